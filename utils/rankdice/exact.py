"""The exact solver for maps: two passes over the pixels, then a small table per row.

The best mask consists of the pixels above some probability, its *cut*. A sample of the pixels gives an estimate of it.
The first pass sums the powers of all probabilities, and of those above the estimate. These sums give bounds for the
true cut. The second pass collects the few pixels between the bounds in a :class:`~.table.Table`. If the sample is
misleading and too many pixels remain, the whole row is sorted. Short rows, and all rows on a GPU, are always sorted.
The sample affects the time, never the result.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import table as tables
from .integral import ORDERS, Goal
from .table import CPU, ONE_BY_ONE, Table, alike, best_volumes, chosen, draw, pick, powers

# So many power sums stand for pixels outside a table, which have p < m / rate at a decay rate m: they leave out less
# than n! / rate^n = 2e-10 of the score.
FAR_ORDERS = {2: 1e5, 3: 3300.0, 4: 600.0, 5: 230.0}
BLOCK = 32
SORTED_PIXELS = 5000  # rows of at most this many pixels are sorted
SORT_BYTES = 170  # of a pixel while its row is sorted and solved
WEAK, FAINT = 0.1, 0.3  # the table of a small row ends at WEAK, or at FAINT times (sum of squares / sum) if smaller
LEAST_SAMPLE = 1024
STEPS = 2  # of the iteration that finds the best cut of a sample
MOST_PIXELS = 4096  # in a row's table; more if the row has over 64 times as many, or if the budget allows
TABLE_BYTES = 200  # of a pixel in a table
CACHE_PIXELS = 1 << 18
ROUNDING = 1e-6  # relative, of the limits in the map's dtype
SPARSE = 0.2  # with a smaller mean probability, blocks of pixels below the cut are left out


def solve(rows: Tensor, masks: Tensor, goal: Goal, budget: int) -> Tensor:
    """Find the best volume of each row as :func:`.table.best_volumes` does, and draw its mask.

    Args:
        rows: ``(R, N)`` probabilities, contiguous.
        masks: bool ``(R, N)``, contiguous, all False; this function fills it.
        goal: what is maximized.
        budget: approximate working memory in bytes.
    """
    count, width = rows.shape
    if width <= SORTED_PIXELS or rows.device.type not in CPU:
        return solve_sorted(rows, masks, goal, budget)
    found = _survey(rows, masks, goal)
    facts = torch.cat([found.ends.diff(dim=0), found.needed], 1).tolist()
    most = max(MOST_PIXELS, width // 64, budget // (TABLE_BYTES * count))
    sizes = {row: size for row, (size, needed) in enumerate(facts) if needed <= size <= most}
    best = rows.new_empty(count, 3, dtype=torch.float64)
    for names in alike(sizes, rows.device):
        which = pick(names, count, rows.device)
        table, place, over = _table(rows, found, which, int(max(sizes[row] for row in names)))
        some = best_volumes(table, goal, budget)
        # The pixels above `cut` are drawn.
        taken = table.volumes[:, :-2] < some[:, :1]
        change = taken.view(torch.uint8) - over.view(torch.uint8)
        masks.view(torch.uint8).view(-1).scatter_add_(0, place.view(-1), change.view(-1))
        best[which] = some
    crowded = torch.tensor([row for row in range(count) if row not in sizes], dtype=torch.int64)
    for part in crowded.split(max(1, budget // (SORT_BYTES * width))) if len(crowded) else ():
        own = masks.new_zeros(part.numel(), width)
        best[part] = solve_sorted(chosen(rows, part), own, goal, budget)
        masks[part] = own
    for row in best[:, 1].isinf().nonzero().view(-1).tolist():  # the mask consists of the pixels above the table
        best[row, 1] = torch.where(masks[row], rows[row], torch.inf).amin()
    return best


def solve_sorted(rows: Tensor, masks: Tensor, goal: Goal, budget: int) -> Tensor:
    """Do the same as :func:`solve`, by sorting the rows."""
    values, columns = rows.sort(dim=1, descending=True, stable=True)
    values = values.double()
    best = best_volumes(Table.whole(values, torch.ones_like(values)), goal, budget)
    draw(masks, columns, best[:, :1])
    return best


def empty_scores(rows: Tensor, goal: Goal, budget: int) -> Tensor:
    """Return the scores ``(R,)`` of empty masks, with about ``budget`` bytes of working memory."""
    values = pad(rows.topk(min(ONE_BY_ONE, rows.shape[1])).values.double(), (1, 1))
    total = values.new_zeros(rows.shape[0], ORDERS)
    for some, _, part in _pieces(rows, (CACHE_PIXELS if rows.device.type in CPU else budget // 8) // (2 * ORDERS)):
        total[some] += powers(part.double()).sum(1)
    each = powers(values)
    below = (total - each.sum(1)).clamp_(min=0)
    volumes = torch.arange(values.shape[1], device=rows.device).double().repeat(rows.shape[0], 1)
    outside = torch.stack([torch.zeros_like(below), below], 1)
    return tables.empty_scores(Table(values, volumes, values, each, outside, total), goal, budget)


def check_range(lowest: list[float], highest: list[float]) -> None:
    """Raise unless the smallest and largest values of all rows are probabilities."""
    for low, high in zip(lowest, highest, strict=True):
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("probs: found values that are not finite (NaN or infinity)")
        if not (low >= 0 and high <= 1):
            raise ValueError(f"probs: expected values in [0, 1], found values from {low:.6g} to {high:.6g}")


class _Survey(NamedTuple):
    """What the passes over the map found: one row each, float64 ``(R, 1)`` unless stated otherwise.

    Attributes:
        total: power sums of all pixels, ``(R, ORDERS)``, 0 above the ``FAR_ORDERS`` that were needed.
        above: number and power sums of the pixels with ``p > cut``, ``(R, 1 + ORDERS)``.
        cut: the estimated cut of the best mask.
        needed: how many pixels must be in ``place`` because ``low`` alone proves nothing; else 0.
        place: places in the flat map of the pixels from ``low`` to ``high``, int64 ``(M,)``.
        ends: where each row's part of ``place`` ends, int64 ``(R + 1, 1)``, with a 0 before.
    """

    total: Tensor
    above: Tensor
    cut: Tensor
    needed: Tensor
    place: Tensor
    ends: Tensor


def _survey(rows: Tensor, masks: Tensor, goal: Goal) -> _Survey:
    """Find the pixels among which the best mask is cut, and draw the pixels above the estimated cut."""
    count, width = rows.shape
    guess, mean = _estimate(rows)
    total, above = (rows.new_zeros(count, n, dtype=torch.float64) for n in (ORDERS, 1 + ORDERS))
    # The orders depend on the row alone: a batch must give the scores of single rows.
    orders = [next((n for n, rate in FAR_ORDERS.items() if m > rate), max(FAR_ORDERS)) for m in mean.view(-1).tolist()]
    kept = torch.tensor([[float(n < own) for n in range(max(FAR_ORDERS))] for own in orders], dtype=torch.float64)
    rate = torch.tensor([[FAR_ORDERS[own]] for own in orders])
    for some, first, part in _pieces(rows):
        most = max(orders[some])
        sums = ROOM.power_sums(part, most)
        total[some, :most].addcmul_(sums, kept[some, :most])
        near, blocks = _near(part, guess[some], sums, part.shape[1])
        over = ROOM.exceeds(near, guess[some])
        mine = masks[some, first : first + part.shape[1]]
        if blocks is None:
            mine.copy_(over)
        else:
            mine.view(-1, BLOCK)[blocks] = over.bool().view(-1, BLOCK)
        above[some, :1].add_(over.sum(1, keepdim=True))
        above[some, 1 : 1 + most].addcmul_(ROOM.power_sums(over.mul_(near), most), kept[some, :most])
    cut = guess.double()
    low, high, needed = _limits(total, above, cut, rate, goal)
    low, high = low.to(guess.dtype), high.to(guess.dtype)
    found = []
    for some, first, part in _pieces(rows):
        near, blocks = _near(part, low[some], total[some], width)
        spot = _places(ROOM.exceeds(near, low[some]).sub_(ROOM.exceeds(near, high[some], 3)).bool().view(-1))
        spot = spot if blocks is None else blocks[spot // BLOCK] * BLOCK + spot % BLOCK
        found.append(spot + (some.start * width + first))
    place = found[0] if len(found) == 1 else torch.cat(found)
    ends = torch.searchsorted(place, torch.arange(0, (count + 1) * width, width))
    return _Survey(total, above, cut, needed, place, ends.unsqueeze(1))


def _limits(total: Tensor, above: Tensor, cut: Tensor, rate: Tensor, goal: Goal) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities around ``cut`` between which the best mask is cut, and ``_Survey.needed``.

    ``rate`` is that of the power sums (:data:`FAR_ORDERS`).
    """
    mean, variance = total[:, :1], total[:, :1] - total[:, 1:2]
    volume, mass = above[:, :1], above[:, 1:2]
    sized = mean + goal.smooth if goal.smooth else mean
    least = goal.least(goal.rate(sized, volume, mass), mass)
    below, _ = goal.margins(sized, variance, (volume + goal.smooth).clamp_(min=1))
    # Fewer pixels score less than `least`: their score is at most (2 t + g) / (t + mu + g) + 1 / (mu + g).
    few = ((least * sized - 1 + goal.smooth) / 2).clamp_(min=goal.smooth or 1)
    low = goal.half(least) - below
    high = goal.half(goal.most(sized, volume, mass, cut)) + goal.margins(sized, variance, few)[1]
    far = mean / rate
    small = far < 1  # the table must hold all pixels that are to be taken one by one
    least_low = (total[:, 1:2] / mean * FAINT).minimum(far).clamp_(max=WEAK) * small
    needed = ((mean + sized) / least).masked_fill_(low >= least_low, 0)  # so many pixels score less than `least`
    low = low.minimum(far).maximum(least_low).minimum(cut)
    high = high.maximum(cut).masked_fill_(small, torch.inf)
    return low * (1 - ROUNDING), high * (1 + ROUNDING), needed


