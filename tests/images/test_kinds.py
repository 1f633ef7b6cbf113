"""The table of file formats in docs/datasets.md agrees with the readers."""

from __future__ import annotations

from tests.images import kinds


def test_the_table_in_the_documentation_is_current() -> None:
    page = kinds.PAGE.read_text(encoding="utf-8")
    assert kinds.page(page) == page, "run python -m tests.images.kinds"


def test_writing_the_table_changes_nothing_else() -> None:
    page = f"before\n{kinds.BEGIN}\nold\n{kinds.END}\nafter\n"
    assert kinds.page(page) == page.replace("old", kinds.table())
