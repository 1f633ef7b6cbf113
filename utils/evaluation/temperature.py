"""Calibrate probabilities: fit a temperature, or a temperature and a bias per class, on validation data.

RankDice sums and ranks probabilities, so an overconfident network lowers its score. A single temperature corrects most
of this (Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017). If a class is predicted too often or too
rarely everywhere, only a bias per class helps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from utils.evaluation import Part
from utils.evaluation.reliability import pixels, truth_of
from utils.facts import Facts
from utils.predict import Activation, probabilities
from utils.presence import newton

# Bytes of logits that a fit looks at.
SAMPLE_BYTES = 2**22
TEMPERATURES = (0.1, 10.0)


@dataclass(frozen=True)
class Calibration:
    """How logits become probabilities: divided by ``temperature``, then ``bias`` is added, one number per class."""

    temperature: float = 1.0
    bias: tuple[float, ...] | None = None

    def __call__(self, logits: Tensor, activation: Activation) -> Tensor:
        """Return float32 probabilities of logits ``(B, C, ...)``."""
        return probabilities(logits, activation, self.temperature, self.bias)


_UNCHANGED = Calibration()


@dataclass
class LogitSample:
    """Logits of pixels of the validation images, the same ones in every run.

    Args:
        facts: of the model.
        images: how many there will be; bounds what each may contribute.
    """

    facts: Facts
    images: int
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        """Add the images of a part."""
        count = max(16, SAMPLE_BYTES // (4 * self.facts.num_classes * max(self.images, 1)))
        for i, name in enumerate(part.batch.names):
            logits, target = pixels(part, part.logits, i, self.facts.ignore_index, count)
            self.rows[name] = (logits.float().cpu(), target.cpu())

    def stacked(self, images: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Return logits float32 ``(N, C)`` and labels ``(N,)`` of some images; None: of all, sorted by name."""
        nothing = torch.zeros(0, self.facts.num_classes), torch.zeros(0, dtype=torch.long)
        rows = [self.rows[name] for name in (sorted(self.rows) if images is None else images)]
        logits, target = zip(nothing, *rows, strict=True)
        return torch.cat(logits), torch.cat(target)


def fit_temperature(
    logits: Tensor,
    target: Tensor,
    activation: Activation,
    bounds: tuple[float, float] = TEMPERATURES,
    start: float = 1.0,
) -> float:
    """Return the temperature with the lowest negative log-likelihood of the labels; a bound if it lies beyond.

    As a function of b = 1 / T, the negative log-likelihood of ``b * logits`` is convex. Newton steps find the zero of
    its slope. They stay inside an interval that brackets the zero: a step that would leave it is replaced by a
    bisection, so the search cannot diverge. If the slope does not change its sign within the bounds, the result is a
    bound.

    Args:
        logits: ``(N, C)``, finite.
        target: ``(N,)``, labels of [0, max(C, 2)).
        activation: "softmax" or "sigmoid"; one channel is always a sigmoid.
        bounds: lowest and highest temperature.
        start: a guess, which saves steps if it is close.

    Raises:
        ValueError: no pixel, or a logit that is not finite.
    """
    if not len(target):
        raise ValueError("logits: expected at least one pixel with a label, found none")
    if not logits.isfinite().all():
        raise ValueError("logits: expected finite numbers, found some that are not")

    def slope_at(b: float) -> tuple[float, float]:
        none, weights = torch.zeros(0, dtype=torch.long), torch.tensor([b], dtype=torch.float64)
        _, gradient, curvature = _terms(logits, target, activation, none, weights)
        return float(gradient), float(curvature)

    low, high = 1 / bounds[1], 1 / bounds[0]
    if slope_at(low)[0] >= 0:
        return bounds[1]
    if slope_at(high)[0] <= 0:
        return bounds[0]
    b = 1 / start if low < 1 / start < high else (low + high) / 2
    for _ in range(60):
        slope, curvature = slope_at(b)
        low, high = (b, high) if slope < 0 else (low, b)
        following = b - slope / curvature if curvature > 0 else math.nan
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - b) <= 1e-7 * b:
            break
        b = following
    return 1 / b


def fit_bias(
    logits: Tensor, target: Tensor, activation: Activation, own: Tensor, start: Calibration = _UNCHANGED
) -> Calibration | None:
    """Return the temperature and bias with the lowest negative log-likelihood, by Newton steps; None if they diverge.

    A small ridge penalty on the bias makes the result unique: a shift of all classes by one number changes nothing
    else.

    Args:
        logits, target, activation: see :func:`fit_temperature`.
        own: bool ``(C,)``, the classes with a bias; the others keep 0.
        start: a guess, such as the temperature alone.
    """
    own = own.nonzero()[:, 0]
    weights = torch.zeros(1 + len(own), dtype=torch.float64)
    weights[0] = 1 / start.temperature
    if start.bias is not None:
        weights[1:] = torch.tensor(start.bias, dtype=torch.float64)[own]
    weights = newton.minimum(partial(_terms, logits, target, activation, own), weights, tolerance=1e-6)
    scale = float(weights[0])
    if not 1 / TEMPERATURES[1] < scale < 1 / TEMPERATURES[0]:
        return None
    bias = torch.zeros(logits.shape[1], dtype=torch.float64).index_copy_(0, own, weights[1:])
    return Calibration(1 / scale, tuple(bias.tolist()))


def _terms(
    logits: Tensor, target: Tensor, activation: Activation, own: Tensor, weights: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Return the penalized negative log-likelihood, its gradient and its curvature by (1 / temperature, bias)."""
    classes = logits.shape[1]
    binary = activation == "sigmoid" or classes == 1
    bias = torch.zeros(classes, dtype=torch.float64).index_copy_(0, own, weights[1:])
    loss, gradient, curvature = 0.0, torch.zeros_like(weights), torch.zeros(len(weights), len(weights)).double()
    for z, y in zip(logits.split(2**18), target.split(2**18), strict=True):
        z = z.double()
        truth = truth_of(z, y)
        odds = weights[0] * z + bias
        if binary:
            p = odds.sigmoid()
            loss += float(torch.nn.functional.binary_cross_entropy_with_logits(odds, truth, reduction="sum"))
            w = p * (1 - p)
            square = torch.diag(w.sum(0)[own])
            cross, corner = (w * z).sum(0)[own], (w * z * z).sum()
        else:
            p = odds.softmax(dim=1)
            loss -= float((odds.log_softmax(dim=1) * truth).sum())
            mean = (p * z).sum(dim=1, keepdim=True)
            square = torch.diag(p.sum(0)[own]) - p[:, own].T @ p[:, own]
            cross, corner = (p * (z - mean)).sum(0)[own], (p * z * z).sum() - mean.square().sum()
        gradient += torch.cat([((p - truth) * z).sum()[None], (p - truth).sum(0)[own]])
        curvature[0, 0] += corner
        curvature[0, 1:] += cross
        curvature[1:, 0] += cross
        curvature[1:, 1:] += square
    count = max(1, len(target))
    gradient[1:] += weights[1:]
    curvature[1:, 1:] += torch.eye(len(own)).double()
    return (loss + 0.5 * float(weights[1:].square().sum())) / count, gradient / count, curvature / count
