"""Translate stored label values to class ids, and check that the palettes of masks agree."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError, listed, plural
from utils.images.labels import Mask


class LabelTable:
    """Translates stored label maps to class ids and checks them.

    Args:
        name: of the data set, for messages.
        num_classes, ignore_index: facts of the data set; for 1 class the ids are 0 (background) and 1.
        void: the stored value (after ``lut``) that means "not labeled"; None: there is no such value.
        lut: table from stored value to class id or ignore index; values beyond its end stay as they are.
        hint: added to the message about values that are not a class.
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
        ids, legal = self._ids_of(np.arange(256))
        self._as_stored = self.dtype == np.uint8 and np.array_equal(ids[legal], np.flatnonzero(legal))
        self._ids = np.where(legal, ids, 0).astype(self.dtype)
        self._illegal = np.uint8(255) * ~legal

    def translate(self, label: np.ndarray, path: Path | str) -> np.ndarray:
        """Return a stored label map as class ids and ignore index; raise UserError if it has other values."""
        if label.dtype == np.uint8:
            # OpenCV's lookup is several times faster than indexing in NumPy.
            if cv2.countNonZero(cv2.LUT(label, self._illegal)):
                values = np.unique(label)
                raise self._error(label, values[self._illegal[values] > 0], path)
            return label if self._as_stored else self._ids[label]
        ids, legal = self._ids_of(label)
        if not legal.all():
            raise self._error(label, np.unique(label[~legal]), path)
        return ids.astype(self.dtype)

    def _ids_of(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what stored values become, and where that is a class or ignored."""
        ids = stored
        if self._lut is not None:
            inside = (ids >= 0) & (ids < len(self._lut))
            ids = np.where(inside, self._lut[np.where(inside, ids, 0)], ids)
        if self._void is not None:
            ids = np.where(ids == self._void, self._ignore_index, ids)
        return ids, ((ids >= 0) & (ids < self._count)) | (ids == self._ignore_index)

    def _error(self, label: np.ndarray, values: np.ndarray, path: Path | str) -> UserError:
        pixels = int(np.isin(label, values).sum())
        hint = self._hint
        if self._count == 2 and set(values.tolist()) <= set(range(2, 256)):
            hint = f" (Masks stored as 0 and 255? The Folder loader reads them with `mask_values` or a palette.){hint}"
        return UserError(
            f"{path} contains label values that are not a class: {listed(values, 10)} ({plural(pixels, 'pixel')}). "
            f"{self._name} expects 0 to {self._count - 1} ({self._num_classes} classes) or "
            f"{self._ignore_index} (ignore_index). Change `classes` in the loader's args if there are more "
            f"classes, `ignore_index` if this value means 'not labeled', or fix the file.{hint}"
        )


class PaletteReference:
    """Checks that the same value has the same color in the palettes of all masks, and the same color one value.

    Programs that make PNG files smaller may sort their palettes or leave out unused colors, which changes the values.
    """

    def __init__(self) -> None:
        self._colors = np.zeros((256, 3), np.uint8)
        self._known = np.zeros(256, bool)
        self._example: Path | str = ""

    def check(self, mask: Mask, path: Path | str, advice: str = "") -> None:
        """Raise UserError if the palette of a mask contradicts those of earlier masks."""
        if mask.palette is None or mask.values.dtype != np.uint8:
            return
        used = np.flatnonzero(cv2.calcHist([mask.values], [0], None, [256], [0, 256]).ravel())
        shown = mask.palette[used]
        other = self._known[used] & (self._colors[used] != shown).any(1)
        if other.any():
            value = int(used[other][0])
            raise self._error(path, f"value {value} is {_text(mask.palette[value])} here", self._colors[value], advice)
        known = self._known.copy()  # before the colors are compared: other threads may add some meanwhile
        if not known[used].all():
            # A color that another value has in earlier masks, and that value has another color in this one.
            before = known[:, None] & (self._colors[:, None] == shown).all(2)
            moved = before & (mask.palette[:, None] != shown).any(2)
            if moved.any():
                old, new = (int(i) for i in np.argwhere(moved)[0])
                raise self._error(path, f"{_text(shown[new])} is value {used[new]} here", old, advice)
            self._colors[used] = shown
            self._known[used] = True
            self._example = self._example or path

    def _error(self, path: Path | str, here: str, there: np.ndarray | int, advice: str) -> UserError:
        return UserError(
            f"{path} has a different palette from {self._example}: {here}, and {_text(there)} there. A program may "
            "have sorted the palette or left out unused colors, which changes the values. Save all masks with the "
            f"same palette. {advice}".rstrip()
        )


def _text(value: np.ndarray | int) -> str:
    return str(value if isinstance(value, int) else value.tolist())
