"""The report of ``test.py``: on the screen, as files for programs, and as one HTML page."""

from utils.report.content import Setting, optimism, results, views_in_words
from utils.report.files import to_be_replaced, write, write_scalars
from utils.report.text import text

__all__ = ["Setting", "optimism", "results", "text", "to_be_replaced", "views_in_words", "write", "write_scalars"]