def _table(rows: Tensor, found: _Survey, which: Tensor | slice, size: int) -> tuple[Table, Tensor, Tensor]:
    """Return the tables of some rows, the places of their pixels in the map, and whether these are above ``cut``."""
    total, above, cut, start, end = (
        chosen(part, which) for part in (found.total, found.above, found.cut, found.ends[:-1], found.ends[1:])
    )
    spot = start + torch.arange(max(size, 1))
    place = found.place if found.place.numel() else found.place.new_zeros(1)
    place = place.take(spot.clamp(max=place.numel() - 1))
    values, order = (rows.take(place) * (spot < end)).sort(dim=1, descending=True, stable=True)
    values = pad(values.double(), (1, 1))
    over, each = values > cut, powers(values)
    counts = torch.stack([over, values > 0], 1).double()
    mine, inside = (counts @ each).unbind(1)
    before, counts, mass = above[:, 1:] - mine, counts[:, 1], values.clone()
    counts[:, :1] = above[:, :1] - over.sum(1, keepdim=True)
    mass[:, 0] = before[:, 0]
    outside = torch.stack([before, total - before - inside], 1).clamp_(min=0)
    values[:, 0] = torch.inf
    table = Table(values, counts.cumsum(1), mass.cumsum(1), each, outside, total)
    return table, place.gather(1, order), over[:, 1:-1]


