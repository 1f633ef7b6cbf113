"""The best volume of rows given as tables: probabilities in descending order, and how many pixels have each.

A table may hold a whole row (sorted, or as counts of its values) or only the pixels around the cut of the best mask.
The other pixels enter through their power sums, and :func:`best_volumes` says whether the best volume is proven to
lie inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .integral import CACHE, CPU, FAR_ORDERS, FAR_RATE, LAGUERRE_SPAN, ORDERS, Goal, Window, empty_score, integrate

TIE = 1e-14  # relative: if scores differ less, the smallest volume is chosen
SERIES_RATE = 80.0  # at slower decay, the most probable pixels are taken one by one
ONE_BY_ONE = 96
WIDE, MOST_PADDED = 48, 1 << 13  # volumes of a window, and of all windows if they are as wide as the widest
NODE_BYTES = 5 * 8  # of a volume at one node


class Table(NamedTuple):
    """Rows of probabilities, float64 ``(R, 1)`` unless stated otherwise.

    Attributes:
        values: ``(R, W)`` descending, padded with zeros.
        counts: ``(R, W)`` how many pixels have each value; None: one each.
        mean, variance: of the number of positive pixels in the whole row.
        rank: number of pixels above the table.
        above, below: ``(R, ORDERS)`` power sums of the pixels above and below the table.
        low, high: pixels below the table have ``p < low``, pixels above it ``p > high``; None if there are none.
    """

    values: Tensor
    counts: Tensor | None
    mean: Tensor
    variance: Tensor
    rank: Tensor
    above: Tensor
    below: Tensor
    low: Tensor | None
    high: Tensor | None

    @classmethod
    def whole(cls, values: Tensor, counts: Tensor | None = None) -> Table:
        """Return the table of complete rows."""
        mass = values if counts is None else values * counts
        mean = mass.sum(1, keepdim=True)
        variance = (mean - (mass * values).sum(1, keepdim=True)).clamp_(min=0)
        none = values.new_zeros(values.shape[0], ORDERS)
        return cls(values, counts, mean, variance, none[:, :1], none, none, None, None)

    def rows(self, names: Tensor) -> Table:
        """Return some of the rows."""
        return Table(*(None if part is None else part[names] for part in self))  # type: ignore[arg-type] # by field

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(R, W + 1)`` for no value, the first, the first two, ...: volume, mass; and the last value taken."""
        last = torch.cat([self.above[:, :1], self.values], 1)
        if self.counts is None:
            return self.rank + torch.arange(last.shape[1], device=last.device), last.cumsum(1), last
        mass = torch.cat([self.above[:, :1], self.values * self.counts], 1)
        return torch.cat([self.rank, self.counts], 1).cumsum(1), mass.cumsum(1), last


class Best(NamedTuple):
    """What was found for each row.

    Attributes:
        volumes: float64 ``(R,)``.
        cutoffs: float64 ``(R,)``, the smallest probability in the mask, ``inf`` where it is empty; NaN where it has no
            pixel of the table.
        scores: float64 ``(R,)``.
        unproven: bool ``(R,)``: these rows need a table of more pixels.
        left: how many rows that are.
    """

    volumes: Tensor
    cutoffs: Tensor
    scores: Tensor
    unproven: Tensor
    left: int


class _Range(NamedTuple):
    """Volumes to be scored, ``first`` to ``last``, and the range of their rates, float64 ``(R, 1)``."""

    first: Tensor
    last: Tensor
    slow: Tensor
    fast: Tensor


