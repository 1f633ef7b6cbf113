"""The report of ``test.py``: on the screen, as files for programs, and as one HTML page."""

from utils.report.content import FIT_COMMAND, ONE_VIEW, results
from utils.report.files import PAGE, to_be_replaced, write, write_scalars
from utils.report.page import page
from utils.report.text import text

__all__ = [
    "FIT_COMMAND",
    "ONE_VIEW",
    "PAGE",
    "page",
    "results",
    "text",
    "to_be_replaced",
    "write",
    "write_scalars",
]
