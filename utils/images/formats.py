"""From the bytes of an image file to a :class:`Raster`. Files are recognized by their content, not by their names."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.errors import UserError
from utils.images import tif
from utils.images.raster import DAMAGED, ORIENTATION, Raster, from_pillow, named_colors, orientation_of, upright

# OpenCV's limit. Pillow's own is lower than the size of satellite images.
Image.MAX_IMAGE_PIXELS = 2**30
# Pillow warns about unusual metadata in every file.
warnings.filterwarnings("ignore", module=r"PIL\.")

_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM", "JPEG2000")
_NPY = b"\x93NUMPY"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_PNG_GRAY, _PNG_GRAYS = 0, (0, 4)  # without and with transparency
_INTERLACED = 28  # place of this byte in a PNG file
_BMP_BITS = 28  # the same in a BMP file: bits per pixel
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by kind of PNG file
_JPEG, _JPEG_END, _EXIF = b"\xff\xd8\xff", b"\xff\xd9", b"Exif\0\0"
_JPEG_12_BIT = re.compile(rb"\xff[\xc0\xc1\xc2]..\x0c", re.DOTALL)  # a frame header: marker, length, precision
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


def read_bytes(path: Path) -> bytes:
    """Return a file's content; UserError where it is missing, unreadable or empty."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not data:
        raise UserError(f"{path} is empty (0 bytes)")
    return data


def orientation(data: bytes) -> int:
    """Return the orientation that the decoders apply to a file: 1 as stored, 2 to 4 mirrored or turned by 180 degrees.

    From 5 on, the sides are swapped. It is that of the EXIF data as Pillow reads it, and TIFF's own.
    """
    try:
        image: Any = Image.open(io.BytesIO(data), formats=(*_FORMATS, "TIFF"))
        if image.format == "TIFF":
            value = image.tag_v2.get(ORIENTATION, 1)
            return value if value in range(1, 9) else 1
        if b"eXIf" in _png_chunks(data):
            image.load()
        return orientation_of(image)
    except Exception:  # Pillow's plugins raise many kinds of errors; other files have no orientation
        return 1


def upright_size(data: bytes, path: Path) -> tuple[int, int]:
    """Return height and width of the image that the decoders return; only the headers of JPEG and PNG files are read.

    Raises:
        UserError: see :func:`decode`.
    """
    if not data.startswith((_JPEG, _PNG)):
        return decode(data, path).array.shape[:2]
    width, height = _open(data, path).size
    return (width, height) if orientation(data) >= 5 else (height, width)


def fast_image(data: bytes, channels: int) -> np.ndarray | None:
    """Decode whole JPEG and PNG files of 8 bits as gray or RGB, upright; return None for any other file.

    OpenCV decodes them faster than Pillow.
    """
    if channels not in (1, 3) or not (_is_whole_jpeg(data) or (_is_whole_png(data) and data[24] <= 8)):
        return None
    chunks = _png_chunks(data)
    if b"acTL" in chunks:  # it is animated
        return None
    # libpng turns colors into gray with a gamma correction where the file has an sRGB or gAMA chunk.
    gray = channels == 1 and (data.startswith(_JPEG) or data[25] in _PNG_GRAYS)
    flag = cv2.IMREAD_GRAYSCALE if gray else cv2.IMREAD_COLOR
    image = _opencv(data, flag | cv2.IMREAD_IGNORE_ORIENTATION)  # OpenCV reads odd EXIF data otherwise than Pillow
    if image is None:
        return None
    if b"eXIf" in chunks or _EXIF in data:
        image = upright(image, orientation(data))
    return image[:, :, None] if image.ndim == 2 else image


def fast_label(data: bytes) -> np.ndarray | None:
    """Decode a plain gray PNG file of 8 bits, the usual form of label maps; None for any other file."""
    if not (_is_whole_png(data) and data[24] == 8 and data[25] == _PNG_GRAY):
        return None
    if {b"eXIf", b"acTL"} & _png_chunks(data).keys():  # it may be turned, it is animated
        return None
    return _opencv(data, cv2.IMREAD_UNCHANGED)


def decode(data: bytes, path: Path, channels: int = 1) -> Raster:
    """Decode the content of a file of any known format.

    The requested number of ``channels`` decides whether the pages of a TIFF file are bands.

    Raises:
        UserError: the file is damaged, of an unknown format, or needs a package that is not installed.
    """
    if data.startswith(_NPY) or path.suffix.lower() == ".npy":
        return _npy(data, path)
    if data.startswith(_TIFF):
        return tif.decode(data, path, channels)
    if data.startswith(_PNG) and data[24:25] == b"\x10":  # 16 bits
        return _png16(data, path)
    if data.startswith(_JPEG) and _JPEG_12_BIT.search(data, 0, 1 << 16):
        raise UserError(f"{path} is a 12-bit JPEG file, which is not supported; convert it to PNG")
    return _pillow(data, path)


def _npy(data: bytes, path: Path) -> Raster:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of several arrays (.npz)")
    except Exception as error:  # NumPy raises many kinds of errors on broken headers
        raise UserError(f"{path} cannot be read as a .npy array: {error}") from None
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(f"{path} has shape {array.shape}; expected (H, W) or (H, W, channels)")
    array = array if array.ndim == 3 else array[:, :, None]
    return Raster(array, colors=named_colors(array.shape[2]))


def _png16(data: bytes, path: Path) -> Raster:
    image = _opencv(data, cv2.IMREAD_UNCHANGED) if _is_whole_png(data) else None
    if image is None or image.dtype != np.uint16:
        raise UserError(f"{path} {DAMAGED}")
    chunks = _png_chunks(data)
    image = upright(image if image.ndim == 3 else image[:, :, None], orientation(data))
    frames = chunks.get(b"acTL")
    pages = 1 if frames is None else int.from_bytes(data[frames + 8 : frames + 12], "big")
    return Raster(image, colors=min(3, image.shape[2]), alpha=image.shape[2] == 4, pages=pages)