def best_volumes(table: Table, skipped: Tensor, goal: Goal, budget: int) -> Best:
    """Find the best volume of each row.

    Args:
        table: the rows.
        skipped: bool ``(R,)``: these rows get the empty mask.
        goal: what is maximized.
        budget: bytes of working memory, about.
    """
    skipped = skipped.unsqueeze(1)
    volumes, mass, values = table.sums()
    wanted, unproven = _candidates(table, volumes, mass, skipped, goal)
    del mass
    width, span = wanted.last - wanted.first, wanted.fast / wanted.slow
    largest = torch.cat([width, span, -wanted.slow], 1).amax(0)
    if unproven is not None:
        largest = torch.cat([largest, unproven.sum(0)])
    most, reach, slowest, *left = largest.tolist()
    orders = FAR_ORDERS if -slowest >= FAR_RATE else ORDERS
    volume = score = table.mean
    for rows, size, factor in _groups(width, span, int(most), reach):
        some, part, known = table, wanted, (volumes, values)
        if rows is not None:
            some, part, known = table.rows(rows), _Range(*(v[rows] for v in wanted)), (volumes[rows], values[rows])
        window = _window(some, *known, part, size + 1, orders)
        step = CACHE if values.device.type in CPU else budget // NODE_BYTES
        scores = integrate(goal, window, factor, max(1, step // window.values.numel()))
        scores[:, :1].masked_fill_(part.first < 1, 0)
        found = scores.amax(1, keepdim=True)
        found, first = found.clamp(max=1), (scores >= found * (1 - TIE)).view(torch.uint8).argmax(1, keepdim=True)
        if rows is None:
            volume, score = part.first + first, found
        else:
            volume, score = volume.index_copy(0, rows, part.first + first), score.index_copy(0, rows, found)
    if goal.smooth:
        empty = _empty_score(table, volumes, values, goal.smooth)
        none = skipped | (empty >= score * (1 - TIE)).gt(table.rank)  # and no pixel above the table
        volume, score = volume.masked_fill(none, 0), torch.where(none, empty, score)
    else:
        volume, score = volume.masked_fill(skipped, 0), score.masked_fill(skipped, 0)
    on_cpu = values.device.type in CPU or table.low is None
    cut = cutoffs(table, volumes, values, volume) if on_cpu else volume.squeeze(1)  # of the mask itself later
    unproven = skipped if unproven is None else unproven
    return Best(volume.squeeze(1), cut, score.squeeze(1), unproven.squeeze(1), int(left[0]) if left else 0)


def _candidates(
    table: Table, volumes: Tensor, mass: Tensor, skipped: Tensor, goal: Goal
) -> tuple[_Range, Tensor | None]:
    """Return the volumes that can be best, and for which rows they may lie outside the table; None: for no row."""
    total, variance = (table.mean + goal.smooth).clamp(min=1e-100), table.variance
    lead, rate = goal.lead(total, volumes, mass)
    top, at = lead.max(1, keepdim=True)
    known = volumes.gather(1, at).clamp_(min=1)
    least = goal.least(top, rate.gather(1, at), known, mass.gather(1, at))
    low, high = goal.cuts(total, variance, known, least, top)
    borders = torch.searchsorted(-table.values, -torch.cat([high, low, torch.zeros_like(low)], 1))
    idle, unproven = skipped, None
    if table.low is not None and table.high is not None:
        # Behind the table the bound falls, if it holds pixels down to where one more lowers the leading term.
        end = borders[:, 2:]
        lead, last = lead.gather(1, end), rate.gather(1, end)
        done = (lead + variance / (last * last) < least) & (2 * table.low <= lead)
        unproven = (table.low > low).gt(done) | ((table.high < high) & (table.rank > 0))
        unproven = unproven.gt(skipped)  # and not
        idle = idle | unproven
    borders = torch.cat([borders[:, :1].minimum(at), borders[:, 1:2].maximum(at)], 1)
    borders.masked_fill_(idle, 0)
    first, last = volumes.gather(1, borders).split(1, 1)
    slow = rate.gather(1, borders[:, :1])
    # Where the integrand decays slowly, the most probable pixels must be in the window, one by one.
    tiny = (slow < SERIES_RATE).gt(idle)  # and not
    last = torch.maximum(last, volumes[:, -1:].clamp(max=ONE_BY_ONE) * tiny)
    return _Range(first.masked_fill(tiny, 0), last, slow.masked_fill(tiny, 1 + goal.smooth), last + total), unproven


def _groups(width: Tensor, span: Tensor, most: int, reach: float) -> Iterator[tuple[Tensor | None, int, float]]:
    """Yield rows (None: all) whose windows have about the same width and need the same nodes.

    On a GPU all rows go together: waiting for the sizes costs more than the padding.
    """
    wide = width.numel() * most > MOST_PADDED
    if width.device.type not in CPU or not (wide or reach > LAGUERRE_SPAN) or width.numel() == 1:
        yield None, most, reach
        return
    kind = ((span > LAGUERRE_SPAN).int() + 2 * (width > WIDE if wide else width < 0)).squeeze(1)
    for one in kind.unique().tolist():
        rows = (kind == one).nonzero().view(-1)
        yield rows, int(width[rows].max()), float(span[rows].max())


def _window(table: Table, volumes: Tensor, values: Tensor, wanted: _Range, width: int, orders: int) -> Window:
    """Return the volumes ``wanted`` pixel by pixel, and power sums of the other pixels."""
    first, last = wanted.first, wanted.last
    volume = first + torch.arange(width, device=first.device)
    own = values.gather(1, _run(table, volumes, volume)).masked_fill_(volume > last, 0)
    own[:, 0] = 0
    # How many pixels of each value are before and behind the window, by arithmetic, which is faster than comparisons.
    ends, counts = volumes[:, 1:], 1 if table.counts is None else table.counts
    outside = torch.stack([first + counts - ends, ends - last], 1)
    outside = outside.clamp_(0, 1) if table.counts is None else outside.clamp_(min=0).minimum(table.counts.unsqueeze(1))
    outside = outside.mT
    above, below = (_powers_of(table.values, orders) @ outside).unbind(2)
    if table.low is not None:
        above, below = above + table.above[:, :orders], below + table.below[:, :orders]
    return Window(volume, own, above, below, wanted.slow, wanted.fast)


def _powers_of(values: Tensor, orders: int) -> Tensor:
    """Return the powers 1 to 4 or 8 of values ``(R, W)``, ``(R, orders, W)``."""
    square = values * values
    powers = torch.stack([values, square, square * values, square * square], 1)
    return powers if orders == 4 else torch.cat([powers, powers * powers[:, 3:]], 1)


def _empty_score(table: Table, volumes: Tensor, values: Tensor, smooth: float) -> Tensor:
    """Return the score of the empty mask, ``(R, 1)``."""
    if table.counts is not None:  # the most probable pixels, one by one
        last = volumes[:, -1:].clamp(max=ONE_BY_ONE)
        top = _window(table, volumes, values, _Range(table.rank, last, last, last), ONE_BY_ONE + 1, ORDERS)
        return empty_score(smooth, table.mean, top.values, top.below)
    rest = table.above + table.below
    if table.values.shape[1] > ONE_BY_ONE:
        rest = rest + _powers_of(table.values[:, ONE_BY_ONE:], ORDERS).sum(2)
    return empty_score(smooth, table.mean, table.values[:, :ONE_BY_ONE], rest)


def _run(table: Table, volumes: Tensor, volume: Tensor) -> Tensor:
    """Return the column of ``Table.sums`` that reaches a volume, int64; the nearest column where none does."""
    if table.counts is None:
        return (volume - table.rank if table.low is not None else volume).long().clamp_(0, volumes.shape[1] - 1)
    return torch.searchsorted(volumes, volume).clamp_(max=volumes.shape[1] - 1)


def cutoffs(table: Table, volumes: Tensor, values: Tensor, volume: Tensor) -> Tensor:
    """Return ``Best.cutoffs`` for volumes ``(R, 1)``."""
    run = _run(table, volumes, volume)
    cut = values.gather(1, run)
    if table.low is not None:
        cut.masked_fill_(run < 1, torch.nan)
    return cut.masked_fill_(volume < 1, torch.inf).squeeze(1)
