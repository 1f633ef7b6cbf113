"""PNG files of any number of bits, written by hand: Pillow and OpenCV write 1 (Pillow), 8 and 16 only."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def png(array: np.ndarray, bits: int, kind: int, extra: bytes = b"", interlaced: bool = False) -> bytes:
    """Write a PNG by hand. Kinds: 0 gray, 2 RGB, 3 palette, 4 gray with alpha, 6 RGBA. ``extra`` chunks come first."""
    height, width = array.shape[:2]

    def rows(part: np.ndarray) -> bytes:
        if bits == 16:
            return b"".join(b"\0" + row.astype(">u2").tobytes() for row in part)
        digits = (part.reshape(*part.shape[:2], -1)[:, :, :, None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(digits.reshape(len(part), -1).astype(np.uint8), axis=1)
        return b"".join(b"\0" + row.tobytes() for row in packed)

    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    parts = [array[y::dy, x::dx] for x, y, dx, dy in passes] if interlaced else [array]
    pixels = b"".join(rows(part) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
