"""The exact solver for maps: two passes over the pixels, then a small table per row.

The best mask consists of the pixels above some probability, its *cut*. A sample of the pixels gives an estimate of it.
The first pass sums the powers of all probabilities, and of those above the estimate. These sums give bounds for the
true cut. The second pass collects the few pixels between the bounds in a :class:`~.table.Table`. If the sample is
misleading and too many pixels remain, the whole row is sorted. Short rows, and all rows on a GPU, are always sorted.
The sample affects the time, never the result.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import table as tables
from .integral import SUMS, Goal
from .table import CPU, ONE_BY_ONE, SERIES_RATE, Table, alike, best_volumes, chosen, descending, draw, pick, powers

# 5, 4, 3 or 2 power sums stand for the pixels outside a table if the integrand decays at least at this rate: they leave
# out less than 4 n! / (4 rate)^n = 2e-10 of the score.
FAR_ORDERS, FAR_RATES = (SUMS, 4, 3, 2), (SERIES_RATE, 230.0, 1200.0, 45000.0)
BLOCK = 32
SORTED_PIXELS = 5000  # rows of at most this many pixels are sorted
SORT_BYTES = 170  # of a pixel while its row is sorted and solved
WEAK, FAINT = 0.1, 0.3  # a small row's table ends at WEAK, or at FAINT times (sum of squares) / sum if smaller
LEAST_SAMPLE = 1024
STEPS = 2  # of the iteration that finds the best cut of a sample
USUAL_PIXELS = 400  # in a row's table, or fewer; in a row of over 128 times as many, up to a 128th of it
MOST_PIXELS = 4096  # in a row's table; more if the row has over 64 times as many, or if the budget allows
TABLE_BYTES = 200  # of a pixel in a table
CACHE_PIXELS = 1 << 18
SHARED = CACHE_PIXELS // 2  # rows of at most so many pixels share a piece of the map
ROUNDING = 1e-6  # relative, of the limits in the map's dtype
SPARSE = 0.2  # with a smaller mean probability, blocks of pixels below the cut are left out


def solve(rows: Tensor, masks: Tensor, goal: Goal, budget: int) -> Tensor:
    """Find the best volume of each row as :func:`.table.best_volumes` does, and draw its mask.

    Args:
        rows: ``(R, N)`` probabilities, contiguous.
        masks: bool ``(R, N)``, contiguous; this function fills it.
        goal: what is maximized.
        budget: approximate working memory in bytes.
    """
    count, width = rows.shape
    if width <= SORTED_PIXELS or rows.device.type not in CPU:
        return solve_sorted(rows, masks, goal, budget)
    found = _survey(rows, masks, goal)
    most = max(MOST_PIXELS, width // 64, budget // (TABLE_BYTES * count))
    sizes = found.ends.diff().tolist()
    costs = {
        row: size
        for row, (size, limits) in enumerate(zip(sizes, found.limits, strict=True))
        if limits.least <= size <= min(most, limits.most)
    }
    best = rows.new_empty(count, 3, dtype=torch.float64)
    for names in alike(costs, rows.device):
        which = pick(names, count, rows.device)
        table, place, over = _table(rows, found, names, max(sizes[row] for row in names))
        some = best_volumes(table, goal, budget)
        # The pixels above `cut` are drawn.
        change = (table.volumes[:, :-2] < some[:, :1]).view(torch.uint8) - over.view(torch.uint8)
        masks.view(torch.uint8).view(-1).scatter_add_(0, place.view(-1), change.view(-1))
        best[slice(None) if which is None else which] = some
    if len(costs) < count:
        crowded = torch.tensor([row for row in range(count) if row not in costs])
        for part in crowded.split(max(1, budget // (SORT_BYTES * width))):
            own = masks.new_empty(part.numel(), width)
            best[part] = solve_sorted(chosen(rows, part), own, goal, budget)
            masks[part] = own
    for row, cutoff in enumerate(best[:, 1].tolist()):
        if not cutoff:  # the mask consists of the pixels above the table
            best[row, 1] = torch.where(masks[row], rows[row], torch.inf).amin()
    return best


def solve_sorted(rows: Tensor, masks: Tensor, goal: Goal, budget: int) -> Tensor:
    """Do the same as :func:`solve`, by sorting the rows."""
    values, columns = descending(rows)
    values, orders = tables.padded(values), []
    if rows.device.type in CPU:
        orders = [FAR_ORDERS[_place(mean)] for mean in values.sum(1).tolist()]
    best = best_volumes(Table.whole(values, orders=orders), goal, budget)
    draw(masks, columns, best[:, :1])
    return best


def empty_scores(rows: Tensor, goal: Goal, budget: int) -> Tensor:
    """Return the scores ``(R,)`` of empty masks, with about ``budget`` bytes of working memory."""
    values = tables.padded(rows.topk(min(ONE_BY_ONE, rows.shape[1])).values)
    total = values.new_zeros(rows.shape[0], SUMS, 1)
    for some, _, part in _pieces(rows, (CACHE_PIXELS if rows.device.type in CPU else budget // 8) // (2 * SUMS)):
        total[some] += powers(part.double()).sum(2, keepdim=True)
    return tables.empty_scores(Table.whole(values)._replace(total=total), goal, budget)


def check_range(lowest: list[float], highest: list[float]) -> None:
    """Raise unless the smallest and largest values of all rows are probabilities."""
    for low, high in zip(lowest, highest, strict=True):
        if 0 <= low <= high <= 1:
            continue
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("probs: found values that are not finite (NaN or infinity)")
        raise ValueError(f"probs: expected values in [0, 1], found values from {low:.6g} to {high:.6g}")


class _Limits(NamedTuple):
    """The pixels from ``low`` to ``high`` must be in a row's table.

    Attributes:
        least: how many there must be, because ``low`` alone proves nothing; else 0.
        most: how many there may be, so that the power sums of the others are accurate.
    """

    low: float
    high: float
    least: float
    most: float


class _Survey(NamedTuple):
    """What the passes over the map found.

    Attributes:
        sums: float64 ``(R, 2, 1 + K)``: number and power sums of all pixels (the number is not set), and of those
            with ``p > cut``.
        orders: how many power sums of all its pixels each row has; the others are 0.
        cut: ``(R, 1)``, the estimated cut of the best mask, in the dtype of the map.
        limits: between which the pixels near the cut are.
        place: their places in the flat map, int64 ``(M,)``.
        ends: where each row's part of ``place`` ends, int64 ``(R + 1,)``, with a 0 before.
        faint: rows whose power sums from the third on are only those of the pixels outside the table, because in
            float32 the others would hide them. Their tables have all pixels above ``cut``.
    """

    sums: Tensor
    orders: list[int]
    cut: Tensor
    limits: list[_Limits]
    place: Tensor
    ends: Tensor
    faint: list[int]


def _survey(rows: Tensor, masks: Tensor, goal: Goal) -> _Survey:
    """Find the pixels among which the best mask is cut, and draw the pixels above the estimated cut."""
    count, width = rows.shape
    cut, decay = _estimate(rows, goal)
    # The orders depend on the row alone: a batch must give the scores of single rows.
    classes = [_place(rate) for rate in decay.view(-1).tolist()]
    orders = [FAR_ORDERS[k] for k in classes]
    sums = rows.new_zeros(count, 2, 1 + SUMS, dtype=torch.float64)
    for some, first, part in _pieces(rows):
        most = max(orders[some])
        # A rate that needs 5 power sums also needs them in float64; rows that share a piece have `faint` for this.
        part = part.double() if width > SHARED and most == SUMS else part
        wide, _, spare = ROOM.fit(part)
        total = power_sums(part, most, wide, spare)
        near, blocks = _near(part, cut[some], total[0])
        wide, over, spare = ROOM.fit(near)
        torch.gt(near, cut[some], out=over)
        drawn = masks[some, first : first + part.shape[1]]
        if blocks is None:
            drawn.copy_(over)
        else:
            drawn.zero_().view(-1, BLOCK)[blocks] = over.bool().view(-1, BLOCK)
        number = over.sum(1)
        above = power_sums(over.mul_(near), most, wide, spare)
        sums[some, :, : 1 + most].add_(torch.stack([number, *total, number, *above], 1).view(-1, 2, 1 + most))
    facts = zip(sums[:, :, :3].tolist(), cut.view(-1).tolist(), classes, strict=True)
    limits = [_limits(goal, FAR_RATES[k], q, total[1:], above[:2]) for (total, above), q, k in facts]
    low, high = cut.new_tensor([limit[:2] for limit in limits]).split(1, 1)
    faint = [row for row, limit in enumerate(limits) if limit.high == math.inf] if width <= SHARED else []
    found = []
    for some, first, part in _pieces(rows):
        near, blocks = _near(part, low[some], sums[some.start, 0, 1], width // part.shape[1])
        wide, over, beyond = ROOM.fit(near)
        torch.gt(near, low[some], out=over).sub_(torch.gt(near, high[some], out=beyond))
        spot = _places(over.bool().view(-1))
        spot = spot if blocks is None else blocks[spot // BLOCK] * BLOCK + spot % BLOCK
        found.append(spot + (some.start * width + first))
        mine = [row for row in faint if some.start <= row < some.start + len(part)]
        if mine:
            rest = torch.addcmul(near, near, over, value=-1, out=beyond)
            which = torch.tensor(mine)
            sums[which, 0, 3:] = torch.stack(power_sums(rest, SUMS, wide, over)[2:], 1)[which - some.start].double()
    place = found[0] if len(found) == 1 else torch.cat(found)
    ends = torch.searchsorted(place, torch.arange(0, (count + 1) * width, width))
    return _Survey(sums, orders, cut, limits, place, ends, faint)


def _limits(goal: Goal, rate: float, cut: float, sums: Sequence[float], above: Sequence[float]) -> _Limits:
    """Return the limits around ``cut`` between which the best mask is cut.

    ``rate`` is that of the power sums (:data:`FAR_RATES`), ``sums`` are the first two of all pixels, and ``above`` the
    number and the sum of the pixels above ``cut``.
    """
    (mean, square), (volume, mass), g = sums, above, goal.smooth
    total = mean + g
    least = max(goal.least(goal.rate(total, volume, mass), mass), 1e-300)
    few = max(goal.few(total, least), g or 1)
    low = goal.half(least) - goal.below(mean - square, max(volume + g, 1))
    high = goal.half(goal.most(total, volume, mass, cut)) + goal.above(total, mean - square, few)
    small, far, most = mean < rate, mean / ONE_BY_ONE, math.inf
    if goal.metric == "dice" and small and mean + volume > rate + USUAL_PIXELS:
        # The best mask contains `volume` pixels but for those in the table, so its rate is that much larger.
        small, most = False, mean + volume - rate
    # In small rows, the table must hold all pixels that are to be taken one by one.
    lowest = min(square / mean * FAINT, far, WEAK) if small else 0.0
    needed = 0.0 if low >= lowest else (mean + total) / least  # so many pixels score less than `least`
    needed = math.inf if small and rate > FAR_RATES[0] else needed  # the sample is misleading
    low, high = min(max(min(low, far) if small else low, lowest), cut), math.inf if small else max(high, cut)
    return _Limits(low * (1 - ROUNDING), high * (1 + ROUNDING), needed, most)


def _table(rows: Tensor, found: _Survey, names: list[int], size: int) -> tuple[Table, Tensor, Tensor]:
    """Return the tables of some rows, the places of their pixels in the map, and whether these are above ``cut``."""
    which = pick(names, len(rows), rows.device)
    sums, cut = chosen(found.sums, which), chosen(found.cut, which)
    orders = [found.orders[name] for name in names]
    start, end = (chosen(part, which).unsqueeze(1) for part in (found.ends[:-1], found.ends[1:]))
    spot = start + torch.arange(max(size, 1))
    place = found.place if found.place.numel() else found.place.new_zeros(1)
    place = place.take(spot.clamp(max=place.numel() - 1))
    values, order = descending(rows.take(place).mul_(spot < end))
    over = values > cut
    values = tables.padded(values)
    total, above = sums[:, :, 1 : 1 + max(orders)].unsqueeze(3).unbind(1)
    inside, mine = powers(values, max(orders)).cumsum_(2), over.sum(1, keepdim=True)
    outside = above - inside.gather(2, mine.unsqueeze(1).expand(above.shape))
    if found.faint:
        faint = torch.tensor([[[name in found.faint]] for name in names])
        faint = faint & (torch.arange(max(orders)) > 1).view(-1, 1)  # the third and higher power sums
        total = total + inside[..., -1:] * faint
    inside.add_(outside)
    volumes = sums[:, 1, :1] - mine + tables.steps(values.shape[1], rows.device)
    used = torch.tensor(orders) if len(set(orders)) > 1 else None
    return Table(values, volumes, inside, total, used), place.gather(1, order), over


def _place(rate: float) -> int:
    """Return which of FAR_ORDERS a decay rate needs."""
    return bisect.bisect_left(FAR_RATES, rate, lo=1) - 1


@lru_cache(maxsize=16)
def _sample(width: int) -> Tensor:
    """Return the places of a row's pixels that make up its sample."""
    size = min(width, max(LEAST_SAMPLE, int((0.4 * width) ** (2 / 3))))
    steps = torch.arange(size)
    stretch = width // size
    # One pixel of each stretch, at places that no regular pattern of the image can follow.
    return steps * stretch + steps * 40503 % 65536 * stretch // 65536


