"""The exact solver for maps: two passes over the pixels, then a small table per row.

1. A sample of the pixels estimates the cut of the best mask.
2. One pass sums the powers of all probabilities, and of those above this cut. That much is known of one volume, and it
   bounds the probabilities ``low`` and ``high`` between which the best mask is cut.
3. A second pass collects the few pixels between them, a :class:`~.table.Table` that gives the best volume.

A misleading sample leaves many pixels between the bounds. If they are too many, the row is sorted as a whole, as short
rows always are. The sample affects the time, never the result. A GPU sorts all rows: there, a sort costs less than the
launches of the other steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .integral import ORDERS, Goal
from .table import CPU, Best, Table, alike, best_volumes, draw, merge, powers

FAR_ORDERS = 4  # power sums that stand for pixels outside a table, which have p < m / FAR_RATE at a decay rate m
FAR_RATE = 600.0  # so that they leave out less than 4! / FAR_RATE^4 of the score
BLOCK = 32
SORTED_PIXELS = 5000  # rows of at most this many pixels are sorted
SORT_BYTES = 170  # of a pixel while its row is sorted and solved
WEAK, FAINT = 0.1, 0.3  # the table of a small row does not reach below this, and this many times its mean square / mean
LEAST_SAMPLE = 1024
STEPS = 2  # to the best cut of a sample
MOST_PIXELS = 4096  # in a table of a row, or one in 64 of the row's pixels, or what the budget has room for
TABLE_BYTES = 200  # of a pixel in a table
CACHE_PIXELS = 1 << 18
ROUNDING = 1e-6  # relative, of the limits in the map's dtype
SPARSE = 0.2  # with a smaller mean probability, blocks of pixels below the cut are left out


def solve(rows: Tensor, skipped: Tensor, masks: Tensor, goal: Goal, budget: int) -> Best:
    """Find the best volume of each row, and draw its mask.

    Args:
        rows: ``(R, N)`` probabilities, contiguous.
        skipped: bool ``(R,)``: these rows get the empty mask.
        masks: bool ``(R, N)``, contiguous, False: is filled.
        goal: what is maximized.
        budget: bytes of working memory, about.
    """
    count, width = rows.shape
    if width <= SORTED_PIXELS or rows.device.type not in CPU:
        return solve_sorted(rows, skipped, masks, goal, budget)
    found = _survey(rows, skipped, masks, goal)
    facts = torch.cat([found.ends.diff(dim=0), found.proof], 1).tolist()
    sizes = [size for size, *_ in facts]
    most = max(MOST_PIXELS, width // 64, budget // (TABLE_BYTES * count))
    few = []
    for row, (size, mean, least, known) in enumerate(facts):
        # If not, do all volumes larger than this small row's table score less than `least`?
        proven = known or size * least > 2 * mean + goal.smooth + mean / max(size, 1)
        if size <= most and proven:
            few.append(row)
    results: list[tuple[Tensor | slice, Best]] = []
    for group in alike([sizes[row] for row in few], rows.device) if few else ():
        names = [few[k] for k in group]
        which = slice(None) if len(names) == count else torch.tensor(names)
        table, place, over = _table(rows, found, which, int(max(sizes[row] for row in names)))
        some = best_volumes(table, skipped[which], goal, budget)
        # The pixels above `cut` are drawn.
        taken = torch.arange(place.shape[1]) < some.volumes.unsqueeze(1) - table.rank
        change = taken.view(torch.uint8) - over.view(torch.uint8)
        masks.view(torch.uint8).view(-1).scatter_add_(0, place.view(-1), change.view(-1))
        results.append((which, some))
    crowded = torch.tensor(sorted({*range(count)} - {*few}), dtype=torch.int64)
    for part in crowded.split(max(1, budget // (SORT_BYTES * width))) if len(crowded) else ():
        own = masks.new_zeros(part.numel(), width)
        results.append((part, solve_sorted(rows[part], skipped[part], own, goal, budget)))
        masks[part] = own
    best = Best(*merge(results, count))
    for row in best.cutoffs.isnan().nonzero().view(-1).tolist():  # the mask is just the pixels above the table
        best.cutoffs[row] = rows[row][masks[row]].amin()
    return best


def solve_sorted(rows: Tensor, skipped: Tensor, masks: Tensor, goal: Goal, budget: int) -> Best:
    """Do what :func:`solve` does by sorting the rows."""
    values, columns = rows.sort(dim=1, descending=True, stable=True)
    values = values.double()
    best = best_volumes(Table.whole(values, values.new_ones(()).expand_as(values)), skipped, goal, budget)
    draw(masks, columns, best.volumes.unsqueeze(1))
    return best


def check_range(low: float, high: float) -> None:
    """Raise unless all values are probabilities, by the smallest and the largest of them."""
    if not (low >= 0 and high <= 1):
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("probs: found values that are not finite (NaN or infinity)")
        raise ValueError(f"probs: expected values in [0, 1], found values from {low:.6g} to {high:.6g}")


class _Survey(NamedTuple):
    """What the passes over the map found: one row each, float64 ``(R, 1)`` unless stated otherwise.

    Attributes:
        total: power sums of all pixels, ``(R, ORDERS)``, 0 above ``FAR_ORDERS``.
        above: number and power sums of the pixels with ``p > cut``, ``(R, 1 + ORDERS)``.
        cut: the estimated cut of the best mask.
        proof: mean, a lower bound of the score, and whether ``low`` is proven, ``(R, 3)``.
        place: places in the flat map of the pixels from ``low`` to ``high``, int64 ``(M,)``.
        ends: where each row's part of ``place`` ends, int64 ``(R + 1, 1)``, with a 0 before.
    """

    total: Tensor
    above: Tensor
    cut: Tensor
    proof: Tensor
    place: Tensor
    ends: Tensor


def _survey(rows: Tensor, skipped: Tensor, masks: Tensor, goal: Goal) -> _Survey:
    """Find the pixels among which the best mask is cut, and draw the pixels above the estimated cut."""
    count, width = rows.shape
    skipped = skipped.unsqueeze(1)
    guess = _cut_of_sample(rows).masked_fill_(skipped, torch.inf)
    total, above = (rows.new_zeros(count, n, dtype=torch.float64) for n in (ORDERS, 1 + ORDERS))
    room = _Room(rows)
    for some, first, part in _pieces(rows):
        sums = room.power_sums(part)
        total[some, :FAR_ORDERS].add_(sums)
        near, blocks = _near(part, guess[some], sums, part.shape[1])
        over = room.exceeds(near, guess[some])
        mine = masks[some, first : first + part.shape[1]]
        if blocks is None:
            mine.copy_(over)
        else:
            mine.view(-1, BLOCK)[blocks] = over.bool().view(-1, BLOCK)
        above[some, : 1 + FAR_ORDERS].add_(torch.cat([over.sum(1, keepdim=True), room.power_sums(over.mul_(near))], 1))
    cut = guess.double()
    low, high, proof = _limits(total, above, cut, skipped, goal)
    low, high = low.to(guess.dtype), high.to(guess.dtype)
    found = []
    for some, first, part in _pieces(rows):
        near, blocks = _near(part, low[some], total[some], width)
        spot = _places(room.exceeds(near, low[some]).sub_(room.exceeds(near, high[some], 3)).bool().view(-1))
        spot = spot if blocks is None else blocks[spot // BLOCK] * BLOCK + spot % BLOCK
        found.append(spot + (some.start * width + first))
    place = found[0] if len(found) == 1 else torch.cat(found)
    ends = torch.searchsorted(place, torch.arange(0, (count + 1) * width, width))
    return _Survey(total, above, cut, proof, place, ends.unsqueeze(1))


def _limits(total: Tensor, above: Tensor, cut: Tensor, skipped: Tensor, goal: Goal) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities ``(low, high)`` around ``cut`` between which the best mask is cut, and ``_Survey.proof``."""
    mean, volume, mass = total[:, :1], above[:, :1], above[:, 1:2]
    sized, variance = mean + goal.smooth if goal.smooth else mean, mean - total[:, 1:2]
    least = goal.least(*goal.lead(sized, volume, mass), mass - above[:, 2:3])
    low, high = goal.cuts(sized, variance, volume, least, goal.most(sized, volume, mass, cut))
    far = mean / FAR_RATE
    small = far < 1  # the table must hold all pixels that are to be taken one by one
    least_low = (total[:, 1:2] / mean * FAINT).minimum(far).clamp_(max=WEAK) * small
    proof = torch.cat([mean, least, (low >= least_low) | skipped], 1)
    low = low.minimum(far).maximum(least_low).minimum(cut)
    high = high.maximum(cut).masked_fill_(small, torch.inf)
    low = torch.where(skipped, far if goal.smooth else torch.inf, low)
    return low * (1 - ROUNDING), high * (1 + ROUNDING), proof


