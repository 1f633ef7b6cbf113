"""Slow and obviously right: what ``utils/rankdice`` must find, computed straight from the definitions.

Nothing here is shared with the product: no bounds, no series, no Laguerre nodes, no FFT.
"""

from __future__ import annotations

import math

import numpy as np

EPSILON = 1e-4


def count_distribution(probs: np.ndarray) -> np.ndarray:
    """Return P(number of successes = 0..n) of independent trials: one convolution per trial."""
    pmf = np.ones(1)
    for p in probs:
        pmf = np.convolve(pmf, [1 - p, p])
    return pmf


def expected_scores(probs: np.ndarray, metric: str, smooth: float) -> np.ndarray:
    """Return the expected Dice or IoU of the top tau pixels for tau = 0..n, from the joint law of (A, B).

    A, B: positive pixels inside and outside the mask. 0 / 0 counts as 0.
    """
    probs = np.sort(probs.astype(np.float64))[::-1]
    scores = []
    for tau in range(len(probs) + 1):
        inside, outside = count_distribution(probs[:tau]), count_distribution(probs[tau:])
        a, b = np.arange(len(inside))[:, None], np.arange(len(outside))[None, :]
        if metric == "dice":
            above, below = 2 * a + smooth, tau + a + b + smooth
        else:
            above, below = a + smooth + 0 * b, tau + b + smooth + 0 * a
        value = np.divide(above, below, out=np.zeros(below.shape), where=below > 0)
        scores.append(float(inside @ value @ outside))
    return np.array(scores)


def best_of_all_subsets(probs: np.ndarray, metric: str, smooth: float) -> float:
    """Return the best expected score over all 2^n masks, from all 2^n label vectors: n at most about 7."""
    n = len(probs)
    labels = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    chance = np.prod(np.where(labels == 1, probs, 1 - probs), axis=1)
    both = labels @ labels.T  # [mask, label vector]
    size = labels.sum(1)
    if metric == "dice":
        above, below = 2 * both + smooth, size[:, None] + size[None, :] + smooth
    else:
        above, below = both + smooth, size[:, None] + size[None, :] - both + smooth
    value = np.divide(above, below, out=np.zeros(both.shape), where=below > 0)
    return float((value @ chance).max())


def integral_scores(probs: np.ndarray, metric: str, smooth: float, volumes: np.ndarray) -> np.ndarray:
    """Return the expected scores of the given volumes (>= 1): the integral by composite Gauss-Legendre in float64.

    ``F`` and ``S`` are summed over every pixel at every node. The panels double from a tenth of the shortest decay
    length among the volumes to 45 times the longest.
    """
    probs = np.sort(probs.astype(np.float64))[::-1]
    probs = probs[probs > 0]
    mass = np.cumsum(probs)
    rates = volumes + smooth + mass[-1] - (mass[volumes - 1] if metric == "iou" else 0)
    start, end = 0.1 / rates.max(), 45 / rates.min()
    # With p = 0.5 and the like, F levels off: the last factor then falls like exp(-s tau) only.
    end = max(end, min(45 / volumes.min(), 100 * end))
    panels = int(np.ceil(np.log(end / start) / np.log(2)))
    edges = np.concatenate([[0], np.geomspace(start, end, panels)])
    x, w = np.polynomial.legendre.leggauss(12)
    total = np.zeros(len(volumes))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        for s, weight in zip((high + low + x * (high - low)) / 2, w * (high - low) / 2, strict=True):
            absent = (1 - probs) + probs * math.exp(-s)
            logs = np.log(absent)
            if metric == "dice":
                ratios = np.cumsum(probs / absent)[volumes - 1]
                factor = 2 * math.exp(-s) * ratios + smooth
                behind = logs.sum()
            else:
                factor = mass[volumes - 1] + smooth
                behind = logs.sum() - np.cumsum(logs)[volumes - 1]
            total += weight * np.exp(behind - s * (volumes + smooth)) * factor
    return total


