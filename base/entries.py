"""What a data set, its loader and the worker processes exchange: entries, samples, batches and the cache."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from base.text import printable
from utils.batch import Batch
from utils.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

# An index, (epoch, index), or (epoch, index, draw) if an epoch draws the index for the second, third, ... time.
Key = int | tuple[int, int] | tuple[int, int, int]

BROKEN_FILES_HINT = (
    "\n(python -m dataloaders check --config CONFIG finds all such files; "
    '"on_error": "skip" in the loader\'s args skips them)'
)


class Sample(NamedTuple):
    """One item: ``image`` uint8 ``(C, H, W)`` (float32 in [0, 1] for more than 8 bits), ``label`` integers
    ``(H, W)``: class ids or the ignore index, ``name``.
    """

    image: Tensor
    label: Tensor
    name: str


class Skipped(NamedTuple):
    """An item that was skipped because it could not be read, and the sample that replaces it."""

    reasons: list[str]
    replacement: Sample | None


class Entry(NamedTuple):
    """Where one sample comes from. Without a ``label`` file all its pixels are ignored."""

    image: Path | None
    label: Path | None
    name: str


class Entries(Sequence[Entry]):
    """A list of entries in one flat buffer, which worker processes share.

    A list of Python objects would be copied into each worker, because counting references writes to the objects.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        rows = [pickle.dumps(tuple(f and str(f) for f in entry)) for entry in entries]
        self._rows, self._ends = b"".join(rows), np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = self._ends[index % len(self) :][:2]
        image, label, name = pickle.loads(self._rows[start:end])
        return Entry(image and Path(image), label and Path(label), name)


def distinct(entries: Iterable[Entry], root: Path | None) -> list[Entry]:
    """Return the entries without repetitions and with unique, printable names.

    Results are stored under these names. Samples with the same name are named by their path below ``root``, or
    numbered.
    """
    once = [e if e.image is None else e._replace(name=printable(e.name)) for e in dict.fromkeys(entries)]
    shared = {name for name, count in Counter(e.name for e in once).items() if count > 1}
    taken: Counter[str] = Counter(e.name for e in once if e.name not in shared)
    result = []
    for entry in once:
        name = entry.name
        if name in shared and entry.image is not None:
            path = entry.image.with_suffix("")
            above = root if root is not None and path.is_relative_to(root) else path.anchor
            name = printable(path.relative_to(above).as_posix())
            plain, number = name, 1
            while taken[name]:
                number += 1
                name = f"{plain}_{number}"
            taken[name] += 1
        result.append(entry._replace(name=name))
    return result


class Collated(NamedTuple):
    """What a worker returns for one batch.

    ``batch`` is None if none of its samples could be read, ``problems`` says which files were skipped and why, and
    ``failure`` is the message of an error that must stop the run.
    """

    batch: Batch | None
    problems: list[str]
    failure: str | None = None


def collate(items: Sequence[Sample | Skipped | UserError]) -> Collated:
    """Stack samples to a batch; if their sizes differ, the batch has lists instead of tensors."""
    problems: list[str] = []
    samples: list[Sample] = []
    for item in items:
        if isinstance(item, UserError):
            return Collated(None, [], str(item))
        if isinstance(item, Skipped):
            problems += item.reasons
            if item.replacement is not None:
                samples.append(item.replacement)
        else:
            samples.append(item)
    if not samples:
        return Collated(None, problems)
    images, labels = [s.image for s in samples], [s.label for s in samples]
    if len({image.dtype for image in images}) > 1:
        # 8 and 16 bit files in one batch.
        images = [i.float() / 255 if i.dtype == torch.uint8 else i for i in images]
    names = [s.name for s in samples]
    if len({image.shape for image in images}) > 1:
        return Collated(Batch(images, labels, names), problems)
    return Collated(Batch(torch.stack(images), torch.stack(labels), names), problems)


class Cache:
    """All images and labels of a data set, read once; worker processes share their memory.

    With ``keep_errors``, a UserError is raised when its sample is asked for, otherwise at once.
    """

    def __init__(self, read: Callable[[int], tuple[np.ndarray, np.ndarray]], count: int, keep_errors: bool) -> None:
        def attempt(index: int) -> tuple[np.ndarray, np.ndarray] | UserError:
            try:
                return read(index)
            except UserError as error:
                if keep_errors:
                    return error
                raise

        self._pairs = list(in_threads(attempt, range(count)))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        pair = self._pairs[index]
        if isinstance(pair, UserError):
            raise UserError(str(pair))
        return pair


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most ``limit`` of the items, evenly spread; None: all."""
    count = len(items)
    places = np.linspace(0, count - 1, count if limit is None else min(limit, count)).astype(int)
    return [items[place] for place in places.tolist()]


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterable[R]:
    """Yield the results for ``items`` in order, computed by a few threads (image decoders release the GIL)."""
    with ThreadPoolExecutor(max_workers=min(8, 2 * available_cores())) as pool:
        yield from pool.map(function, items)
