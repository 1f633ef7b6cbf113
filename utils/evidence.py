"""Is a gain on validation images more than noise?

Scores of images vary, so a mean over few images is uncertain. Images that resemble their neighbors, as frames of a
video do, count less: 100 frames of one drive say little more about other roads than 10 of them do.
"""

from __future__ import annotations

from torch import Tensor

# A gain counts if it is above this many standard errors. With the first value, a fit that helps on new images is mostly
# kept, and one that hurts is mostly not (docs/presence.md). With few images the standard error itself is uncertain.
CLEAR, CLEAR_IF_FEW = 1.0, 2.0
FEW = 15
SMALLEST = 0.001  # smaller gains (less than a tenth of a point) are not worth a change

_CONSTANT = 1e-9  # a variance below this is none


def independent(features: Tensor) -> float:
    """Return how many independent images a sequence of images is worth, in [1, N].

    The sum of the autocorrelations up to the first that is not positive (as for the effective sample size of Markov
    chains; Geyer, *Practical Markov Chain Monte Carlo*, Statistical Science 1992), averaged over the features.

    Args:
        features: ``(N, K)``, numbers that describe the images, in the order in which the images were taken.
    """
    count = len(features)
    centered = features.double() - features.double().mean(0)
    variance = centered.square().sum(0)
    varies = variance > _CONSTANT * count
    if not bool(varies.any()):
        return float(count)
    scaled = centered[:, varies] / variance[varies].sqrt()
    worth = 1.0
    for lag in range(1, count // 2):
        correlation = float((scaled[:-lag] * scaled[lag:]).sum(0).mean())
        if correlation <= 0:
            break
        worth += 2 * correlation
    return max(1.0, count / worth)


def standard_error(gains: Tensor, images: float) -> float:
    """Return the standard error of the mean of ``gains`` ``(N,)`` if they are worth ``images`` independent images.

    NaN (images without a score) is skipped. With fewer than two scores, the error is infinite.
    """
    found = gains[gains.isfinite()]
    if len(found) < 2:
        return float("inf")
    return float(found.std()) / (images * len(found) / len(gains)) ** 0.5


def clear(gains: Tensor, images: float, errors: float | None = None, smallest: float = SMALLEST) -> bool:
    """Return whether the mean of ``gains`` is above ``smallest`` and above ``errors`` standard errors.

    Args:
        gains: ``(N,)``, the difference of the scores of each image; NaN where an image has none.
        images: how many independent images they are worth, see :func:`independent`.
        errors, smallest: the limits; None: one standard error, or two if there are fewer than 15 independent images.
    """
    if errors is None:
        errors = CLEAR_IF_FEW if images < FEW else CLEAR
    mean = float(gains.nanmean())
    return mean > max(smallest, errors * standard_error(gains, images))
