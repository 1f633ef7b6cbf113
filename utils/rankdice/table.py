"""The best volume of rows given as tables: probabilities in descending order, and how many pixels have each.

A table may hold a whole row (sorted, or as counts of its values) or only the pixels around the cut of the best mask.
All that lies outside enters through its power sums, and :func:`best_volumes` says whether the best volume is proven to
lie inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .integral import CACHE, FAR_ORDERS, LAGUERRE_SPAN, ORDERS, Goal, Window, empty_score, integrate

TIE = 1e-14  # relative: of volumes that score the same but for rounding, the smallest is taken
SLACK = 1e-12  # relative, for rounding in the bounds
FAR_RATE = 800.0  # from this rate on, FAR_ORDERS are enough for all pixels
SERIES_RATE = 80.0  # at slower decay, the most probable pixels are taken one by one
ONE_BY_ONE = 96
LEAST_WIDTH = 16
NODE_BYTES = 5 * 8  # of a volume at one node


@dataclass(frozen=True)
class Table:
    """Rows of probabilities. All float64 unless said otherwise.

    Attributes:
        values: ``(R, W)`` descending, filled up with zeros.
        counts: ``(R, W)`` how many pixels have each value; None: one each.
        columns: int64 ``(R, W)`` index of the pixel in its row, ascending among equal values; None if unknown.
        around: what lies outside the table; None: nothing.
    """

    values: Tensor
    counts: Tensor | None = None
    columns: Tensor | None = None
    around: Around | None = None

    def __getitem__(self, rows: Tensor) -> Table:
        parts = (self.values, self.counts, self.columns)
        values, counts, columns = (None if part is None else part[rows] for part in parts)
        assert values is not None
        around = None if self.around is None else Around(*(part[rows] for part in self.around))
        return Table(values, counts, columns, around)

    def ends(self) -> Tensor:
        """Return the volume up to and with each value, ``(R, W)``."""
        if self.counts is not None:
            return self.counts.cumsum(1)
        ends = torch.arange(1, self.values.shape[1] + 1, dtype=torch.float64, device=self.values.device)
        return ends + self.around.rank.unsqueeze(1) if self.around else ends.expand_as(self.values)

    def weighted(self, values: Tensor) -> Tensor:
        """Return ``values`` times the counts."""
        return values if self.counts is None else values * self.counts


class Around(NamedTuple):
    """What lies outside a table without counts, float64.

    Attributes:
        rank: ``(R,)`` number of pixels above the table.
        above: ``(R, FAR_ORDERS)`` their power sums.
        below: ``(R, FAR_ORDERS)`` power sums of the pixels below the table.
        mean, square: ``(R,)`` sum of the probabilities of the whole row, and of their squares.
        low, high: ``(R,)``: pixels below the table have ``p < low``, pixels above it ``p > high``.
        highest: ``(R,)`` largest probability of the row.
    """

    rank: Tensor
    above: Tensor
    below: Tensor
    mean: Tensor
    square: Tensor
    low: Tensor
    high: Tensor
    highest: Tensor


class Best(NamedTuple):
    """What was found for each row.

    Attributes:
        volumes: float64 ``(R,)``.
        cutoffs: float64 ``(R,)``, the smallest probability in the mask; ``Around.high`` where the mask is just the
            pixels above the table, ``inf`` where it is empty.
        columns: int64 ``(R,)``, index of the mask's last pixel with that probability; -1 where the mask has no pixel of
            the table. 0 without ``Table.columns``.
        torn: bool ``(R,)``, whether some pixels with that probability are left out.
        scores: float64 ``(R,)``.
        proven: bool ``(R,)``; a False row needs a table of more pixels.
        unproven: how many rows are not.
    """

    volumes: Tensor
    cutoffs: Tensor
    columns: Tensor
    torn: Tensor
    scores: Tensor
    proven: Tensor
    unproven: int


class _Range(NamedTuple):
    """Volumes that are to be scored: ``first`` to ``last``, float64 ``(R,)``, and the range of their rates."""

    first: Tensor
    last: Tensor
    slow: Tensor
    fast: Tensor


def best_volumes(table: Table, searched: Tensor, goal: Goal, budget: int) -> Best:
    """Find the best volume of each row.

    Args:
        table: the rows.
        searched: bool ``(R,)``; the other rows get the empty mask.
        goal: what is maximized.
        budget: bytes of working memory, about.
    """
    ends = table.ends()
    mean, wanted, proven = _candidates(table, ends, searched, goal)
    width, span = wanted.last - wanted.first + 1, wanted.fast / wanted.slow
    most, reach, slowest, unproven = torch.stack(
        [width.amax(), span.amax(), wanted.slow.amin(), (~proven).sum().double()]
    ).tolist()
    orders = FAR_ORDERS if slowest >= FAR_RATE else ORDERS
    volume, score = torch.empty_like(mean), torch.empty_like(mean)
    for rows, size, factor in _groups(width, span, int(most), reach):
        part, own, some = wanted, ends, table
        if rows is not None:
            part, own, some = _Range(*(v[rows] for v in wanted)), ends[rows], table[rows]
        window = _window(some, own, part, size, orders)
        step = CACHE if mean.device.type == "cpu" else budget // NODE_BYTES
        scores = integrate(goal, window, factor, max(1, step // window.values.numel()))
        scores.masked_fill_(~window.usable, -torch.inf)
        found = scores.amax(1)
        where = (scores >= (found * (1 - TIE)).unsqueeze(1)).int().argmax(1)  # the first one
        if rows is None:
            volume, score = part.first + where, found
        else:
            volume[rows], score[rows] = part.first + where, found
    score = score.clamp(max=1)
    none = ~searched
    if goal.smooth:
        first = mean.new_zeros(mean.shape) if table.around is None else table.around.rank
        known = _window(table, ends, _Range(first, first + ONE_BY_ONE, mean, mean), ONE_BY_ONE + 1, ORDERS)
        empty = empty_score(goal.smooth, mean, known.values, known.above + known.below)
        none |= empty >= score * (1 - TIE)
        score = torch.where(none, empty, score)
    else:
        none |= score <= 0
        score = score.masked_fill(none, 0)
    return describe(table, ends, volume.masked_fill(none, 0), score, proven, int(unproven))


def _candidates(table: Table, ends: Tensor, searched: Tensor, goal: Goal) -> tuple[Tensor, _Range, Tensor]:
    """Return mu, the volumes that can be best, and whether they all lie in the table."""
    values, around = table.values, table.around
    volume = ends if table.counts is None else ends.clamp(min=1)
    mass = table.weighted(values).cumsum(1)  # at the ends of the runs of equal values
    if around is None:
        mean, square, highest = mass[:, -1], table.weighted(values * values).sum(1), values[:, 0]
    else:
        mean, square, highest = around.mean, around.square, around.highest
        volume = torch.cat([around.rank.unsqueeze(1).clamp(min=1), ends], 1)
        mass = torch.cat([around.above[:, :1], mass + around.above[:, :1]], 1)
    mean_, variance = mean.unsqueeze(1), (mean - square).clamp_(min=0)
    rate, lower, lead, excess = goal.bounds(mean_, variance.unsqueeze(1), volume, mass)
    lower, at = lower.max(1, keepdim=True)
    if table.counts is not None:  # inside a run the lead is monotone, and the excess is largest at the run's start
        begin = (volume - table.counts).clamp(min=0) + 1
        least = torch.maximum(rate - table.counts, torch.maximum(begin, mean_) + goal.smooth)
        excess = variance.unsqueeze(1) / ((begin + goal.smooth) * least)
        before = goal.smooth / (mean_ + goal.smooth).clamp(min=SLACK)
        lead = torch.maximum(lead, torch.cat([before, lead[:, :-1]], 1))
    upper = torch.addcmul(lead, lead, excess).amax(1).clamp_(max=1)
    low, high = goal.cuts(mean, variance, highest, volume.gather(1, at).squeeze(1), lower.squeeze(1), upper)
    low, high = low.clamp(min=0) * (1 - SLACK), high * (1 + SLACK)
    descending = -values
    start = torch.searchsorted(descending, -high.unsqueeze(1), right=True)  # runs with p >= high
    stop = torch.searchsorted(descending, -low.unsqueeze(1))  # runs with p > low
    proven = torch.ones_like(searched)
    if around is None:
        start, stop = start - 1, stop - 1
    else:
        proven = (around.low <= low) & ((around.high >= high) | (around.rank == 0)) | ~searched
        stop = torch.where(proven.unsqueeze(1), stop, start)
    borders = torch.cat([torch.minimum(start, at), torch.maximum(stop, at)], 1)
    inside = borders.clamp(min=0)
    first, last = volume.gather(1, inside).unbind(1)
    slow, fast = rate.gather(1, inside).unbind(1)
    if around is None:
        first = first.masked_fill(borders[:, 0] < 0, 0)
    # Where the integrand falls slowly, the most probable pixels must be in the window, one by one.
    tiny = slow < SERIES_RATE
    if around is not None:
        tiny &= around.rank == 0
    last = torch.where(tiny, torch.maximum(last, ends[:, -1].clamp(max=ONE_BY_ONE)), last)
    fast = torch.where(tiny, last + (mean + goal.smooth), fast)
    slow = slow.masked_fill(tiny, 1 + goal.smooth)
    return mean, _Range(first.masked_fill(tiny, 0), last, slow, torch.maximum(fast, slow)), proven


def _groups(width: Tensor, span: Tensor, most: int, reach: float) -> Iterator[tuple[Tensor | None, int, float]]:
    """Yield rows (None: all) whose windows have about the same width and need the same nodes.

    On a GPU all rows go together: waiting for the sizes costs more than the padding.
    """
    if width.device.type != "cpu" or (most <= 4 * LEAST_WIDTH and reach <= LAGUERRE_SPAN) or width.numel() == 1:
        yield None, most, reach
        return
    kind = width.clamp(min=LEAST_WIDTH).log2().ceil() * 2 + (span > LAGUERRE_SPAN)
    for one in kind.unique().tolist():
        rows = (kind == one).nonzero().view(-1)
        yield rows, int(width[rows].max()), float(span[rows].max())


def _window(table: Table, ends: Tensor, wanted: _Range, width: int, orders: int) -> Window:
    """Return the volumes ``wanted`` pixel by pixel, and what lies around them as power sums."""
    first, last = wanted.first.unsqueeze(1), wanted.last.unsqueeze(1)
    volume = first + torch.arange(width, device=first.device)
    usable = volume <= torch.minimum(last, ends[:, -1:])
    values = table.values.gather(1, place(table, ends, volume)) * usable
    values[:, 0] = 0
    usable = torch.cat([first > 0, values[:, 1:] > 0], 1)
    if table.counts is None:
        around = torch.stack([ends <= first, ends > last], 2).double()
    else:
        above = torch.minimum((first - ends + table.counts).clamp_(min=0), table.counts)
        below = torch.minimum((ends - last).clamp_(min=0), table.counts)
        around = torch.stack([above, below], 2)
    sums, power = [], table.values.unsqueeze(1)
    for n in range(orders):
        power = power * table.values.unsqueeze(1) if n else power
        sums.append(power @ around)
    above, below = torch.cat(sums, 1).unbind(2)
    if table.around:
        rest = (0, orders - FAR_ORDERS)
        above, below = above + pad(table.around.above, rest), below + pad(table.around.below, rest)
    return Window(volume, values, usable, above, below, wanted.slow.unsqueeze(1), wanted.fast.unsqueeze(1))


def place(table: Table, ends: Tensor, volume: Tensor) -> Tensor:
    """Return the run of the last pixel of each volume, int64 ``(R, ...)``; the nearest run where it is outside."""
    if table.counts is not None:
        found = torch.searchsorted(ends, volume.contiguous())
    else:
        found = (volume - ends[:, :1]).long()
    return found.clamp_(0, ends.shape[1] - 1)


def describe(table: Table, ends: Tensor, volume: Tensor, score: Tensor, proven: Tensor, unproven: int) -> Best:
    """Return what a mask needs to know beside its volume."""
    which = volume.unsqueeze(1)
    run = place(table, ends, which)
    cut = table.values.gather(1, run)
    column = run if table.columns is None else table.columns.gather(1, run)
    if table.counts is None:
        after = (run + 1).clamp_(max=ends.shape[1] - 1)
        torn = (table.values.gather(1, after) == cut) & (after > run)
    else:
        torn = which < ends.gather(1, run)
    cut, column, torn = cut.squeeze(1), column.squeeze(1), torn.squeeze(1)
    if table.around:
        inside = volume > table.around.rank
        cut, column, torn = torch.where(inside, cut, table.around.high), torch.where(inside, column, -1), torn & inside
    empty = volume == 0
    return Best(volume, cut.masked_fill(empty, torch.inf), column, torn & ~empty, score, proven, unproven)
