"""Do images that follow each other by name look alike, as frames of a video do?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from base.entries import in_threads
from utils.errors import UserError
from utils.images.formats import decode, read_bytes

_STRETCHES, _LENGTH = 6, 10  # stretches that are compared, and consecutive images in each
_APART = 4  # images with this many between them are not neighbors
_FEWEST = 8
# Median difference of neighbors, divided by that of other images: measured 0.3 to 0.5 for videos with a frame per
# second or more, and 0.8 to 1.1 for frames 12 seconds apart and for images of different patients.
_ALIKE = 0.6
_SIDE = 8  # of the thumbnails that are compared


def neighbors_are_alike(names: Sequence[str], paths: Sequence[Path]) -> bool:
    """Return whether images that follow each other by name differ much less than others."""
    order = sorted(range(len(names)), key=lambda i: natural_order(names[i]))
    starts = np.linspace(0, max(0, len(order) - _LENGTH), _STRETCHES).astype(int).tolist()
    places = sorted({place for start in starts for place in range(start, min(start + _LENGTH, len(order)))})
    thumbnails = in_threads(_thumbnail, [paths[order[place]] for place in places])
    readable = [(place, small) for place, small in zip(places, thumbnails, strict=True) if small is not None]
    if len(readable) < _FEWEST:
        return False
    place, small = np.array([p for p, _ in readable]), np.stack([s for _, s in readable])
    first, second = np.triu_indices(len(place), 1)
    difference, apart = np.abs(small[first] - small[second]).mean(1), place[second] - place[first]
    near, far = difference[apart == 1], difference[apart > _APART]
    return bool(len(near) and len(far) and np.median(near) < _ALIKE * np.median(far))


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _thumbnail(path: Path) -> np.ndarray | None:
    """Return an image as a few numbers of mean 0 and deviation 1; None if it cannot be read."""
    try:
        gray = decode(read_bytes(path), path).array.mean(2, dtype=np.float32)
    except UserError:
        return None
    small = np.asarray(cv2.resize(np.nan_to_num(gray), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA), np.float32)
    return ((small - small.mean()) / (small.std() + 1e-6)).reshape(-1)
