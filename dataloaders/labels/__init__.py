"""Class names and palettes of the data sets, kept as data: one text file each, one class a line."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from base.classes import Colour, read_classes


class Labels(NamedTuple):
    """Names and colours of a data set's classes; position is class id."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]


@cache
def labels(name: str) -> Labels:
    """Return the classes of ``<name>.txt`` beside this file: lines ``R G B name``."""
    names, palette = read_classes(Path(__file__).parent / f"{name}.txt")
    assert palette is not None
    return Labels(names, palette)
