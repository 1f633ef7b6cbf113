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

from .integral import CACHE, CPU, FAR_ORDERS, FAR_RATE, LAGUERRE_SPAN, ORDERS, Goal, Window, empty_score, integrate

TIE = 1e-14  # relative: of volumes that score the same but for rounding, the smallest is taken
SLACK = 1e-12  # relative, for rounding in the bounds
SERIES_RATE = 80.0  # at slower decay, the most probable pixels are taken one by one
ONE_BY_ONE = 96
WIDE = 256  # volumes of a window
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
        torn: bool ``(R,)``, whether some pixels with that probability are left out. On a GPU True throughout: drawing
            by ``columns`` then costs less than finding out.
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


def best_volumes(table: Table, skipped: Tensor, goal: Goal, budget: int) -> Best:
    """Find the best volume of each row.

    Args:
        table: the rows.
        skipped: bool ``(R,)``: these rows get the empty mask.
        goal: what is maximized.
        budget: bytes of working memory, about.
    """
    ends = table.ends()
    mean, wanted, unproven = _candidates(table, ends, skipped, goal)
    width, span = wanted.last - wanted.first, wanted.fast / wanted.slow
    largest = torch.stack([width, span, -wanted.slow]).amax(1)
    most, reach, slowest, left = torch.cat([largest, unproven.sum().view(1)]).tolist()
    orders = FAR_ORDERS if -slowest >= FAR_RATE else ORDERS
    volume = score = mean
    for rows, size, factor in _groups(width, span, int(most), reach):
        part, own, some = wanted, ends, table
        if rows is not None:
            part, own, some = _Range(*(v[rows] for v in wanted)), ends[rows], table[rows]
        window = _window(some, own, part, size + 1, orders)
        step = CACHE if mean.device.type in CPU else budget // NODE_BYTES
        scores = integrate(goal, window, factor, max(1, step // window.values.numel()))
        scores.masked_fill_(window.barred, -torch.inf)
        found = scores.amax(1)
        where = (scores >= (found * (1 - TIE)).unsqueeze(1)).view(torch.uint8).argmax(1)  # the first one
        if rows is None:
            volume, score = part.first + where, found
        else:
            volume, score = volume.index_copy(0, rows, part.first + where), score.index_copy(0, rows, found)
    score = score.clamp(max=1)
    if goal.smooth:
        first = mean.new_zeros(mean.shape) if table.around is None else table.around.rank
        known = _window(
            table, ends, _Range(first, (first + ONE_BY_ONE).minimum(ends[:, -1]), mean, mean), ONE_BY_ONE + 1, ORDERS
        )
        empty = empty_score(goal.smooth, mean, known.values, known.above + known.below)
        none = skipped | (empty >= score * (1 - TIE))
        score = torch.where(none, empty, score)
    else:
        none = skipped | (score <= 0)
        score = score.masked_fill(none, 0)
    return describe(table, ends, volume.masked_fill(none, 0), score, ~unproven, int(left))


def _candidates(table: Table, ends: Tensor, skipped: Tensor, goal: Goal) -> tuple[Tensor, _Range, Tensor]:
    """Return mu, the volumes that can be best, and for which rows they may lie outside the table."""
    values, around, unproven = table.values, table.around, skipped
    volume = ends if table.counts is None else ends.clamp(min=1)
    mass = table.weighted(values).cumsum(1)  # at the ends of the runs of equal values
    if around is None:
        mean, square, highest = mass[:, -1], table.weighted(values * values).sum(1), values[:, 0]
    else:
        mean, square, highest = around.mean, around.square, around.highest
        volume = torch.cat([around.rank.unsqueeze(1).clamp(min=1), ends], 1)
        mass = pad(mass, (1, 0)) + around.above[:, :1]
    mean_, variance = mean.unsqueeze(1), (mean - square).clamp_(min=0)
    rate, lower, lead, excess = goal.bounds(mean_, variance.unsqueeze(1), volume, mass)
    lower, at = lower.max(1, keepdim=True)
    if table.counts is not None:  # inside a run the lead is monotone, and the excess is largest at the run's start
        begin = (volume - table.counts).clamp(min=0) + 1
        least = torch.maximum(rate - table.counts, torch.maximum(begin, mean_) + goal.smooth)
        excess = variance.unsqueeze(1) / ((begin + goal.smooth) * least)
        before = goal.smooth / (mean_ + goal.smooth).clamp(min=SLACK)
        lead = torch.maximum(lead, torch.cat([before, lead[:, :-1]], 1))
    upper = torch.addcmul(lead, lead, excess)
    able = (upper >= lower) * torch.arange(upper.shape[1], device=upper.device)  # no volume behind the last is best
    low, high = goal.cuts(
        mean, variance, highest, volume.gather(1, at).squeeze(1), lower.squeeze(1), upper.amax(1).clamp_(max=1)
    )
    low = low.clamp_(min=0)
    # Runs with p > high, and with p > low, but for rounding; and all.
    edges = torch.stack([-high, low * (SLACK - 1), torch.zeros_like(low)], 1)
    borders = torch.searchsorted(-values, edges)
    if around is None:
        borders -= 1
        unproven = torch.zeros_like(skipped)
    else:
        # Behind the table the bound falls, if it holds pixels down to where one more lowers the leading term.
        end = borders[:, 2:]
        worth = around.low / (1 - around.low) if goal.metric == "iou" else 2 * around.low
        done = (upper.gather(1, end) < lower).squeeze(1) & (worth <= lead.gather(1, end).squeeze(1))
        unproven = ((around.low > low) & ~done) | ((around.high < high) & (around.rank > 0))
        unproven = unproven.masked_fill_(skipped, False)
        borders = borders.masked_fill_(unproven.unsqueeze(1), 0)
    borders = borders[:, :2]
    borders[:, :1].clamp_(max=at)
    borders[:, 1:].clamp_(max=able.amax(1, keepdim=True)).clamp_(min=at)
    inside = borders.clamp(min=0) if around is None else borders
    first, last = volume.gather(1, inside).unbind(1)
    slow, fast = rate.gather(1, inside).unbind(1)
    # Where the integrand falls slowly, the most probable pixels must be in the window, one by one.
    tiny = slow < SERIES_RATE
    first = first.masked_fill(tiny if around else (borders[:, 0] < 0) | tiny, 0)
    last = torch.where(tiny, torch.maximum(last, ends[:, -1].clamp(max=ONE_BY_ONE)), last)
    fast = torch.where(tiny, last + (mean + goal.smooth), fast)
    slow = slow.masked_fill(tiny, 1 + goal.smooth)
    return mean, _Range(first, last, slow, fast), unproven


def _groups(width: Tensor, span: Tensor, most: int, reach: float) -> Iterator[tuple[Tensor | None, int, float]]:
    """Yield rows (None: all) whose windows have about the same width and need the same nodes.

    On a GPU all rows go together: waiting for the sizes costs more than the padding.
    """
    if width.device.type not in CPU or (most <= WIDE and reach <= LAGUERRE_SPAN) or width.numel() == 1:
        yield None, most, reach
        return
    kind = (span > LAGUERRE_SPAN).int() + 2 * (width > WIDE)
    for one in kind.unique().tolist():
        rows = (kind == one).nonzero().view(-1)
        yield rows, int(width[rows].max()), float(span[rows].max())


def _window(table: Table, ends: Tensor, wanted: _Range, width: int, orders: int) -> Window:
    """Return the volumes ``wanted`` pixel by pixel, and what lies around them as power sums."""
    first, last = wanted.first.unsqueeze(1), wanted.last.unsqueeze(1)
    volume = first + torch.arange(width, device=first.device)
    barred = volume > last
    values = table.values.gather(1, place(table, ends, volume)).masked_fill_(barred, 0)
    values[:, 0] = 0
    barred |= volume < 1
    if table.counts is None:
        around = torch.stack([ends <= first, ends > last], 2).double()
    else:
        above = torch.minimum((first - ends + table.counts).clamp_(min=0), table.counts)
        below = torch.minimum((ends - last).clamp_(min=0), table.counts)
        around = torch.stack([above, below], 2)
    powers = [table.values]
    for _ in range(1, orders):
        powers.append(powers[-1] * table.values)
    above, below = (torch.stack(powers, 1) @ around).unbind(2)
    if table.around:
        rest = (0, orders - FAR_ORDERS)
        far = [pad(part, rest) if orders > FAR_ORDERS else part for part in (table.around.above, table.around.below)]
        above, below = above + far[0], below + far[1]
    return Window(volume, values, barred, above, below, wanted.slow.unsqueeze(1), wanted.fast.unsqueeze(1))


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
    torn = proven
    if table.counts is not None:
        torn = (which < ends.gather(1, run)).squeeze(1)
    elif volume.device.type in CPU:
        after = (run + 1).clamp_(max=ends.shape[1] - 1)
        torn = ((table.values.gather(1, after) == cut) & (after > run)).squeeze(1)
    cut, column = cut.squeeze(1).masked_fill_(volume == 0, torch.inf), column.squeeze(1)
    if table.around:
        only_above = (volume > 0) & (volume <= table.around.rank)
        cut, column = torch.where(only_above, table.around.high, cut), column.masked_fill(only_above, -1)
        torn = torn & ~only_above if volume.device.type in CPU else torn
    return Best(volume, cut, column, torn, score, proven, unproven)
