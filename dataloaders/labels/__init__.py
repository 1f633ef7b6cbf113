"""Class names and palettes of the data sets: one text file each, with one class per line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from base.classes import Color, read_classes


@cache
def labels(name: str) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Return names and colors of the classes in ``<name>.txt`` of this folder, which has lines ``R G B name``."""
    names, palette = read_classes(Path(__file__).parent / f"{name}.txt")
    assert palette is not None
    return names, palette
