"""The content of an image file: the numbers as stored, and what the file says about them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError

DAMAGED = "cannot be read, it is damaged or truncated"
ORIENTATION = 0x0112  # EXIF's tag, and TIFF's


@dataclass
class Raster:
    """The content of one image file."""

    array: np.ndarray  # (H, W, C) as stored, upright (the file's orientation is applied)
    colors: int  # how many of the first channels are gray (1) or red, green and blue (3); 0: not known
    alpha: bool = False  # the channel after the colors (the last one, if they are not known) is transparency
    largest: int | None = None  # value of integers, where it is below that of their type
    palette: np.ndarray | None = None  # uint8 (256, 3), the colors that the numbers stand for
    inverted: bool = False  # 0 is white
    lossy: bool = False  # the compression has changed the numbers
    pages: int = 1  # how many images the file contains, previews not counted


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Return ``(H, W, ...)`` turned and mirrored as the EXIF or TIFF orientation says (1 to 8; others mean nothing)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def orientation_of(image: Image.Image) -> int:
    """Return the orientation in the EXIF data of a Pillow image, 1 to 8; 1 if there is none, or an unknown one.

    TIFF files have none: Pillow turns them when it loads them. Other places (XMP, text chunks) do not count. In a PNG
    file, the EXIF data may follow the pixels: load them first.
    """
    exif = Image.Exif()
    with suppress(Exception):  # broken metadata is ignored
        exif.load(image.info.get("exif", b""))
    value = exif.get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def from_pillow(image: Image.Image, path: Path | str) -> Raster:
    """Return the content of a Pillow image."""
    image.load()
    orientation = orientation_of(image)
    mode, palette = image.mode, None
    if mode in ("P", "PA"):
        palette = np.zeros((256, 3), np.uint8)
        colors = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        palette[: len(colors)] = colors
    elif mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    elif mode not in ("1", "L", "LA", "RGB", "RGBA", "RGBX", "F") and not mode.startswith("I"):
        raise UserError(f"{path} contains colors of a kind that is not supported ({mode}); convert it to RGB")
    array = np.array(image)  # a copy: Pillow's own arrays cannot be written to
    array = upright(array if array.ndim == 3 else array[:, :, None], orientation)
    largest = 65535 if mode == "I" else None  # 16 bit data in a wider type
    return Raster(array, 3 if array.shape[2] >= 3 else 1, mode.endswith("A"), largest, palette)


def named_colors(channels: int) -> int:
    """Return how many channels are colors if a file does not say so: of three or four channels, three (RGB)."""
    return {1: 1, 3: 3, 4: 3}.get(channels, 0)
