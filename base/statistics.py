"""Statistics of a data set: weights of classes and samples, mean and standard deviation of images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from base.entries import Entry, in_threads, spread
from utils.errors import UserError
from utils.images.values import Pixels

log = logging.getLogger("data")

COUNTED_LABELS = 5000  # at most this many label maps are read for class weights
MEASURED_IMAGES = 500  # at most this many images are read for mean and std


def median_frequency_weights(counts: np.ndarray) -> np.ndarray:
    """Return weights that balance the classes: median frequency balancing (Eigen & Fergus, ICCV 2015).

    The frequency of a class is its share of the labeled pixels of the images in which it occurs. Its weight is the
    median frequency divided by its own. A class that never occurs gets 1. ``counts``: pixels ``(samples, classes)``;
    the result is float64 ``(classes,)``.
    """
    counts = counts.astype(np.float64)
    pixels_where_present = (counts.sum(1, keepdims=True) * (counts > 0)).sum(0)
    frequency = counts.sum(0) / np.maximum(pixels_where_present, 1)
    occurs = frequency > 0
    weights = np.ones(counts.shape[1])
    if occurs.any():
        weights[occurs] = np.median(frequency[occurs]) / frequency[occurs]
    return weights


def repeat_factors(counts: np.ndarray) -> np.ndarray:
    """Return how often each sample should be drawn so that rare classes are seen more often.

    Repeat factors (Gupta et al., LVIS, CVPR 2019): a class that occurs in the share f of the images has the factor
    max(1, sqrt(t / f)), an image the largest factor of its classes. t is the median of f. ``counts``: pixels
    ``(samples, classes)``; the result is float64 ``(samples,)`` and sums to 1.
    """
    present = counts > 0
    share = present.mean(0)
    occurs = share > 0
    factor = np.ones(counts.shape[1])
    if occurs.any():
        factor[occurs] = np.maximum(1.0, np.sqrt(np.median(share[occurs]) / share[occurs]))
    weights = np.where(present, factor, 0.0).max(1)
    weights[weights == 0.0] = 1.0
    return weights / weights.sum()


def moments(image: np.ndarray, missing: np.ndarray | None = None) -> np.ndarray:
    """Return the number of pixels and the sums of intensities in [0, 1] and of their squares, float64 ``(3, C)``.

    ``image``: ``(H, W, C)``, uint8 or float in [0, 1]. ``missing``: bool ``(H, W)``, pixels that are left out.
    """
    pixels = image.reshape(-1, image.shape[2]) if missing is None else image[~missing]
    channels = pixels.T
    if image.dtype == np.uint8:
        levels = np.arange(256) / 255.0
        sums = [np.bincount(channel, minlength=256) @ np.stack([levels, levels**2], 1) for channel in channels]
    else:
        wide = channels.astype(np.float64)
        sums = [np.array([channel.sum(), channel @ channel]) for channel in wide]
    return np.concatenate([np.full((1, len(channels)), channels.shape[1]), np.array(sums).T])


def mean_and_std(all_moments: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation per channel, float64 ``(C,)``, of images with these :func:`moments`."""
    count, total, squares = sum(all_moments)  # type: ignore[misc]
    count = np.maximum(count, 1)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def per_channel(
    name: str, given: Sequence[float] | str | None, own: Sequence[float], channels: int
) -> tuple[float, ...]:
    """Return ``mean`` or ``std`` for each channel: as given, or the data set's own (also for "auto")."""
    if given is None or given == "auto":
        # The published numbers are for RGB; other channels get their average.
        return tuple(own) if len(own) == channels else (float(np.mean(own)),) * channels
    if isinstance(given, str) or len(given) != channels:
        raise ValueError(f'{name} must have one number per channel ({channels}) or be "auto", got {given!r}')
    values = tuple(float(v) for v in given)
    if name == "std" and min(values) <= 0:
        raise ValueError(f"std must be above 0, got {list(values)}")
    if not all(0 <= value <= 1 for value in values):
        divided = [round(value / 255, 4) for value in values]
        hint = f"; did you mean {divided} (divided by 255)?" if min(values) >= 0 and 1 < max(values) <= 255 else ""
        raise ValueError(f"{name} must be for intensities in [0, 1], got {list(values)}{hint}")
    return values


class Statistics:
    """The methods of a data set that count its labels and measure its images."""

    # What the data set provides.
    split: str
    on_error: str
    num_classes: int
    ignore_index: int
    endless: bool
    entries: Sequence[Entry]
    label_at: Callable[[int], np.ndarray]
    image_at: Callable[[int], Pixels]

    @property
    def label_count(self) -> int:
        """Number of class ids in the labels: num_classes, or 2 for one class and its background."""
        return max(2, self.num_classes)

    def measure(self, limit: int = MEASURED_IMAGES) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation per channel of at most ``limit`` images, evenly spread."""
        chosen = spread(range(len(self.entries)), limit)
        found = [m for m in self._each(chosen, lambda index: moments(*self.image_at(index))) if m is not None]
        if not found:
            raise UserError(f'"mean": "auto": no image of split {self.split!r} can be read')
        mean, std = mean_and_std(found)
        log.info("measured on %d images: mean %s, std %s", len(found), np.round(mean, 4), np.round(std, 4))
        return tuple(mean.tolist()), tuple(std.tolist())

    def _each(self, chosen: list[int], measured: Callable[[int], np.ndarray]) -> Iterable[np.ndarray | None]:
        """Yield what is measured on each chosen sample; None for those that ``on_error`` skips."""

        def attempt(index: int) -> np.ndarray | None:
            try:
                return measured(index)
            except UserError:
                if self.on_error == "skip":
                    return None
                raise

        return in_threads(attempt, chosen)

    def class_pixel_counts(self, limit: int | None = None) -> np.ndarray:
        """Count the pixels of each class in each sample, before augmentation: int64 ``(samples, label_count)``.

        At most ``limit`` samples are taken, evenly spread.
        """

        def count(index: int) -> np.ndarray:
            label = self.label_at(index)
            return np.bincount(label[label != self.ignore_index], minlength=self.label_count)

        chosen = spread(range(len(self.entries)), limit)
        result = np.zeros((len(chosen), self.label_count), np.int64)
        for row, counts in enumerate(self._each(chosen, count)):
            result[row] = 0 if counts is None else counts
        return result

    def class_weights(self, limit: int | None = COUNTED_LABELS) -> Tensor:
        """Return weights that balance the classes, float32 ``(num_classes,)`` (label_count for one channel).

        See :func:`median_frequency_weights`; at most ``limit`` label maps are read.
        """
        counts = self.class_pixel_counts(limit)
        if not counts.any():
            raise UserError(f"no labeled pixel in split {self.split!r}: class weights cannot be computed")
        return torch.from_numpy(median_frequency_weights(counts).astype(np.float32))

    def sample_weights(self) -> np.ndarray:
        """Return how often each sample should be drawn (:func:`repeat_factors`), float64; sums to 1."""
        if self.endless:
            raise ValueError(f"sampler must be None: {type(self).__name__} draws new images each epoch")
        return repeat_factors(self.class_pixel_counts())
