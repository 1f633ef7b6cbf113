"""What labels mean: names of classes, their colours, and the translation of stored values to class ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError, plural
from utils.images import voc_colormap

Colour = tuple[int, int, int]


class LabelTable:
    """Translates stored label maps to class ids and checks them.

    Args:
        name: of the data set, for messages.
        num_classes: classes; for 1 the ids are 0 (background) and 1.
        ignore_index: what unlabelled pixels become.
        void: the stored value (after ``lut``) that means "not labelled"; None: no value does.
        lut: stored value -> class id or ignore index; other values stay as they are.
        hint: appended to the message about values that are no class.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        ignore_index: int,
        *,
        void: int | None = 255,
        lut: np.ndarray | None = None,
        hint: str = "",
    ) -> None:
        self._name, self._num_classes, self._hint = name, num_classes, hint
        self._count = max(2, num_classes)
        self._ignore_index, self._void, self._lut = ignore_index, void, lut
        fits = 0 <= ignore_index <= 255 and self._count <= 256
        self.dtype: type[np.generic] = np.uint8 if fits else np.int32
        ids = np.arange(256, dtype=np.int64)
        if lut is not None:
            ids[: len(lut)] = lut[:256]
        if void is not None:
            ids[ids == void] = ignore_index
        legal = ((ids >= 0) & (ids < self._count)) | (ids == ignore_index)
        self._as_stored = self.dtype == np.uint8 and np.array_equal(ids[legal], np.flatnonzero(legal))
        self._ids = np.where(legal, ids, 0).astype(self.dtype)
        self._illegal = np.uint8(255) * ~legal

    def translate(self, label: np.ndarray, path: Path | str) -> np.ndarray:
        """Return a stored label map as class ids and ignore index; UserError if it holds anything else."""
        if label.dtype == np.uint8:
            # OpenCV's table look-up is several times faster than NumPy's indexing.
            if cv2.countNonZero(cv2.LUT(label, self._illegal)):
                values = np.unique(label)
                raise self._error(label, values[self._illegal[values] > 0], path)
            return label if self._as_stored else self._ids[label]
        return self._translate_wide(label, path)

    def _translate_wide(self, label: np.ndarray, path: Path | str) -> np.ndarray:
        stored = label
        if self._lut is not None:
            inside = (label >= 0) & (label < len(self._lut))
            label = np.where(inside, self._lut[np.where(inside, label, 0)], label)
        if self._void is not None:
            label = np.where(label == self._void, self._ignore_index, label)
        illegal = ((label < 0) | (label >= self._count)) & (label != self._ignore_index)
        if illegal.any():
            raise self._error(stored, np.unique(stored[illegal]), path)
        return label.astype(self.dtype)

    def _error(self, label: np.ndarray, values: np.ndarray, path: Path | str) -> UserError:
        pixels = int(np.isin(label, values).sum())
        shown = ", ".join(str(v) for v in values[:10]) + (", ..." if len(values) > 10 else "")
        hint = self._hint
        if self._count == 2 and set(values.tolist()) <= set(range(2, 256)):
            hint = f" (Masks stored as 0 and 255? The Folder loader reads them with `mask_values` or a palette.){hint}"
        return UserError(
            f"{path} holds label values that are no class: {shown} ({plural(pixels, 'pixel')}). "
            f"{self._name} expects 0 to {self._count - 1} ({self._num_classes} classes) or "
            f"{self._ignore_index} (ignore_index). Change `classes` in the loader's args if there are more "
            f"classes, `ignore_index` if this value means 'not labelled', or fix the file.{hint}"
        )


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Return the names in a text file: one a line, without empty lines and lines that begin with ``#``."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"classes: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"classes: cannot read {path}: {error}") from None
    names = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not names:
        raise UserError(f"classes: {path} names no class; expected one name a line")
    return names


def class_names(classes: Sequence[str] | str | int, data_dir: str | None) -> tuple[str, ...]:
    """Return the names that the argument ``classes`` gives: a list, a number, or a file (below data_dir or as given).

    Raises:
        ValueError: no names, equal names, or a number below 1.
        UserError: the file is missing or names no class.
    """
    if isinstance(classes, bool):
        raise ValueError("classes must be names, a text file or a number")
    if isinstance(classes, int):
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        return tuple(f"class {i}" for i in range(classes))
    if isinstance(classes, str):
        below = Path(data_dir or ".").expanduser() / classes
        given = Path(classes).expanduser()
        if not below.is_file() and not given.is_file():
            raise UserError(
                f"classes: there is no file {given}, nor {below}; give the path of a text file with one name a line, "
                "or the names themselves as a list"
            )
        return read_class_names(below if below.is_file() else given)
    names = tuple(str(name) for name in classes)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"classes must be different names, at least one; got {list(names)}")
    return names


def class_colours(palette: Sequence[Sequence[int]] | None, count: int) -> tuple[Colour, ...]:
    """Return one colour per class: the given ones, or the first of the VOC colour map.

    Raises:
        ValueError: another number of colours than classes, or something that is not an RGB colour.
    """
    if palette is None:
        # Colour 0 of the VOC map is black: right for a background, wrong for a single class.
        return voc_colormap(count) if count > 1 else voc_colormap(2)[1:]
    colours = tuple(_colour(c) for c in palette)
    if len(colours) != count:
        raise ValueError(f"palette must have one colour per class: {count} classes, {len(colours)} colours")
    return colours


def _colour(colour: Sequence[int]) -> Colour:
    values = tuple(int(v) for v in colour)
    if len(values) != 3 or not all(0 <= v <= 255 for v in values):
        raise ValueError(f"palette must hold RGB colours of three numbers from 0 to 255, got {list(colour)}")
    return values  # type: ignore[return-value]


def median_frequency_weights(counts: np.ndarray) -> np.ndarray:
    """Return weights that balance the classes: median frequency balancing (Eigen & Fergus, ICCV 2015).

    The frequency of a class is its share of the labelled pixels of the images in which it occurs. Its weight is the
    median frequency divided by its own. A class that never occurs gets 1.

    Args:
        counts: pixels ``(samples, classes)``.

    Returns:
        float64 ``(classes,)``; all 1 if no pixel is labelled.
    """
    counts = counts.astype(np.float64)
    pixels_where_present = (counts.sum(1, keepdims=True) * (counts > 0)).sum(0)
    frequency = counts.sum(0) / np.maximum(pixels_where_present, 1)
    occurs = frequency > 0
    weights = np.ones(counts.shape[1])
    if occurs.any():
        weights[occurs] = np.median(frequency[occurs]) / frequency[occurs]
    return weights


def repeat_factors(counts: np.ndarray) -> np.ndarray:
    """Return how often each sample should be drawn so that rare classes are seen more often.

    Repeat factors (Gupta et al., LVIS, CVPR 2019): a class that occurs in the share f of the images has the factor
    max(1, sqrt(t / f)), an image the largest factor of its classes. t is the median of f.

    Args:
        counts: pixels ``(samples, classes)``.

    Returns:
        float64 ``(samples,)``, sums to 1.
    """
    present = counts > 0
    share = present.mean(0)
    occurs = share > 0
    factor = np.ones(counts.shape[1])
    if occurs.any():
        factor[occurs] = np.maximum(1.0, np.sqrt(np.median(share[occurs]) / share[occurs]))
    weights = np.where(present, factor, 0.0).max(1)
    weights[weights == 0.0] = 1.0
    return weights / weights.sum()
