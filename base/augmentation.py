"""Paired augmentation: parameters drawn from a generator, geometry applied as one affine warp.

Scale, rotation, crop and flip are combined into one matrix that maps each pixel of the crop to its place in the source
image. Image and label use the same matrix and are interpolated once, and only pixels of the crop are computed. Pixel
(x, y) covers [x, x + 1) x [y, y + 1) before scaling, as in ``cv2.resize``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

SCALE_RANGE = (0.5, 2.0)  # of base_size
LARGEST_SIDE = 32766  # OpenCV stores coordinates in 16 bits
MAX_ROTATION = 10.0  # degrees
MAX_BLUR = 1.0  # pixels, standard deviation
MAX_JITTER = 0.3  # brightness, contrast and saturation factors within 1 +- this
_MIN_BLUR = 0.25  # a narrower Gaussian leaves 8-bit images as they are
_LUMINANCE = np.array([0.299, 0.587, 0.114])


class Parameters(NamedTuple):
    """The random parameters of one sample.

    ``matrix``: float64 ``(2, 3)``, maps homogeneous crop coordinates (x, y, 1) to source coordinates.
    ``size``: (height, width) of the crop. ``blur``: standard deviation in pixels, 0 for none.
    ``brightness``, ``contrast``, ``saturation``: factors, 1 for none.
    """

    matrix: np.ndarray
    size: tuple[int, int]
    blur: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


@dataclass(frozen=True)
class Augmentation:
    """The ranges of the random parameters of a training sample.

    Args:
        crop_size: (height, width) of the result; None keeps the (rescaled) image whole.
        base_size: the longer side of the image is rescaled to this times a random factor; None: its own length.
        scale: (lowest, highest) factor; (1, 1) for none.
        rotate: largest angle in degrees, in both directions.
        flip: mirror left-right with probability 1/2.
        blur: largest standard deviation of the Gaussian blur in pixels.
        jitter: largest relative change of brightness, contrast and saturation.
    """

    crop_size: tuple[int, int] | None = None
    base_size: int | None = None
    scale: tuple[float, float] = SCALE_RANGE
    rotate: float = MAX_ROTATION
    flip: bool = True
    blur: float = 0.0
    jitter: float = 0.0

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Parameters:
        """Draw parameters for an image of the given size.

        The number of random numbers is fixed, so switching one kind of change on or off does not alter the others.
        """
        u = rng.random(9)
        long_side = max(height, width)
        low, high = self.scale
        scale = (self.base_size or long_side) / long_side * (low + (high - low) * u[0])
        angle = math.radians(self.rotate * (2.0 * u[1] - 1.0))
        canvas = max(1, round(height * scale)), max(1, round(width * scale))
        size = self.crop_size or canvas
        # Whole pixels, so that without scaling and rotation a crop is a slice. A canvas smaller than the crop is
        # placed at random inside it.
        top = _whole_offset(u[2], canvas[0] - size[0])
        left = _whole_offset(u[3], canvas[1] - size[1])
        flip = bool(self.flip and u[4] < 0.5)
        matrix = crop_to_source((height, width), canvas, scale, angle, (top, left, *size), flip)
        factors = 1.0 + self.jitter * (2.0 * u[6:9] - 1.0)
        return Parameters(matrix, size, self.blur * u[5], *(float(f) for f in factors))


def _whole_offset(u: float, room: int) -> int:
    """Return an integer uniform between 0 and ``room``, both included; ``room`` may be negative."""
    steps = math.floor(u * (abs(room) + 1))
    return steps if room >= 0 else -steps


def crop_to_source(
    source: tuple[int, int],
    canvas: tuple[int, int],
    scale: float,
    angle: float,
    window: tuple[int, int, int, int],
    flip: bool = False,
) -> np.ndarray:
    """Return the ``(2, 3)`` matrix from crop pixels to source pixels.

    The source (height, width) is scaled by ``scale`` about its center, which is placed on the center of the
    ``canvas``. There it is rotated by ``angle`` radians (positive: counter-clockwise as seen), cropped to the
    ``window`` (top, left, height, width) and, if ``flip``, mirrored.
    """
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    top, left, _, width = window
    sign, start = (-1.0, width - 1.0) if flip else (1.0, 0.0)
    # Crop pixel (u, v) lies at (start + sign u + left, v + top) on the canvas; relative to its center:
    dx0 = start + left - (canvas[1] - 1) / 2
    dy0 = top - (canvas[0] - 1) / 2
    x0 = (source[1] - 1) / 2
    y0 = (source[0] - 1) / 2
    return np.array(
        [
            [cos * sign, -sin, cos * dx0 - sin * dy0 + x0],
            [sin * sign, cos, sin * dx0 + cos * dy0 + y0],
        ]
    )


def center_crop(height: int, width: int, crop_size: tuple[int, int]) -> Parameters:
    """Return the parameters that rescale the shorter side to that of the crop and crop the center (validation)."""
    scale = max(crop_size[0] / height, crop_size[1] / width)
    canvas = round(height * scale), round(width * scale)
    window = (canvas[0] - crop_size[0]) // 2, (canvas[1] - crop_size[1]) // 2, *crop_size
    return Parameters(crop_to_source((height, width), canvas, scale, 0.0, window), crop_size)


def warp_image(image: np.ndarray, parameters: Parameters, fill: Sequence[float]) -> np.ndarray:
    """Return the crop of an image ``(H, W, C)``, bilinear, with ``fill`` per channel outside the image."""
    return _warp(image, parameters, cv2.INTER_LINEAR, fill)


def warp_label(label: np.ndarray, parameters: Parameters, ignore_index: int) -> np.ndarray:
    """Return the crop of a label map ``(H, W)`` (uint8 or int32), nearest, with ``ignore_index`` outside it."""
    if label.dtype == np.uint8:
        return _warp(label, parameters, cv2.INTER_NEAREST, [ignore_index])
    # float64 represents every int32 exactly, and every version of OpenCV can warp it.
    warped = _warp(label.astype(np.float64), parameters, cv2.INTER_NEAREST, [ignore_index])
    return warped.astype(label.dtype)


def _warp(array: np.ndarray, parameters: Parameters, interpolation: int, fill: Sequence[float]) -> np.ndarray:
    height, width = parameters.size
    # OpenCV accepts border values for at most four channels.
    groups = [array] if array.ndim == 2 else np.array_split(array, math.ceil(array.shape[2] / 4), axis=2)
    warped, start = [], 0
    for group in groups:
        count = 1 if group.ndim == 2 else group.shape[2]
        crop = cv2.warpAffine(
            np.ascontiguousarray(group),
            parameters.matrix,
            (width, height),
            flags=interpolation | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=[float(v) for v in fill[start : start + count]],
        )
        warped.append(crop.reshape(height, width, *group.shape[2:]))
        start += count
    return warped[0] if len(warped) == 1 else np.concatenate(warped, axis=2)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Return the image after a Gaussian blur of ``sigma`` pixels."""
    if sigma < _MIN_BLUR:
        return image
    side = 2 * max(1, math.ceil(2.5 * sigma)) + 1
    return cv2.GaussianBlur(image, (side, side), sigma).reshape(image.shape)


