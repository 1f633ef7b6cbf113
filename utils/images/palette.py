"""Label maps in color: palettes, overlays and grids of pictures. NumPy in, NumPy out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.images import voc_colormap, write_png

Palette = Sequence[Sequence[int]]

# A palette PNG has 256 entries: larger label maps are written as 16-bit gray.
PALETTE_SIZE = 256
# Rows per step of operations on very large pictures, so that temporaries stay small.
_ROWS = 256


def complete_palette(palette: Palette | None, size: int = PALETTE_SIZE) -> np.ndarray:
    """Return uint8 ``(size, 3)``: the given colors, then those of the Pascal VOC color map.

    With one color only (a single class over background) index 0 is black and index 1 has that color.
    """
    colors = np.array(voc_colormap(size), dtype=np.uint8)
    given = np.asarray(palette if palette is not None else [], dtype=np.int64).reshape(-1, 3)
    if len(given) == 1:
        given = np.concatenate([np.zeros((1, 3), np.int64), given])
    colors[: len(given)] = given[:size]
    return colors


def colorize(labels: np.ndarray, palette: Palette | None = None) -> np.ndarray:
    """Return the picture, uint8 ``(H, W, 3)`` RGB, of a label map ``(H, W)`` of non-negative integers."""
    largest = int(labels.max(initial=0))
    return complete_palette(palette, max(PALETTE_SIZE, largest + 1))[labels]


def write_mask(path: str | Path, labels: np.ndarray, palette: Palette | None = None, software: str = "") -> None:
    """Write a label map as a PNG that shows the palette's colors and contains the exact class indices.

    uint8 labels become a palette PNG, larger ones (more than 256 classes) a 16-bit gray PNG without colors. The
    file is complete or not there at all.
    """
    if labels.dtype == np.uint8:
        write_png(path, labels, complete_palette(palette).tolist(), software)
    else:
        write_png(path, labels.astype(np.uint16), software=software)


def displayable(image: np.ndarray) -> np.ndarray:
    """Return an image ``(H, W, channels)``, uint8 or floating point in [0, 1], as uint8 RGB to look at.

    One channel is shown as gray, of more than three the first three, of two the first.
    """
    image = image if image.ndim == 3 else image[:, :, None]
    image = image[:, :, :3] if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    if image.dtype != np.uint8:
        image = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: Palette | None = None, opacity: float = 0.5, in_place: bool = False
) -> np.ndarray:
    """Return the image with the label map's colors laid over it.

    Args:
        image: as :func:`displayable` takes it.
        labels: ``(H, W)`` integers; index 0 (background) and unassigned pixels (255) are tinted as any other.
        opacity: 0 shows the image, 1 the colors.
        in_place: overwrite ``image`` where it is uint8 RGB already, for pictures that fill the memory.
    """
    canvas = displayable(image)
    if np.may_share_memory(canvas, image) and not (in_place and image.flags.writeable):
        canvas = canvas.copy()
    colors = complete_palette(palette, max(PALETTE_SIZE, int(labels.max(initial=0)) + 1))
    for y in range(0, len(canvas), _ROWS):
        band = canvas[y : y + _ROWS]
        cv2.addWeighted(band, 1 - opacity, colors[labels[y : y + _ROWS]], opacity, 0, dst=band)
    return canvas


def grid(pictures: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Return uint8 RGB pictures, which may differ in size, row by row on a white canvas with cells of equal size."""
    tall = max(p.shape[0] for p in pictures) + gap
    wide = max(p.shape[1] for p in pictures) + gap
    rows = -(-len(pictures) // columns)
    canvas = np.full((rows * tall + gap, min(columns, len(pictures)) * wide + gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = gap + index // columns * tall, gap + index % columns * wide
        canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return canvas
