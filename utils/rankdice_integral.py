"""The expected Dice and IoU of the top ``tau`` pixels: bounds for many volumes, and exact values by quadrature.

For one row with probabilities ``p_1 >= p_2 >= ...``, mean volume ``mu = sum p_j``, variance ``v = sum p_j (1 - p_j)``,
``C(tau) = p_1 + ... + p_tau`` and smoothing ``g``, with ``u = 1 - exp(-s)``::

    Dice(tau) = int_0^inf exp(-s (tau + g)) F(s) [2 exp(-s) S(tau, s) + g] ds
    IoU(tau)  = (C(tau) + g) int_0^inf exp(-s (tau + g)) F_tau(s) ds

    F(s) = prod_j (1 - p_j u),   F_tau(s) = prod_{j > tau} (1 - p_j u),   S(tau, s) = sum_{j <= tau} p_j / (1 - p_j u)

``docs/rankdice.md`` derives these and the bounds. All tensors here are float64 with rows first: ``(R, ...)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

POWERS = 4  # power sums that stand for the pixels that are not looked at one by one
BLOCK = 1024  # elements per block of a sum
CACHE = 1 << 17  # float64 values that a core's cache holds
RATIO = 4.0  # volumes whose decay rates differ by at most this factor share one set of nodes
MOST_TURNS = 32
NODES = 8
MOST_NODES = 32
EMPTY_NODES = 48
SLACK = 1e-12  # relative, for rounding in the bounds
TOLERANCE = 1e-11  # twice the nodes must give the same score, relative


@dataclass
class RowFacts:
    """What is known about some rows.

    Attributes:
        power: ``(R, 4)``, ``sum_j p_j^n`` for n = 1..4 over the whole row.
        lower: ``(R,)``, a score that some volume of the row is known to reach.
        searched: bool ``(R,)``, False for pruned rows, whose mask stays empty.
    """

    power: Tensor
    lower: Tensor
    searched: Tensor

    @property
    def mean(self) -> Tensor:
        """Return mu."""
        return self.power[:, 0]

    @property
    def variance(self) -> Tensor:
        """Return v."""
        return (self.power[:, 0] - self.power[:, 1]).clamp(min=0)

    def __getitem__(self, index: Tensor) -> RowFacts:
        return RowFacts(self.power[index], self.lower[index], self.searched[index])


@dataclass
class Pixels:
    """The pixels of some rows, as far as they are known one by one.

    Attributes:
        values: ``(R, W)``, descending, filled up with zeros: the pixels whose volumes are to be scored.
        rank: int64 ``(R,)``, the number of pixels above them.
        above: ``(R, 4)``, power sums of all the pixels above.
        extra_above, extra_below: ``(R, E)``, those of the pixels above (below) that power sums cannot stand for.
    """

    values: Tensor
    rank: Tensor
    above: Tensor
    extra_above: Tensor
    extra_below: Tensor

    @property
    def volumes(self) -> Tensor:
        """Return the volume up to and with each value, float64 ``(R, W)``."""
        steps = torch.arange(1, self.values.shape[1] + 1, device=self.values.device)
        return (self.rank.unsqueeze(1) + steps).double()

    @property
    def mass(self) -> Tensor:
        """Return C at each of those volumes."""
        return self.above[:, :1] + self.values.cumsum(1)

    def __getitem__(self, index: Tensor) -> Pixels:
        parts = (self.values, self.rank, self.above, self.extra_above, self.extra_below)
        return Pixels(*(part[index] for part in parts))


def block_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension in an order that depends on its length only, not on the rows beside."""
    while values.shape[-1] > BLOCK:
        short = -values.shape[-1] % BLOCK
        if short:
            values = torch.nn.functional.pad(values, (0, short))
        values = values.unflatten(-1, (-1, BLOCK)).sum(-1)
    return values.sum(-1)


def power_sums(values: Tensor) -> Tensor:
    """Return ``sum_j values_j^n`` over the last dimension for n = 1..4, stacked last."""
    sums, power = [], values
    for n in range(POWERS):
        power = values if n == 0 else power * values
        sums.append(block_sum(power))
    return torch.stack(sums, -1)


# --- bounds -----------------------------------------------------------------------------------------------------------


