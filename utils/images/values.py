"""What stored numbers mean: from the values in a file or an array to intensities in [0, 1].

Data sets, :class:`utils.predictor.Predictor` and the demo page all use it, so a file always gives the same image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

# Rounding errors of floating point images; larger excursions are another range of values.
_TOLERANCE = 1e-3
# Integers of 16 bits and more whose largest value is not above these contain narrower data. Some writers scale by 256.
_BYTE, _WORD = 256, 65536
_SENTINEL = -99  # negative numbers from here on usually mean "no data": -99, -999, -9999, -32768, -3.4e38
_USUAL_RANGES = ((0, 1), (0, 255), (-1, 1), (0, 10000), (0, 65535))


class Pixels(NamedTuple):
    """An image ``(H, W, C)``, uint8 or float32 in [0, 1], and where it has no data.

    ``missing`` is bool ``(H, W)``, or None where no pixel is missing. Missing pixels are 0 in ``image``.
    """

    image: np.ndarray
    missing: np.ndarray | None = None

    def filled(self, fill: Sequence[float]) -> np.ndarray:
        """Return the image with the missing pixels set to ``fill``: one intensity in [0, 1] per channel."""
        if self.missing is not None:
            top = 255 if self.image.dtype == np.uint8 else 1
            self.image[self.missing] = np.multiply(fill, top).astype(self.image.dtype)
        return self.image


@dataclass(frozen=True)
class ValueRange:
    """How stored numbers become intensities.

    Without ``limits``, the type of the numbers decides: integers run from 0 to the largest value of their type (or of
    the bits that the file declares), floating point numbers lie in [0, 1] already. Data that do not fit are refused:
    negative numbers, floating point outside of [0, 1], wide integers that contain only 0 to 255.

    Attributes:
        limits: the stored values that become 0 and 1. Values beyond them are clipped.
        nodata: the stored value that means "no data". A pixel is missing where all its channels have this value, or
            where one has it and it lies outside of the range. NaN and infinity are missing too.
    """

    limits: tuple[float, float] | None = None
    nodata: float | None = None

    @classmethod
    def of(cls, value_range: Sequence[float] | None = None, nodata: float | str | None = None) -> ValueRange:
        """Return the range that the arguments ``value_range`` and ``nodata`` of loaders and Predictor describe.

        Args:
            value_range: ``[low, high]``, or None.
            nodata: a number, ``"nan"`` (only NaN and infinity are missing), or None.

        Raises:
            ValueError: the values are not possible; the message names the argument.
        """
        limits = None
        if value_range is not None:
            if len(value_range) != 2 or not all(map(math.isfinite, value_range)) or value_range[0] >= value_range[1]:
                raise ValueError(f"value_range must be [low, high] with low < high, got {list(value_range)}")
            limits = (float(value_range[0]), float(value_range[1]))
        if isinstance(nodata, str) and nodata.lower() != "nan":
            raise ValueError(f'nodata must be a number or "nan", got {nodata!r}')
        return cls(limits, None if nodata is None else float(nodata))

    def apply(self, stored: np.ndarray, source: str, largest: int | None = None) -> Pixels:
        """Turn stored numbers ``(H, W, C)`` into intensities.

        Args:
            stored: bool, integers or floating point, without transparency or other extra channels.
            source: the name of the file (or array) for messages.
            largest: the largest value that integers can have, where the type allows more than the data (12 bits in a
                16-bit type).

        Raises:
            UserError: the numbers do not fit; the message says which setting helps.
        """
        if stored.dtype == np.bool_:
            return Pixels(stored.astype(np.uint8) * 255)
        if stored.dtype.kind not in "uif":
            raise UserError(f"{source} contains {stored.dtype} values; expected integers or floating point")
        missing = self._missing(stored)
        if missing is not None:
            low = (self.limits or _type_limits(stored.dtype))[0]
            stored = np.where(missing[:, :, None], stored.dtype.type(low), stored)
        return Pixels(self._scale(stored, source, largest), missing)

    def _missing(self, stored: np.ndarray) -> np.ndarray | None:
        if self.nodata is None:
            return None
        hit = stored == self.nodata
        low, high = self.limits or _type_limits(stored.dtype)
        missing = hit.all(axis=2) if low <= self.nodata <= high else hit.any(axis=2)
        if stored.dtype.kind == "f":
            missing |= ~np.isfinite(stored).all(axis=2)
        return missing if missing.any() else None

    def _scale(self, stored: np.ndarray, source: str, largest: int | None) -> np.ndarray:
        if stored.dtype.kind == "f" and not np.isfinite(stored).all():
            raise UserError(
                f'{source} contains values that are not finite (NaN or infinity). If they mean "no data", set '
                '`nodata: "nan"` (in the loader\'s args; Predictor takes `values`); these pixels are ignored then'
            )
        if stored.dtype == np.uint8 and self.limits in (None, (0, largest or 255)):
            # Fewer than 8 bits are stretched.
            return stored if largest in (None, 255) else np.rint(stored * (255 / largest)).astype(np.uint8)
        if self.limits is not None:
            low, high = self.limits
        else:
            low, high = _default_limits(stored, source, largest)
        wide = stored.astype(np.float32 if stored.itemsize <= 2 or stored.dtype == np.float32 else np.float64)
        if low:
            wide -= low
        wide /= high - low  # astype has made a copy
        return np.clip(wide, 0, 1, out=wide).astype(np.float32, copy=False)


BY_TYPE = ValueRange()  # the type of the numbers decides; nothing means "no data"


def _type_limits(dtype: np.dtype) -> tuple[float, float]:
    return (0, 1) if dtype.kind == "f" else (0, np.iinfo(dtype).max)


def _default_limits(stored: np.ndarray, source: str, largest: int | None) -> tuple[float, float]:
    """Return the range of the type; refuse numbers that do not fit."""
    low, high = _type_limits(stored.dtype)
    high = largest or high
    smallest_found, largest_found = stored.min(initial=0).item(), stored.max(initial=0).item()
    if smallest_found < low - _TOLERANCE or largest_found > high + _TOLERANCE:
        expected = f"0 to {high}" + (" (the range of floating point images)" if stored.dtype.kind == "f" else "")
        raise _does_not_fit(source, stored, smallest_found, largest_found, expected)
    # Black frames are valid.
    if stored.dtype.kind in "ui" and 0 < largest_found <= (_BYTE if high <= _WORD else _WORD) < high:
        raise _does_not_fit(source, stored, smallest_found, largest_found, f"the full range 0 to {high}")
    return low, high


def _does_not_fit(source: str, stored: np.ndarray, low: float, high: float, expected: str) -> UserError:
    advice, rest = "", (low, high)
    if low <= _SENTINEL:
        others = stored[stored != stored.min()]
        rest = (others.min(initial=0).item(), others.max(initial=0).item())
        advice = f' If {low:.6g} means "no data", set `nodata: {low:.6g}`; these pixels are ignored then'
    fitting = [limits for limits in _USUAL_RANGES if limits[0] <= rest[0] and rest[1] <= limits[1] + 1]
    example = list(fitting[0]) if fitting else [math.floor(rest[0]), math.ceil(rest[1])]
    return UserError(
        f"{source} contains {stored.dtype} values from {low:.6g} to {high:.6g}, expected {expected}. Set `value_range` "
        "(in the loader's args; Predictor takes `values`) to the stored values of black and white, for instance "
        f"{example}.{advice}"
    )
