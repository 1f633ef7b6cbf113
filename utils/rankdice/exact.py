"""The exact solver for maps: two passes over the pixels, then a small table per row.

1. One pass sums the powers of all probabilities.
2. A sample of the pixels estimates the cut of the best mask. Its standard error gives the limits ``low`` and ``high``.
3. A second pass sums the powers of the pixels above ``high``. The few pixels between the limits form a
   :class:`~.table.Table`, which finds the best volume and proves that it lies between the limits.
4. If the proof fails, the row is sorted as a whole. Small maps are always sorted as a whole.

The sample affects the time, never the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .integral import CPU, FAR_ORDERS, FAR_RATE, ORDERS, Goal
from .table import Best, Table, best_volumes

BLOCK = 32
SORTED_PIXELS = 5000  # rows of at most this many pixels are sorted
SORT_BYTES = 130  # of a pixel while its row is sorted and solved
LEAST_SAMPLE = 1024
STEPS = 5  # to the best cut of a sample
DEVIATIONS = 3.5  # standard errors of the sample's estimate between it and each limit
GPU_DEVIATIONS = 5.0  # on a GPU, sorting more pixels costs less than another try
MOST_PIXELS = 4096  # in a table of a row, or one in 64 of the row's pixels, or what the budget has room for
TABLE_BYTES = 100  # of a pixel in a table
SMALL_TABLE, MOST_PADDED = 64, 1 << 14  # pixels: rows with many more than others get tables of their own
CACHE_PIXELS = 1 << 18
MOST_BLOCKS = 0.6  # with more blocks in question, all are looked at
LEAST_CUT = 1e-30  # smaller probabilities never enter a table


def solve(
    rows: Tensor, skipped: Tensor, masks: Tensor, goal: Goal, budget: int, extremes: Tensor | None = None
) -> Best:
    """Find the best volume of each row, and draw its mask.

    Args:
        rows: ``(R, N)`` probabilities, contiguous.
        skipped: bool ``(R,)``: these rows get the empty mask.
        masks: bool ``(R, N)``, contiguous, False: is filled.
        goal: what is maximized.
        budget: bytes of working memory, about.
        extremes: smallest and largest value of the map, if they are still to be checked.
    """
    if rows.shape[1] <= SORTED_PIXELS:
        if extremes is not None:
            check_range(*extremes.tolist())
        return _solve_sorted(rows, skipped, masks, goal, budget)
    pixels = _around_the_cut(rows, skipped.unsqueeze(1), masks, goal)
    if extremes is not None:
        check_range(*extremes.tolist())
    best = _around(rows, skipped, masks, pixels, goal, budget)
    if best.left:
        names = best.unproven.byte().argsort(descending=True)[: best.left]  # not nonzero(), which a GPU would wait for
        for part in names.split(max(1, budget // (SORT_BYTES * rows.shape[1]))):
            own = masks.new_zeros(part.numel(), rows.shape[1])
            again = _solve_sorted(rows[part], skipped[part], own, goal, budget)
            masks[part] = own
            best.volumes[part], best.scores[part] = again.volumes, again.scores
            if rows.device.type in CPU:  # elsewhere the cut-offs are read from the masks below
                best.cutoffs[part] = again.cutoffs
    if rows.device.type not in CPU:
        return best._replace(cutoffs=torch.where(masks, rows, torch.inf).amin(1))
    for row in best.cutoffs.isnan().nonzero().view(-1).tolist():  # the mask is just the pixels above the table
        best.cutoffs[row] = rows[row][masks[row]].amin()
    return best


def _around(rows: Tensor, skipped: Tensor, masks: Tensor, pixels: _Pixels, goal: Goal, budget: int) -> Best:
    """Find the best volume of each row among those that are cut around the pixels found, and draw its mask."""
    groups, found = _groups(pixels.sizes), []
    for names in groups:
        table, columns = _table(rows, pixels, names, budget)
        best = best_volumes(table, skipped if names is None else skipped[names], goal, budget)
        _draw_some(masks, columns, best.volumes.unsqueeze(1) - table.rank, names)
        found.append(best)
    if len(found) == 1:
        return found[0]
    order = torch.cat(groups).argsort()  # type: ignore[arg-type] # several groups are never None
    volumes, cuts, scores, unproven = (torch.cat(parts)[order] for parts in list(zip(*found, strict=True))[:4])
    return Best(volumes, cuts, scores, unproven, sum(best.left for best in found))


def draw(masks: Tensor, columns: Tensor, volumes: Tensor) -> None:
    """Fill masks ``(R, N)`` with the first ``volumes`` ``(R, 1)`` of the sorted pixels ``columns`` ``(R, N)``."""
    masks.scatter_(1, columns, torch.arange(columns.shape[1], device=masks.device) < volumes)


def _draw_some(masks: Tensor, columns: Tensor, counts: Tensor, names: Tensor | None) -> None:
    """Add the first ``counts`` pixels of the tables to the masks of the rows ``names``."""
    taken = torch.arange(columns.shape[1], device=masks.device) < counts
    if masks.device.type in CPU:
        first = torch.arange(len(masks)) if names is None else names
        masks.view(-1).index_fill_(0, (columns + (first * masks.shape[1]).unsqueeze(1))[taken], True)
    else:  # the padding of the tables adds 0
        masks.view(torch.uint8).scatter_add_(1, columns, taken.view(torch.uint8))


def check_range(low: float, high: float) -> None:
    """Raise unless all values are probabilities, by the smallest and the largest of them."""
    if not (low >= 0 and high <= 1):
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("probs: found values that are not finite (NaN or infinity)")
        raise ValueError(f"probs: expected values in [0, 1], found values from {low:.6g} to {high:.6g}")


def _solve_sorted(rows: Tensor, skipped: Tensor, masks: Tensor, goal: Goal, budget: int) -> Best:
    values, columns = rows.sort(dim=1, descending=True, stable=True)
    best = best_volumes(Table.whole(values.double()), skipped, goal, budget)
    draw(masks, columns, best.volumes.unsqueeze(1))
    return best


class _Room:
    """Memory for pieces of a map, used again and again: on a CPU, getting new memory takes longer than the sums."""

    def __init__(self, rows: Tensor) -> None:
        self.size = min(CACHE_PIXELS, rows.numel())
        dtype = rows.dtype if rows.element_size() > 2 else torch.float32
        self.parts = [rows.new_empty(self.size, dtype=kind) for kind in (torch.float64, dtype, dtype, dtype)]

    def like(self, values: Tensor, which: int) -> Tensor:
        """Return one of the parts (0 is float64, 1 to 3 are like the map) in that shape."""
        return self.parts[which][: values.numel()].view(values.shape)


def _powers(values: Tensor, room: _Room | None = None) -> Tensor:
    """Return the power sums ``(R, FAR_ORDERS)``, float64."""
    if room is None:  # few operations
        wide = values.double()
        square = wide * wide
        return torch.stack([wide, square, square * wide, square * square], 1).sum(2)
    # Few bytes. Orders above 2 matter little: float32 is enough for them.
    wide, square = room.like(values, 0).copy_(values), torch.mul(values, values, out=room.like(values, 1))
    sums = [wide.sum(1, keepdim=True), wide.mul_(wide).sum(1, keepdim=True)]
    fourth = torch.linalg.vector_norm(square, dim=1, keepdim=True).double().square_()
    return torch.cat([*sums, square.mul_(values).sum(1, keepdim=True), fourth], 1)


def pieces(rows: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield rows, first column, and the pixels ``(r, n)`` there: on a CPU as many as fit a cache, on a GPU all."""
    (count, width), pixels = rows.shape, CACHE_PIXELS if rows.device.type in CPU else rows.numel()
    together = max(1, pixels // width)
    for row in range(0, count, together):
        some = slice(row, row + together)
        for first in range(0, width, pixels):
            part = rows[some, first : first + pixels]
            yield some, first, part if part.element_size() > 2 else part.float()


@lru_cache(maxsize=16)
def _sample(width: int, device: torch.device) -> Tensor:
    """Return the places of a row's pixels that make up its sample."""
    size = min(
        width, max(LEAST_SAMPLE, int((0.4 * width) ** (2 / 3)))
    )  # then sample and table take about the same time
    steps = torch.arange(size, device=device)
    stretch = width // size
    # One pixel of each stretch, at places that no regular pattern of the image can follow.
    return steps * stretch + steps * 40503 % 65536 * stretch // 65536


def _limits(rows: Tensor, total: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """Guess probabilities ``(low, high)``, ``(R, 1)``, between which the best mask is cut.

    The best cut is where one more pixel lowers the leading term of the score; a sample gives it, and its error.
    """
    sample = rows.index_select(1, _sample(rows.shape[1], rows.device)).float()
    scale = sample.shape[1] / rows.shape[1]
    mean, square = total[:, :1], total[:, 1:2]
    g = (goal.smooth / 2 if goal.metric == "dice" else goal.smooth) * scale
    base = sample.sum(1, keepdim=True) + (2 * g + scale)
    if rows.device.type in CPU:
        cut = torch.full_like(base, 0.3)
        for _ in range(STEPS):  # to the maximum of (mass + g) / (volume + base) (Dinkelbach 1967)
            over = torch.sub(sample, cut).mul_(2.0**100).clamp_(0, 1)
            weight = over.sum(1, keepdim=True) + base
            cut = (over.mul_(sample).sum(1, keepdim=True) + g) / weight
    else:  # fewer operations
        weight = base + torch.arange(1, sample.shape[1] + 1, device=rows.device)
        cut, at = ((sample.sort(1, descending=True).values.cumsum(1) + g) / weight).max(1, keepdim=True)
        weight = weight.gather(1, at)
    # Errors of the sum that is zero at the best cut, per pixel of the sample.
    part = torch.addcmul((sample - cut).clamp_(min=0), cut, sample, value=-1)
    sure = DEVIATIONS if rows.device.type in CPU else GPU_DEVIATIONS
    error = torch.linalg.vector_norm(part, dim=1, keepdim=True).add_(0.5).mul_(sure) / weight
    # Some volume scores about square / mean or more: a mask cut at a random height has that mass per mean volume.
    guess = torch.minimum(square / mean.clamp(min=torch.finfo(torch.float64).tiny), cut * 2) * 0.3
    return torch.maximum(cut - error, guess), cut + error


class _Pixels(NamedTuple):
    """What the passes over the map found: one row each, ``(R, 1)`` unless stated otherwise.

    Attributes:
        total: power sums of all pixels ``(R, ORDERS)``; orders above ``FAR_ORDERS`` stay 0.
        above: number and power sums of the pixels above ``high``, ``(R, 1 + ORDERS)``.
        low, high: the limits.
        place: places in the flat map of the pixels from ``low`` to ``high`` ``(M,)``.
        ends, sizes: where each row's part of ``place`` ends, and how many there are.
    """

    total: Tensor
    above: Tensor
    low: Tensor
    high: Tensor
    place: Tensor
    ends: Tensor
    sizes: Tensor


def _around_the_cut(rows: Tensor, skipped: Tensor, masks: Tensor, goal: Goal) -> _Pixels:
    """Find the pixels around the cut, and draw the pixels above them."""
    count, width = rows.shape
    room = _Room(rows) if rows.device.type in CPU else None
    total = rows.new_zeros(count, ORDERS, dtype=torch.float64)
    for some, _, part in pieces(rows):
        total[some, :FAR_ORDERS].add_(_powers(part, room))
    low, high = _limits(rows, total, goal)
    # With a small mean, the table must hold all pixels that are to be taken one by one.
    info, dtype, mean = torch.finfo(rows.dtype), part.dtype, total[:, :1]
    low = low.minimum(mean / FAR_RATE).clamp_(min=max(LEAST_CUT, info.tiny * info.eps)).masked_fill_(skipped, 2)
    low, high = low.to(dtype), high.masked_fill(skipped | (mean < FAR_RATE), torch.inf).to(dtype)
    above = rows.new_zeros(count, 1 + ORDERS, dtype=torch.float64)
    found = []
    search = _search_part if rows.device.type in CPU else _search_map
    for some, first, part in pieces(rows):
        size, over, place = search(part, low[some], high[some], masks[some, first : first + part.shape[1]], room)
        above[some, : 1 + FAR_ORDERS].add_(torch.cat([size, _powers(over, room)], 1))
        found.append(place + (some.start * width + first))
    place = torch.cat(found)
    ends = torch.searchsorted(place, torch.arange(0, (count + 1) * width, width, device=rows.device)).unsqueeze(1)
    return _Pixels(total, above, low, high, place, ends[1:], ends.diff(dim=0))


def _groups(sizes: Tensor) -> list[Tensor] | list[None]:
    """Return rows whose tables have about the same size; None: all rows."""
    if sizes.device.type in CPU and sizes.numel() > 1:
        small = (sizes <= 2 * sizes.sum() // sizes.numel() + SMALL_TABLE).squeeze(1)
        if sizes.numel() * int(sizes.max()) > MOST_PADDED and not bool(small.all()):
            return [small.nonzero().view(-1), small.logical_not().nonzero().view(-1)]
    return [None]


def _table(rows: Tensor, pixels: _Pixels, names: Tensor | None, budget: int) -> tuple[Table, Tensor]:
    """Return the tables of some rows (None: all), and the columns of their pixels ``(R, W)``."""
    total, above, low, high, ends, sizes = (
        part if names is None else part[names]
        for part in (pixels.total, pixels.above, pixels.low, pixels.high, pixels.ends, pixels.sizes)
    )
    width = rows.shape[1]
    most = max(MOST_PIXELS, width // 64, budget // (TABLE_BYTES * len(rows)))
    most = max(1, min(most, int(sizes.max())))
    which = torch.arange(most, device=rows.device)
    place = pixels.place if pixels.place.numel() else pixels.place.new_zeros(1)
    place = place[(which + (ends - sizes)).clamp_(max=place.numel() - 1)]
    values, order = (rows.view(-1)[place] * (which < sizes)).sort(dim=1, descending=True, stable=True)
    values, columns = values.double(), (place % width).gather(1, order)
    below = total - above[:, 1:]
    below[:, :FAR_ORDERS].sub_(_powers(values)).clamp_(min=0)
    low = low.double().masked_fill_(sizes > most, torch.inf)
    variance = (total[:, :1] - total[:, 1:2]).clamp_(min=0)
    table = Table(values, None, total[:, :1], variance, above[:, :1], above[:, 1:], below, low, high.double())
    return table, columns


def _search_map(
    rows: Tensor, low: Tensor, high: Tensor, masks: Tensor, room: _Room | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the pixels around the cut, and draw those above: for a GPU.

    Returns:
        How many pixels are above ``high``, ``(R, 1)``; the pixels, with zeros for all others; places in the flat map of
        the pixels from ``low`` to ``high``.
    """
    over = torch.gt(rows, high, out=masks)
    return over.sum(1, keepdim=True), rows * over, ((rows >= low) ^ over).view(-1).nonzero().view(-1)


def _search_part(
    part: Tensor, low: Tensor, high: Tensor, masks: Tensor, room: _Room | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what :func:`_search_map` does, with fast arithmetic instead of slow comparisons: for a CPU."""
    assert room is not None
    names = None
    if part.shape[0] == 1 and part.shape[1] % BLOCK == 0:  # leave out blocks without a pixel above `low`
        blocks = part.view(-1, BLOCK)
        names = (blocks.amax(1) >= low.view(1)).nonzero().view(-1)
        if names.numel() < MOST_BLOCKS * len(blocks):
            part = torch.index_select(blocks, 0, names).view(1, -1)
        else:
            names = None
    steep = 2.0**124 if part.dtype == torch.float32 else 2.0**1000  # a power of two: products are exact
    over = torch.add(high * -steep, part, alpha=steep, out=room.like(part, 2)).clamp_(0, 1)  # 1 above `high`, else 0
    outside = torch.sub(low * steep, part, alpha=steep, out=room.like(part, 3)).clamp_(0, 1).add_(over)
    place = _places(outside.sub_(1).bool().view(-1))
    if names is None:
        masks.copy_(over)
    else:
        masks.view(-1, BLOCK)[names] = over.bool().view(-1, BLOCK)
        block = place // BLOCK
        place = (names[block] - block) * BLOCK + place
    return over.sum(1, keepdim=True), over.mul_(part), place


def _places(found: Tensor) -> Tensor:
    """Return where a vector is True, fast if nearly all of it is False."""
    whole = found.numel() // 8 * 8
    words = found[:whole].view(torch.int64)  # eight at a time
    hit = words.nonzero()
    place = (hit * 8 + torch.arange(8))[words[hit.view(-1)].view(torch.bool).view(-1, 8)]
    return place if whole == found.numel() else torch.cat([place, found[whole:].nonzero().view(-1) + whole])
