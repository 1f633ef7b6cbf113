"""The exact solver for maps: a few passes over the pixels, then a small table per row.

1. One pass sums up blocks of 64 pixels: largest and smallest probability, power sums.
2. A sample of the pixels says about where the best mask is cut. Its standard error gives the limits ``low``, ``high``.
3. Blocks that lie wholly on one side of the limits are done. Of the others, the pixels between the limits make a
   :class:`~.table.Table`, which finds the best volume and proves that it lies between the limits.
4. Rows without that proof are sorted as a whole. Small maps are sorted at once.

The sample thus decides how long it takes, and never what comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .integral import FAR_ORDERS, SURE_MEAN, Goal
from .table import Around, Best, Table, best_volumes

BLOCK = 64
SORTED_PIXELS = 5000  # rows of at most so many pixels are sorted
SORT_BYTES = 96  # of a pixel while its row is sorted and solved
LEAST_SAMPLE, MOST_SAMPLE = 2048, 16384
DEVIATIONS = 4.0  # standard errors of the sample's estimate between it and each limit
MOST_PIXELS = 4096  # in a table of a row, or one in BLOCK of the row's pixels, or what the budget has room for
TABLE_BYTES = 100  # of a pixel in a table
DINKELBACH_STEPS = 4
CACHE_PIXELS = 1 << 16
PIXEL_BYTES = 160  # of a pixel in a mixed block, about


def solve(
    rows: Tensor, highest: Tensor, searched: Tensor, goal: Goal, budget: int, extremes: Tensor | None = None
) -> Best:
    """Find the best volume of each row.

    Args:
        rows: ``(R, N)`` probabilities, contiguous.
        highest: ``(R,)`` largest value of each row.
        searched: bool ``(R,)``; the other rows get the empty mask.
        goal: what is maximized.
        budget: bytes of working memory, about.
        extremes: smallest and largest value of the map, if they are still to be checked.
    """
    if rows.shape[1] <= SORTED_PIXELS:
        if extremes is not None:
            check_range(*extremes.tolist())
        return _solve_sorted(rows, searched, goal, budget)
    table, least = _around_the_cut(rows, highest.double(), searched, goal, budget, extremes)
    best = best_volumes(table, searched, goal, budget)
    only_above = (best.columns < 0) & (best.volumes > 0)
    best = best._replace(cutoffs=torch.where(only_above, least.double(), best.cutoffs))
    if not best.unproven:
        return best
    names = best.proven.sort().indices[: best.unproven]  # not nonzero(), which a GPU would wait for
    for part in names.split(max(1, budget // (SORT_BYTES * rows.shape[1]))):
        again = _solve_sorted(rows[part], searched[part], goal, budget)
        for mine, theirs in zip(best[:-1], again[:-1], strict=True):
            mine[part] = theirs
    return best


def check_range(low: float, high: float) -> None:
    """Raise unless all values are probabilities, by the smallest and the largest of them."""
    if not (low >= 0 and high <= 1):
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("probs: found values that are not finite (NaN or infinity)")
        raise ValueError(f"probs: expected values in [0, 1], found values from {low:.6g} to {high:.6g}")


def _solve_sorted(rows: Tensor, searched: Tensor, goal: Goal, budget: int) -> Best:
    values, columns = rows.sort(dim=1, descending=True, stable=True)
    return best_volumes(Table(values.double(), columns=columns), searched, goal, budget)


def _summarize(rows: Tensor, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest and smallest value ``(R, B)`` and the power sums ``(R, B, FAR_ORDERS)`` of all blocks.

    The last block is filled up with zeros. Sums are float64; from the second order on, those of float32 values are
    summed in float32 inside a block, which the scores cannot see.
    """
    count, width = rows.shape
    whole = width // BLOCK
    blocks = -(-width // BLOCK)
    top, bottom = rows.new_empty(count, blocks), rows.new_empty(count, blocks)
    sums = torch.empty(count, blocks, FAR_ORDERS, dtype=torch.float64, device=rows.device)

    def add(part: Tensor, some: slice, where: slice) -> None:
        torch.amax(part, 2, out=top[some, where])
        torch.amin(part, 2, out=bottom[some, where])
        sums[some, where, 0] = part.double().sum(2)
        part = part if part.dtype in (torch.float32, torch.float64) else part.float()
        power = part
        for n in range(1, FAR_ORDERS):
            power = power * part if n == 1 else power.mul_(part)
            sums[some, where, n] = power.sum(2)

    together = max(1, pixels // width)
    step = whole if together > 1 else max(1, pixels // BLOCK)
    for row in range(0, count, together):
        some = slice(row, row + together)
        for first in range(0, whole, step):
            where = slice(first, min(first + step, whole))
            add(rows[some, first * BLOCK : where.stop * BLOCK].unflatten(1, (-1, BLOCK)), some, where)
    if whole < blocks:
        add(_last_block(rows).unsqueeze(1), slice(None), slice(whole, blocks))
    return top, bottom, sums


def _last_block(rows: Tensor) -> Tensor:
    """Return the pixels behind the last whole block, filled up with zeros, ``(R, BLOCK)``."""
    left = rows.shape[1] % BLOCK
    return pad(rows[:, rows.shape[1] - left :], (0, BLOCK - left))


def _limits(rows: Tensor, total: Tensor, searched: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """Guess probabilities ``(low, high)``, ``(R, 1)`` in the dtype of the rows, between which the best mask is cut.

    Dinkelbach's iteration ``cut <- C / (n + mu)`` on a sample finds the best cut of the score's leading term.
    """
    width = rows.shape[1]
    size = min(MOST_SAMPLE, max(LEAST_SAMPLE, width // BLOCK))
    # One pixel of each stretch, at places that no regular pattern of the image can follow.
    steps = torch.arange(size, device=rows.device)
    stretch = width // size
    sample = rows.index_select(1, steps * stretch + steps * 40503 % 65536 * stretch // 65536).float()
    scale = size / width
    mean, square = total[:, :1], total[:, 1:2]
    g = goal.smooth / 2 if goal.metric == "dice" else goal.smooth
    own = sample.sum(1, keepdim=True) + scale * (2 * g + 1)
    guess = square / mean.clamp(min=1e-300) / 2
    cut = guess.float()
    for _ in range(DINKELBACH_STEPS):
        inside = sample > cut
        volume = inside.sum(1, keepdim=True)
        weight = volume + own
        cut = ((inside * sample).sum(1, keepdim=True) + scale * g) / weight
    # Errors of the sum that is zero at the best cut, per pixel of the sample.
    part = torch.addcmul((sample - cut).clamp_(min=0), cut, sample, value=-1)
    error = torch.linalg.vector_norm(part, dim=1, keepdim=True).add_(0.5).mul_(DEVIATIONS) / weight
    # What Goal.cuts will ask for at least, about.
    volume, variance, sure = (volume / scale).clamp_(min=1), (mean - square).clamp(min=0), mean >= SURE_MEAN
    margin = 2 * variance / (volume + sure * mean / 2) ** 2 + cut * variance / (volume * (volume + mean))
    # Some volume scores about square / mean or more: a mask cut at a random height has that mass per mean volume.
    low = torch.maximum(cut - margin - error, torch.minimum(0.9 * guess, cut - margin))
    low = torch.where(sure, low, torch.minimum(low, (mean + 1) / SURE_MEAN))
    high = torch.where(sure, cut + 2 * margin + 4 * cut / (volume + mean) + error, torch.inf)
    info = torch.finfo(rows.dtype)
    low = low.clamp(min=info.tiny * info.eps).masked_fill(~searched.unsqueeze(1), 2)
    return low.to(rows.dtype), high.to(rows.dtype)


def _around_the_cut(
    rows: Tensor, highest: Tensor, searched: Tensor, goal: Goal, budget: int, extremes: Tensor | None
) -> tuple[Table, Tensor]:
    """Return tables of the pixels around the cut, and the smallest probability above each table."""
    gpu = rows.device.type != "cpu"
    top, bottom, sums = _summarize(rows, budget // 16 if gpu else CACHE_PIXELS * torch.get_num_threads())
    total = sums.sum(1)
    low, high = _limits(rows, total, searched, goal)
    apart, under = bottom > high, top < low
    mixed = ~(apart | under).view(-1)
    if extremes is None:
        places = mixed.nonzero().view(-1)
    else:  # one wait for the check and the size
        smallest, largest, size = torch.cat([extremes, mixed.sum().double().view(1)]).tolist()
        check_range(smallest, largest)
        places = mixed.sort(descending=True, stable=True).indices[: int(size)]
    outside = torch.stack([apart, under], 1).double() @ sums  # (R, 2, FAR_ORDERS): above, below
    rank = apart.sum(1) * BLOCK
    least = bottom.masked_fill(~apart, torch.inf).amin(1)
    found = []
    for part in places.split(max(1, budget // (BLOCK * PIXEL_BYTES))):
        row = part // top.shape[1]
        block = part - row * top.shape[1]
        pixels = _read(rows, row, block)
        over, beneath = pixels > high[row], pixels < low[row]
        rank.index_add_(0, row, over.sum(1))
        power = torch.stack([pixels * over, pixels * beneath], 1)
        own = [power.sum(2, dtype=torch.float64)]
        more = power = power if rows.dtype in (torch.float32, torch.float64) else power.float()
        for _ in range(1, FAR_ORDERS):
            more = more * power
            own.append(more.sum(2).double())
        outside.index_add_(0, row, torch.stack(own, 2))
        least.scatter_reduce_(0, row, torch.where(over, pixels, torch.inf).amin(1), "amin")
        inside = (~(over | beneath)).view(-1).nonzero().view(-1)
        which = inside // BLOCK
        found.append((row[which], pixels.view(-1)[inside], block[which] * BLOCK + inside % BLOCK))
    values, columns, lost = _dense(found, rows, budget)
    limit = low.squeeze(1).double().masked_fill(lost, torch.inf)
    around = Around(
        rank.double(), outside[:, 0], outside[:, 1], total[:, 0], total[:, 1], limit, high.squeeze(1).double(), highest
    )
    return Table(values, None, columns, around), least


def _read(rows: Tensor, row: Tensor, block: Tensor) -> Tensor:
    """Return the pixels ``(K, BLOCK)`` of blocks."""
    whole = rows.shape[1] // BLOCK
    if whole * BLOCK == rows.shape[1]:
        return rows.view(-1, BLOCK).index_select(0, row * whole + block)
    pixels = rows[:, : whole * BLOCK].unflatten(1, (whole, BLOCK))[row, block.clamp(max=whole - 1)]
    return torch.where((block == whole).unsqueeze(1), _last_block(rows)[row], pixels)


def _dense(parts: list[tuple[Tensor, Tensor, Tensor]], rows: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort pixels ``(row, value, column)`` into tables ``(R, W)``; also say which rows have too many."""
    row, value, column = (torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
    starts = torch.searchsorted(row, torch.arange(rows.shape[0] + 1, device=row.device))
    counts = starts.diff()
    width = max(MOST_PIXELS, rows.shape[1] // BLOCK)
    if row.device.type == "cpu":
        width = max(1, min(max(width, budget // (TABLE_BYTES * rows.shape[0])), int(counts.max())))
    spot = torch.arange(row.numel(), device=row.device) - starts[row]
    spot = row * (width + 1) + spot.clamp_(max=width)  # the last column takes what is too much
    values = rows.new_zeros(rows.shape[0], width + 1)
    columns = torch.empty(values.shape, dtype=torch.int64, device=row.device)
    values.view(-1).scatter_(0, spot, value)
    columns.view(-1).scatter_(0, spot, column)
    values, order = values[:, :width].sort(dim=1, descending=True, stable=True)
    return values.double(), columns.gather(1, order), counts > width
