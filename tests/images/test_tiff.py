"""TIFF files with many channels, written here byte by byte in every layout that the reader promises."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.errors import UserError
from utils.images.tiff import decode

COMPRESSIONS = {"none": 1, "lzw": 5, "deflate": 8, "packbits": 32773}


def lzw(data: bytes) -> bytes:
    """Return TIFF's LZW of nine-bit codes only: the table is cleared before codes would grow."""
    bits = ""
    for start in range(0, len(data), 200):
        bits += f"{256:09b}" + "".join(f"{byte:09b}" for byte in data[start : start + 200])
    bits += f"{257:09b}"
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


def packbits(data: bytes) -> bytes:
    """Return the bytes as literal runs."""
    runs = (data[i : i + 128] for i in range(0, len(data), 128))
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


ENCODE = {"none": bytes, "lzw": lzw, "deflate": zlib.compress, "packbits": packbits}


def blocks(array: np.ndarray, tile: int | None, rows: int) -> list[np.ndarray]:
    """Cut ``(H, W, C)`` into strips of some rows, or into square tiles padded at the edges."""
    height, width = array.shape[:2]
    if tile is None:
        return [array[y : y + rows] for y in range(0, height, rows)]
    padded = np.pad(array, ((0, -height % tile), (0, -width % tile), (0, 0)))
    return [
        padded[y : y + tile, x : x + tile]
        for y in range(0, padded.shape[0], tile)
        for x in range(0, padded.shape[1], tile)
    ]


def predicted(block: np.ndarray) -> np.ndarray:
    return np.concatenate([block[:, :1], np.diff(block, axis=1)], axis=1)


def tiff(
    array: np.ndarray,
    *,
    compression: str = "none",
    predictor: bool = False,
    planar: bool = False,
    tile: int | None = None,
    order: str = "<",
    big: bool = False,
    rows: int = 5,
) -> bytes:
    height, width, channels = array.shape
    parts = [array[:, :, c : c + 1] for c in range(channels)] if planar else [array]
    pieces = [block for part in parts for block in blocks(part, tile, rows)]
    if predictor:
        pieces = [predicted(piece) for piece in pieces]
    written = array.dtype.newbyteorder(order)
    encoded = [ENCODE[compression](piece.astype(written).tobytes()) for piece in pieces]
    number, count, header = ("Q", "Q", 16) if big else ("I", "H", 8)
    starts = header + np.concatenate([[0], np.cumsum([len(e) for e in encoded])])
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    tags: dict[int, list[int]] = {
        256: [width],
        257: [height],
        258: [8 * array.dtype.itemsize] * channels,
        259: [COMPRESSIONS[compression]],
        262: [1],
        277: [channels],
        284: [2 if planar else 1],
        317: [2 if predictor else 1],
        338: [0] * (channels - 1),
        339: [kind] * channels,
    }
    offsets, lengths = starts[:-1].tolist(), [len(e) for e in encoded]
    tags |= {273: offsets, 278: [rows], 279: lengths} if tile is None else {}
    tags |= {} if tile is None else {322: [tile], 323: [tile], 324: offsets, 325: lengths}
    tags = {tag: values for tag, values in tags.items() if values}
    end, values_at = int(starts[-1]), int(starts[-1])
    size, extra, entries = struct.calcsize(number), b"", b""
    for tag in sorted(tags):
        wide = tag in (273, 279, 324, 325)
        code, letter = ((16, "Q") if big else (4, "I")) if wide else (3, "H")
        packed = struct.pack(f"{order}{len(tags[tag])}{letter}", *tags[tag])
        if len(packed) > size:
            place, extra = struct.pack(order + number, values_at + len(extra)), extra + packed
        else:
            place = packed.ljust(size, b"\0")
        entries += struct.pack(f"{order}HH{number}", tag, code, len(tags[tag])) + place
    directory = struct.pack(order + count, len(tags)) + entries + bytes(size)
    mark = b"II" if order == "<" else b"MM"
    start = mark + struct.pack(f"{order}H", 43 if big else 42) + (struct.pack(f"{order}HH", 8, 0) if big else b"")
    start += struct.pack(order + number, end + len(extra))
    return start + b"".join(encoded) + extra + directory


def bands(dtype: type, channels: int, shape: tuple[int, int] = (23, 37)) -> np.ndarray:
    rng = np.random.default_rng(channels)
    if np.issubdtype(dtype, np.floating):
        return rng.normal(size=(*shape, channels)).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, (*shape, channels), endpoint=True).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 5, 13])
def test_types_and_channel_counts(dtype: type, channels: int) -> None:
    array = bands(dtype, channels)
    found = decode(tiff(array))
    assert found.dtype == dtype
    assert np.array_equal(found, array)


@pytest.mark.parametrize("compression", list(COMPRESSIONS))
@pytest.mark.parametrize("predictor", [False, True], ids=["plain", "predicted"])
@pytest.mark.parametrize("planar", [False, True], ids=["chunky", "planar"])
@pytest.mark.parametrize("tile", [None, 16], ids=["strips", "tiles"])
def test_compressions_and_layouts(compression: str, predictor: bool, planar: bool, tile: int | None) -> None:
    if predictor and compression not in ("lzw", "deflate"):
        pytest.skip("TIFF defines prediction for LZW and deflate only")
    array = bands(np.uint16, 6)
    data = tiff(array, compression=compression, predictor=predictor, planar=planar, tile=tile)
    assert np.array_equal(decode(data), array)


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big-endian"])
@pytest.mark.parametrize("big", [False, True], ids=["classic", "BigTIFF"])
@pytest.mark.parametrize("predictor", [False, True], ids=["plain", "predicted"])
def test_byte_orders_and_big_files(order: str, big: bool, predictor: bool) -> None:
    array = bands(np.uint16, 7)
    data = tiff(array, order=order, big=big, compression="deflate", predictor=predictor)
    assert np.array_equal(decode(data), array)


def test_files_written_by_another_library() -> None:
    array = bands(np.uint16, 3)
    done, data = cv2.imencode(".tif", array)
    assert done
    assert np.array_equal(decode(data.tobytes()), array[:, :, ::-1]), "OpenCV's order of colours is reversed"


@pytest.mark.parametrize("keep", [3, 9, 60, 1000])
def test_truncated_files_are_refused(keep: int) -> None:
    data = tiff(bands(np.uint16, 5))
    with pytest.raises(UserError, match=r"x\.tif"):
        decode(data[:keep], Path("x.tif"))


def test_compressions_of_pixels_are_explained() -> None:
    data = bytearray(tiff(bands(np.uint8, 5)))
    place = data.index(struct.pack("<HHIH", 259, 3, 1, 1))
    data[place + 8 : place + 10] = struct.pack("<H", 7)
    with pytest.raises(UserError, match=r"compression 7.*\.npy"):
        decode(bytes(data), Path("x.tif"))
