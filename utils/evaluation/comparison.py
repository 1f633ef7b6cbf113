"""Which prediction procedure is better? Paired differences over the same images, with bootstrap intervals.

Procedures are compared on the images they were all applied to. Images are drawn again with replacement (Efron &
Tibshirani, *An Introduction to the Bootstrap*, 1993, percentile intervals); within a draw every procedure is scored
on the same images, so what makes an image hard for all of them does not widen the interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.errors import are, plural
from utils.metrics import Metrics

BASELINE = "max"
RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
# Images whose mean Dice differs by no more count as the same: a tenth of a point.
SAME = 0.001
# With fewer images an interval says little.
FEW_IMAGES = 20
WORST_SHARE = 0.1
# Procedures that give one label per pixel, as ``max`` does; the others give overlapping masks.
LABEL_MAPS = ("max_present", "rankdice_map")
# Scores that a procedure with a higher mDice may lower.
OTHER_SCORES = (
    ("Dataset_mIoU", "data-set mIoU"),
    ("Pixel_Accuracy", "pixel accuracy"),
    ("Multiclass_Accuracy", "share of pixels with the right label"),
)
# The most numbers in one block of bootstrap draws.
_BLOCK = 2**22


@dataclass(frozen=True)
class Difference:
    """How much higher the mean scores of one procedure are than those of another.

    ``mean``: the difference of the two means (of the table); ``low``, ``high``: the ends of its interval, nan with
    fewer than two images. ``better``, ``same``, ``worse``: numbers of images with a score under both;
    ``largest_gain`` and ``largest_loss``: the largest and the smallest difference among them, whatever their sign.
    """

    mean: float
    low: float
    high: float
    better: int
    same: int
    worse: int
    largest_gain: float
    largest_loss: float

    @property
    def clear(self) -> int:
        """1: the interval lies above 0; -1: below; 0: it contains 0."""
        return int(self.low > 0) - int(self.high < 0)


def bootstrap(
    scores: NDArray[np.float64],
    baseline: NDArray[np.float64],
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = SEED,
) -> NDArray[np.float64]:
    """Return percentile intervals of ``mean(scores) - mean(baseline)`` over images drawn with replacement.

    Args:
        scores, baseline: ``(N, K)``, K pairs of columns over the same N images; nan where a score is undefined: it is
            left out of its mean.
        resamples: number of draws, the same images for all columns.
        level: of the interval, in (0, 1).
        seed: of the draws.

    Returns:
        ``(2, K)``: lower and upper ends; nan for columns with fewer than two defined scores on either side.
    """
    images, columns = scores.shape
    both = np.concatenate([scores, baseline], axis=1)
    defined = np.isfinite(both)
    values, weights = np.where(defined, both, 0.0), defined.astype(np.float64)
    rng = np.random.default_rng(seed)
    means = np.full((resamples, columns), np.nan)
    block = max(1, _BLOCK // max(images, 1))
    for first in range(0, resamples if images else 0, block):
        rows = min(block, resamples - first)
        drawn = rng.integers(0, images, (rows, images)) + np.arange(rows)[:, None] * images
        times = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (times @ values) / (times @ weights)
        means[first : first + rows] = mean[:, :columns] - mean[:, columns:]
    enough = (defined[:, :columns].sum(axis=0) > 1) & (defined[:, columns:].sum(axis=0) > 1)
    ends = np.full((2, columns), np.nan)
    if enough.any():
        # A draw may contain none of the few images that define a column.
        ends[:, enough] = np.nanquantile(means[:, enough], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends


def differences(scores: NDArray[np.float64], baseline: NDArray[np.float64]) -> list[Difference]:
    """Return how each column of ``scores`` ``(N, K)`` differs from that of ``baseline``; see :func:`bootstrap`."""
    low, high = bootstrap(scores, baseline)
    found = []
    for k in range(scores.shape[1]):
        a, b = scores[:, k], baseline[:, k]
        change = (a - b)[np.isfinite(a) & np.isfinite(b)]
        found.append(
            Difference(
                mean=_mean(a) - _mean(b),
                low=float(low[k]),
                high=float(high[k]),
                better=int((change > SAME).sum()),
                same=int((np.abs(change) <= SAME).sum()),
                worse=int((change < -SAME).sum()),
                largest_gain=float(change.max()) if len(change) else math.nan,
                largest_loss=float(change.min()) if len(change) else math.nan,
            )
        )
    return found


def _mean(values: NDArray[np.float64]) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def image_means(metrics: Metrics) -> NDArray[np.float64]:
    """Return the mean Dice of each image over the classes of interest, ``(N,)``, images sorted by name."""
    _, scores, _ = metrics.rows()
    return scores.dice[:, metrics.classes].nanmean(dim=1).numpy()


def worst_mean(means: NDArray[np.float64]) -> float:
    """Return the mean over the worst tenth of the images, at least one; nan without any."""
    means = np.sort(means[np.isfinite(means)])
    return float(means[: math.ceil(WORST_SHARE * len(means))].mean()) if len(means) else math.nan


def compare(
    metrics: Mapping[str, Metrics],
    class_names: Sequence[str],
    configured: str | None = None,
    doubt: str | None = None,
) -> dict[str, Any] | None:
    """Compare every procedure with ``max``; None if there is nothing to compare.

    Args:
        metrics: per procedure, with the images kept.
        class_names: of all classes.
        configured: the procedure that inference uses, ``predict.test``.
        doubt: why scores on these images are optimistic, or None.

    Returns:
        ``{"baseline", "level", "resamples", "same_within", "Mean_Dice": {procedure: Difference as dict},
        "Class_Dice": {procedure: {class: {"mean", "low", "high"}}}, "verdict"}``.
    """
    others = [name for name in metrics if name != BASELINE]
    if BASELINE not in metrics or not others:
        return None
    means = {name: image_means(m) for name, m in metrics.items()}
    base = means[BASELINE]
    columns = np.stack([means[name] for name in others], axis=1)
    overall = dict(zip(others, differences(columns, np.stack([base] * len(others), axis=1)), strict=True))
    per_class = {}
    for name in others:
        found = differences(metrics[name].rows()[1].dice.numpy(), metrics[BASELINE].rows()[1].dice.numpy())
        per_class[name] = {
            cls: {"mean": d.mean, "low": d.low, "high": d.high} for cls, d in zip(class_names, found, strict=True)
        }
    scores = {name: m.compute() for name, m in metrics.items()}
    return {
        "baseline": BASELINE,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "same_within": SAME,
        "Mean_Dice": {name: asdict(d) for name, d in overall.items()},
        "Class_Dice": per_class,
        "verdict": verdict(scores, overall, int(np.isfinite(base).sum()), configured, doubt),
    }


def verdict(
    scores: Mapping[str, Mapping[str, Any]],
    overall: Mapping[str, Difference],
    images: int,
    configured: str | None = None,
    doubt: str | None = None,
) -> str:
    """Return in a few sentences which procedure to use for masks and which for label maps, and what gets worse.

    A procedure is recommended only if the interval of its difference to ``max`` lies above 0: among those whose mDice
    is practically the highest, the first. On few images, or on images that chose the checkpoint, nothing is
    recommended. Procedures whose interval lies below 0 are named, ``configured`` first.

    Args:
        scores: per procedure, :meth:`utils.metrics.Metrics.compute`.
        overall: per procedure, its difference to ``max`` in mDice.
        images: with a score.
        configured, doubt: see :func:`compare`.
    """
    if not images:
        return "No result: no image could be scored."
    if images < FEW_IMAGES:
        few = f"{are(images, 'image')} few; test on more"
        doubt = f"{doubt}; {few}" if doubt else few
    said = [f"Not decisive: {doubt}."] if doubt else []
    for kind, names in (
        ("masks", [name for name in overall if name not in LABEL_MAPS]),
        ("label maps", [name for name in overall if name in LABEL_MAPS]),
    ):
        if names:
            said.append(_best(kind, {name: overall[name] for name in names}, scores, images, decisive=not doubt))
    worse = sorted((name for name, d in overall.items() if d.clear < 0), key=lambda name: name != configured)
    alike = groupby(worse, key=lambda name: overall[name])  # names in a row with equal scores share a sentence
    return " ".join([*said, *(_is_worse(list(names), d, configured) for d, names in alike)])


def _best(
    kind: str,
    overall: Mapping[str, Difference],
    scores: Mapping[str, Mapping[str, Any]],
    images: int,
    decisive: bool,
) -> str:
    """Return which procedure of a kind to use."""
    means = {name: scores[name]["Mean_Dice"] for name in overall}
    better = [name for name, d in overall.items() if d.clear > 0]
    undecided = [name for name, d in overall.items() if d.clear == 0]
    if better:
        highest = max(means[name] for name in better)
        best = next(name for name in better if means[name] >= highest - SAME)  # the simplest one comes first
        d = overall[best]
        return (
            f"For {kind} {'use' if decisive else 'the best here is'} {best}: mDice {d.mean:+.4f} against {BASELINE} "
            f"({_interval(d)}), better in {d.better}, the same in {d.same} and worse in {d.worse} of "
            f"{plural(images, 'image')}." + "".join(_lower(best, key, title, scores) for key, title in OTHER_SCORES)
        )
    if not undecided:
        return f"For {kind} keep {BASELINE}: every other procedure is worse."
    different = [name for name in undecided if overall[name].low or overall[name].high]
    if not different:
        return (
            f"For {kind} keep {BASELINE}: {' and '.join(undecided)} give{'s' * (len(undecided) == 1)} the same scores."
        )
    undecided = different
    best = max(undecided, key=lambda name: means[name] if math.isfinite(means[name]) else -1.0)
    d = overall[best]
    return (
        f"For {kind} keep {BASELINE}: on {plural(images, 'image')}, no procedure is clearly better; the best, {best}, "
        f"has mDice {d.mean:+.4f} against it ({_interval(d)})."
    )


def _lower(name: str, key: str, title: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence if a recommended procedure lowers another score."""
    new, old = scores[name].get(key), scores[BASELINE].get(key)
    if new is None or old is None or not new < old - SAME / 2:
        return ""
    return f" Its {title} is lower: {new:.4f}, {BASELINE} {old:.4f}."


def _is_worse(names: Sequence[str], d: Difference, configured: str | None) -> str:
    of_config = ", the config's predict.test," if names[0] == configured else ""
    *some, last = names[1:] or [""]
    others = f" So {'are' if some else 'is'} {' and '.join(filter(None, [', '.join(some), last]))}." if last else ""
    return f"{names[0]}{of_config} is worse than {BASELINE} here: {d.mean:+.4f} ({_interval(d)}).{others}"


def _interval(d: Difference) -> str:
    if math.isnan(d.low):
        return "no interval"
    return f"{LEVEL:.0%} interval {d.low:+.4f} to {d.high:+.4f}"
