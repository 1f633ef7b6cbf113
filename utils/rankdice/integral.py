"""The expected Dice and IoU of the ``tau`` most probable pixels: bounds, and exact values by quadrature.

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

ORDERS = 8  # power sums that stand for pixels of a table: at a decay rate m they leave out less than 8! / m^8
FAR_ORDERS = 4  # the same for pixels outside a table, which have p < m / FAR_RATE
FAR_RATE = 600.0  # so that they leave out less than 4! / FAR_RATE^4
LAGUERRE_NODES = 16  # exact up to rounding for rates within LAGUERRE_SPAN
LAGUERRE_SPAN = 3.0
SLACK = 1e-12  # relative, for rounding in the bounds
CACHE = 1 << 17  # float64 values that fit in a core's cache
CPU = {"cpu"}  # where the host need not wait for results, and work is split to fit the cache


@dataclass(frozen=True)
class Goal:
    """What is maximized: ``metric`` "dice" or "iou", with the smoothing constant ``smooth``."""

    metric: str
    smooth: float

    def lead(self, total: Tensor, volume: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Return the leading term of the score, and its denominator, at whose rate the integrand decays at s = 0.

        The score of ``volume`` pixels with the sum ``mass`` is at most ``lead + v / rate^2``. ``total`` is ``mu + g``.
        """
        rate = volume + total
        if self.metric == "iou":
            rate -= mass
        else:
            mass = mass * 2
        return (mass + self.smooth if self.smooth else mass) / rate, rate

    def least(self, lead: Tensor, rate: Tensor, volume: Tensor, mass: Tensor) -> Tensor:
        """Return a lower bound of the score, for volumes of at least 1."""
        if self.metric == "iou":
            return lead
        return torch.addcdiv(lead, mass - mass * mass / volume, rate * rate, value=-2)

    def cuts(
        self, total: Tensor, variance: Tensor, volume: Tensor, least: Tensor, lead: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return probabilities ``(low, high)`` between which the best mask is cut.

        A volume that includes pixels with ``p <= low`` beyond ``volume`` is not best, nor is one below ``volume`` that
        leaves out pixels with ``p >= high``. "Which volumes must be scored" in ``docs/rankdice.md`` has the proof.

        Args:
            total: mu + g of the row.
            variance: v of the row.
            volume: any volume of at least 1.
            least: a lower bound of its score.
            lead: the largest leading term.
        """
        g, dice = self.smooth, self.metric == "dice"
        rest = variance / (total * total)
        few = (least - rest) * total  # volumes below this one score less than `least`
        few = few - g if g else few
        few = (few / (2 + rest - least) if dice else few).clamp_(min=1)
        base = volume + g if g else volume
        few = few + g if g else few
        low = torch.addcdiv(least, variance, base * base, value=-2).clamp_(min=0) if dice else least
        spread = 2 * variance / (few * few)
        high = lead + rest + (spread if dice else spread * ((total + 1) / few + 1) / 2)
        high /= (1 - (spread + 1) / few).clamp_(min=1e-100)
        if dice:
            return low * (0.5 - SLACK), high * (0.5 + SLACK)
        return low / (low + (1 + SLACK)), high / (high + (1 - SLACK))


class Window(NamedTuple):
    """Consecutive volumes of some rows.

    Attributes:
        volume: ``(R, W)``; the first column's is the base, each further one takes one pixel more.
        values: ``(R, W)`` probability of that pixel, 0 in the first column and behind the last volume.
        above, below: ``(R, orders)`` power sums of the pixels before and behind the window.
        slow, fast: ``(R, 1)`` the range of the integrands' rates.
    """

    volume: Tensor
    values: Tensor
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
    """Return nodes and log weights for integrands that decay at rates from 1 to ``2^octaves``.

    The trapezoidal rule after ``s = exp(t - exp(-t))`` (Takahasi & Mori 1974), to about 1e-13.
    """
    step = 0.1 / max(1.0, octaves / 6.5)
    left, right = -math.log(37 + octaves * math.log(2)), math.log(40)
    t = [left + step * k for k in range(math.ceil((right - left) / step) + 1)]
    return [math.exp(x - math.exp(-x)) for x in t], [math.log(step * (1 + math.exp(-x))) + x - math.exp(-x) for x in t]


def nodes(span: float, like: Tensor, *more: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return ``(K, 1, 1)`` nodes and log weights for rates from 1 to ``span``, and ``more`` of them."""
    if span <= LAGUERRE_SPAN:
        points, logs = _laguerre(LAGUERRE_NODES)
        points, logs = [x / math.sqrt(span) for x in points], [w - math.log(span) / 2 for w in logs]
    else:
        points, logs = _double_exponential(min(60, math.ceil(math.log2(span))))
    points, logs = ([*own, *(pair[k] for pair in more)] for k, own in enumerate((points, logs)))
    table = torch.tensor([points, logs], dtype=torch.float64, device=like.device).view(2, -1, 1, 1)
    return table[0], table[1]


def _log_series(power: Tensor, powers: Tensor, steps: Tensor) -> Tensor:
    """Return ``-sum log(1 - p u)`` ``(K, R, 1)`` of pixels with power sums ``(R, n)``; ``powers`` are ``u^n``."""
    return (powers * (power / steps)).sum(-1, keepdim=True)


def integrate(goal: Goal, window: Window, span: float, step: int) -> Tensor:
    """Return the exact scores ``(R, W)`` of the volumes of a window.

    Args:
        goal: what is maximized.
        window: the volumes.
        span: at least the largest ``fast / slow`` of the rows.
        step: how many nodes at a time.
    """
    points, logs = nodes(span, window.values)
    steps = torch.arange(1, window.above.shape[1] + 1, device=points.device)
    volume = window.volume + goal.smooth if goal.smooth else window.volume
    absent, total = 1 - window.values, None
    for x, log_weight in zip(points.split(step), logs.split(step), strict=True):
        s = x / -window.slow  # (K, R, 1), negative
        e, minus = s.exp(), s.expm1()  # -u; 1 - e would cancel
        powers = (-minus) ** steps  # (K, R, n)
        q = torch.addcmul(absent, window.values, e)  # 1 - p u without cancellation, (K, R, W)
        exponent = torch.addcmul(log_weight, s, volume)
        if goal.metric == "iou":
            own = q.log_().cumsum(2)
            exponent -= _log_series(window.below, powers, steps) - own[..., -1:] + own
            part = exponent.exp_().sum(0)
        else:
            inside = (powers * window.above).sum(2, keepdim=True) / minus  # -sum p / (1 - p u) before the window
            ratios = ((window.values / q).cumsum(2) - inside) * (2 * e)
            exponent += q.log_().sum(2, keepdim=True) - _log_series(window.above + window.below, powers, steps)
            part = (exponent.exp_() * (ratios + goal.smooth if goal.smooth else ratios)).sum(0)
        total = part if total is None else total + part
    assert total is not None
    total = total / window.slow
    if goal.metric == "iou":
        total = total * (window.above[:, :1] + window.values.cumsum(1) + goal.smooth)
    return total


def empty_score(smooth: float, mean: Tensor, values: Tensor, rest: Tensor) -> Tensor:
    """Return ``E[g / (g + |Y|)]`` ``(R, 1)``, the score of the empty mask, for ``g = smooth > 0``.

    With ``F(inf) = P(|Y| = 0)`` taken out, the rest of the integrand decays at least like exp(-s).

    Args:
        smooth: the constant g.
        mean: mu, ``(R, 1)``.
        values: ``(R, E)`` the most probable pixels.
        rest: ``(R, ORDERS)`` power sums of the other pixels.
    """
    few = mean < 100  # else P(|Y| = 0) <= exp(-mean) is negligible, and the series holds for small u only
    slow = mean.masked_fill(few, 1) + smooth
    points, logs = nodes(128.0, mean, (torch.inf, -torch.inf))  # the last node is P(|Y| = 0)
    s = points / -slow  # (K, R, 1), negative
    minus = s.expm1()
    absent = torch.addcmul(1 - values, values, s.exp()).log_()
    steps = torch.arange(1, rest.shape[1] + 1, device=mean.device)
    some = (absent.sum(2, keepdim=True) - _log_series(rest, (-minus) ** steps, steps)).exp()
    never = some[-1] * few
    return never + (torch.add(logs, s, alpha=smooth).exp() * (some - never)).sum(0) * smooth / slow
