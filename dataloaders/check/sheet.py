"""A contact sheet: samples as training uses them, with their masks drawn over them, and the colors of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from base.base_dataset import BaseDataSet
from base.entries import Sample
from utils.images.captions import Entry, legend, line, stack
from utils.images.palette import displayable, grid, overlay

CELL = 260  # longest side of a picture, pixels
COLUMNS = 3  # pairs of pictures per row
LEGEND = 60  # classes in a legend, at most
_GAP = 6


def contact_sheet(sections: Sequence[tuple[str, Sequence[Sample], BaseDataSet]]) -> np.ndarray:
    """Return one picture, uint8 RGB: per section a title, the samples and the legend of the classes."""
    parts = []
    for title, samples, dataset in sections:
        cells = [_cell(sample, dataset) for sample in samples]
        pictures = grid(cells, COLUMNS, _GAP)
        width = max(pictures.shape[1], 2 * CELL)
        parts += [line(title, width, size=16), pictures, _legend(dataset, width)]
    return stack(parts)


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
    return np.concatenate([pair, line(sample.name, pair.shape[1])])


def _overlay(image: np.ndarray, label: np.ndarray, dataset: BaseDataSet) -> np.ndarray:
    """Return the image with the colors of the classes over it; ignored pixels are hatched in gray."""
    ignored = label == dataset.ignore_index
    tinted = overlay(image, np.where(ignored, 0, label), dataset.palette)
    rows, columns = np.indices(label.shape)
    stripes = np.where((rows + columns) % 8 < 2, 255, 90).astype(np.uint8)[:, :, None]
    hatched = (image // 2 + stripes // 2).astype(np.uint8)
    return np.where(ignored[:, :, None], hatched, tinted)


def _legend(dataset: BaseDataSet, width: int) -> np.ndarray:
    names: list[Entry] = list(zip(dataset.class_names, dataset.palette, strict=True))
    entries = names[:LEGEND]
    if len(names) > LEGEND:
        entries.append((f"... {len(names) - LEGEND} more", (255, 255, 255)))
    return legend([*entries, ("not labeled", None)], width)
