"""Class names and palettes of the data sets, kept as data: one text file each, one class a line."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple


class Labels(NamedTuple):
    """Names and colours of a data set's classes; position is class id."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


@cache
def labels(name: str) -> Labels:
    """Return the classes of ``<name>.txt`` beside this file: lines ``R G B name``, ``#`` for comments."""
    names, palette = [], []
    for line in (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            red, green, blue, title = line.split(maxsplit=3)
            names.append(title.strip())
            palette.append((int(red), int(green), int(blue)))
    return Labels(tuple(names), tuple(palette))
