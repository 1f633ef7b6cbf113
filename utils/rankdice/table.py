"""The best volume of rows given as tables: probabilities in descending order, and how many pixels have each.

A table holds a whole row (sorted, or as counts of its values), or only the pixels near the cut of the best mask. In the
second case, power sums replace the other pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .integral import LAGUERRE_SPAN, ORDERS, Goal, Window, integrate

CPU = {"cpu"}  # devices where reading a result is cheap and work is split to fit the cache
CACHE = 1 << 17  # float64 values that fit in a core's cache
TIE = 1e-14  # relative: if scores differ less, the smallest volume is chosen
SERIES_RATE = 80.0  # in rows with a smaller mean volume, the most probable pixels are handled one by one
ONE_BY_ONE = 96
MOST_PADDED = 1 << 13  # split tables or windows of rows into groups if this saves more values than that
NODE_BYTES = 5 * 8  # working memory of one volume at one node


class Table(NamedTuple):
    """Rows of probabilities, float64.

    Attributes:
        values: ``(R, W)`` descending. The first, ``inf``, stands for the pixels above the table, and the last is 0.
        volumes: ``(R, W)`` how many pixels have at least this value.
        mass: ``(R, W)`` their sum.
        powers: ``(R, W, ORDERS)`` powers of the values.
        outside: ``(R, 2, ORDERS)`` power sums of the pixels above and below the table.
        total: ``(R, ORDERS)`` power sums of the whole row.
    """

    values: Tensor
    volumes: Tensor
    mass: Tensor
    powers: Tensor
    outside: Tensor
    total: Tensor

    @classmethod
    def whole(cls, values: Tensor, counts: Tensor) -> Table:
        """Return the table of complete rows: all values ``(R, K)``, descending, and how many pixels have each."""
        values, counts = pad(values, (1, 1)), pad(counts, (1, 1))
        each = powers(values)
        total = counts.unsqueeze(1) @ each
        mass = (values * counts).cumsum(1)
        values[:, 0] = torch.inf
        return cls(values, counts.cumsum(1), mass, each, torch.zeros_like(total).expand(-1, 2, -1), total.squeeze(1))


def alike(costs: Mapping[int, float], device: torch.device) -> list[list[int]]:
    """Return groups of rows with about the same cost; a GPU takes all: there, waiting costs more than padding."""
    if device.type not in CPU or not costs:
        return [list(costs)] if costs else []
    groups, waiting = [], [sorted(costs, key=costs.__getitem__, reverse=True)]
    while waiting:
        rows = waiting.pop()
        # Padded to their own largest cost, the rows from i on save so much:
        saved, i = max(((costs[rows[0]] - costs[row]) * (len(rows) - i), i) for i, row in enumerate(rows))
        if saved <= MOST_PADDED:
            groups.append(rows)
        else:
            waiting += [rows[:i], rows[i:]]
    return groups


def pick(names: list[int], count: int, device: torch.device) -> Tensor | slice:
    """Return the index of some of ``count`` rows."""
    return slice(None) if len(names) == count else torch.tensor(names, device=device)


def chosen(values: Tensor, which: Tensor | slice) -> Tensor:
    """Return ``values[which]``; ``index_select`` is up to ten times as fast as indexing."""
    return values.index_select(0, which) if isinstance(which, Tensor) else values[which]


def best_volumes(table: Table, goal: Goal, budget: int) -> Tensor:
    """Find the best volume of each row with about ``budget`` bytes of working memory.

    Returns:
        float64 ``(R, 3)``: the volume; the smallest probability in the mask, ``inf`` if the mask has no pixel of the
        table; the score.
    """
    device, count = table.values.device, table.values.shape[0]
    first, last, slow, fast = _candidates(table, goal)
    facts = torch.cat([last - first, fast / slow], 1).tolist()
    costs = {row: (width + 1) * (64 if span > LAGUERRE_SPAN else 1) for row, (width, span) in enumerate(facts)}
    found = table.values.new_empty(count, 3)
    for names in alike(costs, device):
        rows = pick(names, count, device)
        width, span = (max(column) for column in zip(*(facts[name] for name in names), strict=True))
        some = Table(*(chosen(part, rows) for part in table))
        wide = span > LAGUERRE_SPAN
        base = slow[rows] if wide else (slow[rows] * fast[rows]).sqrt_()
        run, window = _window(some, first[rows], int(width), base, span if wide else 1.0)
        scores = integrate(goal, window, CACHE if device.type in CPU else budget // NODE_BYTES)
        score = scores.amax(1, keepdim=True).clamp_(max=1)
        index = (scores >= score * (1 - TIE)).view(torch.uint8).argmax(1, keepdim=True)
        cutoff = some.values.gather(1, run.gather(1, index))
        found[rows] = torch.cat([window.volume.gather(1, index), cutoff, score], 1)
    return found


def empty_scores(table: Table, goal: Goal, budget: int) -> Tensor:
    """Return the scores ``(R,)`` of empty masks, for tables of at least the ``ONE_BY_ONE`` most probable pixels."""
    slow = torch.full_like(table.total[:, :1], 1 + goal.smooth)
    span = (table.total[:, :1].amax() + ONE_BY_ONE + goal.smooth) / slow[0]
    _, window = _window(table, torch.zeros_like(slow), ONE_BY_ONE, slow, float(span))
    return integrate(goal, window, CACHE if slow.device.type in CPU else budget // NODE_BYTES)[:, 0]


def _candidates(table: Table, goal: Goal) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first and last volume that can be best, and the range of the rates, ``(R, 1)``."""
    mean, variance = table.total[:, :1], table.total[:, :1] - table.total[:, 1:2]
    total = mean + goal.smooth if goal.smooth else mean
    rate = goal.rate(total, table.volumes, table.mass)
    known = goal.least(rate, table.mass)
    least = known.amax(1, keepdim=True)
    # Scores are at most `known + 2 / total`: which is the first run of pixels at whose end this reaches `least`?
    run = (known[:, 1:] >= torch.sub(least, total.reciprocal(), alpha=2)).view(torch.uint8).argmax(1, keepdim=True)
    few = table.volumes.gather(1, run).add_(goal.smooth).clamp_(min=goal.smooth or 1)
    below, above = goal.margins(total, variance, few)
    half = goal.half(least)
    cuts = torch.cat([half + above, half - below], 1)
    borders = torch.searchsorted(-table.values, -cuts).sub_(1)
    first, last = table.volumes.gather(1, borders).split(1, 1)
    last = last.minimum((mean + total) / least)  # the score is at most (2 mu + g) / volume
    slow = rate.gather(1, borders[:, :1])
    # Where the integrand decays slowly, the most probable pixels must be in the window, one by one.
    tiny = total < SERIES_RATE
    last = last.maximum(tiny * ONE_BY_ONE)
    return first.masked_fill(tiny, 0), last, slow.masked_fill_(tiny, 1 + goal.smooth), last + total