def jitter(image: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Return the image with changed brightness, contrast and, for RGB, saturation: one linear map per pixel.

    Contrast scales the distance to the middle of the range, saturation that to the luminance of the pixel.
    """
    brightness, contrast, saturation = parameters[3:]
    if brightness == contrast == saturation == 1.0:
        return image
    top = 255.0 if image.dtype == np.uint8 else 1.0
    gain, offset = brightness * contrast, (1.0 - contrast) * top / 2
    if image.shape[2] == 3:
        color = saturation * np.eye(3) + (1.0 - saturation) * np.broadcast_to(_LUMINANCE, (3, 3))
        image = cv2.transform(image, np.hstack([gain * color, np.full((3, 1), offset)]))
        return image if image.dtype == np.uint8 else np.clip(image, 0.0, top, out=image)
    changed = np.clip(image.astype(np.float32) * np.float32(gain) + np.float32(offset), 0.0, top)
    return np.rint(changed).astype(np.uint8) if image.dtype == np.uint8 else changed


def apply(
    image: np.ndarray,
    label: np.ndarray,
    parameters: Parameters,
    fill: Sequence[float],
    ignore_index: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the augmented crop of an image ``(H, W, C)`` and of its label map ``(H, W)``."""
    crop = warp_image(image, parameters, fill)
    crop = jitter(blur(crop, parameters.blur), parameters)
    return crop, warp_label(label, parameters, ignore_index)


def size_of(crop_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return (height, width) of a loader's ``crop_size``."""
    if crop_size is None:
        return None
    height, width = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    return height, width


def scale_range(scale: bool | Sequence[float]) -> tuple[float, float]:
    """Return (lowest, highest) of a loader's ``scale``."""
    if isinstance(scale, bool):
        return SCALE_RANGE if scale else (1.0, 1.0)
    low, high = scale
    if not 0 < low <= high:
        raise ValueError(f"scale must be (lowest, highest) with 0 < lowest <= highest, got {tuple(scale)}")
    return float(low), float(high)


def amount(value: bool | float, default: float) -> float:
    """Return the number of an argument that may also be true (``default``) or false (0)."""
    return default * value if isinstance(value, bool) else float(value)