def lower_bound(metric: str, smooth: float, mean: Tensor, volume: Tensor, mass: Tensor) -> Tensor:
    """Return a lower bound of the score of ``volume >= 1`` pixels that sum up to ``mass``: Jensen's inequality.

    ``E[1 / (a + X)] >= 1 / (a + E X)``; for Dice, ``sum p_j / (b - p_j) >= C / b + C^2 / (tau b^2)``.
    """
    if metric == "iou":
        return (mass + smooth) / (volume + smooth + mean - mass)
    b = volume + 1 + smooth + mean
    score = 2 * mass / b * (1 + mass / (volume * b))
    return score + smooth / (b - 1) if smooth else score


def upper_bound(
    metric: str,
    smooth: float,
    mean: Tensor,
    variance: Tensor,
    first: Tensor,
    first_mass: Tensor,
    volume: Tensor,
    mass: Tensor,
) -> Tensor:
    """Return an upper bound of the score of ``volume`` pixels that sum up to at most ``mass``.

    ``E[1 / (a + X)] <= 1 / (a + m) + v / (a (a + m)^2)`` with ``m = E X`` and ``v = Var X``. The second term, relative
    to the first, falls with the volume: it is taken at the volume ``first <= volume``, ``first >= 1``, with at most
    ``first_mass``.
    """
    mass = torch.minimum(mass, torch.minimum(volume, mean))
    first_mass = torch.minimum(first_mass, torch.minimum(first, mean))
    if metric == "iou":
        numerator, b = mass + smooth, volume + smooth + mean - mass
        first_b = first + smooth + mean - first_mass
    else:
        # b = a + mu - 1 is not above a + mu - p_j, the mean of the denominator.
        numerator, b = 2 * mass + smooth, volume + smooth + mean
        first_b = first + smooth + mean
    return numerator / b * (1 + variance / ((first + smooth) * first_b))


@dataclass
class Runs:
    """Runs of consecutive volumes: ``count`` pixels from ``high`` down to ``low`` after ``rank`` pixels above.

    All ``(R, B)`` float64: ``rank``, ``mass`` (sum of the pixels above), ``count``, ``own`` (sum of the run's
    pixels), ``low``, ``high``.
    """

    rank: Tensor
    mass: Tensor
    count: Tensor
    own: Tensor
    low: Tensor
    high: Tensor

    def upper(self, metric: str, smooth: float, facts: RowFacts) -> Tensor:
        """Return a bound ``(R, B)`` that no volume ``rank + t``, ``1 <= t <= count``, exceeds; -inf for empty runs.

        ``C(rank + t)`` is at most ``mass + high t`` and at most ``mass + own - low (count - t)``. Under either line
        the leading term of the score is monotone in t, so that it is largest at an end or where the lines cross.
        """
        mean, variance = facts.mean.unsqueeze(1), facts.variance.unsqueeze(1)
        # A run's upper edge may lie above 1; a line as steep as that would cross the other one too early.
        high = self.high.clamp(max=1)
        crossing = (self.own - self.low * self.count) / (high - self.low).clamp(min=1e-300)
        crossing = torch.maximum(torch.minimum(crossing, self.count), torch.ones_like(crossing))
        best = torch.full_like(self.rank, -torch.inf)
        first, first_mass = self.rank + 1, self.mass + high
        for t in (torch.ones_like(crossing), crossing, self.count):
            most = torch.minimum(self.mass + high * t, self.mass + self.own - self.low * (self.count - t))
            score = upper_bound(metric, smooth, mean, variance, first, first_mass, self.rank + t, most)
            best = torch.maximum(best, score)
        return best.masked_fill_(self.count <= 0, -torch.inf)

    def lower(self, metric: str, smooth: float, facts: RowFacts) -> Tensor:
        """Return a score ``(R,)`` that the best volume reaches, from the volumes at the ends of the runs."""
        volume = self.rank + self.count
        score = lower_bound(metric, smooth, facts.mean.unsqueeze(1), volume.clamp(min=1), self.mass + self.own)
        return torch.maximum(facts.lower, score.masked_fill_(volume < 1, 0).amax(1))


# --- the integral -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _laguerre(nodes: int) -> tuple[tuple[float, float], ...]:
    """Return nodes x and ``log(w exp(x))``, w being the weights of Gauss-Laguerre quadrature."""
    x, w = np.polynomial.laguerre.laggauss(nodes)
    kept = w > 0  # weights under 1e-308 stand at nodes where the integrand has long vanished
    return tuple(zip(x[kept].tolist(), (np.log(w[kept]) + x[kept]).tolist(), strict=True))