def _table(rows: Tensor, found: _Survey, which: Tensor | slice, size: int) -> tuple[Table, Tensor, Tensor]:
    """Return the tables of some rows, the places of their pixels in the map, and whether these are above ``cut``."""
    total, above, cut = found.total[which], found.above[which], found.cut[which]
    start, end = found.ends[:-1][which], found.ends[1:][which]
    spot = start + torch.arange(max(size, 1))
    place = found.place if found.place.numel() else found.place.new_zeros(1)
    place = place[spot.clamp(max=place.numel() - 1)]
    values, order = (rows.view(-1)[place] * (spot < end)).sort(dim=1, descending=True, stable=True)
    values = values.double()
    over, counts, each = values > cut, (values > 0).double(), powers(values)
    mine, inside = (each @ torch.stack([over, counts], 2)).unbind(2)
    above, rank = above[:, 1:] - mine, above[:, :1] - over.sum(1, keepdim=True)
    below = (total - above).sub_(inside).clamp_(min=0)
    table = Table(values, counts, total[:, :1], total[:, :1] - total[:, 1:2], each, rank, above.clamp_(min=0), below)
    return table, place.gather(1, order), over


@lru_cache(maxsize=16)
def _sample(width: int) -> Tensor:
    """Return the places of a row's pixels that make up its sample."""
    size = min(width, max(LEAST_SAMPLE, int((0.4 * width) ** (2 / 3))))
    steps = torch.arange(size)
    stretch = width // size
    # One pixel of each stretch, at places that no regular pattern of the image can follow.
    return steps * stretch + steps * 40503 % 65536 * stretch // 65536