def _pillow(data: bytes, path: Path) -> Raster:
    image = _open(data, path)
    if image.format == "BMP" and image.mode == "1" and data[_BMP_BITS] != 1:  # which Pillow reads bit by bit
        raise UserError(f"{path} is a BMP file of 4 or 8 bits with two colors, which is not supported; save it as PNG")
    if image.format == "PPM" and image.tile:
        raster = _pnm(data, image, path)
        if raster is not None:
            return raster
    try:
        pages = getattr(image, "n_frames", 1)
        image.load()
    except Exception as error:  # Pillow's parsers raise many kinds of errors on broken files
        raise UserError(f"{path} {DAMAGED}: {error}") from None
    if image.format == "PNG" and (data[_INTERLACED] or not np.asarray(image)[-1].any()) and not _has_all_rows(data):
        raise UserError(f"{path} {DAMAGED}")
    raster = from_pillow(image, path)
    raster.pages = pages
    raster.lossy = image.format in ("JPEG", "MPO", "JPEG2000") or (image.format == "WEBP" and _is_lossy_webp(data))
    if image.format == "PNG" and data[25] == _PNG_GRAY and data[24] in (2, 4):
        # Decoders stretch 2 and 4 bits to 0..255: back to the stored numbers.
        raster.largest = 2 ** data[24] - 1
        raster.array = raster.array // (255 // raster.largest)
    return raster


def _open(data: bytes, path: Path) -> Any:  # of Pillow's classes, which have attributes of their own
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image file, or of an unknown format; convert it to PNG or JPEG") from None
    except Exception as error:  # as above
        raise UserError(f"{path} {DAMAGED}: {error}") from None


def _pnm(data: bytes, image: Any, path: Path) -> Raster | None:
    """Return the numbers of a PGM or PPM file as stored; Pillow scales them to 8 or 16 bits.

    Return None for files of one bit, and where the largest value is 255: Pillow reads these as they are.
    """
    decoder, _, offset, args = image.tile[0]
    if decoder not in ("ppm", "ppm_plain") or data[1:2] not in b"2356":
        return None
    largest = int(args[-1] if isinstance(args, tuple) else args)
    height, width, channels = image.height, image.width, 3 if data[1:2] in b"36" else 1
    wanted = height * width * channels
    kind = np.dtype(np.uint16 if largest > 255 else np.uint8)
    try:
        if decoder == "ppm_plain":
            numbers = np.array(re.sub(rb"#[^\r\n]*", b"", data[offset:]).split()[:wanted], np.int64)
        else:
            numbers = np.frombuffer(data, kind.newbyteorder(">"), wanted, offset)
    except ValueError as error:  # text that is no number, or too few bytes
        raise UserError(f"{path} {DAMAGED}: {error}") from None
    if numbers.size < wanted or numbers.min(initial=0) < 0 or numbers.max(initial=0) > largest:
        raise UserError(f"{path} {DAMAGED}")
    return Raster(numbers.reshape(height, width, channels).astype(kind), colors=channels, largest=largest)


def _is_whole_jpeg(data: bytes) -> bool:
    # libjpeg fills the missing part of a truncated file with gray and only prints a warning. Files without the end
    # marker in their last bytes go to Pillow, which refuses the truncated ones.
    return data.startswith(_JPEG) and _JPEG_END in data[-64:]


def _is_whole_png(data: bytes) -> bool:
    return data.startswith(_PNG) and data.rfind(_PNG_END) > 0


def _png_chunks(data: bytes) -> dict[bytes, int]:
    """Return the place of the first chunk of each kind in a PNG file; nothing for other files."""
    chunks: dict[bytes, int] = {}
    place = len(_PNG) if data.startswith(_PNG) else len(data)
    while place + 8 <= len(data):
        chunks.setdefault(data[place + 4 : place + 8], place)
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return chunks


def _has_all_rows(png: bytes) -> bool:
    """Return whether a PNG file contains all rows; Pillow fills missing ones with zeros."""
    if png[_INTERLACED]:
        return _opencv(png, cv2.IMREAD_UNCHANGED) is not None
    # OpenCV is several times slower than this.
    width, height, bits, kind = struct.unpack(">IIBB", png[16:26])
    wanted = height * (1 + (width * bits * _SAMPLES[kind] + 7) // 8)
    place, unpacked, size = _png_chunks(png)[b"IDAT"], zlib.decompressobj(), 0
    while png[place + 4 : place + 8] == b"IDAT":
        end = place + 8 + int.from_bytes(png[place : place + 4], "big")
        size += len(unpacked.decompress(png[place + 8 : end]))
        place = end + 4
    return size >= wanted


def _is_lossy_webp(data: bytes) -> bool:
    place = 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind == b"VP8 ":
            return True
        # The frames of an animation lie inside of chunks with a header of 16 bytes.
        place += 24 if kind == b"ANMF" else 8 + size + size % 2
    return False


def _opencv(data: bytes, flag: int) -> np.ndarray | None:
    """Decode with OpenCV into RGB(A) order; None where it cannot."""
    data = _without_color_profile(data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        return None
    if image is None:
        return None
    if image.ndim == 3 and image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if image.ndim == 3 and image.shape[2] == 4:
        return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)
    return image


def _without_color_profile(data: bytes) -> bytes:
    """Return a PNG file without its ICC profile: nothing uses it, and libpng warns of every odd one."""
    place = _png_chunks(data).get(b"iCCP")
    if place is None:
        return data
    return data[:place] + data[place + 12 + int.from_bytes(data[place : place + 4], "big") :]
