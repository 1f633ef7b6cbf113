"""Samples that belong together, such as frames of a video or slices of a patient: a split must not divide them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from base.entries import in_threads
from base.splits import grouping, split_by_fraction
from utils.errors import UserError
from utils.images.formats import decode, read_bytes

_RUNS = (r"^(.+)/", r"^(.+?)[_\- ]?\d+$", r"^(.+?)[_\- ]", r"^(\d+)[_\- ]")
_LARGEST = 0.4  # share of the samples that a group may have
_CLEAR = 5  # as many groups by name can hardly be chance
_STRETCHES, _LENGTH = 6, 10  # stretches that are compared, and consecutive images in each
_APART = 4  # images with this many between them are not neighbors
_FEWEST = 8
# Median difference of neighbors, divided by that of other images: measured 0.3 to 0.5 for videos with a frame per
# second or more, and 0.8 to 1.1 for frames 12 seconds apart and for images of different patients.
_ALIKE = 0.6
_SIDE = 8  # of the thumbnails that are compared


class Groups(NamedTuple):
    """A ``group_by``, the share of the samples to hold out, and the reason."""

    pattern: str
    share: float
    why: str


def find_groups(names: Sequence[str], paths: Sequence[Path], share: float) -> Groups | None:
    """Return how the samples are grouped by their names; None if they are not.

    Many groups by name are enough. Few groups, and blocks of consecutive numbers, also need neighbors that look alike:
    names like cat_01 and dog_01 are no groups.

    Args:
        names, paths: of the samples, and of their images.
        share: to hold out, if the groups are not so large that it must be more.
    """
    count = len(names)
    runs = {pattern: sizes for pattern in _RUNS if (sizes := _sizes(pattern, names)) and len(sizes) <= count / 3}
    for pattern, sizes in runs.items():
        if len(sizes) >= _CLEAR and max(sizes.values()) <= count / 3:
            return Groups(
                pattern,
                _enough(names, pattern, share),
                f"names fall into {len(sizes)} groups by how they begin, such as {min(sizes)!r}: perhaps frames of one "
                "scene or slices of one patient, so a group is not divided. Remove it if that is not so",
            )
    if not neighbors_are_alike(names, paths):
        return None
    alike = "images that follow each other by name look alike, as frames of a video or slices of a patient do"
    for pattern, sizes in runs.items():
        if len(sizes) > 2 and max(sizes.values()) <= _LARGEST * count:
            why = f"{alike}; a group with the same beginning, such as {min(sizes)!r}, is not divided"
            return Groups(pattern, _enough(names, pattern, share), why)
    for digits in (4, 3, 2, 1):
        pattern = rf"^(.*?)\d{{0,{digits}}}\D*$"
        sizes = _sizes(pattern, names)
        if _CLEAR <= len(sizes) <= count / 3 and max(sizes.values()) <= count / 3:
            last = "last digit" if digits == 1 else f"last {digits} digits"
            why = f"{alike}; they are split by blocks: names that are equal up to the {last} stay together"
            return Groups(pattern, _enough(names, pattern, share), why)
    return None


def _enough(names: Sequence[str], pattern: str, share: float) -> float:
    """Return the smallest share that holds out a group at all."""
    shares = (share, *np.arange(0.2, 0.9, 0.05).round(2).tolist())
    return next(s for s in shares if s >= share and split_by_fraction(names, {"val": s}, "train", 0, pattern)["val"])


def _sizes(pattern: str, names: Sequence[str]) -> Counter[str]:
    """Return the number of names in each group; nothing if a name does not match."""
    try:
        return Counter(map(grouping(pattern), names))
    except UserError:
        return Counter()


def neighbors_are_alike(names: Sequence[str], paths: Sequence[Path]) -> bool:
    """Return whether images that follow each other by name differ much less than others."""
    order = sorted(range(len(names)), key=lambda i: _natural(names[i]))
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


def _natural(name: str) -> list[tuple[int, str]]:
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
