"""A contact sheet: samples as the network sees them, beside their masks laid over, and the classes' colours."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from base.base_dataset import BaseDataSet
from base.entries import Sample
from utils.images.palette import displayable, grid, overlay

CELL = 260  # longest side of a picture, pixels
COLUMNS = 3  # pairs of pictures per row
_GAP, _LINE, _SWATCH = 6, 20, 14
_INK = (20, 20, 20)


def contact_sheet(sections: Sequence[tuple[str, Sequence[Sample], BaseDataSet]]) -> np.ndarray:
    """Return one picture, uint8 RGB: per section a title, the samples and the legend of the classes."""
    parts = []
    for title, samples, dataset in sections:
        cells = [_cell(sample, dataset) for sample in samples]
        pictures = grid(cells, COLUMNS, _GAP)
        width = max(pictures.shape[1], 2 * CELL)
        parts += [_text(title, width, size=16), pictures, _legend(dataset, width)]
    width = max(part.shape[1] for part in parts)
    return np.concatenate([_widen(part, width) for part in parts])


def _cell(sample: Sample, dataset: BaseDataSet) -> np.ndarray:
    """Return image and overlay side by side with the sample's name underneath."""
    image = displayable(sample.image.permute(1, 2, 0).numpy())
    label = sample.label.numpy()
    scale = CELL / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    label = cv2.resize(label.astype(np.float64), size, interpolation=cv2.INTER_NEAREST).astype(np.int64)
    laid_over = _overlay(image, label, dataset)
    pair = np.concatenate([image, np.full((size[1], 2, 3), 255, np.uint8), laid_over], axis=1)
    return np.concatenate([pair, _text(sample.name, pair.shape[1])])


def _overlay(image: np.ndarray, label: np.ndarray, dataset: BaseDataSet) -> np.ndarray:
    """Return the image with the classes' colours over it; pixels that count nowhere are hatched in grey."""
    ignored = label == dataset.ignore_index
    tinted = overlay(image, np.where(ignored, 0, label), dataset.palette)
    rows, columns = np.indices(label.shape)
    stripes = np.where((rows + columns) % 8 < 2, 255, 90).astype(np.uint8)[:, :, None]
    hatched = (image // 2 + stripes // 2).astype(np.uint8)
    return np.where(ignored[:, :, None], hatched, tinted)


def _legend(dataset: BaseDataSet, width: int, limit: int = 60) -> np.ndarray:
    """Return rows of coloured squares with class names."""
    names = list(zip(dataset.class_names, dataset.palette, strict=True))
    entries = [*names[:limit], ("not labelled", None)]
    if len(names) > limit:
        entries.insert(limit, (f"... {len(names) - limit} more", (255, 255, 255)))
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
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        box = (x, y + 2, x + _SWATCH, y + 2 + _SWATCH)
        pen.rectangle(box, fill=colour or (150, 150, 150), outline=_INK)
        if colour is None:
            pen.line((box[0], box[3], box[2], box[1]), fill="white", width=2)
        pen.text((x + _SWATCH + 5, y + 1), name, fill=_INK, font=font)
    return np.asarray(canvas)


def _text(text: str, width: int, size: int = 11) -> np.ndarray:
    """Return a line of text on white; too long a text loses its beginning, which says least of a file's name."""
    font = ImageFont.load_default(size)
    while len(text) > 4 and font.getlength(text) > width - 2 * _GAP:
        text = "..." + text[4:]
    canvas = Image.new("RGB", (width, size + 8), "white")
    ImageDraw.Draw(canvas).text((_GAP, 2), text, fill=_INK, font=font)
    return np.asarray(canvas)


def _widen(picture: np.ndarray, width: int) -> np.ndarray:
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