def _estimate(rows: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """Estimate the probability above which one more pixel raises the leading term, and the rate there, ``(R, 1)``.

    The rate is rather too small than too large.
    """
    sample = rows.index_select(1, _sample(rows.shape[1]))
    sample = sample if sample.element_size() > 2 else sample.float()
    base, over = sample.sum(1, keepdim=True), torch.empty_like(sample)
    cut, weight = torch.mul(sample, sample, out=over).sum(1, keepdim=True) / base, base
    for _ in range(STEPS):  # to the maximum of mass / (volume + base) (Dinkelbach 1967); smoothing matters little
        torch.gt(sample, cut, out=over)
        weight = over.sum(1, keepdim=True) + base
        cut = over.mul_(sample).sum(1, keepdim=True) / weight
    rate, room = (weight, max(USUAL_PIXELS, rows.shape[1] // 128)) if goal.metric == "dice" else (base, 0)
    return cut, (rate - 2 * rate.sqrt()) * (rows.shape[1] / sample.shape[1]) - room  # two standard deviations less


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
    """Memory for a piece of a map, 4 to 8 MB per thread, kept because new memory takes longer than the sums."""

    def __init__(self) -> None:
        self.memory: dict[tuple[torch.dtype, int], Tensor] = {}
        self.parts: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def fit(self, values: Tensor) -> list[Tensor]:
        """Return a float64 tensor and two of the dtype of values, all in its shape."""
        like, size = (values.shape, values.dtype), values.numel()
        if like in self.parts:
            return self.parts[like]
        kinds = list(enumerate((torch.float64, values.dtype, values.dtype)))
        for which, dtype in kinds:
            if (dtype, which) not in self.memory or self.memory[dtype, which].numel() < size:
                self.memory[dtype, which] = values.new_empty(max(CACHE_PIXELS, size), dtype=dtype)
                self.parts = {}
        self.parts = self.parts if len(self.parts) < 8 else {}
        self.parts[like] = [self.memory[dtype, which][:size].view(values.shape) for which, dtype in kinds]
        return self.parts[like]


ROOM = _Room()


def power_sums(values: Tensor, orders: int, wide: Tensor, spare: Tensor) -> list[Tensor]:
    """Return the power sums ``(R,)`` of values ``(R, N)``; ``wide`` (float64) and ``spare`` are working memory.

    The third and higher ones are summed in the dtype of the values, and in rows that share a piece, as beside others.
    """
    sums, power = [wide.copy_(values).sum(1)], values
    alone = len(wide) == 1  # then, vector_norm uses one thread only
    sums.append(torch.dot(wide[0], wide[0]).view(1) if alone else torch.linalg.vector_norm(wide, dim=1).square_())
    for order in range(3, 1 + orders):
        power = torch.pow(values, 3, out=spare) if order == 3 else power.mul_(values)
        # Several threads would add up a single row in another order.
        sums.append((power.expand(2, -1) if alone and values.shape[1] <= SHARED else power).sum(1)[: len(power)])
    return sums


def _near(part: Tensor, low: Tensor, total: Tensor, times: int = 1) -> tuple[Tensor, Tensor | None]:
    """Return the pixels of the blocks in which one is above ``low``, and these blocks; None: all pixels.

    ``total`` is the sum of ``times`` as many pixels.
    """
    if part.shape[1] <= SHARED or part.shape[1] % BLOCK or total > SPARSE * times * part.shape[1]:
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