def _log_series(power: Tensor, u: Tensor) -> Tensor:
    """Return ``sum log(1 - p u)`` ``(R, 1)`` of pixels with the given power sums."""
    total = torch.zeros_like(u)
    for n in range(POWERS, 0, -1):
        total = u * (total - power[:, n - 1 : n] / n)
    return total


def _ratio_series(power: Tensor, u: Tensor) -> Tensor:
    """Return ``sum p / (1 - p u)`` ``(R, 1)`` of pixels with the given power sums."""
    total = torch.zeros_like(u)
    for n in range(POWERS, 0, -1):
        total = u * total + power[:, n - 1 : n]
    return total


def decay(metric: str, smooth: float, mean: Tensor, volume: Tensor, mass: Tensor) -> Tensor:
    """Return the rate at which the integrand falls at s = 0: the mean of the score's denominator."""
    rate = volume + smooth + mean
    return rate - mass if metric == "iou" else rate


def integrate(
    metric: str, smooth: float, facts: RowFacts, pixels: Pixels, rate: Tensor, nodes: int, at: Tensor | None = None
) -> Tensor:
    """Return the exact scores ``(R, W)`` of ``pixels.volumes``, or ``(R, 1)`` of the volume at column ``at``.

    Args:
        metric: "dice" or "iou".
        smooth: the constant g.
        facts: of the same rows.
        pixels: the pixels known one by one.
        rate: ``(R, 1)``; the nodes are ``x_k / rate``. Good for volumes whose :func:`decay` is within a factor 2.
        nodes: how many.
        at: int64 ``(R, 1)`` or None.
    """
    values, volume, mass = pixels.values, pixels.volumes, pixels.mass
    if at is not None:
        inside = (torch.arange(values.shape[1], device=values.device) <= at).double()
        volume, mass = volume.gather(1, at), mass.gather(1, at)
    rest = (facts.power - pixels.above - power_sums(values) - power_sums(pixels.extra_below)).clamp_(min=0)
    above = (pixels.above - power_sums(pixels.extra_above)).clamp_(min=0)
    absent = 1 - values
    total = torch.zeros_like(volume)
    # Groups of nodes, as a leading dimension, as large as a core's cache holds.
    for s, log_weight in _node_groups(nodes, rate, max(1, CACHE // max(1, values.numel()))):  # s: (K, R, 1)
        e, u = torch.exp(-s), -torch.expm1(-s)
        q = torch.addcmul(absent, values, e)  # (K, R, W): 1 - p u without cancellation
        logs = _log_series(rest, u) + _logs(pixels.extra_below, e)
        exponent = log_weight - s * (volume + smooth)
        if metric == "iou":
            own = q.log_()
            outside = _last(own.cumsum(-1) if at is None else own * (1 - inside), at)
            terms = exponent.add_(logs).add_(outside).exp_()
        else:
            own = values / q
            logs = logs + _log_series(above, u) + _logs(pixels.extra_above, e) + block_sum(q.log_()).unsqueeze(-1)
            ratios = _ratio_series(above, u) + block_sum(pixels.extra_above / _q(pixels.extra_above, e)).unsqueeze(-1)
            ratios = ratios + (own.cumsum(-1) if at is None else block_sum(own * inside).unsqueeze(-1))
            terms = exponent.add_(logs).exp_() * (2 * e * ratios + smooth)
        for term in terms:  # one by one: the sum must not depend on the grouping
            total += term
    total /= rate
    return total * (mass + smooth) if metric == "iou" else total


def _node_groups(nodes: int, rate: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the nodes ``s = x / rate`` ``(K, R, 1)`` and ``log(w exp(x))`` ``(K, 1, 1)`` in groups."""
    table = torch.tensor(_laguerre(nodes), dtype=torch.float64, device=rate.device).T.unsqueeze(-1).unsqueeze(-1)
    return [(x / rate, log_weight) for x, log_weight in zip(*(part.split(size) for part in table), strict=True)]


def _q(values: Tensor, e: Tensor) -> Tensor:
    return (1 - values) + values * e


def _logs(values: Tensor, e: Tensor) -> Tensor:
    return block_sum(_q(values, e).log_()).unsqueeze(-1)


def _last(sums: Tensor, at: Tensor | None) -> Tensor:
    """Return what lies behind each column: from running sums, or the sum of terms already masked."""
    return sums[..., -1:] - sums if at is None else block_sum(sums).unsqueeze(-1)


def best_volume(
    metric: str, smooth: float, facts: RowFacts, pixels: Pixels, nodes: int = NODES
) -> tuple[Tensor, Tensor]:
    """Return the column ``(R,)`` of the best of ``pixels.volumes`` and its score.

    Bounds leave a window of volumes. They are scored with ``nodes`` nodes, and the winner with twice as many; rows in
    which the two disagree start again with more.
    """
    volume, mass = pixels.volumes, pixels.mass
    mean, variance = facts.mean.unsqueeze(1), facts.variance.unsqueeze(1)
    real = pixels.values > 0
    low = lower_bound(metric, smooth, mean, volume, mass).masked_fill_(~real, 0).amax(1)
    low = torch.maximum(low, facts.lower).unsqueeze(1) * (1 - SLACK)
    able = real & (upper_bound(metric, smooth, mean, variance, volume, mass, volume, mass) >= low)
    # Along a plateau of IoU the rates are equal but for rounding. Made monotone, they guarantee progress below.
    rates = decay(metric, smooth, mean, volume, mass).cummax(1).values
    column = torch.arange(volume.shape[1], device=volume.device).expand_as(volume)
    start = torch.where(able, column, volume.shape[1] - 1).amin(1, keepdim=True)
    end = torch.where(able, column, 0).amax(1, keepdim=True)
    score = torch.full_like(low, -torch.inf)
    where = torch.zeros_like(start)
    # Each turn starts at a rate more than RATIO times that of the turn before. All rates of a row lie within a factor
    # of 2 N < 2^64, so log_4(2^64) = 32 turns are enough. Most windows need one.
    for _ in range(MOST_TURNS):
        least = rates.gather(1, start)
        limit = torch.minimum(RATIO * least, rates.gather(1, end))
        found = integrate(metric, smooth, facts, pixels, (least * limit).sqrt(), nodes)
        usable = able & (column >= start) & (rates <= limit)
        most, at = torch.where(usable, found, -torch.inf).max(1, keepdim=True)
        where = torch.where(most > score, at, where)
        score = torch.maximum(score, most)
        behind = (rates <= limit).sum(1, keepdim=True)
        if not bool((behind <= end).any()):
            break
        start = torch.minimum(behind, end)
    exact = integrate(metric, smooth, facts, pixels, rates.gather(1, where), 2 * nodes, at=where)
    where, score, exact = where.squeeze(1), score.squeeze(1), exact.squeeze(1)
    if nodes < MOST_NODES:
        doubtful = ((score - exact).abs() > TOLERANCE * exact) & able.any(1)
        again = doubtful.nonzero().view(-1)
        if again.numel():
            where[again], exact[again] = best_volume(metric, smooth, facts[again], pixels[again], 2 * nodes)
    return where, exact.clamp_(max=1)


def empty_score(smooth: float, facts: RowFacts, pixels: Pixels, series_from: float) -> Tensor:
    """Return ``E[g / (g + |Y|)]`` ``(R,)``, the score of the empty mask for g > 0.

    With ``F(inf) = P(|Y| = 0)`` taken out, what is left under the integral falls at least like exp(-s).
    """
    none = torch.zeros_like(facts.mean).unsqueeze(1)
    rest = facts.power - power_sums(pixels.values)
    rest = (rest - power_sums(pixels.extra_above) - power_sums(pixels.extra_below)).clamp_(min=0)
    known = (pixels.values, pixels.extra_above, pixels.extra_below)

    def log_absent(e: Tensor, u: Tensor) -> Tensor:
        return _log_series(rest, u) + sum(_logs(part, e) for part in known)

    never = torch.exp(log_absent(none, none + 1))
    # From a mean volume of hundreds on, P(|Y| = 0) <= exp(-mu) is nothing, and the series holds for small u only.
    never = torch.where(facts.mean.unsqueeze(1) >= series_from, none, never)
    rate = smooth + facts.mean.clamp(min=1).unsqueeze(1)
    total = torch.zeros_like(none)
    for s, log_weight in _node_groups(EMPTY_NODES, rate, 1):
        some = torch.exp(log_absent(torch.exp(-s[0]), -torch.expm1(-s[0]))) - never
        total += torch.exp(log_weight[0] - s[0] * smooth) * some
    return (never + smooth * total / rate).squeeze(1)
