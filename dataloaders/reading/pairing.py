"""Which mask belongs to which image, and which files have no partner; splits that stay when files are added."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from base.entries import Entry
from utils.errors import UserError, plural
from utils.images import IMAGE_EXTENSIONS

log = logging.getLogger("data")

_SHOWN = 5


class Pairs(NamedTuple):
    """What matching found: pairs, and the files without a partner, each sorted."""

    entries: list[Entry]
    images_alone: list[Path]
    masks_alone: list[Path]

    def warn(self) -> list[Path]:
        """Log how many files have no partner, with a few of them; return them all."""
        for what, missing, files in (
            ("image", "mask", self.images_alone),
            ("mask", "image", self.masks_alone),
        ):
            if files:
                more = ", ..." if len(files) > _SHOWN else ""
                shown = ", ".join(str(f) for f in files[:_SHOWN])
                left_out = f"has no {missing} and is" if len(files) == 1 else f"have no {missing} and are"
                _warn(f"{plural(len(files), what)} {left_out} left out: {shown}{more}")
        return [*self.images_alone, *self.masks_alone]


@functools.cache
def _warn(message: str) -> None:
    # Once, though the loaders of several splits may list the same folder.
    log.warning(message)


def image_files(folder: Path, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> list[Path]:
    """Return the files with one of the extensions (any case) in ``folder`` and below, sorted; not hidden ones."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if name.lower().endswith(tuple(extensions)) and not name.startswith(".")
        ]
    return sorted(found)


def relative_stem(folder: Path, suffix: str = "") -> Callable[[Path], str]:
    """Return the key of files below ``folder``: the path from there without extension and without ``suffix``."""

    def key(path: Path) -> str:
        return path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)

    return key


def pair(
    images: Iterable[Path],
    masks: Iterable[Path],
    image_key: Callable[[Path], str],
    mask_key: Callable[[Path], str],
) -> Pairs:
    """Match images and masks whose keys are equal; entries are named by their keys, and sorted by them.

    Raises:
        UserError: two images, or two masks, have the same key.
    """
    by_key, masks_by_key = _index(images, image_key), _index(masks, mask_key)
    both = sorted(by_key.keys() & masks_by_key.keys())
    return Pairs(
        [Entry(by_key[key], masks_by_key[key], key) for key in both],
        sorted(by_key[key] for key in by_key.keys() - masks_by_key.keys()),
        sorted(masks_by_key[key] for key in masks_by_key.keys() - by_key.keys()),
    )


def _index(files: Iterable[Path], key: Callable[[Path], str]) -> dict[str, Path]:
    result: dict[str, Path] = {}
    for file in files:
        other = result.setdefault(key(file), file)
        if other is not file:
            raise UserError(
                f"{other} and {file} stand for the same sample ({key(file)!r}); files are matched by their names "
                "without extension, so keep one of them"
            )
    return result


def split_by_fraction(
    names: Iterable[str], fractions: Mapping[str, float], rest: str, seed: int = 0
) -> dict[str, set[str]]:
    """Deal names out to parts: ``fractions`` of them (rounded) to its keys, what remains to ``rest``.

    Names are ordered by a hash of seed and name. So the split depends neither on the machine nor on the order
    of files, and when files are added nearly all others stay in their parts.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    parts, start = {}, 0
    for part, fraction in fractions.items():
        count = round(len(order) * fraction)
        parts[part] = set(order[start : start + count])
        start += count
    parts[rest] = set(order[start:])
    return parts
