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
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

ORDERS = 8  # power sums that replace single pixels; at a decay rate m, the error is below 8! / m^8 of the score
LAGUERRE_NODES, LAGUERRE_SPAN = 12, 2.0  # exact up to rounding for rates within this factor

T = TypeVar("T", float, Tensor)


@dataclass(frozen=True)
class Goal:
    """What is maximized: ``metric`` "dice" or "iou", with the smoothing constant ``smooth``.

    Arguments of the methods: ``total`` is ``mu + g`` of the row, ``variance`` its v; ``volume`` pixels have the sum
    ``mass``. The first two methods take tensors, all of them take floats.
    """

    metric: str
    smooth: float

    def rate(self, total: T, volume: T, mass: T) -> T:
        """Return the mean of the score's denominator: the rate at which the integrand decays at s = 0."""
        return volume + total - mass if self.metric == "iou" else volume + total

    def least(self, rate: T, mass: T) -> T:
        """Return a lower bound of the score: that of Jensen, with one more pixel."""
        above = mass if self.metric == "iou" else 2 * mass
        return (above + self.smooth if self.smooth else above) / (rate + 1)

    def most(self, total: float, volume: float, mass: float, cut: float) -> float:
        """Return an upper bound of the largest leading term, from the ``volume`` pixels with ``p > cut``.

        ``2 C + g - x (t + mu + g)``, maximized over the volumes t, is known for ``x = 2 cut``. It falls in x by at
        least ``mu + g``, to 0 at the largest leading term of Dice (Dinkelbach 1967). That of IoU grows with it.
        """
        g = self.smooth if self.metric == "dice" else 2 * self.smooth
        base = total if self.metric == "dice" else total + self.smooth
        dice = min(1.0, 2 * (cut + max(0.0, mass - cut * (volume + base) + g / 2) / base))
        return dice if self.metric == "dice" else dice / (2 - dice)

    def half(self, score: float) -> float:
        """Return the probability at which one more pixel neither raises nor lowers a leading term."""
        return score / 2 if self.metric == "dice" else score / (score + 1)

    def few(self, total: float, score: float) -> float:
        """Return so many pixels that fewer score less: at most ``(2 t + g) / (t + mu + g) + 1 / (mu + g)``."""
        return (score * total - 1 + self.smooth) / 2

    def below(self, variance: float, few: float) -> float:
        """Return how far below ``half`` of the best score a pixel certainly lowers the score.

        ``few`` is at most ``tau - 1 + g`` for the smallest volume ``tau`` that can be the best.
        "Which volumes must be scored" in ``docs/rankdice.md`` has the proof.
        """
        return variance / few / few

    def above(self, total: float, variance: float, few: float) -> float:
        """Return how far above ``half`` of the best score a pixel certainly raises the score."""
        spread = variance / few / few
        return spread + 2 / few + 2 / total + (4 if self.metric == "dice" else total + 5) * spread / few


class Window(NamedTuple):
    """Consecutive volumes of some rows.

    Attributes:
        volume: ``(R, W)``; each column has one more pixel than the column before.
        values: ``(R, W)`` probability of the added pixel, 0 in the first column.
        outside: ``(R, K, 2)`` power sums of the pixels before the window, and those in the series of log F: of all
            pixels outside the window (Dice) or behind it (IoU).
        orders: ``(R, K, 2)`` factors of these sums, :func:`series_factors`.
        base: ``(R, 1)`` a decay rate of the integrands, by which the nodes are scaled.
        octaves: which rule of :func:`nodes` to use.
    """

    volume: Tensor
    values: Tensor
    outside: Tensor
    orders: Tensor
    base: Tensor
    octaves: int


@lru_cache(maxsize=64)
def nodes(octaves: int, metric: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return negative nodes and logarithms of weights, ``(N, 1)``, for rates from 1 to ``2^octaves``.

    With ``octaves = 0``, Gauss-Laguerre quadrature, for rates between ``1 / r`` and ``r``, ``r^2 = LAGUERRE_SPAN``.
    Otherwise the trapezoidal rule after ``s = exp(t - exp(-t))`` (Takahasi & Mori 1974), accurate to about 1e-13.
    The weights for Dice contain the 2 of its integrand.
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
    logs = logs + math.log(2) if metric == "dice" else logs
    return -points.unsqueeze(1).to(device), logs.unsqueeze(1).to(device)


@lru_cache(maxsize=64)
def series_factors(orders: int, device: torch.device) -> Tensor:
    """Return the factors of ``p^n (-u)^n`` in ``-u S`` and log F, ``(1 + ORDERS, orders, 2)``, for 0 to ORDERS sums."""
    steps = torch.arange(1, orders + 1, device=device, dtype=torch.float64)
    used = steps <= torch.arange(1 + ORDERS, device=device).unsqueeze(1)
    sign = 1 - 2 * (steps % 2)
    return torch.stack([-sign, -sign / steps], 1) * used.unsqueeze(2)


@lru_cache(maxsize=64)
def _lost(octaves: int, smooth: float) -> float:
    """Return what the rule leaves out of ``int g exp(-g s) ds`` at the rate 1 + g, for ``g = smooth``."""
    points, logs = nodes(octaves, "iou", torch.device("cpu"))
    scale = smooth / (1 + smooth)
    return 1 - float((logs + points * scale).exp().sum() * scale)


def integrate(goal: Goal, window: Window, size: int) -> Tensor:
    """Return the exact scores ``(R, W)`` of a window; work on ``size`` values ``(R, nodes, W)`` at a time."""
    volume, values, outside, orders, base, octaves = window
    dice, g = goal.metric == "dice", goal.smooth
    sums = outside * orders
    points, logs = nodes(octaves, goal.metric, base.device)
    shift = g + 1 if dice else g  # exp(-s) of S is one more pixel in the denominator
    volume = (volume + shift if shift else volume).unsqueeze(1)
    absent, values, scores = (1 - values).unsqueeze(1), values.unsqueeze(1), None
    step = max(1, size // values.numel())
    for first in range(0, len(points), step):
        part = slice(first, first + step)
        s = points[part] / base.unsqueeze(2)  # (R, N, 1), negative
        e, minus = s.exp(), s.expm1()  # 1 - u and -u; 1 - e would cancel
        series = minus.expand(-1, -1, orders.shape[1]).cumprod(2)  # (-u)^n
        series, log = (series @ sums).chunk(2, 2)  # (Tensor.split takes longer)
        q = torch.addcmul(absent, values, e)  # 1 - p u without cancellation, (R, N, W)
        exponent = torch.addcmul(log + logs[part], s, volume)
        if dice:
            ratios = (values / q).cumsum(2).add_(series / minus)
            ratios = ratios.add_(g / 2 / e) if g else ratios
            scored = exponent.add_(q.log_().sum(2, keepdim=True)).exp_().mul_(ratios).sum(1)
        else:
            own = q.log_().cumsum(2)
            scored = exponent.sub_(own).add_(own[..., -1:]).exp_().sum(1)
        scores = scored if scores is None else scores + scored
    assert scores is not None
    scores /= base
    if not dice:
        scores *= outside[:, 0, :1] + values.squeeze(1).cumsum(1) + g
    if g and octaves:  # the empty mask: F does not decay below P(no positive pixel)
        odd, even = (sums[:, first::2, 1].sum(1, keepdim=True) for first in (0, 1))
        never = (absent.log().sum(2) - odd + even).exp_()
        scores[:, :1].add_(never * (base <= 1 + g), alpha=_lost(octaves, g))
    return scores