def _window(table: Table, first: Tensor, width: int, base: Tensor, span: float) -> tuple[Tensor, Window]:
    """Return the window of the volumes ``first`` to ``first + width``, and their columns in the table."""
    volume = first + torch.arange(width + 1, device=first.device)
    run = torch.searchsorted(table.volumes, volume).clamp_(max=table.values.shape[1] - 1)
    own = table.values.gather(1, run)
    own[:, 0] = 0
    ends = torch.stack([table.volumes.minimum(first), table.volumes.maximum(volume[:, -1:])], 1)
    outside = torch.baddbmm(table.outside, ends.diff(), table.powers[:, 1:])
    return run, Window(volume, own, outside, base, min(60, math.ceil(math.log2(span))))


def powers(values: Tensor) -> Tensor:
    """Return the powers 1 to ``ORDERS`` of values ``(R, W)``, ``(R, W, ORDERS)``."""
    return values.unsqueeze(2).expand(-1, -1, ORDERS).cumprod(2)


def draw(masks: Tensor, columns: Tensor, volumes: Tensor) -> None:
    """Fill masks ``(R, N)`` with the first ``volumes`` ``(R, 1)`` of the sorted pixels ``columns`` ``(R, N)``."""
    masks.scatter_(1, columns, torch.arange(columns.shape[1], device=masks.device) < volumes)
