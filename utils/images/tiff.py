"""TIFF files with more channels than image libraries take (satellites, microscopes): all bands as one array.

OpenCV decodes up to four channels, with whatever compression libtiff knows. But pixels whose channels lie side by
side, W pixels of C samples a row, are the same bytes as one channel of W x C pixels; and channels that lie one
after the other are C images. So the file's directory is rewritten to say that, and OpenCV decodes it. Some programs
write one page per band: pages of equal size are read as bands.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.errors import UserError

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, _FORMAT = 317, 322, 323, 324, 325, 339

_RGB = 2  # photometric interpretations below it are grey
_MAX_PAGES = 4096
_NUMBER_FORMATS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # byte, short, long, long8
_DTYPES = {
    (8, 1): np.uint8,
    (16, 1): np.uint16,
    (32, 1): np.uint32,
    (8, 2): np.int8,
    (16, 2): np.int16,
    (32, 2): np.int32,
    (32, 3): np.float32,
    (64, 3): np.float64,
}
# None, LZW, deflate (both numbers), PackBits: they compress rows of bytes and know nothing of pixels.
_BYTEWISE = (1, 5, 8, 32946, 32773)


class _Layout(NamedTuple):
    """How the numbers of a file's structure are written."""

    order: str  # of bytes, as struct writes it
    entry_count: str  # of a directory
    offset: str
    first: int  # where the header says where the directory is


def is_multiband(data: bytes) -> bool:
    """Tell whether a TIFF holds anything but one page of grey, RGB, or RGB with transparency.

    Image libraries read such files in part, without a word.
    """
    try:
        pages = _directories(data, _layout(data))
    except (struct.error, KeyError, IndexError):
        return False
    if len(pages) > 1:
        return _are_bands(pages)
    channels, meaning = (pages[0].get(tag, (1,))[0] for tag in (_SAMPLES, _PHOTOMETRIC))
    return channels > 4 or channels == 2 or (channels > 1 and meaning < _RGB)


def _are_bands(pages: list[dict[int, tuple[int, ...]]]) -> bool:
    # Pages of other sizes are previews.
    sizes = {(page.get(_HEIGHT), page.get(_WIDTH)) for page in pages}
    return len(sizes) == 1 and all(page.get(_SAMPLES, (1,))[0] == 1 for page in pages)


def decode(data: bytes, path: Path | str = "") -> np.ndarray:
    """Return all bands of a TIFF file, ``(H, W, channels)``, in the file's own type of numbers.

    Any number of channels, side by side or one after the other, in strips or tiles; uncompressed, LZW, deflate or
    PackBits, with or without horizontal prediction; 8 to 32 bit integers, 32 and 64 bit floating point.

    Raises:
        UserError: the file is damaged, or of a kind that is not listed above.
    """
    try:
        layout = _layout(data)
        pages = _directories(data, layout)
        if len(pages) == 1 or not _are_bands(pages):
            return _decode(data, layout, pages[0], path)
        return np.concatenate([_decode(data, layout, page, path) for page in pages], axis=2)
    except (struct.error, KeyError, IndexError, cv2.error) as error:
        raise UserError(f"{path} cannot be read, it is damaged or truncated ({error!r})") from error


def _layout(data: bytes) -> _Layout:
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    (version,) = struct.unpack_from(f"{order}H", data, 2)
    return {42: _Layout(order, "H", "I", 4), 43: _Layout(order, "Q", "Q", 8)}[version]


def _directories(data: bytes, layout: _Layout) -> list[dict[int, tuple[int, ...]]]:
    """Return the whole numbers of each page's directory: tag -> values."""
    pages: list[dict[int, tuple[int, ...]]] = []
    (at,) = struct.unpack_from(layout.order + layout.offset, data, layout.first)
    while at and len(pages) < _MAX_PAGES:
        tags, following = _directory(data, layout, at)
        pages.append(tags)
        (at,) = struct.unpack_from(layout.order + layout.offset, data, following)
    if not pages:
        raise IndexError("no page")
    return pages


def _directory(data: bytes, layout: _Layout, at: int) -> tuple[dict[int, tuple[int, ...]], int]:
    """Return one directory, and where the position of the next one is written."""
    order, size = layout.order, struct.calcsize(layout.offset)
    (entries,) = struct.unpack_from(order + layout.entry_count, data, at)
    at += struct.calcsize(layout.entry_count)
    end = at + entries * (4 + 2 * size)
    tags = {}
    for place in range(at, end, 4 + 2 * size):
        tag, kind, count = struct.unpack_from(f"{order}HH{layout.offset}", data, place)
        if kind not in _NUMBER_FORMATS:
            continue
        values, place = f"{order}{count}{_NUMBER_FORMATS[kind]}", place + 4 + size
        if struct.calcsize(values) > size:
            (place,) = struct.unpack_from(order + layout.offset, data, place)
        tags[tag] = struct.unpack_from(values, data, place)
    return tags, end


