"""Tables for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: bool = True) -> str:
    """Return a Markdown table; all columns but the first are right-aligned unless ``right`` is False."""
    rule = ["---", *(["---:" if right else "---"] * (len(header) - 1))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), rule, *map(list, rows)])
