"""The exact solver for maps: a few passes over the pixels, then a small table per row.

1. One pass sums the powers of all probabilities.
2. A sample of the pixels estimates the cut of the best mask. Its standard error gives the limits ``low`` and ``high``.
3. A second pass sums the powers of the pixels above ``high``. The few pixels between the limits form a
   :class:`~.table.Table`, which finds the best volume and proves that it lies between the limits.
4. If the proof fails, the row is sorted as a whole. Small maps are always sorted as a whole.

The sample affects the time, never the result.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .integral import CPU, FAR_ORDERS, FAR_RATE, SURE_MEAN, Goal
from .table import Around, Best, Table, best_volumes

BLOCK = 32
SORTED_PIXELS = 5000  # rows of at most so many pixels are sorted
SORT_BYTES = 96  # of a pixel while its row is sorted and solved
LEAST_SAMPLE = 512
DEVIATIONS = 4.0  # standard errors of the sample's estimate between it and each limit
MOST_PIXELS = 4096  # in a table of a row, or one in 64 of the row's pixels, or what the budget has room for
TABLE_BYTES = 100  # of a pixel in a table
CACHE_PIXELS = 1 << 17
LEAST_CUT = 1e-30  # smaller probabilities never enter a table


def solve(
    rows: Tensor, highest: Tensor, skipped: Tensor, goal: Goal, budget: int, extremes: Tensor | None = None
) -> Best:
    """Find the best volume of each row.

    Args:
        rows: ``(R, N)`` probabilities, contiguous.
        highest: ``(R,)`` largest value of each row.
        skipped: bool ``(R,)``: these rows get the empty mask.
        goal: what is maximized.
        budget: bytes of working memory, about.
        extremes: smallest and largest value of the map, if they are still to be checked.
    """
    if rows.shape[1] <= SORTED_PIXELS:
        if extremes is not None:
            check_range(*extremes.tolist())
        return _solve_sorted(rows, skipped, goal, budget)
    table = _around_the_cut(rows, highest.double(), skipped, goal, budget, extremes)
    best = best_volumes(table, skipped, goal, budget)
    if not best.unproven:
        return best
    names = best.proven.sort().indices[: best.unproven]  # not nonzero(), which a GPU would wait for
    for part in names.split(max(1, budget // (SORT_BYTES * rows.shape[1]))):
        again = _solve_sorted(rows[part], skipped[part], goal, budget)
        for mine, theirs in zip(best[:-1], again[:-1], strict=True):
            mine[part] = theirs
    return best


def check_range(low: float, high: float) -> None:
    """Raise unless all values are probabilities, by the smallest and the largest of them."""
    if not (low >= 0 and high <= 1):
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("probs: found values that are not finite (NaN or infinity)")
        raise ValueError(f"probs: expected values in [0, 1], found values from {low:.6g} to {high:.6g}")


def _solve_sorted(rows: Tensor, skipped: Tensor, goal: Goal, budget: int) -> Best:
    values, columns = rows.sort(dim=1, descending=True, stable=True)
    return best_volumes(Table(values.double(), columns=columns), skipped, goal, budget)


def _powers(values: Tensor) -> Tensor:
    """Return the power sums ``(R, FAR_ORDERS)`` of float64 values ``(R, n)``."""
    square = values * values
    cubes = [(square * other).sum(1) for other in (values, square)]
    return torch.stack([values.sum(1), square.sum(1), *cubes], 1)


def _scan(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value of each block ``(R, B)`` and the power sums of the rows, in pieces that fit a cache."""
    count, width = rows.shape
    top = rows.new_zeros(count, -(-width // BLOCK))
    total = torch.zeros(count, FAR_ORDERS, dtype=torch.float64)
    pixels = CACHE_PIXELS * torch.get_num_threads()
    together = max(1, pixels // width)
    step = max(BLOCK, pixels // BLOCK * BLOCK)
    for row in range(0, count, together):
        some = slice(row, row + together)
        for first in range(0, width, step):
            part = rows[some, first : first + step]
            total[some] += _powers(part.double())
            whole, done = part.shape[1] // BLOCK, first // BLOCK
            torch.amax(part[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), 2, out=top[some, done : done + whole])
            if whole * BLOCK < part.shape[1]:
                top[some, -1] = part[:, whole * BLOCK :].amax(1)
    return top, total


@lru_cache(maxsize=16)
def _sample(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the places of a row's pixels that make up its sample, and the numbers from 1 on."""
    size = max(LEAST_SAMPLE, int((0.4 * width) ** (2 / 3)))  # then sample and table take about the same time
    steps = torch.arange(size, device=device)
    stretch = width // size
    # One pixel of each stretch, at places that no regular pattern of the image can follow.
    return steps * stretch + steps * 40503 % 65536 * stretch // 65536, steps + 1


def _limits(rows: Tensor, total: Tensor, skipped: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """Guess probabilities ``(low, high)``, ``(R, 1)`` in the dtype of the rows, between which the best mask is cut.

    The best cut is half the best score, about; a sample gives the best score, and how much it may be wrong.
    """
    places, steps = _sample(rows.shape[1], rows.device)
    scale = places.numel() / rows.shape[1]
    mean, square = total[:, :1], total[:, 1:2]
    g = (goal.smooth / 2 if goal.metric == "dice" else goal.smooth) * scale
    sample = rows.index_select(1, places).float().sort(1, descending=True).values
    mass = sample.cumsum(1)
    weight = mass[:, -1:] + steps + (2 * g + scale)
    cut, at = ((mass + g if g else mass) / weight).max(1, keepdim=True)
    # Errors of the sum that is zero at the best cut, per pixel of the sample.
    part = torch.addcmul((sample - cut).clamp_(min=0), cut, sample, value=-1)
    error = torch.linalg.vector_norm(part, dim=1, keepdim=True).add_(0.5).mul_(DEVIATIONS) / weight.gather(1, at)
    # Some volume scores about square / mean or more: a mask cut at a random height has that mass per mean volume.
    guess = torch.minimum(square / mean.clamp(min=torch.finfo(torch.float64).tiny), cut * 2) * 0.3
    low = torch.minimum(torch.maximum(cut - error, guess), (mean + 1) / FAR_RATE)
    high = (cut + error).masked_fill(mean < SURE_MEAN, torch.inf)
    info = torch.finfo(rows.dtype)
    low = low.clamp_(min=max(LEAST_CUT, info.tiny * info.eps)).masked_fill_(skipped.unsqueeze(1), 2)
    return low.to(rows.dtype), high.to(rows.dtype)


def _around_the_cut(
    rows: Tensor, highest: Tensor, skipped: Tensor, goal: Goal, budget: int, extremes: Tensor | None
) -> Table:
    """Return tables of the pixels around the cut."""
    if rows.device.type in CPU:
        top, total = _scan(rows)
        low, high = _limits(rows, total, skipped, goal)
        above, value, place = _search_blocks(rows, top, low, high)
    else:
        total = _powers(rows.double())
        low, high = _limits(rows, total, skipped, goal)
        above, value, place = _search_map(rows, low, high)
    values, columns, lost = _dense(value, place, rows, budget)
    inside = _powers(values)
    below = (total - above[:, 1:] - inside).clamp_(min=0)
    limit = low.squeeze(1).double().masked_fill(lost, torch.inf)
    around = Around(
        above[:, 0], above[:, 1:], below, total[:, 0], total[:, 1], limit, high.squeeze(1).double(), highest
    )
    if extremes is not None:
        check_range(*extremes.tolist())
    return Table(values, None, columns, around)


def _search_map(rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Look at all pixels at once: for a GPU.

    Returns:
        Number and power sums of the pixels above ``high`` ``(R, 1 + FAR_ORDERS)``; values and places (in the flat map)
        of those from ``low`` to ``high``.
    """
    over = rows > high
    place = ((rows >= low) & ~over).view(-1).nonzero().view(-1)
    above = torch.cat([over.sum(1, keepdim=True), _powers((rows * over).double())], 1)
    return above, rows.view(-1)[place], place


def _search_blocks(rows: Tensor, top: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do what :func:`_search_map` does, but look only at blocks whose largest value ``top`` is above ``low``."""
    (count, width), blocks = rows.shape, top.shape[1]
    whole = width // BLOCK
    steep = 1e38 if rows.dtype != torch.float64 else 1e300
    above = torch.zeros(count, 1 + FAR_ORDERS, dtype=torch.float64)
    found = [(rows.new_zeros(0), torch.zeros(0, dtype=torch.int64))]
    for names in (top >= low).view(-1).nonzero().view(-1).split(CACHE_PIXELS // BLOCK * torch.get_num_threads()):
        row = names // blocks
        first = names * BLOCK - row * (blocks * BLOCK - width)  # in the flat map
        if whole * BLOCK == width:
            pixels = rows.view(-1, BLOCK).index_select(0, names)
        else:  # the last block of a row overlaps the one before, whose pixels are taken out
            last = names - row * blocks == whole
            begin = torch.where(last, first - (blocks * BLOCK - width), first)
            pixels = rows.view(-1).unfold(0, BLOCK, 1)[begin]
            pixels[last, : blocks * BLOCK - width] = 0
            first = begin
        edges = low[row], high[row]
        pixels = pixels if pixels.element_size() > 2 else pixels.float()
        # Comparisons by arithmetic are several times faster than with bool tensors.
        over = (pixels - edges[1].to(pixels.dtype)).mul_(steep).clamp_(0, 1)
        size = over.sum(1)
        beneath = (edges[0].to(pixels.dtype) - pixels).mul_(steep).clamp_(0, 1).sum(1)
        power = over.mul_(pixels)
        sums = [size, power.double().sum(1)]
        own = power
        for _ in range(1, FAR_ORDERS):
            own = own * power
            sums.append(own.sum(1))
        above.index_add_(0, row, torch.stack(sums, 1).double())
        hit = (size + beneath < BLOCK).nonzero().view(-1)
        pixels, edges = pixels[hit], (edges[0][hit], edges[1][hit])
        inside = ((pixels >= edges[0]) & (pixels <= edges[1])).view(-1).nonzero().view(-1)
        block = inside // BLOCK
        found.append((pixels.view(-1)[inside].to(rows.dtype), first[hit[block]] + inside - block * BLOCK))
    value, place = (torch.cat(part) for part in zip(*found, strict=True))
    return above, value, place


def _dense(value: Tensor, place: Tensor, rows: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort pixels of all rows into tables ``(R, W)``.

    Returns:
        Values, columns, and which rows have too many pixels.
    """
    if place.numel() == 0:
        value, place = value.new_zeros(1), place.new_zeros(1) - 1
    count, width = rows.shape
    ends = torch.searchsorted(place, torch.arange(0, (count + 1) * width, width, device=rows.device)).unsqueeze(1)
    sizes = ends.diff(dim=0)
    most = max(MOST_PIXELS, width // 64)
    if rows.device.type in CPU:
        most = max(1, min(max(most, budget // (TABLE_BYTES * count)), int(sizes.max())))
    which = torch.arange(most, device=rows.device)
    real = which < sizes
    which = (which + ends[:-1]).clamp_(max=place.numel() - 1)
    values, order = (value[which] * real).sort(dim=1, descending=True, stable=True)
    return values.double(), (place % width)[which.gather(1, order)], (sizes > most).squeeze(1)
