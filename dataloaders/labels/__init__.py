"""Class names and palettes of the data sets, kept as data: one text file each, one class a line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from base.classes import Classes, read_classes


@cache
def labels(name: str) -> Classes:
    """Return names and colours of the classes in ``<name>.txt`` beside this file: lines ``R G B name``."""
    return read_classes(Path(__file__).parent / f"{name}.txt")
