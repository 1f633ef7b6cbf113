"""TIFF files with more bands than image libraries read: a small reader for the kinds that science writes.

Follows the TIFF 6.0 specification (Adobe, 1992): bands interleaved or one after the other, in strips or tiles,
uncompressed or deflated, with or without the horizontal predictor, 8 to 64 bits, integers or floating point; and
several one-band pages, which are taken as bands. BigTIFF and other compressions are not read.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIP_OFFSETS, _BANDS, _ROWS_PER_STRIP, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, _FORMAT = 317, 322, 323, 324, 325, 339
_RGB = 2
_NONE, _DEFLATE, _OLD_DEFLATE = 1, 8, 32946
# Field type -> struct letter.
_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
_MAX_PAGES = 1000

Tags = dict[int, tuple[int, ...]]


class UnsupportedTiff(Exception):
    """The file is TIFF, but of a kind that is not read here, or it is damaged; the message says what it is."""


def is_multiband(data: bytes) -> bool:
    """Tell whether a TIFF holds anything but one page of grey, RGB, or RGB with transparency.

    Image libraries read such files in part, without a word.
    """
    try:
        _, pages = _pages(data)
    except (UnsupportedTiff, struct.error):
        return False
    bands = _first(pages[0], _BANDS, 1)
    if len(pages) > 1:
        # Pages of other sizes are previews, not bands.
        sizes = {(page.get(_HEIGHT), page.get(_WIDTH)) for page in pages}
        return len(sizes) == 1 and all(_first(page, _BANDS, 1) == 1 for page in pages)
    return bands > 4 or bands == 2 or (bands > 1 and _first(pages[0], _PHOTOMETRIC, 1) < _RGB)


def decode(data: bytes) -> np.ndarray:
    """Return all bands, ``(H, W, bands)`` in the file's own type of number.

    Raises:
        UnsupportedTiff: the file is damaged, or of a kind that is not read here.
    """
    try:
        order, pages = _pages(data)
        bands = [_page(data, order, page) for page in pages]
    except (struct.error, zlib.error, ValueError, IndexError, KeyError) as error:
        raise UnsupportedTiff(f"damaged or truncated ({error})") from None
    if len({b.shape[:2] for b in bands}) > 1:
        raise UnsupportedTiff("its pages differ in size")
    return np.concatenate(bands, axis=2)


def _pages(data: bytes) -> tuple[str, list[Tags]]:
    """Return the byte order and the tags of each page."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or struct.unpack_from(order + "H", data, 2)[0] != 42:
        raise UnsupportedTiff("no classic TIFF")
    pages: list[Tags] = []
    (offset,) = struct.unpack_from(order + "I", data, 4)
    while offset and len(pages) < _MAX_PAGES:
        (count,) = struct.unpack_from(order + "H", data, offset)
        pages.append(dict(_field(data, order, offset + 2 + 12 * i) for i in range(count)))
        (offset,) = struct.unpack_from(order + "I", data, offset + 2 + 12 * count)
    if not pages:
        raise UnsupportedTiff("no page")
    return order, pages


def _field(data: bytes, order: str, at: int) -> tuple[int, tuple[int, ...]]:
    tag, kind, count = struct.unpack_from(order + "HHI", data, at)
    if kind not in _TYPES:
        return tag, ()  # text and fractions: nothing that is needed
    layout = f"{order}{count}{_TYPES[kind]}"
    place = at + 8 if struct.calcsize(layout) <= 4 else struct.unpack_from(order + "I", data, at + 8)[0]
    return tag, struct.unpack_from(layout, data, place)


def _first(tags: Tags, tag: int, default: int) -> int:
    return (tags.get(tag) or (default,))[0]


def _number_type(tags: Tags, order: str) -> np.dtype[Any]:
    bits, kinds = set(tags[_BITS]), set(tags.get(_FORMAT) or (1,))
    if len(bits) > 1 or len(kinds) > 1:
        raise UnsupportedTiff("its bands differ in type")
    bit, kind = bits.pop(), {1: "u", 2: "i", 3: "f", 4: "u"}.get(kinds.pop())
    if kind is None or bit not in (8, 16, 32, 64) or (kind == "f" and bit == 8):
        raise UnsupportedTiff(f"{bit} bits per sample of an unusual format")
    return np.dtype(f"{order}{kind}{bit // 8}")


def _page(data: bytes, order: str, tags: Tags) -> np.ndarray:
    """Return ``(H, W, bands)`` of one page."""
    height, width, bands = tags[_HEIGHT][0], tags[_WIDTH][0], _first(tags, _BANDS, 1)
    dtype = _number_type(tags, order)
    separate = _first(tags, _PLANAR, 1) == 2
    tiled = _TILE_OFFSETS in tags
    block_width = tags[_TILE_WIDTH][0] if tiled else width
    block_height = tags[_TILE_HEIGHT][0] if tiled else min(height, _first(tags, _ROWS_PER_STRIP, height))
    offsets, sizes = (tags[t] for t in ((_TILE_OFFSETS, _TILE_BYTES) if tiled else (_STRIP_OFFSETS, _STRIP_BYTES)))
    if len(data) < max(o + s for o, s in zip(offsets, sizes, strict=True)):
        raise UnsupportedTiff("damaged or truncated (its data ends too early)")
    page = np.empty((height, width, bands), dtype.newbyteorder("="))
    blocks = iter(zip(offsets, sizes, strict=True))
    depth = 1 if separate else bands
    for band in range(bands if separate else 1):
        for top in range(0, height, block_height):
            for left in range(0, width, block_width):
                offset, size = next(blocks, (0, 0))
                rows = block_height if tiled else min(block_height, height - top)
                block = _block(data[offset : offset + size], tags, dtype, (rows, block_width, depth))
                window = page[top : top + rows, left : left + block_width, band : band + depth]
                window[...] = block[: window.shape[0], : window.shape[1]]
    return page


def _block(packed: bytes, tags: Tags, dtype: np.dtype[Any], shape: tuple[int, int, int]) -> np.ndarray:
    compression, predictor = _first(tags, _COMPRESSION, _NONE), _first(tags, _PREDICTOR, 1)
    if compression in (_DEFLATE, _OLD_DEFLATE):
        packed = zlib.decompress(packed)
    elif compression != _NONE:
        raise UnsupportedTiff(f"compression {compression} is not read for many bands")
    if predictor not in (1, 2):
        raise UnsupportedTiff(f"predictor {predictor} is not read for many bands")
    block = np.frombuffer(packed, dtype, count=shape[0] * shape[1] * shape[2]).reshape(shape)
    if predictor == 2 and compression != _NONE:
        # Each pixel holds the difference to its left neighbour; sums wrap around as the differences did.
        block = np.cumsum(block, axis=1, dtype=dtype.newbyteorder("="))
    return block
