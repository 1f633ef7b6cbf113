"""What counts over a data set say: weights of classes and samples, mean and standard deviation of images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def median_frequency_weights(counts: np.ndarray) -> np.ndarray:
    """Return weights that balance the classes: median frequency balancing (Eigen & Fergus, ICCV 2015).

    The frequency of a class is its share of the labelled pixels of the images in which it occurs. Its weight is the
    median frequency divided by its own. A class that never occurs gets 1.

    Args:
        counts: pixels ``(samples, classes)``.

    Returns:
        float64 ``(classes,)``; all 1 if no pixel is labelled.
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
    max(1, sqrt(t / f)), an image the largest factor of its classes. t is the median of f.

    Args:
        counts: pixels ``(samples, classes)``.

    Returns:
        float64 ``(samples,)``, sums to 1.
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
    """Return the number of pixels and the sums of intensities in [0, 1] and of their squares.

    Args:
        image: ``(H, W, C)``, uint8 or float in [0, 1].
        missing: bool ``(H, W)``: pixels that are left out.

    Returns:
        float64 ``(3, C)``.
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
