"""Label maps on disk. A file that contains more than class ids is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.images.formats import decode, fast_label, read_bytes
from utils.images.raster import Raster

# Lossy compression makes grays slightly colored; a larger difference means a mask painted in colors.
_CHROMA_NOISE = 24


@dataclass(frozen=True)
class Mask:
    """A label map as stored."""

    values: np.ndarray  # (H, W) uint8 or int32, or the colors: uint8 (H, W, 3)
    palette: np.ndarray | None = None  # uint8 (256, 3): the colors that the values of a palette file stand for

    def colors(self) -> np.ndarray:
        """Return uint8 ``(H, W, 3)``: the mask as it looks."""
        if self.values.ndim == 3:
            return self.values
        if self.palette is not None:
            return self.palette[self.values]
        return np.repeat(np.clip(self.values, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def read_label(path: str | Path) -> np.ndarray:
    """Read a label map: the numbers as stored (a palette's indices, not its colors).

    Returns:
        ``(H, W)`` uint8, or int32 where values above 255 or below 0 can occur.

    Raises:
        UserError: as :func:`read_mask`, and for a file in color.
    """
    values = read_mask(path).values
    if values.ndim == 3:
        raise UserError(
            f"{path} is a color image, but a label map must contain one class id per pixel. For masks painted in "
            "colors use the Folder loader with a `palette` (one RGB color per class)."
        )
    return values


def read_mask(path: str | Path) -> Mask:
    """Read a label map, and the palette if the file has one.

    Refused are: lossy compression (JPEG and others, recognized by content), transparency that varies, several pages
    or frames, channels that are neither gray nor RGB, numbers with a fraction, NaN, and colors of more than 8 bits.

    Raises:
        UserError: the file is missing, empty, truncated, no image, or one of the above.
    """
    path = Path(path)
    data = read_bytes(path)
    label = fast_label(data)
    if label is not None:
        return Mask(label)
    raster = decode(data, path)
    if raster.lossy:
        raise UserError(
            f"{path} has lossy compression (JPEG or similar), which changes pixel values, so they cannot be class "
            "ids. Save masks as PNG. For two classes, `threshold: 127` in the args of the Folder loader reads "
            "lossy masks"
        )
    if raster.inverted:
        raise UserError(f"{path} stores 0 as white, so the meaning of its numbers is unclear; save the mask as PNG")
    array = _without_alpha(raster, path)
    if array.shape[2] == 3:
        if array.dtype != np.uint8:
            raise UserError(f"{path} has colors of type {array.dtype}; masks in colors must have 8 bits per channel")
        return Mask(array)
    return Mask(_integers(array[:, :, 0], path), raster.palette)


def read_levels(path: str | Path) -> np.ndarray:
    """Read a mask of two classes that a threshold is applied to, as gray levels ``(H, W)`` uint8.

    One bit is stretched to 0 and 255, palettes become their colors, more than 8 bits are reduced to 8. Lossy
    compression is fine.

    Raises:
        UserError: the file cannot be read, is painted in colors, has transparency that varies, or contains only the
            values 0 and 1, which look alike to any threshold.
    """
    path = Path(path)
    raster = decode(read_bytes(path), path)
    array = _without_alpha(raster, path)
    if raster.palette is not None:
        array = raster.palette[array[:, :, 0]]
    if array.dtype.kind not in "buif":
        raise UserError(f"{path} contains {array.dtype} values; a mask must contain gray levels")
    if array.shape[2] == 3:
        # The difference of signed numbers may not fit in their type.
        spread = np.ptp(array if array.dtype.kind == "u" else array.astype(np.float64), axis=2).max(initial=0)
        if spread > (_CHROMA_NOISE if raster.lossy else 0) * (257 if array.dtype == np.uint16 else 1):
            if raster.lossy:
                raise UserError(
                    f"{path} is painted in colors, which lossy compression (JPEG or similar) has changed, so it is "
                    "unclear which classes they mean. Save masks as PNG"
                )
            raise UserError(
                f"{path} is painted in colors, so `threshold` does not apply: set `palette` in the loader's args to "
                "one RGB color per class, in the order of `classes`"
            )
        array = array[:, :, 1:2]
    return _levels(array[:, :, 0], raster, path)


def _levels(array: np.ndarray, raster: Raster, path: Path) -> np.ndarray:
    if array.dtype.kind == "f":
        if not (array.min(initial=0) >= 0 and array.max(initial=0) <= 1):
            raise UserError(f"{path} contains floating point values; expected them in [0, 1] where `threshold` is set")
        return np.rint(array * 255).astype(np.uint8)
    if array.dtype == np.bool_:
        top = 1
    elif array.max(initial=0) == 1 and not raster.lossy:
        raise UserError(
            f"{path} contains only the values 0 and 1, which are already class ids: read the masks with the Folder "
            "loader, without `threshold`"
        )
    else:
        top = raster.largest or np.iinfo(array.dtype).max
        if array.min(initial=0) < 0 or (array.max(initial=0) <= 255 < top and array.any()):
            raise UserError(f"{path} contains {array.dtype} values of 0 to 255 at most; save the mask with 8 bits")
    if top != 255:
        array = np.rint(array.astype(np.float64) * (255 / top)).astype(np.uint8)
    return 255 - array if raster.inverted else array


def _without_alpha(raster: Raster, path: Path) -> np.ndarray:
    """Return one channel or three; raise UserError if the file contains anything else."""
    array = raster.array
    if raster.pages > 1:
        raise UserError(f"{path} contains {raster.pages} pages or frames; a label map must have exactly one")
    if raster.alpha:
        alpha, array = array[:, :, -1], array[:, :, :-1]
        if alpha.size and (alpha != alpha.flat[0]).any():
            raise UserError(
                f"{path} has transparency that differs between pixels, so it is unclear which pixels are labeled; "
                "save the mask without an alpha channel"
            )
    if array.shape[2] not in (1, 3):
        raise UserError(f"{path} has {array.shape[2]} channels; a label map must have one (class ids), or RGB")
    return array


def _integers(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind not in "uif":
        raise UserError(f"{path} contains {array.dtype} values; a label map must contain integers (class ids)")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(
            f"{path} contains values that are not finite (NaN or infinity); a label map must contain integers. Save "
            "pixels without a label as 255"
        )
    limits = np.iinfo(np.int32)
    low, high = array.min(initial=0).item(), array.max(initial=0).item()
    if low < limits.min or high > limits.max:
        raise UserError(f"{path} contains values from {low} to {high}; class ids must fit in 32 bits")
    whole = array.astype(np.int32)
    if array.dtype.kind == "f" and (whole != array).any():
        raise UserError(f"{path} contains non-integer values; a label map must contain integers (class ids)")
    return whole
