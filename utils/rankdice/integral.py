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

ORDERS = 8  # power sums that stand for pixels: at a decay rate m they leave out less than 8! / m^8 of the score
LAGUERRE_NODES, LAGUERRE_SPAN = 12, 2.0  # exact up to rounding for rates within this factor
SLACK = 1e-12  # relative, for rounding in the bounds


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

    def most(self, total: Tensor, volume: Tensor, mass: Tensor, cut: Tensor) -> Tensor:
        """Return at least the largest leading term, by the ``volume`` pixels with ``p > cut`` and their sum ``mass``.

        ``2 C + g - x (t + mu + g)``, maximized over the volumes t, is known for ``x = 2 cut``. It falls in x by at
        least ``mu + g``, to 0 at the largest leading term of Dice (Dinkelbach 1967). That of IoU grows with it.
        """
        g = self.smooth if self.metric == "dice" else 2 * self.smooth
        base = total if self.metric == "dice" else total + self.smooth
        dice = (2 * (cut + (mass - cut * (volume + base) + g / 2).clamp_(min=0) / base)).clamp_(max=1)
        return dice if self.metric == "dice" else dice / (2 - dice)

    def least(self, lead: Tensor, rate: Tensor, spread: Tensor) -> Tensor:
        """Return a lower bound of the score; ``spread`` is at least ``sum p (1 - p)`` of the pixels in the mask."""
        return lead if self.metric == "iou" else torch.addcdiv(lead, spread, rate * rate, value=-2)

    def cuts(
        self, total: Tensor, variance: Tensor, volume: Tensor, least: Tensor, lead: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return probabilities ``(low, high)`` between which the best mask is cut.

        A volume that includes pixels with ``p <= low`` beyond ``volume`` is not best, nor is one below ``volume`` that
        leaves out pixels with ``p >= high``. "Which volumes must be scored" in ``docs/rankdice.md`` has the proof.

        Args:
            total: mu + g of the row.
            variance: v of the row.
            volume: any volume.
            least: a lower bound of its score.
            lead: at least the largest leading term.
        """
        g, dice = self.smooth, self.metric == "dice"
        rest = variance / (total * total)
        worth = least - rest
        few = worth * total  # as for the volume h - g, below which all score less than `least`
        few = ((few + g if g else few) / 2 if dice else few).clamp_(min=g or 1)
        spread = variance / (few * few)
        high = lead + rest
        high.add_(spread, alpha=2) if dice else high.addcmul_(spread, (total + 1) / few + 1)
        high = high * few / torch.sub(few - 1, spread, alpha=2).clamp_(min=1e-100)
        if dice:
            base = volume + g if g else volume.clamp(min=1)
            low = torch.addcdiv(least, variance, base * base, value=-2).clamp_(min=0)
            return low * (0.5 - SLACK), high * (0.5 + SLACK)
        return least / (least + (1 + SLACK)), high / (high + (1 - SLACK))


class Window(NamedTuple):
    """Consecutive volumes of some rows.

    Attributes:
        volume: ``(R, W)``; the first column's is the base, each further one takes one pixel more.
        values: ``(R, W)`` probability of that pixel, 0 in the first column and behind the last volume.
        above, below: ``(R, ORDERS)`` power sums of the pixels before and behind the window.
        slow, fast: ``(R, 1)`` the range of the integrands' rates.
    """

    volume: Tensor
    values: Tensor
    above: Tensor
    below: Tensor
    slow: Tensor
    fast: Tensor


@lru_cache(maxsize=64)
def nodes(octaves: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nodes and logarithms of weights ``(2, K, 1, 1)``, for rates from 1 to ``2^octaves``, and 1 to ``ORDERS``.

    0 stands for Gauss-Laguerre quadrature: the rates are between ``1 / r`` and ``r``, ``r^2 = LAGUERRE_SPAN``. For
    more, the trapezoidal rule after ``s = exp(t - exp(-t))`` (Takahasi & Mori 1974), to about 1e-13.
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


def integrate(goal: Goal, window: Window, span: float, size: int) -> Tensor:
    """Return the exact scores ``(R, W)`` of the volumes of a window.

    Args:
        goal: what is maximized.
        window: the volumes.
        span: at least the largest ``fast / slow`` of the rows.
        size: how many values ``(nodes, R, W)`` to work on at a time.
    """
    wide = span > LAGUERRE_SPAN
    base = window.slow if wide else (window.slow * window.fast).sqrt_()
    octaves = min(60, math.ceil(math.log2(span))) if wide else 0
    both, steps = nodes(octaves, base.device)
    rest = (window.below if goal.metric == "iou" else window.below + window.above) / steps
    volume = window.volume + goal.smooth if goal.smooth else window.volume
    absent, total = 1 - window.values, None
    for x, log_weight in both.split(max(1, size // window.values.numel()), 1):
        s = x / -base  # (K, R, 1), negative
        e, minus = s.exp(), s.expm1()  # -u; 1 - e would cancel
        powers = (-minus).expand(-1, -1, ORDERS).cumprod(2)
        q = torch.addcmul(absent, window.values, e)  # 1 - p u without cancellation, (K, R, W)
        exponent = torch.addcmul(log_weight, s, volume)
        if goal.metric == "iou":
            own = q.log_().cumsum(2)
            exponent -= (powers * rest).sum(2, keepdim=True) - own[..., -1:] + own
            part = exponent.exp_().sum(0)
        else:
            inside = (powers * window.above).sum(2, keepdim=True) / minus  # -sum p / (1 - p u) before the window
            ratios = ((window.values / q).cumsum(2) - inside) * (2 * e)
            exponent += q.log_().sum(2, keepdim=True) - (powers * rest).sum(2, keepdim=True)
            part = (exponent.exp_() * (ratios + goal.smooth if goal.smooth else ratios)).sum(0)
        total = part if total is None else total + part
    assert total is not None
    total = total / base
    if goal.metric == "iou":
        total = total * (window.above[:, :1] + window.values.cumsum(1) + goal.smooth)
    if goal.smooth and wide:  # the empty mask: F does not decay below P(no positive pixel)
        never = (absent.log().sum(1, keepdim=True) - rest.sum(1, keepdim=True)).exp_()
        total[:, :1].add_(never * (window.slow <= 1 + goal.smooth), alpha=_lost(octaves, goal.smooth))
    return total
