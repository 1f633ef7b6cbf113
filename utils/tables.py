"""Tables as text, aligned for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def number(value: Any, digits: int = 4, signed: bool = False, missing: str = "-") -> str:
    """Return a cell: floats rounded to ``digits``, other values as they are, ``missing`` for None and NaN."""
    if value is None or value != value:
        return missing
    return f"{value:{'+' if signed else ''}.{digits}f}" if isinstance(value, float) else str(value)


def plain(header: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "", width: int = 100) -> str:
    """Return an aligned table; the first column is left-aligned, the others are right-aligned.

    A table wider than ``width`` continues below, with the first column repeated.
    """
    columns = [list(column) for column in zip(header, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    blocks, room = [[0]], 0
    for i in range(1, len(columns)):
        room -= widths[i] + 2
        if room < 0 and (i > 1):
            blocks.append([0])
        if len(blocks[-1]) == 1:
            room = width - len(indent) - widths[0] - widths[i] - 2
        blocks[-1].append(i)
    return "\n\n".join(_block([columns[i] for i in block], [widths[i] for i in block], indent) for block in blocks)


def _block(columns: Sequence[Sequence[str]], widths: Sequence[int], indent: str) -> str:
    rows = [list(row) for row in zip(*columns, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = (
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join((indent + line).rstrip() for line in lines)
