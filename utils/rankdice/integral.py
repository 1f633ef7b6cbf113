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

ORDERS = 8  # of the series for log F: at a decay rate m, the rest is less than 8! / m^8 of the score
SUMS = 5  # the most power sums that are computed; others follow from them
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
        sums: ``(R, K, W)`` power sums of the pixels up to each volume; 0 in rows whose pixels are taken one by one.
        values: ``(R, W)`` probability of the pixel that a column adds; 0 in rows whose pixels are all in the sums, and
            in the first column, which then is volume 0. None: there are only such rows.
        rest: ``(R, K, 1)`` or ``(R, K, W)`` power sums of the pixels in the series for log F.
        factors: ``(R or 1, ORDERS, 2 K)`` of these sums, :func:`series_factors`.
        base: ``(R, 1)`` a decay rate of the integrands, by which the nodes are scaled.
        octaves: which rule of :func:`nodes` to use.
    """

    volume: Tensor
    sums: Tensor
    values: Tensor | None
    rest: Tensor
    factors: Tensor
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
    """Return the factors of the power sums in ``-u S`` and log F, by powers of -u, ``(1 + orders, ORDERS, 2 orders)``.

    The first index is how many sums to use. If these are n, ``p^(k - 1)`` is replaced for k > n by the polynomial of
    degree n - 1 that equals it at the Chebyshev points of [0, 1] (economization, Lanczos 1938). For k = n + 1, this is
    wrong by at most ``2^(1 - 2 n)``. Index 0 uses all sums and no replacement, which is better for small p.
    """
    steps = torch.arange(1, 1 + ORDERS, dtype=torch.float64).unsqueeze(1)
    sign = 1 - 2 * (steps % 2)
    found = torch.zeros(1 + orders, ORDERS, 2 * orders, dtype=torch.float64)
    for n in range(1, 1 + orders):
        points = (1 + (math.pi / n * (steps[:n] - 0.5)).cos()) / 2
        values = points ** (steps.view(-1) - 1)  # (n, ORDERS)
        sums = torch.cat([torch.eye(n), torch.linalg.solve(values[:, :n], values[:, n:]).mT])  # (ORDERS, n)
        found[n, :, :n], found[n, :, orders : orders + n] = -sign * sums, -sign / steps * sums
    found[0, :orders] = found[orders, :orders]
    return found.to(device)


@lru_cache(maxsize=64)
def _lost(octaves: int, smooth: float) -> float:
    """Return what the rule leaves out of ``int g exp(-g s) ds`` at the rate 1 + g, for ``g = smooth``."""
    points, logs = nodes(octaves, "iou", torch.device("cpu"))
    scale = smooth / (1 + smooth)
    return 1 - float((logs + points * scale).exp().sum() * scale)


def integrate(goal: Goal, window: Window, size: int) -> Tensor:
    """Return the exact scores ``(R, W)`` of a window; work on ``size`` values ``(R, nodes, W)`` at a time."""
    volume, sums, values, rest, factors, base, octaves = window
    dice, g = goal.metric == "dice", goal.smooth
    points, logs = nodes(octaves, goal.metric, base.device)
    shift = g + 1 if dice else g  # exp(-s) of S is one more pixel in the denominator
    step = max(1, size // volume.numel())
    volume, scores = (volume + shift if shift else volume).unsqueeze(1), None
    p = None if values is None else values.unsqueeze(1)
    for first in range(0, len(points), step):
        part = slice(first, first + step)
        s = points[part] / base.unsqueeze(2)  # (R, N, 1), negative
        minus = s.expm1()  # -u
        series, log = (minus.expand(-1, -1, ORDERS).cumprod(2) @ factors).chunk(2, 2)  # (Tensor.split takes longer)
        exponent = torch.addcmul(torch.baddbmm(logs[part], log, rest), s, volume)  # (R, N, W)
        if dice:
            ratios = torch.bmm(series / minus, sums)
            if g:
                ratios += (g / 2) / s.exp()
        if p is not None:
            q = torch.addcmul(1 - p, p, s.exp())  # 1 - p u without cancellation
            if dice:
                ratios += (p / q).cumsum(2)
            own = q.log_()
            exponent += own.sum(2, keepdim=True) if dice else own.flip(2).cumsum(2).flip(2) - own
        weight = exponent.exp_()
        scored = weight.mul_(ratios).sum(1) if dice else weight.sum(1)
        scores = scored if scores is None else scores + scored
    assert scores is not None
    scores /= base
    if not dice:
        mass = sums[:, 0] if values is None else sums[:, 0] + values.cumsum(1)
        scores *= mass + g
    if g and octaves and values is not None:  # the empty mask: F does not decay below P(no positive pixel)
        counts = torch.arange(1, 1 + rest.shape[1], device=base.device)
        never = ((-values).log1p().sum(1) - (rest[..., 0] / counts).sum(1)).exp_().unsqueeze(1)
        scores[:, :1].add_(never * (base <= 1 + g), alpha=_lost(octaves, g))
    return scores
