"""The expected Dice and IoU of the ``tau`` most probable pixels: bounds, and exact values by quadrature.

For one row with probabilities ``p_1 >= p_2 >= ...``, mean volume ``mu = sum p_j``, variance ``v = sum p_j (1 - p_j)``,
``C(tau) = p_1 + ... + p_tau`` and smoothing ``g``, with ``u = 1 - exp(-s)``::

    Dice(tau) = int_0^inf exp(-s (tau + g)) F(s) [2 exp(-s) S(tau, s) + g] ds
    IoU(tau)  = (C(tau) + g) int_0^inf exp(-s (tau + g)) F_tau(s) ds

    F(s) = prod_j (1 - p_j u),   F_tau(s) = prod_{j > tau} (1 - p_j u),   S(tau, s) = sum_{j <= tau} p_j / (1 - p_j u)

``docs/rankdice.md`` derives these and the bounds. All tensors here are float64 with rows first: ``(R, ...)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

ORDERS = 8  # power sums that stand for pixels of a table: at a decay rate m they leave out less than 8! / m^8
FAR_ORDERS = 4  # the same for pixels outside a table, which have p < m / FAR_RATE
FAR_RATE = 600.0  # so that they leave out less than 4! / FAR_RATE^4
LAGUERRE_NODES = 16  # good to round-off for rates within LAGUERRE_SPAN
LAGUERRE_SPAN = 3.0
SURE_MEAN = 300.0  # from this mean volume on, P(count < mean / 2) < exp(-mean / 8) is nothing beside the bounds
CACHE = 1 << 17  # float64 values that a core's cache holds
CPU = {"cpu"}  # where the host need not wait for results, and work is split to fit the cache


@dataclass(frozen=True)
class Goal:
    """What is maximized: ``metric`` "dice" or "iou", with the smoothing constant ``smooth``."""

    metric: str
    smooth: float

    def bounds(
        self, mean: Tensor, variance: Tensor, volume: Tensor, mass: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bound the scores of ``volume >= 1`` pixels with the sum ``mass``.

        ``1 / (a + m) <= E[1 / (a + X)] <= 1 / (a + m) + v / (a (a + m)^2)`` with ``m = E X`` and ``v = Var X``. For
        Dice, ``sum p_j / (b - p_j) >= C / b + C^2 / (tau b^2)``.

        Returns:
            ``rate``, the mean of the score's denominator, at which the integrand falls at s = 0; ``lower``, a lower
            bound of the score; ``lead`` and ``excess``: ``lead (1 + excess)`` is an upper bound, and ``excess`` falls
            with the volume.
        """
        g = self.smooth
        rate = volume + (mean + g if g else mean)
        base = volume + g if g else volume
        if self.metric == "iou":
            rate = rate - mass
            lead = (mass + g if g else mass) / rate
            return rate, lead, lead, variance / (base * rate)
        share = mass / (rate + 1)
        lower = torch.addcdiv(share, share * share, volume) * 2
        lead = mass * 2 / rate
        if g:
            lower, lead = lower + g / rate, lead + g / rate
        return rate, lower, lead, variance / (base * rate)

    def cuts(
        self, mean: Tensor, variance: Tensor, highest: Tensor, volume: Tensor, lower: Tensor, upper: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return probabilities ``(low, high)``, ``(R,)``: the cut of the best mask lies between them.

        If the best score ``M`` lies in ``[lower, upper]`` and ``volume`` pixels reach ``lower``: no volume beyond
        ``volume`` is better that takes pixels with ``p <= low`` on top of all others, and none is better that leaves
        out pixels with ``p >= high``. ``docs/rankdice.md`` ("Which pixels are in doubt") has the proof: one pixel more
        changes the score by ``(2 p - M) E[1 / denominator]``, but for covariances that are bounded here.

        Args:
            mean, variance: mu and v of the row.
            highest: an upper bound of all probabilities of the row.
            volume: at least 1.
            lower, upper: bounds of the best score.
        """
        g = self.smooth
        total = mean + g if g else mean
        few = mean < SURE_MEAN  # else the count is at least mean / 2
        tiny = 1e-12
        # Volumes up to `least` score below `lower`, since their C is at most tau * highest.
        if self.metric == "iou":
            spread = (total * 0.499).masked_fill(few, 1 + g)
            reach = lower / (1 + variance / (total * spread).clamp(min=tiny))
            slope = highest - reach * (1 - highest)
        else:
            half = (mean * 0.499).masked_fill(few, 0)
            half = half + g if g else half
            reach = lower / (1 + variance / ((1 + half) * (1 + total)))
            slope = 2 * highest - reach
        least = reach * total - g if g else reach * total
        least = torch.minimum((least / slope.clamp(min=tiny) - 1).clamp(min=1), volume)
        if self.metric == "iou":
            near = least + g if g else least
            base = torch.maximum(least * (1 - highest) + (total - 1), near)
            ratio = 1 + variance / torch.where(few, near, base * 0.499) ** 2
            high = upper * ratio / (1 - ratio * ratio / base).clamp(min=1e-100)  # else 1: a sure pixel always helps
            return lower / (1 + lower), high / (1 + high)
        far, beyond = least + half, volume + half
        omega = (variance / far + 1) / (least + total)  # at most 1
        high = torch.addcdiv(upper / 2, variance, far * far) / (1 + tiny - omega)
        return torch.addcdiv(lower / 2, variance, beyond * beyond, value=-1), high


@dataclass(frozen=True)
class Window:
    """Consecutive volumes of some rows.

    Attributes:
        volume: ``(R, W)``; the first column's is the base, each further one takes one pixel more.
        values: ``(R, W)`` probability of that pixel, 0 in the first column and behind the last volume.
        barred: bool ``(R, W)``, True for the empty mask and behind the last volume.
        above, below: ``(R, orders)`` power sums of the pixels before and behind the window.
        slow, fast: ``(R, 1)`` the range of the integrands' rates.
    """

    volume: Tensor
    values: Tensor
    barred: Tensor
    above: Tensor
    below: Tensor
    slow: Tensor
    fast: Tensor


@lru_cache(maxsize=64)
def _laguerre(nodes: int) -> tuple[list[float], list[float]]:
    """Return nodes x and ``log(w exp(x))``, w being the weights of Gauss-Laguerre quadrature."""
    steps = torch.arange(1.0, nodes, dtype=torch.float64)
    jacobi = torch.diag(2 * torch.arange(nodes, dtype=torch.float64) + 1) + torch.diag(steps, 1) + torch.diag(steps, -1)
    points, logs = [], []
    for x in torch.linalg.eigvalsh(jacobi).tolist():
        for _ in range(3):  # Newton steps: L'_n(x) = n (L_n - L_{n-1}) / x
            before, value = 1.0, 1.0 - x
            for n in range(1, nodes):
                before, value = value, ((2 * n + 1 - x) * value - n * before) / (n + 1)
            x -= value * x / (nodes * (value - before))
        points.append(x)
        logs.append(math.log(x) + x - 2 * math.log(nodes * abs(before)))
    return points, logs


@lru_cache(maxsize=64)
def _double_exponential(octaves: int) -> tuple[list[float], list[float]]:
    """Return nodes and log weights for integrands that fall at rates from 1 to ``2^octaves``.

    The trapezoidal rule after ``s = exp(t - exp(-t))`` (Takahasi & Mori 1974), to about 1e-13.
    """
    step = 0.1 / max(1.0, octaves / 6.5)
    left, right = -math.log(37 + octaves * math.log(2)), math.log(40)
    t = [left + step * k for k in range(math.ceil((right - left) / step) + 1)]
    return [math.exp(x - math.exp(-x)) for x in t], [math.log(step * (1 + math.exp(-x))) + x - math.exp(-x) for x in t]


def nodes(span: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(K, 1, 1)`` nodes and log weights for rates from 1 to ``span``."""
    if span <= LAGUERRE_SPAN:
        points, logs = _laguerre(LAGUERRE_NODES)
        points, logs = [x / math.sqrt(span) for x in points], [w - math.log(span) / 2 for w in logs]
    else:
        points, logs = _double_exponential(min(60, math.ceil(math.log2(span))))
    table = torch.tensor([points, logs], dtype=torch.float64, device=like.device).view(2, -1, 1, 1)
    return table[0], table[1]


def _log_series(power: Tensor, u: Tensor, powers: Tensor, steps: Tensor) -> Tensor:
    """Return ``sum log(1 - p u)`` ``(K, R)`` of pixels with power sums ``(R, n)``; ``powers`` are ``u^steps``."""
    return (powers * (power / (-1 - steps))).sum(-1) * u


def integrate(goal: Goal, window: Window, span: float, step: int) -> Tensor:
    """Return the exact scores ``(R, W)`` of the volumes of a window.

    Args:
        goal: what is maximized.
        window: the volumes.
        span: at least the largest ``fast / slow`` of the rows.
        step: how many nodes at a time.
    """
    points, logs = nodes(span, window.values)
    steps = torch.arange(window.above.shape[1], device=points.device)
    volume = window.volume + goal.smooth if goal.smooth else window.volume
    absent, total = 1 - window.values, None
    for x, log_weight in (
        zip(points.split(step), logs.split(step), strict=True) if step < len(points) else [(points, logs)]
    ):
        s = x / window.slow  # (K, R, 1)
        minus = -s
        e, u = minus.exp(), -minus.squeeze(2).expm1()  # 1 - e would cancel
        powers = u.unsqueeze(2) ** steps
        q = torch.addcmul(absent, window.values, e)  # 1 - p u without cancellation, (K, R, W)
        exponent = torch.addcmul(log_weight, s, volume, value=-1)
        if goal.metric == "iou":
            own = q.log_().cumsum(2)
            exponent += _log_series(window.below, u, powers, steps).unsqueeze(2) + own[..., -1:] - own
            part = exponent.exp_().sum(0)
        else:
            ratios = ((powers * window.above).sum(2, keepdim=True) + (window.values / q).cumsum(2)) * (2 * e)
            logs_absent = _log_series(window.above + window.below, u, powers, steps) + q.log_().sum(2)
            exponent += logs_absent.unsqueeze(2)
            part = (exponent.exp_() * (ratios + goal.smooth if goal.smooth else ratios)).sum(0)
        total = part if total is None else total + part
    assert total is not None
    total = total / window.slow
    if goal.metric == "iou":
        total = total * (window.above[:, :1] + window.values.cumsum(1) + goal.smooth)
    return total


def empty_score(smooth: float, mean: Tensor, values: Tensor, rest: Tensor) -> Tensor:
    """Return ``E[g / (g + |Y|)]`` ``(R,)``, the score of the empty mask, for ``g = smooth > 0``.

    With ``F(inf) = P(|Y| = 0)`` taken out, what is left under the integral falls at least like exp(-s).

    Args:
        smooth: the constant g.
        mean: mu, ``(R,)``.
        values: ``(R, E)`` the most probable pixels.
        rest: ``(R, ORDERS)`` power sums of the others.
    """
    few = mean < 100  # else P(|Y| = 0) <= exp(-mean) is nothing, and the series holds for small u only
    slow = smooth + torch.where(few, 1.0, mean)
    points, logs = nodes(128.0, mean)
    s = pad(points.squeeze(2) / slow, (0, 0, 0, 1), value=torch.inf)  # (K + 1, R): the last node is P(|Y| = 0)
    e, u = torch.exp(-s), -torch.expm1(-s)
    steps = torch.arange(rest.shape[1], device=mean.device)
    some = _log_series(rest, u, u.unsqueeze(2) ** steps, steps)
    some = (some + torch.addcmul(1 - values, values, e.unsqueeze(2)).log_().sum(2)).exp()
    never = some[-1] * few
    return never + smooth * ((logs.squeeze(2) - s[:-1] * smooth).exp() * (some[:-1] - never)).sum(0) / slow
