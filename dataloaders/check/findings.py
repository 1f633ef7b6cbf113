"""Read the files of a data set and collect facts and problems."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from base.base_dataset import BaseDataSet
from base.entries import spread
from base.statistics import mean_and_std, moments
from utils.errors import UserError
from utils.images.formats import decode, orientation, read_bytes
from utils.progress import progress_bar

DECODED = 100  # at most this many images are also examined as stored


@dataclass
class OnDisk:
    """The values in the image files of one kind."""

    first: str  # the name of such a file
    files: int = 0
    low: float = np.inf
    high: float = -np.inf
    largest: int | None = None


@dataclass
class Findings:
    """Facts and problems of some samples of a data set."""

    looked_at: list[int]  # indices of the samples
    good: list[int] = field(default_factory=list)  # of those that could be read
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) -> images
    stored: Counter[int] = field(default_factory=Counter)  # value in the label files, before translation -> pixels
    illegal: dict[int, str] = field(default_factory=dict)  # stored value that is not a class -> the first file with it
    problems: list[str] = field(default_factory=list)  # one message per file that cannot be used
    # Message without files and counts -> (name of the sample, message) of each such problem.
    alike: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    pixels: np.ndarray = field(default_factory=lambda: np.array(0))  # per class id; the last entry: ignored pixels
    images: np.ndarray = field(default_factory=lambda: np.array(0))  # with such pixels
    moments: np.ndarray = field(default_factory=lambda: np.array(0))  # sum of :func:`base.statistics.moments`
    # (channels without transparency, whether there is transparency, type) of up to DECODED image files.
    on_disk: dict[tuple[int, bool, str], OnDisk] = field(default_factory=dict)
    turned: list[str] = field(default_factory=list)  # images turned by EXIF data, perhaps unlike their masks
    weights: list[float] = field(default_factory=list)  # those of "balanced"; empty without labeled pixels

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean of the images per channel, for intensities in [0, 1]."""
        return mean_and_std([self.moments])[0]

    @cached_property
    def std(self) -> np.ndarray:
        """Standard deviation of the images per channel."""
        return mean_and_std([self.moments])[1]

    def add(self, other: Findings) -> None:
        """Add the findings of another sample."""
        for kind, seen in other.on_disk.items():
            known = self.on_disk.setdefault(kind, OnDisk(seen.first, largest=seen.largest))
            known.files, known.low, known.high = known.files + 1, min(known.low, seen.low), max(known.high, seen.high)
        for message, problems in other.alike.items():
            self.alike.setdefault(message, []).extend(problems)
        self.good += other.good
        self.turned += other.turned
        self.problems += other.problems
        self.sizes.update(other.sizes)
        self.stored.update(other.stored)
        self.illegal = other.illegal | self.illegal
        self.pixels, self.images = self.pixels + other.pixels, self.images + other.images
        self.moments = self.moments + other.moments


def inspect(dataset: BaseDataSet, samples: int = 0) -> Findings:
    """Read ``samples`` images and label maps, evenly spread (0: all); return what was found."""
    findings = Findings(spread(range(len(dataset)), samples or None))
    count = len(findings.looked_at)
    findings.pixels = findings.images = np.zeros(dataset.label_count + 1, np.int64)
    findings.moments = np.zeros((3, dataset.in_channels))
    with ThreadPoolExecutor(max_workers=4) as pool:
        decoded = set(findings.looked_at[:: -(-count // DECODED)])
        looks = pool.map(lambda index: _look(dataset, index, index in decoded), findings.looked_at)
        for look in progress_bar(looks, total=count, desc=f"read {dataset.split}", unit="image"):
            findings.add(look)
    if findings.pixels[:-1].any():
        findings.weights = [float(weight) for weight in dataset.class_weights(count)]
    return findings


def _look(dataset: BaseDataSet, index: int, as_stored: bool) -> Findings:
    found, entry = Findings([index]), dataset.entries[index]
    try:
        if as_stored and entry.image is not None:
            kind, seen = _stored_image(entry.image, dataset.in_channels)
            found.on_disk[kind] = seen
        if entry.label is not None:
            found.stored = _histogram(dataset.load_label(entry.label))
            found.illegal = {value: str(entry.label) for value in found.stored if not is_legal(dataset, value)}
        image, label = dataset.read(index)
    except UserError as error:
        message = str(error)
        general = re.sub(r"\d+ pixels?\b", "", message).replace(str(entry.image), "").replace(str(entry.label), "")
        found.problems, found.alike[general] = [message], [(entry.name, message)]
        return found
    if as_stored and entry.image is not None and entry.label is not None:
        turn, of_mask = (orientation(read_bytes(path)) for path in (entry.image, entry.label))
        # If width and height are swapped, equal sizes show that the mask fits the turned image.
        if turn != of_mask and (label.shape[0] == label.shape[1] or (turn >= 5) == (of_mask >= 5)):
            found.turned = [f"{entry.image} (orientation {turn}, its mask {of_mask})"]
    ignored = label == dataset.ignore_index
    found.good, found.sizes = [index], Counter([(label.shape[1], label.shape[0])])
    found.pixels = np.append(np.bincount(label[~ignored], minlength=dataset.label_count), ignored.sum())
    found.images = found.pixels > 0
    if entry.image is not None and dataset.value_limits.nodata is not None:
        found.moments = moments(*dataset.load_image(entry.image))  # read() fills the pixels without data
    else:
        found.moments = moments(image)
    return found


def _histogram(stored: np.ndarray) -> Counter[int]:
    """Return the values that occur, and how often each occurs."""
    if stored.dtype == np.uint8:
        return +Counter(dict(enumerate(np.bincount(stored.reshape(-1)).tolist())))  # several times faster
    values, counts = np.unique(stored, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _stored_image(path: Path, channels: int) -> tuple[tuple[int, bool, str], OnDisk]:
    raster = decode(read_bytes(path), path, channels)
    values = raster.array[:, :, :-1] if raster.alpha else raster.array
    if raster.palette is not None:
        values = raster.palette[values[:, :, 0]]
    low, high = (float(np.nanmin(values)), float(np.nanmax(values))) if values.size else (0.0, 0.0)
    return (values.shape[2], raster.alpha, str(values.dtype)), OnDisk(path.name, 1, low, high, raster.largest)


def likely_largest(high: float) -> int:
    """Return the value of white in images whose values go up to ``high``: that of a camera's 8, 10, 12 or 14 bits."""
    return next((2**bits - 1 for bits in (8, 10, 12, 14) if high < 2**bits), round(high))


def is_legal(dataset: BaseDataSet, value: int) -> bool:
    """Return whether a stored label value means a class or "not labeled"."""
    probe = np.full((1, 1), value, np.uint8 if 0 <= value <= 255 else np.int32)
    try:
        dataset.label_table.translate(probe, "")
    except UserError:
        return False
    return True
