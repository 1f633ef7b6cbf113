"""Images and label maps on disk: read all common formats, and write PNG files completely or not at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.errors import UserError
from utils.files import atomic
from utils.images.formats import decode, fast_image, read_bytes
from utils.images.labels import Mask, read_label, read_levels, read_mask
from utils.images.raster import Raster, from_pillow, named_colors
from utils.images.values import BY_TYPE, Pixels, ValueRange

__all__ = ["BY_TYPE", "IMAGE_EXTENSIONS", "Mask", "Pixels", "ValueRange", "read_image", "read_label", "read_levels"]
__all__ += ["read_mask", "read_pixels", "to_pixels", "voc_colormap", "write_png"]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif", ".jp2", ".npy")

log = logging.getLogger("images")
_warned: list[Path] = []  # of pages that are not read: once, not file by file


def read_image(path: str | Path, channels: int = 3, values: ValueRange = BY_TYPE) -> np.ndarray:
    """Read an image of any supported format, with the given number of channels.

    Gray, RGB, RGBA, palette, CMYK, 1, 8 and 16 bit files of any format that OpenCV or Pillow know, TIFF with
    many channels, and ``.npy`` arrays ``(H, W)`` or ``(H, W, C)``. EXIF orientation is applied, transparency is
    dropped, gray is repeated for RGB and RGB becomes luminance for one channel.

    Args:
        path: the file.
        channels: how many channels the result has.
        values: how stored numbers become intensities; without it the type of the numbers decides.

    Returns:
        ``(H, W, channels)``, C-contiguous: uint8 for data of up to 8 bits, else float32 in [0, 1].

    Raises:
        UserError: the file is missing, empty, truncated or no image, or its channels or values do not fit.
    """
    return read_pixels(path, channels, values).image


def read_pixels(path: str | Path, channels: int = 3, values: ValueRange = BY_TYPE) -> Pixels:
    """Read an image like :func:`read_image`, and also return which pixels have no data (``values.nodata``).

    A data set fills the missing pixels with its mean color, ``pixels.filled(mean)``, and ignores them:
    ``label[pixels.missing] = ignore_index``.
    """
    path = Path(path)
    data = read_bytes(path)
    image = fast_image(data, channels)
    if image is not None:
        return _pixels(Raster(image, colors=image.shape[2]), channels, values, str(path))
    raster = decode(data, path, channels)
    if raster.pages > 1 and not _warned:
        log.warning("%s contains %d pages or frames; only the first one is read", path, raster.pages)
        _warned.append(path)
    return _pixels(raster, channels, values, str(path))


def to_pixels(image: np.ndarray | Image.Image, channels: int = 3, values: ValueRange = BY_TYPE) -> Pixels:
    """Convert an image in memory to the channels and intensities that :func:`read_pixels` returns for a file.

    Args:
        image: an array ``(H, W)`` or ``(H, W, C)``, or a Pillow image.
        channels, values: as for :func:`read_pixels`.

    Raises:
        ValueError: the array has another shape.
        UserError: its channels or values do not fit.
    """
    if isinstance(image, Image.Image):
        return _pixels(from_pillow(image, "the image"), channels, values, "the image")
    array = image[:, :, None] if image.ndim == 2 else image
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"images: expected an array (H, W) or (H, W, channels), got shape {image.shape}")
    return _pixels(Raster(array, named_colors(array.shape[2])), channels, values, "the image")


def _pixels(raster: Raster, channels: int, values: ValueRange, source: str) -> Pixels:
    pixels = values.apply(_select(raster, channels, source), source, raster.largest)
    image = pixels.image
    if image.shape[2] == 1 != channels:
        image = np.repeat(image, channels, axis=2)
    elif image.shape[2] != channels:
        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[:, :, None]
    return pixels._replace(image=np.ascontiguousarray(image))


def write_png(
    path: str | Path, array: np.ndarray, palette: Sequence[Sequence[int]] | None = None, software: str = ""
) -> None:
    """Write ``array`` as a PNG file, completely or not at all.

    Args:
        path: where to; its folder is created.
        array: uint8 ``(H, W)`` (gray, or indices with ``palette``) or ``(H, W, 3)`` RGB; uint16 ``(H, W)``.
        palette: up to 256 RGB triples: colors of the indices 0, 1, ...
        software: text of the PNG's "Software" field.
    """
    image = Image.fromarray(array)
    if palette is not None:
        image = image.convert("L") if image.mode != "L" else image
        image.putpalette([int(v) for color in palette for v in color])
    information = PngInfo()
    if software:
        information.add_text("Software", software)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=information)


def voc_colormap(n: int = 256) -> tuple[tuple[int, int, int], ...]:
    """Return the first ``n`` colors of the Pascal VOC color map (index 255 is its void color)."""

    def value(index: int, channel: int) -> int:
        # Three bits of the index at a time become the next lower bit of red, green and blue.
        return sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))

    return tuple((value(i, 0), value(i, 1), value(i, 2)) for i in range(n))


def _select(raster: Raster, channels: int, source: str) -> np.ndarray:
    """Return the requested number of channels, or gray or RGB, which can be converted."""
    array, colors = raster.array, raster.colors
    if raster.palette is not None:
        colors = 3
        array = np.concatenate([raster.palette[array[:, :, 0]], array[:, :, 1:]], axis=2)
    have = array.shape[2]
    if raster.inverted and array.dtype.kind not in "bu":
        raise UserError(f"{source} stores 0 as white in {array.dtype} numbers, which is not supported; save it as PNG")
    if raster.inverted:
        array = ~array if array.dtype == np.bool_ else (raster.largest or np.iinfo(array.dtype).max) - array
    if have == channels or (raster.alpha and have - 1 == channels):
        return array[:, :, :channels]
    if channels in (1, 3) and colors == 3:
        return array[:, :, :3]
    if channels in (1, 3) and (have == 1 or (have == 2 and raster.alpha)):
        return array[:, :, :1]
    raise UserError(
        f"{source} has {have} channels, but `in_channels` is {channels}; set `in_channels` of the loader and of the "
        "model to the same number, or convert the file"
    )