@lru_cache(maxsize=16)
def _sample(width: int) -> Tensor:
    """Return the places of a row's pixels that make up its sample."""
    size = min(width, max(LEAST_SAMPLE, int((0.4 * width) ** (2 / 3))))
    steps = torch.arange(size)
    stretch = width // size
    # One pixel of each stretch, at places that no regular pattern of the image can follow.
    return steps * stretch + steps * 40503 % 65536 * stretch // 65536


def _estimate(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the probability above which one more pixel raises the leading term, and the mean volume, ``(R, 1)``.

    The mean volume is rather too small than too large.
    """
    sample = rows.index_select(1, _sample(rows.shape[1]))
    sample = sample if sample.element_size() > 2 else sample.float()
    base, over = sample.sum(1, keepdim=True), torch.empty_like(sample)
    cut = torch.linalg.vector_norm(sample, dim=1, keepdim=True).square_() / base
    for _ in range(STEPS):  # to the maximum of mass / (volume + base) (Dinkelbach 1967); smoothing matters little
        torch.gt(sample, cut, out=over)
        weight = over.sum(1, keepdim=True) + base
        cut = over.mul_(sample).sum(1, keepdim=True) / weight
    return cut, base * (0.9 * rows.shape[1] / sample.shape[1])


def _pieces(rows: Tensor, size: int = CACHE_PIXELS) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield rows, first column and pixels ``(r, n)``, about ``size`` pixels at a time (as many as fit in the cache)."""
    count, width = rows.shape
    together = max(1, size // width)
    for row in range(0, count, together):
        some = slice(row, row + together)
        for first in range(0, width, size):
            part = rows[some, first : first + size]
            yield some, first, part if part.element_size() > 2 else part.float()


class _Room(threading.local):
    """Memory for pieces of a map, 6 MB per thread, kept because allocating new memory takes longer than the sums."""

    def __init__(self) -> None:
        self.parts: dict[tuple[torch.dtype, int], Tensor] = {}

    def like(self, values: Tensor, dtype: torch.dtype, which: int) -> Tensor:
        """Return memory in the shape of values, the same for the same dtype and ``which``."""
        if (dtype, which) not in self.parts or self.parts[dtype, which].numel() < values.numel():
            self.parts[dtype, which] = values.new_empty(max(CACHE_PIXELS, values.numel()), dtype=dtype)
        return self.parts[dtype, which][: values.numel()].view(values.shape)

    def exceeds(self, values: Tensor, cut: Tensor, which: int = 2) -> Tensor:
        """Return 1 where values are above the cut, else 0, in their dtype (faster than bool)."""
        return torch.gt(values, cut, out=self.like(values, values.dtype, which))

    def power_sums(self, values: Tensor, orders: int) -> Tensor:
        """Return the power sums ``(R, orders)``, float64."""
        power = wide = self.like(values, torch.float64, 0).copy_(values)
        sums = [wide.sum(1)]
        for _ in range(1, orders):
            power = torch.mul(power, wide, out=self.like(values, torch.float64, 1))
            sums.append(power.sum(1))
        return torch.stack(sums, 1)


ROOM = _Room()


def _near(part: Tensor, low: Tensor, total: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Return the pixels of the blocks in which one is above ``low``, and these blocks; None: all pixels."""
    if len(part) > 1 or part.shape[1] % BLOCK or total[0, 0] > SPARSE * width:
        return part, None
    blocks = part.view(-1, BLOCK)
    names = (blocks.amax(1) > low.view(1)).nonzero().view(-1)
    return blocks.index_select(0, names).view(1, -1), names


def _places(found: Tensor) -> Tensor:
    """Return the indices where a bool vector is True; fast if nearly all of it is False."""
    whole = found.numel() // 8 * 8
    words = found[:whole].view(torch.int64)  # eight at a time
    hit = words.nonzero()
    place = (hit * 8 + torch.arange(8))[words[hit.view(-1)].view(torch.bool).view(-1, 8)]
    return place if whole == found.numel() else torch.cat([place, found[whole:].nonzero().view(-1) + whole])
