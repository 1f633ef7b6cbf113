"""Render annotated areas: polygons, boxes, ellipses, and the run-length codes of COCO, CVAT and Label Studio.

A pixel belongs to an area if its center lies inside. Coordinates count from the image's upper left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Render = Callable[[int, int], np.ndarray]

_ELLIPSE_POINTS = 64


def polygons(rings: Sequence[np.ndarray]) -> Render:
    """Return a function that renders the union of polygons, each ``(N, 2)`` of x, y.

    The function raises ValueError if a coordinate is not finite.
    """

    def render(height: int, width: int) -> np.ndarray:
        area = np.zeros((height, width), bool)
        for ring in rings:
            _fill(area, np.asarray(ring, np.float64).reshape(-1, 2))
        return area

    return render


def _fill(area: np.ndarray, ring: np.ndarray) -> None:
    """Set the pixels whose centers lie inside a polygon, by the even-odd rule."""
    height, width = area.shape
    if not np.isfinite(ring).all():
        raise ValueError("its coordinates are not finite numbers")
    if len(ring) < 3:
        return
    (x, y), (x2, y2) = ring.T, np.roll(ring, -1, axis=0).T
    top = int(np.clip(np.ceil(y.min() - 0.5), 0, height))
    bottom = int(np.clip(np.ceil(y.max() - 0.5), 0, height))
    centers = np.arange(top, bottom)[:, None] + 0.5
    rows, edges = np.nonzero((y <= centers) != (y2 <= centers))
    at = (centers[rows, 0] - y[edges]) / (y2 - y)[edges]
    crossings = x[edges] + at * (x2 - x)[edges]
    columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)
    turns = np.zeros((bottom - top, width + 1), np.int32)
    np.add.at(turns, (rows, columns), 1)
    area[top:bottom] |= turns.cumsum(axis=1)[:, :width] % 2 == 1


def box(x: float, y: float, width: float, height: float, degrees: float = 0, centered: bool = False) -> Render:
    """Return a function that renders a box, rotated clockwise about its upper left corner, or about its center."""
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float64)
    pivot = np.array((width / 2, height / 2)) if centered else np.zeros(2)
    return polygons([_turned(corners - pivot, degrees) + pivot + (x, y)])


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0) -> Render:
    """Return a function that renders an ellipse with center (x, y), rotated clockwise."""
    angles = np.linspace(0, 2 * np.pi, _ELLIPSE_POINTS, endpoint=False)
    outline = np.stack([radius_x * np.cos(angles), radius_y * np.sin(angles)], axis=1)
    return polygons([_turned(outline, degrees) + (x, y)])


def _turned(points: np.ndarray, degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return points @ np.array([[cos, sin], [-sin, cos]])


def window(mask: np.ndarray, left: int, top: int) -> Render:
    """Return a function that renders a mask whose upper left corner is at (left, top) of the image."""

    def render(height: int, width: int) -> np.ndarray:
        area = np.zeros((height, width), bool)
        rows = slice(max(top, 0), min(top + mask.shape[0], height))
        columns = slice(max(left, 0), min(left + mask.shape[1], width))
        if rows.start < rows.stop and columns.start < columns.stop:
            area[rows, columns] = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        return area

    return render


def runs(counts: Sequence[int], height: int, width: int, order: str = "C") -> np.ndarray:
    """Return the mask of alternating runs of 0 and 1, starting with 0: bool ``(height, width)``.

    ``order``: "C" for row by row, "F" for column by column (COCO). ValueError: the runs do not fill the mask.
    """
    if any(count < 0 for count in counts) or sum(counts) != height * width:
        raise ValueError(f"the runs have {sum(counts)} pixels, expected {width} x {height}")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape((height, width), order=order)  # type: ignore[call-overload]


def coco_counts(text: str | bytes) -> list[int]:
    """Return the runs in COCO's compressed code.

    Each number is stored in groups of 5 bits, lowest first, as characters from 48 on. Bit 5 is set if more groups
    follow; bit 4 of the last group is the sign. From the fourth number on, the difference to the number two places
    before is stored.
    """
    counts: list[int] = []
    value = shift = 0
    for byte in text.encode("ascii") if isinstance(text, str) else text:
        group = byte - 48
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def label_studio_mask(code: Sequence[int], height: int, width: int) -> np.ndarray:
    """Return the area drawn with Label Studio's brush, bool ``(height, width)``.

    The code is a stream of bits: 32 for the number of values, 5 for the size of a value minus one, four times 4 for
    sizes of run lengths minus one, then the runs. A run has a bit (whether one value is repeated), 2 bits that choose
    the size of the length, the length minus one, and the value or values. The values are RGBA; the area is where A is
    above 0. ValueError: the code does not fill the image.
    """
    data, place = bytes(code), 0

    def read(bits: int) -> int:
        nonlocal place
        end = place + bits
        chunk = int.from_bytes(data[place >> 3 : (end + 7) >> 3], "big")
        place = end
        return chunk >> (-end % 8) & ((1 << bits) - 1)

    count = read(32)
    if count != 4 * height * width:
        raise ValueError(f"the code has {count} values, expected 4 x {width} x {height}")
    size, lengths = read(5) + 1, [read(4) + 1 for _ in range(4)]
    values, at = np.zeros(count, np.uint8), 0
    while at < count:
        if place > 8 * len(data):
            raise ValueError("the code ends early")
        repeated, bits = read(1), lengths[read(2)]
        stop = min(at + 1 + read(bits), count)
        values[at:stop] = read(size) if repeated else [read(size) for _ in range(at, stop)]
        at = stop
    return values.reshape(height, width, 4)[:, :, 3] > 0
