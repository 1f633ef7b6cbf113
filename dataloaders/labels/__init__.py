"""Class names and palettes of the data sets: one text file each, with one class per line."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from base.classes import Color, read_classes


class Labels(NamedTuple):
    """Names and colors of the classes of a data set, in the order of their ids."""

    names: tuple[str, ...]
    palette: tuple[Color, ...]


@cache
def labels(name: str) -> Labels:
    """Return the classes in the file ``<name>.txt`` of this folder, which has lines ``R G B name``."""
    names, palette = read_classes(Path(__file__).parent / f"{name}.txt")
    assert palette is not None
    return Labels(names, palette)
