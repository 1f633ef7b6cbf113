"""Text and legends in pictures, uint8 RGB."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP, _LINE, _SWATCH = 6, 20, 14
_INK = (20, 20, 20)

Entry = tuple[str, Sequence[int] | None]  # a name and its color; None: a gray square with a line through it


def legend(entries: Sequence[Entry], width: int) -> np.ndarray:
    """Return rows of colored squares with names, ``width`` pixels wide."""
    font = ImageFont.load_default(12)
    places, x, y = [], _GAP, 2
    for name, _ in entries:
        wide = _SWATCH + 6 + int(font.getlength(name)) + 14
        if x + wide > width and x > _GAP:
            x, y = _GAP, y + _LINE
        places.append((x, y))
        x += wide
    canvas = Image.new("RGB", (width, y + _LINE + 12), "white")
    pen = ImageDraw.Draw(canvas)
    for (name, color), (x, y) in zip(entries, places, strict=True):
        box = (x, y + 2, x + _SWATCH, y + 2 + _SWATCH)
        pen.rectangle(box, fill=(150, 150, 150) if color is None else tuple(map(int, color)), outline=_INK)
        if color is None:
            pen.line((box[0], box[3], box[2], box[1]), fill="white", width=2)
        pen.text((x + _SWATCH + 5, y + 1), name, fill=_INK, font=font)
    return np.asarray(canvas)


def line(text: str, width: int, size: int = 11) -> np.ndarray:
    """Return a line of text on white; text that is too long loses its beginning, the least useful part of a path."""
    font = ImageFont.load_default(size)
    while len(text) > 4 and font.getlength(text) > width - 2 * _GAP:
        text = "..." + text[4:]
    canvas = Image.new("RGB", (width, size + 8), "white")
    ImageDraw.Draw(canvas).text((_GAP, 2), text, fill=_INK, font=font)
    return np.asarray(canvas)


def stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return pictures below each other, on white."""
    width = max(part.shape[1] for part in parts)
    wide = [np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255) for part in parts]
    return np.concatenate(wide)