def refined_normal_pmf(mean: float, variance: float, third: float, pixels: int) -> dict[int, float]:
    """Return the truncated, renormalized refined normal distribution of a count (JMLR 24(224), section 4)."""
    deviation = math.sqrt(max(variance, 1e-12))
    skew = third / deviation**3

    def cdf(x: float) -> float:
        density = math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * math.erfc(-x / math.sqrt(2)) + skew * (1 - x * x) * density / 6

    mass = {}
    for volume in range(pixels + 1):
        upper, lower = (cdf((volume + h - mean) / deviation) for h in (0.5, -0.5))
        if upper >= EPSILON and lower <= 1 - EPSILON:
            mass[volume] = max(0.0, upper - lower)
    total = sum(mass.values())
    return {volume: m / total for volume, m in mass.items()}


def _moments(probs: np.ndarray) -> tuple[float, float, float]:
    spread = probs * (1 - probs)
    return float(probs.sum()), float(spread.sum()), float((spread * (1 - 2 * probs)).sum())


def approximate_scores(probs: np.ndarray, metric: str, solver: str, smooth: float) -> np.ndarray:
    """Return the scores that ba, trna and rma give the volumes 1..n, by direct sums."""
    probs = np.sort(probs.astype(np.float64))[::-1]
    n, mean, mass = len(probs), float(probs.sum()), np.cumsum(probs)
    tau = np.arange(1, n + 1)
    if solver == "rma":
        if metric == "iou":
            return (mass + smooth) / (tau + mean - mass + smooth)
        return 2 * mass / (tau + mean + 1 + smooth) + smooth / (tau + mean + smooth)
    whole = refined_normal_pmf(*_moments(probs), n)
    scores = np.zeros(n)
    for t in tau:
        last = smooth * sum(m / (t + smooth + volume) for volume, m in whole.items())
        if solver == "ba":
            scores[t - 1] = 2 * mass[t - 1] * sum(m / (t + 1 + smooth + v) for v, m in whole.items()) + last
            continue
        own = 0.0
        for p in probs[:t]:
            mean_j, variance, third = (a - b for a, b in zip(_moments(probs), _moments(np.array([p])), strict=True))
            pmf = refined_normal_pmf(mean_j, variance, third, n)
            own += p * sum(m / (t + 1 + smooth + volume) for volume, m in pmf.items())
        scores[t - 1] = 2 * own + last
    return scores


def program_volume(probs: np.ndarray, smooth: float = 0.0) -> int:
    """Return the volume that the program behind the published tables takes (``rank_dice`` with ``truncate_mean``).

    Step by step in its order: mean by count, quantiles, pruning, and a search of the volumes by one of two formulas.
    """
    probs = np.sort(probs.astype(np.float64))[::-1]
    n, mean = len(probs), float((probs >= 0.5).sum())
    _, variance, third = _moments(probs)
    if mean == 0:
        return 0
    deviation = math.sqrt(variance)

    def cdf(x: float, skew: float) -> float:
        density = math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * math.erfc(-x / math.sqrt(2)) + skew * (1 - x * x) * density / 6

    def quantile(level: float) -> float:
        low, high = -12.0, 12.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if cdf(middle, third / deviation**3) < level else (low, middle)
        return low

    low = int(max(math.floor(deviation * quantile(EPSILON) + mean) - 1, 0))
    high = int(min(math.ceil(deviation * quantile(1 - EPSILON) + mean), n))

    def pmf(mean: float, variance: float, third: float) -> np.ndarray:
        scale = math.sqrt(variance)
        values = np.array([cdf((v + 0.5 - mean) / scale, third / scale**3) for v in range(low - 1, high)])
        mass = np.clip(np.diff(values), 0, 1)
        return mass / mass.sum()

    counts, whole = np.arange(low, high), pmf(mean, variance, third)
    best, found = smooth * (whole / np.maximum(counts + smooth, 1e-300)).sum() if smooth else 0.0, 0
    carried = np.zeros(len(counts))
    for tau in range(1, n + 1 if mean > 50 else min(n, int(5 * mean) + 1) + 1):
        if mean > 50:
            score = 2 * probs[:tau].sum() * (whole / (counts + tau + smooth + 1)).sum()
            score += smooth * (whole / (counts + tau + smooth)).sum()
        else:
            p = probs[tau - 1]
            spread = p * (1 - p)
            carried = carried + p * pmf(max(mean - p, 0), variance - spread, third - spread * (1 - 2 * p))
            score = (2 / (counts + tau + smooth + 2) * carried).sum()
            score += smooth * (whole / (counts + tau + smooth + 1)).sum()
        if score > best:
            best, found = score, tau
    return found
