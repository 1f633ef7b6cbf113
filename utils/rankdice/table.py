"""The best volume of rows given as tables: probabilities in descending order, and how many pixels have each.

A table holds a whole row (sorted, or as counts of its values), or the pixels around the cut of the best mask. Then the
other pixels enter through their power sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .integral import LAGUERRE_SPAN, ORDERS, Goal, Window, integrate

CPU = {"cpu"}  # where the host need not wait for results, and work is split to fit the cache
CACHE = 1 << 17  # float64 values that fit in a core's cache
TIE = 1e-14  # relative: if scores differ less, the smallest volume is chosen
SERIES_RATE = 80.0  # at slower decay, the most probable pixels are taken one by one
ONE_BY_ONE = 96
MOST_PADDED = 1 << 13  # if padded tables or windows of rows are larger in all, rows of about the same size go together
NODE_BYTES = 5 * 8  # of a volume at one node


class Best(NamedTuple):
    """What was found for each row, float64 ``(R,)``.

    Attributes:
        volumes: pixels in the best mask.
        cutoffs: the smallest probability in the mask, ``inf`` where it is empty; NaN: no pixel of the table.
        scores: expected score.
    """

    volumes: Tensor
    cutoffs: Tensor
    scores: Tensor


class Table(NamedTuple):
    """Rows of probabilities, float64 ``(R, 1)`` unless stated otherwise.

    Attributes:
        values: ``(R, W)`` descending.
        counts: ``(R, W)`` how many pixels have each value; 0 in padding.
        mean, variance: of the number of positive pixels in the whole row.
        powers: ``(R, ORDERS, W)`` powers of the values.
        rank: number of pixels above the table.
        above, below: ``(R, ORDERS)`` power sums of the pixels above and below the table.
    """

    values: Tensor
    counts: Tensor
    mean: Tensor
    variance: Tensor
    powers: Tensor
    rank: Tensor
    above: Tensor
    below: Tensor

    @classmethod
    def whole(cls, values: Tensor, counts: Tensor) -> Table:
        """Return the table of complete rows."""
        all_powers = powers(values)
        mean, square = (all_powers[:, :2] @ counts.unsqueeze(2)).unbind(1)
        none = values.new_zeros(values.shape[0], ORDERS)
        return cls(values, counts, mean, (mean - square).clamp_(min=0), all_powers, none[:, :1], none, none)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return volume and mass ``(R, W + 1)`` of the pixels above the table, also with the first value, ..."""
        mass = torch.cat([self.above[:, :1], self.values * self.counts], 1)
        return torch.cat([self.rank, self.counts], 1).cumsum_(1), mass.cumsum_(1)

    def choose(self, volumes: Tensor, volume: Tensor, score: Tensor) -> Best:
        """Return the result for ``volume`` and ``score`` ``(R, 1)``, with its cut-off."""
        run = torch.searchsorted(volumes, volume)
        cut = self.values.gather(1, (run - 1).clamp_(min=0)).masked_fill_(run < 1, torch.nan)
        return Best(volume.squeeze(1), cut.masked_fill_(volume < 1, torch.inf).squeeze(1), score.squeeze(1))


def alike(costs: list[float], device: torch.device) -> list[list[int] | range]:
    """Return groups of rows with about the same cost; a GPU takes all: there, waiting costs more than padding."""
    if device.type not in CPU or len(costs) * max(costs) <= MOST_PADDED:
        return [range(len(costs))]
    groups: dict[int, list[int]] = {}
    for row, cost in enumerate(costs):
        groups.setdefault(round(math.log(max(cost, 64), 64)), []).append(row)
    return list(groups.values())


def merge(found: Sequence[tuple[Tensor | slice, tuple[Tensor, ...]]], count: int) -> tuple[Tensor, ...]:
    """Return the results of ``count`` rows from those of some rows each."""
    if len(found) == 1 and len(found[0][1][0]) == count:
        return found[0][1]
    whole = tuple(part.new_zeros(count, *part.shape[1:]) for part in found[0][1])
    for rows, some in found:
        for mine, part in zip(whole, some, strict=True):
            mine[rows] = part
    return whole


