"""Samples that belong together, such as frames of a video or slices of a patient: a split must not divide them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base.splits import grouping, split_by_fraction
from dataloaders.check.neighbors import neighbors_are_alike
from utils.errors import UserError

_RUNS = (r"^(.+)/", r"^(.+?)[_\- ]?\d+$", r"^(.+?)[_\- ]", r"^(\d+)[_\- ]")
_LARGEST = 0.4  # share of the samples that a group may have
_CLEAR = 5  # this many groups by name are hardly a coincidence


class Groups(NamedTuple):
    """A ``group_by``, the share of the samples to hold out, and the reason."""

    pattern: str
    share: float
    why: str


def find_groups(names: Sequence[str], paths: Sequence[Path], share: float) -> Groups | None:
    """Return how the samples are grouped by their names; None if they are not.

    Many groups by name are enough. Few groups, and blocks of consecutive numbers, also need neighbors that look alike:
    names like cat_01 and dog_01 do not form groups.

    Args:
        names, paths: of the samples, and of their images.
        share: the share to hold out; it is raised if the groups are too large for it.
    """
    count = len(names)
    runs = {pattern: sizes for pattern in _RUNS if (sizes := _sizes(pattern, names)) and len(sizes) <= count / 3}
    for pattern, sizes in runs.items():
        if len(sizes) >= _CLEAR and max(sizes.values()) <= count / 3:
            return Groups(
                pattern,
                _enough(names, pattern, share),
                f"the names have {len(sizes)} different prefixes, such as {min(sizes)!r}. Images with one prefix "
                "may be frames of one scene or slices of one patient, so they are not divided. Remove this if they "
                "are independent",
            )
    if not neighbors_are_alike(names, paths):
        return None
    alike = "images with consecutive names look alike, like frames of a video or slices of a patient"
    for pattern, sizes in runs.items():
        if len(sizes) > 2 and max(sizes.values()) <= _LARGEST * count:
            why = f"{alike}; images with the same prefix, such as {min(sizes)!r}, are not divided"
            return Groups(pattern, _enough(names, pattern, share), why)
    for digits in (4, 3, 2, 1):
        pattern = rf"^(.*?)\d{{0,{digits}}}\D*$"
        sizes = _sizes(pattern, names)
        if _CLEAR <= len(sizes) <= count / 3 and max(sizes.values()) <= count / 3:
            last = "last digit" if digits == 1 else f"last {digits} digits"
            why = f"{alike}; they are split in blocks: names that are equal up to the {last} stay together"
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
