"""Splits by the names of samples: the same on every machine, and nearly the same after files are added."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from utils.errors import UserError


def grouping(group_by: str | None) -> Callable[[str], str]:
    """Return the function from the name of a sample to its group; samples of one group stay together.

    Args:
        group_by: a regular expression that is searched in the name. The group is the text of its first parentheses, or
            of the whole match: ``"^([^_]+)_"`` finds patient7 in patient7_slice3. None: each sample is a group.

    Raises:
        ValueError: it is not a regular expression. The function raises UserError for a name without a match.
    """
    if group_by is None:
        return str
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise ValueError(f"group_by must be a regular expression, got {group_by!r}: {error}") from None

    def group(name: str) -> str:
        match = pattern.search(name)
        if match is None:
            raise UserError(f"group_by: {group_by!r} does not match the name {name!r}; it must match every sample")
        found = match.group(1) if pattern.groups else match.group()
        return found or ""

    return group


def split_by_fraction(
    names: Iterable[str], fractions: Mapping[str, float], rest: str, seed: int = 0, group_by: str | None = None
) -> dict[str, set[str]]:
    """Split names: each key of ``fractions`` gets its fraction (rounded), and ``rest`` gets the others.

    Groups are sorted by a hash of seed and name and then cut into parts. If files are added, nearly all names stay in
    their parts.
    """
    names = list(names)
    ends, end = [], 0
    for fraction in fractions.values():
        end += round(len(names) * fraction)
        ends.append(end)
    parts = _cut(names, ends, seed, group_by)
    return dict(zip([*fractions, rest], parts, strict=True))


def split_by_fold(
    names: Iterable[str], val_fold: Sequence[int], group_by: str | None = None
) -> tuple[set[str], set[str]]:
    """Return the names to train on, and those of fold k (from 0) of n folds of nearly equal size; ``val_fold``: (k, n).

    Raises:
        ValueError: ``val_fold`` is invalid.
        UserError: a fold would be empty.
    """
    if len(val_fold) != 2 or val_fold[1] < 2 or not 0 <= val_fold[0] < val_fold[1]:
        raise ValueError(f"val_fold must be [k, n] with n at least 2 and k from 0 to n - 1, got {list(val_fold)}")
    names, (chosen, count) = list(names), val_fold
    folds = _cut(names, [round(len(names) * (i + 1) / count) for i in range(count - 1)], 0, group_by)
    if not all(folds):
        groups = len(set(map(grouping(group_by), names)))
        what = f"{groups} groups (group_by)" if group_by else f"{groups} samples"
        raise UserError(f"val_fold: {what} are too few or too uneven for {count} folds; choose fewer folds")
    return set().union(*(fold for i, fold in enumerate(folds) if i != chosen)), folds[chosen]


def _cut(names: Sequence[str], ends: Sequence[int], seed: int, group_by: str | None) -> list[set[str]]:
    """Sort the groups by a hash and cut them at ``ends`` (numbers of names); return the names of each part."""
    group = grouping(group_by)
    sizes = Counter(map(group, names))
    # Names may contain bytes that are not UTF-8.
    keys = {name: hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest() for name in sizes}
    part_of, start = {}, 0
    for name in sorted(sizes, key=keys.__getitem__):
        middle = start + sizes[name] / 2
        part_of[name] = sum(end <= middle for end in ends)
        start += sizes[name]
    parts: list[set[str]] = [set() for _ in range(len(ends) + 1)]
    for name in names:
        parts[part_of[group(name)]].add(name)
    return parts
