"""Expected Dice and IoU of the ``tau`` most probable pixels: bounds, and exact values by quadrature.

For one row with probabilities ``p_1 >= p_2 >= ...``, mean volume ``mu = sum p_j``, variance ``v = sum p_j (1 - p_j)``,
``C(tau) = p_1 + ... + p_tau`` and smoothing ``g``, with ``u = 1 - exp(-s)``::

    Dice(tau) = int_0^inf exp(-s (tau + g)) F(s) [2 exp(-s) S(tau, s) + g] ds
    IoU(tau)  = (C(tau) + g) int_0^inf exp(-s (tau + g)) F_tau(s) ds

    F(s) = prod_j (1 - p_j u),   F_tau(s) = prod_{j > tau} (1 - p_j u),   S(tau, s) = sum_{j <= tau} p_j / (1 - p_j u)

``docs/rankdice.md`` derives these and the bounds. All tensors are float64 with rows first: ``(R, 1)``, ``(R, W)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ORDERS = 8  # power sums that replace single pixels; at a decay rate m, the error is below 8! / m^8 of the score
LAGUERRE_NODES, LAGUERRE_SPAN = 12, 2.0  # exact up to rounding for rates within this factor


@dataclass(frozen=True)
class Goal:
    """What is maximized: ``metric`` "dice" or "iou", with the smoothing constant ``smooth``.

    Arguments of the methods: ``total`` is ``mu + g`` of the row, ``variance`` its v; ``volume`` pixels have the sum
    ``mass``.
    """

    metric: str
    smooth: float

    def rate(self, total: Tensor, volume: Tensor, mass: Tensor) -> Tensor:
        """Return the mean of the score's denominator: the rate at which the integrand decays at s = 0."""
        rate = volume + total
        return rate.sub_(mass) if self.metric == "iou" else rate

    def least(self, rate: Tensor, mass: Tensor) -> Tensor:
        """Return a lower bound of the score: that of Jensen, with one more pixel."""
        above = mass if self.metric == "iou" else 2 * mass
        return (above + self.smooth if self.smooth else above) / (rate + 1)

    def most(self, total: Tensor, volume: Tensor, mass: Tensor, cut: Tensor) -> Tensor:
        """Return an upper bound of the largest leading term, from the ``volume`` pixels with ``p > cut``.

        ``2 C + g - x (t + mu + g)``, maximized over the volumes t, is known for ``x = 2 cut``. It falls in x by at
        least ``mu + g``, to 0 at the largest leading term of Dice (Dinkelbach 1967). That of IoU grows with it.
        """
        g = self.smooth if self.metric == "dice" else 2 * self.smooth
        base = total if self.metric == "dice" else total + self.smooth
        dice = (2 * (cut + (mass - cut * (volume + base) + g / 2).clamp_(min=0) / base)).clamp_(max=1)
        return dice if self.metric == "dice" else dice / (2 - dice)

    def half(self, score: Tensor) -> Tensor:
        """Return the probability at which one more pixel neither raises nor lowers a leading term."""
        return score / 2 if self.metric == "dice" else score / (score + 1)

    def margins(self, total: Tensor, variance: Tensor, few: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far below and above ``half`` of the best score a pixel certainly lowers and raises the score.

        ``few`` is at most ``tau - 1 + g`` for the smallest volume ``tau`` that can be the best.
        "Which volumes must be scored" in ``docs/rankdice.md`` has the proof.
        """
        small = few.reciprocal()
        spread = variance * small * small
        above = torch.add(spread, small + total.reciprocal(), alpha=2)
        if self.metric == "dice":
            return spread, above.addcmul_(spread, small, value=4)
        return spread, above.addcmul_(spread * small, total + 5)


class Window(NamedTuple):
    """Consecutive volumes of some rows.

    Attributes:
        volume: ``(R, W)``; each column has one more pixel than the column before.
        values: ``(R, W)`` probability of the added pixel, 0 in the first column.
        outside: ``(R, 2, ORDERS)`` power sums of the pixels before and behind the window.
        base: ``(R, 1)`` a decay rate of the integrands, by which the nodes are scaled.
        octaves: which rule of :func:`nodes` to use.
    """

    volume: Tensor
    values: Tensor
    outside: Tensor
    base: Tensor
    octaves: int


@lru_cache(maxsize=64)
def nodes(octaves: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nodes and logarithms of weights ``(2, K, 1, 1)``, for rates from 1 to ``2^octaves``, and 1 to ``ORDERS``.

    With ``octaves = 0``, Gauss-Laguerre quadrature, for rates between ``1 / r`` and ``r``, ``r^2 = LAGUERRE_SPAN``.
    Otherwise the trapezoidal rule after ``s = exp(t - exp(-t))`` (Takahasi & Mori 1974), accurate to about 1e-13.
    """
    if octaves:
        step = 0.1 / max(1.0, octaves / 6.5)
        left, right = -math.log(37 + octaves * math.log(2)), math.log(40)
        t = left + step * torch.arange(math.ceil((right - left) / step) + 1, dtype=torch.float64)
        points, logs = (t - (-t).exp()).exp(), (step * (1 + (-t).exp())).log() + t - (-t).exp()
    else:
        n = torch.arange(LAGUERRE_NODES, dtype=torch.float64)
        points, vectors = torch.linalg.eigh((2 * n + 1).diag() + n[1:].diag(1) + n[1:].diag(-1))  # Golub & Welsch 1969
        logs = 2 * vectors[0].abs().log() + points
    return torch.stack([points, logs]).view(2, -1, 1, 1).to(device), torch.arange(1, ORDERS + 1, device=device)


@lru_cache(maxsize=64)
def _lost(octaves: int, smooth: float) -> float:
    """Return what the rule leaves out of ``int g exp(-g s) ds`` at the rate 1 + g, for ``g = smooth``."""
    points, logs = nodes(octaves, torch.device("cpu"))[0].flatten(1)
    scale = smooth / (1 + smooth)
    return 1 - float((logs - points * scale).exp().sum() * scale)


def integrate(goal: Goal, window: Window, size: int) -> Tensor:
    """Return the exact scores ``(R, W)`` of a window; work on ``size`` values ``(nodes, R, W)`` at a time."""
    volume, values, outside, base, octaves = window
    both, steps = nodes(octaves, base.device)
    before, rest = outside.unbind(1)
    if goal.metric == "dice":
        rest = rest + before
    sums = torch.stack([before, rest / steps], 2)  # of p^n for S, and of p^n / n for log F
    volume = volume + goal.smooth if goal.smooth else volume
    absent, scores = 1 - values, None
    for x, log_weight in both.split(max(1, size // values.numel()), 1):
        s = x / -base  # (K, R, 1), negative
        e, minus = s.exp(), s.expm1()  # 1 - u and -u; 1 - e would cancel
        series = (-minus).expand(-1, -1, ORDERS).cumprod(2)  # u^n
        series, logs = (series.transpose(0, 1) @ sums).transpose(0, 1).split(1, 2)
        q = torch.addcmul(absent, values, e)  # 1 - p u without cancellation, (K, R, W)
        exponent = torch.addcmul(log_weight - logs, s, volume)
        if goal.metric == "iou":
            own = q.log_().cumsum(2)
            part = exponent.sub_(own).add_(own[..., -1:]).exp_().sum(0)
        else:
            ratios = (values / q).cumsum(2).sub_(series / minus).mul_(2 * e)
            ratios = ratios.add_(goal.smooth) if goal.smooth else ratios
            part = exponent.add_(q.log_().sum(2, keepdim=True)).exp_().mul_(ratios).sum(0)
        scores = part if scores is None else scores + part
    assert scores is not None
    scores /= base
    if goal.metric == "iou":
        scores *= before[:, :1] + values.cumsum(1) + goal.smooth
    if goal.smooth and octaves:  # the empty mask: F does not decay below P(no positive pixel)
        never = (absent.log().sum(1, keepdim=True) - sums[..., 1].sum(1, keepdim=True)).exp_()
        scores[:, :1].add_(never * (base <= 1 + goal.smooth), alpha=_lost(octaves, goal.smooth))
    return scores
