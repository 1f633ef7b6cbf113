"""Find images that train and validation data share, and training data that is not shuffled."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path

from base.base_dataloader import BaseDataLoader
from base.entries import Entry, in_threads, spread
from base.splits import grouping
from dataloaders.check.neighbors import natural_order, neighbors_are_alike
from utils.distributed import is_first
from utils.errors import UserError, plural, warn

HASHED_FILES = 512  # per side, at most
_PART = 1 << 16  # bytes at both ends of a file that are compared
# What exports with augmentation add to the name of an image: Roboflow's key, or a word.
_COPY = re.compile(
    r"(\.rf\.[0-9a-z]{20,}|[_\-. ](aug|augmented|[hv]?flip|flipped|mirror|rot|rotated|copy)[_\-]?\d*| ?\(\d+\))+$", re.I
)

_Files = list[tuple[Entry, os.stat_result]]


def warn_about_loaders(train: BaseDataLoader, val: BaseDataLoader | None) -> None:
    """Print a warning for each mistake in the loaders that makes training or its scores useless."""
    if is_first():
        for message in (*in_same_order(train), *(shared({"train": train, "val": val}) if val is not None else ())):
            warn(message)


def in_same_order(train: BaseDataLoader) -> list[str]:
    """Return a message if the training images come in the same order in every epoch."""
    if train.batches.shuffle:
        return []
    return ['train_loader: every epoch shows the images in the same order; set "shuffle": true in its args']


def shared(loaders: dict[str, BaseDataLoader]) -> list[str]:
    """Return messages about images that "train" has in common with another loader.

    It finds the same file (also through links), files with equal content (among up to ``HASHED_FILES`` of each loader),
    and samples of one group (by ``group_by``, or by the names that augmented copies usually have).
    """
    return [
        message
        for (first, a), (second, b) in combinations(loaders.items(), 2)
        if "train" in (first, second)
        for message in _between(f"{first} and {second}", a, b)
    ]


def common_images(stages: str, a: BaseDataLoader, b: BaseDataLoader) -> str | None:
    """Return a message if two loaders share images, files with equal content, or samples of one group."""
    return next(_between(stages, a, b), None)


def _between(stages: str, a: BaseDataLoader, b: BaseDataLoader) -> Iterator[str]:
    left, right = ([x.dataset.entries[index] for index in x.batches.indices.tolist()] for x in (a, b))
    advice = "scores on these images do not show how well the network segments new ones"
    if not left or not right:
        return
    if left[0].image is None or right[0].image is None:
        one, other = a.dataset, b.dataset
        if type(one) is type(other) and getattr(one, "scene_seed", None) == getattr(other, "scene_seed", None):
            same = {entry.name for entry in left} & {entry.name for entry in right}
            if same:
                yield f"{stages} have {plural(len(same), 'image')} in common, such as {min(same)}: {advice}"
        return
    files, others = _with_status(left), _with_status(right)
    known = {(status.st_dev, status.st_ino) for _, status in files}  # the same file, also through links
    same_files = [entry for entry, status in others if (status.st_dev, status.st_ino) in known]
    if same_files:
        yield f"{stages} have {plural(len(same_files), 'image')} in common, such as {same_files[0].image}: {advice}"
        return
    equal = _equal_content(files, others)
    if equal:
        yield (
            f"{stages} contain files with equal content: {plural(len(equal), 'pair')} found, such as "
            f"{equal[0][0].image} and {equal[0][1].image}: {advice}"
        )
    yield from _common_groups(stages, a.dataset.group_by or b.dataset.group_by, left, right)
    if a.group_of is None and b.group_of is None and _are_mixed(left, right):
        every = [(entry.name, entry.image) for entry in (*left, *right) if entry.image is not None]
        if neighbors_are_alike([name for name, _ in every], [path for _, path in every]):
            yield (
                f"{stages}: images with consecutive names look alike, like frames of a video or slices of a "
                f"patient, and are on both sides: {advice}. Keep them together with `group_by`, which python -m "
                "dataloaders plan suggests"
            )


def _are_mixed(left: list[Entry], right: list[Entry]) -> bool:
    """Return whether most samples of the second part follow or precede one of the first, by name."""
    sides = [(entry.name, part is left) for part in (left, right) for entry in part]
    first = [side for _, side in sorted(sides, key=lambda side: natural_order(side[0]))]
    beside = [a or b for a, b in zip([False, *first[:-1]], [*first[1:], False], strict=True)]
    return sum(near for near, own in zip(beside, first, strict=True) if not own) > len(right) / 2


def _with_status(entries: Iterable[Entry]) -> list[tuple[Entry, os.stat_result]]:
    """Return the entries with the status of their image files; missing files are left out."""
    found = []
    for entry in entries:
        with suppress(OSError):
            found.append((entry, entry.image.stat()))  # type: ignore[union-attr]
    return found


def _equal_content(left: _Files, right: _Files) -> list[tuple[Entry, Entry]]:
    """Return pairs of entries whose image files have the same size, start and end."""
    sizes = {status.st_size for _, status in left}
    right = spread([file for file in right if file[1].st_size in sizes], HASHED_FILES)
    sizes = {status.st_size for _, status in right}
    left = spread([file for file in left if file[1].st_size in sizes], HASHED_FILES)
    known = dict(_hashed(left))
    return [(known[digest], entry) for digest, entry in _hashed(right) if digest in known]


def _hashed(files: _Files) -> Iterator[tuple[bytes, Entry]]:
    digests = in_threads(_digest, [entry.image for entry, _ in files])
    return ((digest, entry) for digest, (entry, _) in zip(digests, files, strict=True) if digest)


def _digest(path: Path | None) -> bytes:
    """Return a hash of both ends of a file and its size; empty if it cannot be read."""
    assert path is not None
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(_PART)
            file.seek(max(len(start), size - _PART))
            return hashlib.blake2b(start + file.read() + str(size).encode()).digest()
    except OSError:
        return b""


def _common_groups(stages: str, group_by: str | None, left: list[Entry], right: list[Entry]) -> Iterator[str]:
    key: Callable[[str], str] = grouping(group_by)
    why, fix = f"group_by {group_by!r}", "split by group: val_fraction or val_fold with group_by"
    if group_by is None:
        if not any(_COPY.search(entry.name) for entry in (*left, *right)):
            return
        key = partial(_COPY.sub, "")
        why, fix = "by their names, augmented copies of one image", 'export without augmentation, or use "group_by"'
    try:
        common = {key(entry.name): entry for entry in left}
        both = [entry for entry in right if key(entry.name) in common]
    except UserError:
        return  # the data set reports names that group_by does not match
    if both:
        one = common[key(both[0].name)]
        yield (
            f"{stages} share groups ({why}): {plural(len(both), 'sample')} of the second, such as {one.name} and "
            f"{both[0].name}; {fix}"
        )
