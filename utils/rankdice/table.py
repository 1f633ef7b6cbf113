"""The best volume of rows given as tables: probabilities in descending order, and how many pixels have each.

A table holds a whole row (sorted, or as counts of its values), or only the pixels near the cut of the best mask. In the
second case, power sums replace the other pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .integral import LAGUERRE_SPAN, SUMS, Goal, Window, integrate, series_factors

CPU = {"cpu"}  # devices where reading a result is cheap and work is split to fit the cache
CACHE = 1 << 17  # float64 values that fit in a core's cache
TIE = 1e-14  # relative: if scores differ less, the smallest volume is chosen
SERIES_RATE = 80.0  # where the integrand may decay more slowly, the most probable pixels are taken one by one
ONE_BY_ONE = 300  # at most so many: others have less than 1 / 300 of the mean, and their sixth powers hardly matter
MOST_PADDED = 1 << 13  # split tables or windows of rows into groups if this saves more values than that
FEW_VALUES = 1 << 13  # in tables of up to so many values, operations cost more than a wider window
NODE_BYTES = 5 * 8  # working memory of one volume at one node


class Table(NamedTuple):
    """Rows of probabilities, float64. The first column stands for the pixels above the table.

    Attributes:
        values: ``(R, W)`` descending from the second on; the first and the last are 0.
        volumes: ``(R, W)`` how many pixels have at least this value.
        sums: ``(R, K, W)`` sums of their powers.
        total: ``(R, K, 1)`` power sums of the whole row.
        orders: ``(R,)`` int64, how many of the power sums to use; None: all.
        runs: whether several pixels may have the same entry.
    """

    values: Tensor
    volumes: Tensor
    sums: Tensor
    total: Tensor
    orders: Tensor | None = None
    runs: bool = False

    @classmethod
    def whole(cls, values: Tensor, counts: Tensor | None = None, orders: Sequence[int] = ()) -> Table:
        """Return the table of complete rows.

        Args:
            values: all values ``(R, W)``, descending, between zeros (:func:`padded`).
            counts: ``(R, W)``, how many pixels have each value, between zeros; None: one.
            orders: of each row; empty: ``SUMS``.
        """
        sums = powers(values, max(orders, default=SUMS))
        if counts is None:
            volumes = steps(values.shape[1], values.device).expand(values.shape)
        else:
            volumes, sums = counts.cumsum(1), sums.mul_(counts.unsqueeze(1))
        sums = sums.cumsum_(2)
        used = upload(orders, values.device, torch.int64) if len(set(orders)) > 1 else None
        return cls(values, volumes.contiguous(), sums, sums[..., -1:], used, counts is not None)

    def of(self, which: Tensor | None) -> Table:
        """Return the table of some rows; None: of all."""
        values, volumes, sums, total = (chosen(part, which) for part in self[:4])
        orders = None if self.orders is None else chosen(self.orders, which)
        return Table(values, volumes, sums, total, orders, self.runs)

    @property
    def mass(self) -> Tensor:
        """``(R, W)``, the sum of the values of these pixels."""
        return self.sums[:, 0]


def alike(costs: Mapping[int, float], device: torch.device) -> list[list[int]]:
    """Return groups of rows with about the same cost; a GPU takes all: there, waiting costs more than padding."""
    if device.type not in CPU or len(costs) < 2:
        return [list(costs)] if costs else []
    groups, waiting = [], [sorted(costs, key=costs.__getitem__, reverse=True)]
    while waiting:
        rows = waiting.pop()
        # Padded to their own largest cost, the rows from i on save so much:
        saved, i = max(((costs[rows[0]] - costs[row]) * (len(rows) - i), i) for i, row in enumerate(rows))
        if saved <= MOST_PADDED:
            groups.append(sorted(rows))
        else:
            waiting += [rows[:i], rows[i:]]
    return groups


def pick(names: list[int], count: int, device: torch.device) -> Tensor | None:
    """Return the index of some of ``count`` rows; None for all of them, in their order."""
    return None if len(names) == count else upload(names, device, torch.int64)


def upload(values: Sequence[object] | Tensor, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Copy a list or a tensor; pinned, because otherwise the host waits until the GPU has finished its work."""
    made = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def chosen(values: Tensor, which: Tensor | None) -> Tensor:
    """Return ``values[which]``; ``index_select`` is up to ten times as fast as indexing."""
    return values if which is None else values.index_select(0, which)


