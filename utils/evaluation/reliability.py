"""Reliability of the probabilities, and the score of procedure T at every threshold."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.evaluation import Part
from utils.facts import Facts
from utils.metrics import Counts, image_scores
from utils.predict import Activation

BINS = 15
# Pixels per image for NLL, Brier score and reliability; neighboring pixels add little information.
PIXELS_PER_IMAGE = 2**16
THRESHOLDS = tuple(k / 100 for k in range(1, 100))
_TINY = 1e-12


# ---------------------------------------------------------------------------------------------------- pixels


def chosen_pixels(name: str, target: Tensor, ignore_index: int, count: int) -> Tensor:
    """Return the indices of at most ``count`` counted pixels of an image, int64, the same ones in every run.

    Args:
        name: of the image; seeds the choice.
        target: ``(H, W)``.
        ignore_index: of pixels that do not count.
        count: if there are more, this many are drawn (with replacement).
    """
    valid = (target.flatten() != ignore_index).nonzero()[:, 0]
    if len(valid) <= count:
        return valid
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return valid[torch.randint(len(valid), (count,), generator=generator).to(valid.device)]


def pixels(part: Part, maps: Tensor, i: int, ignore_index: int, count: int) -> tuple[Tensor, Tensor]:
    """Return values ``(N, C)`` of a map and targets ``(N,)`` at the chosen pixels of image ``i``."""
    where = chosen_pixels(part.batch.names[i], part.target[i], ignore_index, count)
    return maps[i].flatten(1)[:, where].T, part.target[i].flatten()[where].long()


def truth_of(values: Tensor, target: Tensor) -> Tensor:
    """Return 1 for the label of each pixel and 0 for the others, like ``values`` ``(N, C)``; one class is label 1."""
    if values.shape[1] == 1:
        return (target == 1).to(values.dtype)[:, None]
    return torch.zeros_like(values).scatter_(1, target[:, None], 1.0)


# ---------------------------------------------------------------------------------------------------- reliability


@dataclass
class Reliability:
    """Accumulates how often predictions with probability p are correct.

    Two views: *pixels and classes*, each class's probability at each pixel against whether the pixel is of the class
    (what RankDice uses), and *confidence*, the highest probability of a pixel against whether its class is right.
    """

    num_classes: int  # 1 stands for a sigmoid of one class over its background
    ignore_index: int  # of pixels that do not count
    activation: Activation  # of "sigmoid", NLL and Brier score are means over the channels

    def __post_init__(self) -> None:
        self.binary = self.activation == "sigmoid" or self.num_classes == 1
        # Per class, and one row more for the confidence: pixels, sum of probabilities, pixels that are true.
        self.sums = torch.zeros(3, self.num_classes + 1, BINS, dtype=torch.float64)
        self.totals = torch.zeros(3, dtype=torch.float64)  # NLL, Brier score, pixels

    def add(self, part: Part) -> None:
        """Add the images of a part."""
        for i in range(len(part.target)):
            self.add_pixels(*pixels(part, part.probs, i, self.ignore_index, PIXELS_PER_IMAGE))

    def add_pixels(self, probs: Tensor, target: Tensor) -> None:
        """Add pixels: probabilities ``(N, C)`` and labels ``(N,)``, none ignored."""
        count, classes = probs.shape
        if not count:
            return
        truth = truth_of(probs, target)
        if classes == 1:
            confidence, right = torch.maximum(probs[:, 0], 1 - probs[:, 0]), (probs[:, 0] > 0.5) == (target == 1)
        else:
            confidence, best = probs.max(dim=1)
            right = best == target
        everything = torch.cat([probs, confidence[:, None]], dim=1).double()  # (N, C + 1)
        hits = torch.cat([truth, right[:, None].to(truth.dtype)], dim=1).double()
        rows = torch.arange(classes + 1, device=probs.device)
        where = ((everything * BINS).long().clamp_(max=BINS - 1) + rows * BINS).flatten()
        size = (classes + 1) * BINS
        found = [torch.bincount(where, weights, size) for weights in (None, everything.flatten(), hits.flatten())]
        self.sums += torch.stack([f.double() for f in found]).view(3, classes + 1, BINS).cpu()
        double, squares = probs.double(), (probs - truth).double().square()
        if self.binary:
            said, brier = torch.where(truth > 0, double, 1 - double), squares.mean(dim=1)
            nll = -said.clamp_min(_TINY).log().mean(dim=1)
        else:
            nll, brier = -(double * truth).sum(dim=1).clamp_min(_TINY).log(), squares.sum(dim=1)
        self.totals += torch.tensor([float(nll.sum()), float(brier.sum()), count], dtype=torch.float64)

    def merge(self, others: Sequence[Reliability]) -> None:
        """Add what other processes have gathered."""
        for other in others:
            self.sums += other.sums
            self.totals += other.totals

    def compute(self) -> dict[str, Any]:
        """Return ``NLL``, ``Brier``, ``ECE`` (of the confidence), ``Class_ECE`` (mean over the classes), ``pixels``.

        And the two diagrams, ``confidence`` and ``classes`` (all classes together): lists of ``[mean probability,
        share that is true, share of the pixels]`` of the bins that are not empty.
        """
        pixels = float(self.totals[2])
        if not pixels:
            nothing = dict.fromkeys(("NLL", "Brier", "ECE", "Class_ECE"), math.nan)
            return nothing | {"pixels": 0, "confidence": [], "classes": []}
        count, said, true = self.sums
        errors = (said - true).abs().sum(dim=1) / pixels  # (C + 1): every pixel is in one bin of each row
        return {
            "NLL": float(self.totals[0]) / pixels,
            "Brier": float(self.totals[1]) / pixels,
            "ECE": float(errors[-1]),
            "Class_ECE": float(errors[:-1].mean()),
            "pixels": int(pixels),
            "confidence": _diagram(count[-1], said[-1], true[-1]),
            "classes": _diagram(count[:-1].sum(0), said[:-1].sum(0), true[:-1].sum(0)),
        }


def _diagram(count: Tensor, said: Tensor, true: Tensor) -> list[list[float]]:
    there = count > 0
    columns = (said[there] / count[there], true[there] / count[there], count[there] / count.sum())
    return torch.stack(columns, dim=1).tolist()


# ---------------------------------------------------------------------------------------------------- threshold


def threshold_scores(
    probs: Tensor,
    target: Tensor,
    facts: Facts,
    thresholds: Sequence[float] = THRESHOLDS,
    classes: Sequence[int] | None = None,
    count_ignored: bool = False,
) -> Tensor:
    """Return the mean Dice of an image under procedure T at every threshold, float64 ``(K,)``, from one pass over it.

    Args:
        probs: ``(C, H, W)``.
        target: ``(H, W)``.
        facts: of the model.
        thresholds: in rising order.
        classes: the classes of interest; None: all.
        count_ignored: see :func:`utils.metrics.count`.
    """
    number, steps = probs.shape[0], len(thresholds)
    # The number of thresholds below a probability: p > t[k] means k < that number, in float32 as T compares.
    edges = torch.tensor(thresholds, dtype=probs.dtype, device=probs.device)
    # A sigmoid of channels_last maps is not contiguous; bucketize warns of it and copies them all the same.
    below = torch.bucketize(probs.flatten(1).contiguous(), edges)
    below += torch.arange(number, device=probs.device)[:, None] * (steps + 1)
    flat = target.flatten().long()
    valid = flat != facts.ignore_index
    # With one channel the class is label 1, and background no class.
    own = torch.where(flat == 1, 0, -1) if number == 1 else flat
    true = valid & (own >= 0) & (own < number)

    def above(found: Tensor) -> Tensor:
        """Count the pixels above each threshold, ``(K, C)``."""
        histogram = torch.bincount(found.flatten(), minlength=number * (steps + 1)).view(number, -1).cpu()
        return histogram.flip(1).cumsum(1).flip(1)[:, 1:].T

    predicted = above(below if count_ignored else below[:, valid])
    intersection = above(below.gather(0, own.clamp(0, number - 1)[None])[0][true])
    volume = torch.bincount(own[true], minlength=number).cpu().expand(steps, number)
    pixels = torch.full((steps,), len(flat) if count_ignored else int(valid.sum()))
    counts = Counts(intersection, predicted, volume, pixels, torch.full((steps,), -1))
    return image_scores(counts).dice[:, list(range(number)) if classes is None else list(classes)].nanmean(dim=1)