def _cut_of_sample(rows: Tensor) -> Tensor:
    """Return about the probability above which one more pixel raises the leading term of the score, ``(R, 1)``."""
    sample = rows.index_select(1, _sample(rows.shape[1]))
    sample = sample if sample.element_size() > 2 else sample.float()
    base, over = sample.sum(1, keepdim=True), torch.empty_like(sample)
    cut = torch.linalg.vector_norm(sample, dim=1, keepdim=True).square_() / base
    for _ in range(STEPS):  # to the maximum of mass / (volume + base) (Dinkelbach 1967); smoothing matters little
        torch.gt(sample, cut, out=over)
        weight = over.sum(1, keepdim=True) + base
        cut = over.mul_(sample).sum(1, keepdim=True) / weight
    return cut


def _pieces(rows: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield rows, first column, and the pixels ``(r, n)`` there: as many as fit a cache."""
    count, width = rows.shape
    together = max(1, CACHE_PIXELS // width)
    for row in range(0, count, together):
        some = slice(row, row + together)
        for first in range(0, width, CACHE_PIXELS):
            part = rows[some, first : first + CACHE_PIXELS]
            yield some, first, part if part.element_size() > 2 else part.float()


class _Room:
    """Memory for pieces of a map, used again and again: getting new memory takes longer than the sums."""

    def __init__(self, rows: Tensor) -> None:
        size = min(CACHE_PIXELS, rows.numel())
        dtype = rows.dtype if rows.element_size() > 2 else torch.float32
        self.parts = [rows.new_empty(size, dtype=kind) for kind in (torch.float64, torch.float64, dtype, dtype)]

    def like(self, values: Tensor, which: int) -> Tensor:
        """Return one of the parts (0 and 1 are float64, 2 and 3 are like the map) in that shape."""
        return self.parts[which][: values.numel()].view(values.shape)

    def exceeds(self, values: Tensor, cut: Tensor, which: int = 2) -> Tensor:
        """Return 1 where values are above the cut, else 0, in their dtype, which is faster than bools."""
        return torch.gt(values, cut, out=self.like(values, which))

    def power_sums(self, values: Tensor) -> Tensor:
        """Return the power sums ``(R, FAR_ORDERS)``, float64."""
        wide = self.like(values, 0).copy_(values)
        square = torch.mul(wide, wide, out=self.like(values, 1))
        return torch.stack([wide.sum(1), square.sum(1), wide.mul_(square).sum(1), square.square_().sum(1)], 1)


def _near(part: Tensor, low: Tensor, total: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Return the pixels of the blocks in which one is above ``low``, and these blocks; None: all pixels."""
    if len(part) > 1 or part.shape[1] % BLOCK or total[0, 0] > SPARSE * width:
        return part, None
    blocks = part.view(-1, BLOCK)
    names = (blocks.amax(1) > low.view(1)).nonzero().view(-1)
    return blocks.index_select(0, names).view(1, -1), names


def _places(found: Tensor) -> Tensor:
    """Return where a vector is True, fast if nearly all of it is False."""
    whole = found.numel() // 8 * 8
    words = found[:whole].view(torch.int64)  # eight at a time
    hit = words.nonzero()
    place = (hit * 8 + torch.arange(8))[words[hit.view(-1)].view(torch.bool).view(-1, 8)]
    return place if whole == found.numel() else torch.cat([place, found[whole:].nonzero().view(-1) + whole])
