"""Read the files of a data set and collect facts and problems."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from base.base_dataset import BaseDataSet
from base.entries import spread
from base.statistics import mean_and_std, moments
from utils.errors import UserError
from utils.images.formats import decode, read_bytes
from utils.progress import progress_bar

DECODED = 100  # at most so many images are also examined as stored


@dataclass
class OnDisk:
    """The values in the image files of one kind."""

    files: int = 0
    low: float = np.inf
    high: float = -np.inf
    largest: int | None = None


@dataclass
class Findings:
    """Facts and problems of some samples of a data set.

    Attributes:
        looked_at: indices of the samples.
        good: indices of the samples that could be read.
        sizes: (width, height) -> number of images.
        stored: value in the label files, before translation -> number of pixels.
        illegal: stored value that is not a class -> the first file with it.
        problems: one message per file that cannot be used.
        alike: message without files and counts -> (name of the sample, message) of each such problem.
        pixels: number of pixels per class id; the last entry counts ignored pixels.
        images: number of images with such pixels.
        mean, std: of the images per channel, for intensities in [0, 1].
        on_disk: (channels without transparency, whether there is transparency, type) of image files -> their values;
            for up to ``DECODED`` samples.
        weights: the class weights of ``"weight": "balanced"`` on these samples; empty without labeled pixels.
    """

    looked_at: list[int]
    good: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    stored: Counter[int] = field(default_factory=Counter)
    illegal: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    alike: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0))
    images: np.ndarray = field(default_factory=lambda: np.zeros(0))
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    std: np.ndarray = field(default_factory=lambda: np.zeros(0))
    on_disk: dict[tuple[int, bool, str], OnDisk] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)


@dataclass
class _Look:
    """The findings of one sample."""

    index: int
    size: tuple[int, int] | None = None
    stored: tuple[np.ndarray, np.ndarray] | None = None
    counts: np.ndarray | None = None
    moments: np.ndarray | None = None
    problem: str | None = None
    raster: tuple[tuple[int, bool, str], float, float, int | None] | None = None


def inspect(dataset: BaseDataSet, samples: int = 0) -> Findings:
    """Read ``samples`` images and label maps, evenly spread (0: all); return what was found."""
    findings = Findings(spread(len(dataset), samples or None))
    count = len(findings.looked_at)
    findings.pixels = np.zeros(dataset.label_count + 1, np.int64)
    findings.images = np.zeros(dataset.label_count + 1, np.int64)
    found_moments = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        decoded = set(findings.looked_at[:: -(-count // DECODED)])
        looks = pool.map(lambda index: _look(dataset, index, index in decoded), findings.looked_at)
        for look in progress_bar(looks, total=count, desc=f"read {dataset.split}", unit="image"):
            _add(findings, look, dataset)
            if look.moments is not None:
                found_moments.append(look.moments)
    findings.mean, findings.std = mean_and_std(found_moments or [np.zeros((3, dataset.in_channels))])
    if findings.pixels[:-1].any():
        findings.weights = [float(weight) for weight in dataset.class_weights(count)]
    return findings


def _look(dataset: BaseDataSet, index: int, as_stored: bool = False) -> _Look:
    look = _Look(index)
    entry = dataset.entries[index]
    try:
        if as_stored and entry.image is not None:
            look.raster = _stored_image(entry.image, dataset.in_channels)
        if entry.label is not None:
            stored = dataset.load_label(entry.label)
            look.stored = _histogram(stored)
        image, label = dataset.read(index)
    except UserError as error:
        look.problem = str(error)
        return look
    look.size = (label.shape[1], label.shape[0])
    ignored = label == dataset.ignore_index
    counts = np.bincount(label[~ignored], minlength=dataset.label_count)
    look.counts = np.append(counts, ignored.sum())
    if entry.image is not None and dataset.value_limits.nodata is not None:
        look.moments = moments(*dataset.load_image(entry.image))  # read() fills the pixels without data
    else:
        look.moments = moments(image)
    return look


def _stored_image(path: Path, channels: int) -> tuple[tuple[int, bool, str], float, float, int | None]:
    raster = decode(read_bytes(path), path, channels)
    values = raster.array[:, :, :-1] if raster.alpha else raster.array
    if raster.palette is not None:
        values = raster.palette[values[:, :, 0]]
    low, high = (float(np.nanmin(values)), float(np.nanmax(values))) if values.size else (0.0, 0.0)
    return (values.shape[2], raster.alpha, str(values.dtype)), low, high, raster.largest


def _histogram(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur, and how often each occurs."""
    if stored.dtype != np.uint8:
        return np.unique(stored, return_counts=True)
    counts = np.bincount(stored.reshape(-1), minlength=256)
    values = np.flatnonzero(counts)
    return values, counts[values]


def _add(findings: Findings, look: _Look, dataset: BaseDataSet) -> None:
    if look.raster is not None:
        stored, low, high, largest = look.raster
        seen = findings.on_disk.setdefault(stored, OnDisk(largest=largest))
        seen.files, seen.low, seen.high = seen.files + 1, min(seen.low, low), max(seen.high, high)
    if look.stored is not None:
        for value, pixels in zip(*(part.tolist() for part in look.stored), strict=True):
            if value not in findings.stored and not is_legal(dataset, value):
                findings.illegal[value] = str(dataset.entries[look.index].label)
            findings.stored[value] += pixels
    if look.problem is not None:
        findings.problems.append(look.problem)
        entry = dataset.entries[look.index]
        kind = re.sub(r"\d+ pixels?\b", "", look.problem)
        for path in (entry.image, entry.label):
            kind = kind.replace(str(path), "")
        findings.alike.setdefault(kind, []).append((entry.name, look.problem))
        return
    assert look.size is not None
    assert look.counts is not None
    findings.good.append(look.index)
    findings.sizes[look.size] += 1
    findings.pixels += look.counts
    findings.images += look.counts > 0


def is_legal(dataset: BaseDataSet, value: int) -> bool:
    """Return whether a stored label value means a class or "not labeled"."""
    probe = np.full((1, 1), value, np.uint8 if 0 <= value <= 255 else np.int32)
    try:
        dataset.label_table.translate(probe, "")
    except UserError:
        return False
    return True