def best_volumes(table: Table, skipped: Tensor, goal: Goal, budget: int) -> Best:
    """Find the best volume of each row.

    Args:
        table: the rows.
        skipped: bool ``(R,)``: these rows get the empty mask.
        goal: what is maximized.
        budget: bytes of working memory, about.
    """
    skipped, device = skipped.unsqueeze(1), table.values.device
    volumes, mass = table.sums()
    first, last, slow, fast = _candidates(table, volumes, mass, skipped, goal)
    del mass
    facts = torch.cat([last - first, fast / slow], 1).tolist()
    result = []
    size = CACHE if device.type in CPU else budget // NODE_BYTES
    for names in alike([width * (64 if span > LAGUERRE_SPAN else 1) for width, span in facts], device):
        rows = slice(None) if len(names) == len(facts) else torch.tensor(names)
        width, span = (max(column) for column in zip(*(facts[name] for name in names), strict=True))
        some = Table(*(part[rows] for part in table))
        window = _window(some, volumes[rows], first[rows], last[rows], int(width) + 1)
        window = window._replace(slow=slow[rows], fast=fast[rows])
        scores = integrate(goal, window, span, size)
        if goal.smooth:
            scores[:, 1:].masked_fill_(skipped[rows], 0)
        found = scores.amax(1, keepdim=True).clamp_(max=1)
        index = (scores >= found * (1 - TIE)).view(torch.uint8).argmax(1, keepdim=True)
        result.append((rows, (index + window.volume[:, :1], found)))
    volume, score = merge(result, len(facts))
    return table.choose(volumes, volume, score)


def _candidates(table: Table, volumes: Tensor, mass: Tensor, skipped: Tensor, goal: Goal) -> list[Tensor]:
    """Return the first and last volume that can be best, and the range of the rates, ``(R, 1)``."""
    total = (table.mean + goal.smooth).clamp_(min=1e-100)
    lead, rate = goal.lead(total, volumes, mass)
    top, at = lead.max(1, keepdim=True)
    known, own = volumes.gather(1, at).clamp_(min=1), mass.gather(1, at)
    least = goal.least(top, rate.gather(1, at), torch.addcmul(own, own, own / known, value=-1))
    low, high = goal.cuts(total, table.variance, known, least, top)
    start, end = torch.searchsorted(-table.values, -torch.cat([high, low], 1)).split(1, 1)
    borders = torch.cat([start.minimum(at), end.maximum(at)], 1).masked_fill_(skipped, 0)
    first, last = volumes.gather(1, borders).split(1, 1)
    # The leading term of larger volumes is too small: it is at most (2 mu + g) / volume.
    last = last.minimum(((total + table.mean + 1) / least.clamp(min=1e-9)).floor_())
    slow = rate.gather(1, borders[:, :1])
    # Where the integrand decays slowly, the most probable pixels must be in the window, one by one.
    tiny = slow < SERIES_RATE
    if not goal.smooth:
        tiny = tiny.gt(skipped)  # and not
    last = torch.maximum(last, volumes[:, -1:].clamp(max=ONE_BY_ONE) * tiny)
    fast = torch.add(last + total, tiny, alpha=2 + 2 * goal.smooth)  # so far from `slow` that they get many nodes
    return [first.masked_fill(tiny, 0), last, slow.masked_fill_(tiny, 1 + goal.smooth), fast]


def _window(table: Table, volumes: Tensor, first: Tensor, last: Tensor, width: int) -> Window:
    """Return the volumes ``first`` to ``last``, pixel by pixel, and power sums of the other pixels."""
    volume = first + torch.arange(width, device=first.device)
    run = torch.searchsorted(volumes, volume).sub_(1).clamp_(0, table.values.shape[1] - 1)
    own = table.values.gather(1, run).masked_fill_(volume > last, 0)
    own[:, 0] = 0
    outside = torch.stack([first - volumes[:, :-1], volumes[:, 1:] - last], 1)  # of each value before and behind
    outside = outside.clamp_(min=0).minimum(table.counts.unsqueeze(1)).mT
    above, below = (table.powers @ outside).unbind(2)
    return Window(volume, own, above + table.above, below + table.below, first, last)


def powers(values: Tensor) -> Tensor:
    """Return the powers 1 to ``ORDERS`` of values ``(R, W)``, ``(R, ORDERS, W)``."""
    square = values * values
    four = torch.stack([values, square, square * values, square * square], 1)
    return torch.cat([four, four * four[:, 3:]], 1)


def draw(masks: Tensor, columns: Tensor, volumes: Tensor) -> None:
    """Fill masks ``(R, N)`` with the first ``volumes`` ``(R, 1)`` of the sorted pixels ``columns`` ``(R, N)``."""
    masks.scatter_(1, columns, torch.arange(columns.shape[1], device=masks.device) < volumes)