def best_volumes(table: Table, goal: Goal, budget: int) -> Tensor:
    """Find the best volume of each row with about ``budget`` bytes of working memory.

    Returns:
        float64 ``(R, 3)``: the volume; the smallest probability in the mask, 0 if the mask has no pixel of the table;
        the score.
    """
    device, count = table.values.device, table.values.shape[0]
    facts = _candidates(table, goal)
    costs = {
        row: (fact.last - fact.first + 1) * (64 if fact.fast > LAGUERRE_SPAN * fact.slow else 1)
        for row, fact in enumerate(facts)
    }
    best = table.total.new_empty(count, 3)
    for names in alike(costs, device):
        rows, mine = pick(names, count, device), [facts[name] for name in names]
        some = table.of(rows)
        run, window = _window(some, mine, goal)
        scores = integrate(goal, window, CACHE if device.type in CPU else budget // NODE_BYTES)
        score = scores.amax(1, keepdim=True).clamp_(max=1)
        index = (scores >= score * (1 - TIE)).view(torch.uint8).argmax(1, keepdim=True)
        parts = [window.volume.gather(1, index), some.values.gather(1, run.gather(1, index)), score]
        if rows is None:
            return torch.cat(parts, 1)
        best[rows] = torch.cat(parts, 1)
    return best


def empty_scores(table: Table, goal: Goal, budget: int) -> Tensor:
    """Return the scores ``(R,)`` of empty masks, for tables of at least the ``ONE_BY_ONE`` most probable pixels."""
    slow = 1 + goal.smooth
    fast = float(table.total[:, 0].amax()) + ONE_BY_ONE + goal.smooth
    _, window = _window(table, [_Candidates(0.0, ONE_BY_ONE, slow, fast, True)] * len(table.total), goal)
    return integrate(goal, window, CACHE if table.total.device.type in CPU else budget // NODE_BYTES)[:, 0]


class _Candidates(NamedTuple):
    """The first and last volume of a row that can be best, the range of the rates, and whether the slowest is too slow.

    In such small rows, the first volume is 0, and all pixels in the window are taken one by one.
    """

    first: float
    last: float
    slow: float
    fast: float
    small: bool


def _candidates(table: Table, goal: Goal) -> list[_Candidates]:
    """Return the volumes of each row that can be best."""
    g, totals = goal.smooth, table.total[:, 0] + goal.smooth if goal.smooth else table.total[:, 0]
    known = goal.least(goal.rate(totals, table.volumes, table.mass), table.mass)
    least = known.amax(1, keepdim=True)
    parts = [table.total[:, :2, 0], least]
    if known.numel() > FEW_VALUES:
        # Scores are at most `known + 2 / total`: which is the first run of pixels at whose end this reaches `least`?
        run = (known[:, 1:] >= torch.sub(least, totals.reciprocal(), alpha=2)).view(torch.uint8).argmax(1, keepdim=True)
        parts.append(table.volumes.gather(1, run))
    facts = torch.cat(parts, 1).tolist()
    cuts = []
    for mean, square, best, *excluded in facts:
        few = excluded[0] + g if excluded else goal.few(mean + g, best)
        few, half = max(few, g or 1), goal.half(best)
        spread = mean - square
        cuts.append([-half - goal.above(mean + g, spread, few), goal.below(spread, few) - half, -mean / ONE_BY_ONE])
    borders = torch.searchsorted(-table.values[:, 1:], upload(cuts, totals.device))
    top = [table.volumes[:, :1], table.mass[:, :1]]  # the pixels above the table
    ends = torch.cat([table.volumes.gather(1, borders), table.mass.gather(1, borders[:, :1]), *top], 1).tolist()
    found = []
    for (mean, _, best, *_), (first, last, weak, mass, *above) in zip(facts, ends, strict=True):
        last = min(last, (2 * mean + g) / max(best, 1e-300))  # the score is at most (2 mu + g) / volume
        slow, fast = goal.rate(mean + g, first, mass), last + mean + g
        small = goal.rate(mean + g, *above) < SERIES_RATE
        if small:
            first, last, slow, fast = 0.0, max(last, weak), 1 + g, max(last, ONE_BY_ONE) + mean + g
        found.append(_Candidates(first, last, slow, fast, small))
    return found


def _window(table: Table, facts: Sequence[_Candidates], goal: Goal) -> tuple[Tensor, Window]:
    """Return a window with these candidates of each row, and their columns in the table."""
    span = max(fact.fast / fact.slow for fact in facts)
    octaves = min(60, math.ceil(math.log2(span))) if span > LAGUERRE_SPAN else 0
    bases = [fact.slow if octaves else math.sqrt(fact.slow * fact.fast) for fact in facts]
    ends = [fact.last if fact.small else -1 for fact in facts]
    scale = [[fact.first, base, end, end < 0] for fact, base, end in zip(facts, bases, ends, strict=True)]
    first, base, end, usual = upload(scale, table.total.device).chunk(4, 1)
    volume = first + steps(int(max(fact.last - fact.first for fact in facts)) + 1, first.device)
    run = torch.searchsorted(table.volumes, volume) if table.runs else (volume - table.volumes[:, :1]).long()
    run.clamp_(max=table.values.shape[1] - 1)
    orders, own, rest = table.total.shape[1], None, table.total
    sums = table.sums.gather(2, run.unsqueeze(1).expand(-1, orders, -1))
    if table.runs:  # without the pixels of the last run that are not in the mask
        beyond = table.volumes.gather(1, run) - volume
        sums -= powers(table.values.gather(1, run), orders) * beyond.unsqueeze(1)
    if any(fact.small for fact in facts):
        own = table.values.gather(1, run) * (volume <= end)  # whatever the other rows need
        own[:, :1].zero_()
        rest, sums = rest - powers(own, orders).sum(2, keepdim=True), sums * usual.unsqueeze(2)
    rest = rest if goal.metric == "dice" else rest - sums
    factors = series_factors(orders, first.device)
    if own is None and table.orders is None:
        factors = factors[-1:]
    else:
        used = usual.view(-1) * (orders if table.orders is None else table.orders)
        factors = factors.index_select(0, used.long())
    return run, Window(volume, sums, own, rest, factors, base, octaves)


def descending(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row of values that are not negative; return values and columns. Equal values keep their order.

    Such numbers are in the order of the integers with the same bits, which a CPU sorts in two thirds of the time.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits, columns = values.view(integer).sort(dim=1, descending=True, stable=True)
    return bits.view(values.dtype), columns


def padded(values: Tensor) -> Tensor:
    """Return values ``(R, W)`` in float64 with a 0 before and behind."""
    wide = values.new_zeros(len(values), values.shape[1] + 2, dtype=torch.float64)
    wide[:, 1:-1] = values
    return wide


def powers(values: Tensor, orders: int = SUMS) -> Tensor:
    """Return the first powers of values ``(R, W)``, ``(R, orders, W)``."""
    return values.unsqueeze(1).expand(-1, orders, -1).cumprod(1)


def draw(masks: Tensor, columns: Tensor, volumes: Tensor) -> None:
    """Fill masks ``(R, N)`` with the first ``volumes`` ``(R, 1)`` of the sorted pixels ``columns`` ``(R, N)``."""
    masks.scatter_(1, columns, steps(columns.shape[1], masks.device) < volumes)


def steps(count: int, device: torch.device) -> Tensor:
    """Return 0, 1, ... in float64."""
    if count <= FEW_VALUES:
        return _first_steps(device)[:count]
    return torch.arange(count, dtype=torch.float64, device=device)


@lru_cache(maxsize=8)
def _first_steps(device: torch.device) -> Tensor:
    return torch.arange(FEW_VALUES, dtype=torch.float64, device=device)