def _decode(data: bytes, layout: _Layout, tags: dict[int, tuple[int, ...]], path: Path | str) -> np.ndarray:
    width, height, channels = tags[_WIDTH][0], tags[_HEIGHT][0], tags.get(_SAMPLES, (1,))[0]
    bits, formats = set(tags[_BITS]), set(tags.get(_FORMAT, (1,)))
    key = (bits.pop(), formats.pop())
    compression, predictor = tags.get(_COMPRESSION, (1,))[0], tags.get(_PREDICTOR, (1,))[0]
    if bits or formats or key not in _DTYPES:
        raise UserError(f"{path} holds numbers of a kind that cannot be read (bits and format {key}, mixed: {bits})")
    dtype = np.dtype(_DTYPES[key])
    if tags.get(_PLANAR, (1,))[0] == 2:
        parts = [_plane(tags, channel, channels) for channel in range(channels)]
        planes = [_opencv(data, layout, part, dtype, path) for part in parts]
        return np.stack(planes, axis=2)
    if compression not in _BYTEWISE or predictor not in (1, 2):
        raise UserError(
            f"{path} is compressed in a way (compression {compression}, predictor {predictor}) that cannot be read "
            f"with {channels} channels; write it uncompressed, with LZW or deflate, or as .npy"
        )
    # One channel of width x channels pixels; the prediction, which steps over pixels, is undone here.
    wide = {**tags, _WIDTH: (width * channels,), _PREDICTOR: (1,)}
    if _TILE_WIDTH in tags:
        wide[_TILE_WIDTH] = (tags[_TILE_WIDTH][0] * channels,)
    image = _opencv(data, layout, wide, dtype, path).reshape(height, width, channels)
    return _undo_prediction(image, tags.get(_TILE_WIDTH, (width,))[0]) if predictor == 2 else image


def _plane(tags: dict[int, tuple[int, ...]], channel: int, channels: int) -> dict[int, tuple[int, ...]]:
    """Return the directory of one channel of a file that holds them one after the other."""
    part = dict(tags)
    for tag in (_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES):
        if tag in tags:
            count = len(tags[tag]) // channels
            part[tag] = tags[tag][channel * count : (channel + 1) * count]
    return part


def _undo_prediction(image: np.ndarray, tile: int) -> np.ndarray:
    """Return sums along the rows, begun anew in every tile; they wrap around as the differences did."""
    result = np.empty_like(image)
    for start in range(0, image.shape[1], tile):
        part = image[:, start : start + tile]
        result[:, start : start + tile] = np.cumsum(part, axis=1, dtype=image.dtype)
    return result


def _opencv(
    data: bytes, layout: _Layout, tags: dict[int, tuple[int, ...]], dtype: np.dtype, path: Path | str
) -> np.ndarray:
    """Return ``(H, W)`` of the single channel that ``tags`` describe in ``data``."""
    # Integers of 8 and 16 bits are decoded as unsigned, wider numbers as floating point: the same bits.
    bits = 8 * dtype.itemsize
    described = {
        tag: tags[tag]
        for tag in (
            *(_WIDTH, _HEIGHT, _COMPRESSION, _PREDICTOR, _STRIP_OFFSETS, _STRIP_BYTES, _ROWS_PER_STRIP),
            *(_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES),
        )
        if tag in tags
    }
    described |= {_BITS: (bits,), _PHOTOMETRIC: (1,), _SAMPLES: (1,), _PLANAR: (1,)}
    described[_FORMAT] = (3 if bits >= 32 else 1,)
    rewritten = _with_directory(data, layout, described)
    image = cv2.imdecode(np.frombuffer(rewritten, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.itemsize != dtype.itemsize:
        raise UserError(f"{path} cannot be read, it is damaged or truncated")
    return np.ascontiguousarray(image).view(dtype)


def _with_directory(data: bytes, layout: _Layout, tags: dict[int, tuple[int, ...]]) -> bytes:
    """Return the file with another directory: values and directory are appended, the header points there."""
    order, size = layout.order, struct.calcsize(layout.offset)
    kind = 4 if layout.offset == "I" else 16
    start = len(data) + len(data) % 2
    values, entries = b"", b""
    for tag in sorted(tags):
        packed = struct.pack(f"{order}{len(tags[tag])}{layout.offset}", *tags[tag])
        if len(packed) > size:
            place = struct.pack(order + layout.offset, start + len(values))
            values += packed
        else:
            place = packed
        # Short numbers have a type of their own, which readers insist on.
        if len(tags[tag]) == 1 and tags[tag][0] < 1 << 16:
            place = struct.pack(f"{order}H", tags[tag][0]).ljust(size, b"\0")
            entries += struct.pack(f"{order}HH{layout.offset}", tag, 3, 1) + place
        else:
            entries += struct.pack(f"{order}HH{layout.offset}", tag, kind, len(tags[tag])) + place
    directory = struct.pack(order + layout.entry_count, len(tags)) + entries + bytes(size)
    header = data[: layout.first] + struct.pack(order + layout.offset, start + len(values))
    body = data[layout.first + size :].ljust(start - layout.first - size, b"\0")
    return header + body + values + directory
