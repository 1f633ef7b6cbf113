"""The exact RankDice solver: the best volume of every row in a few passes over the map, sorting almost nothing.

The steps, each for all rows at once (the formulas are in ``utils/rankdice_integral.py``, the reasons in
``docs/rankdice.md``):

1. the power sums of each row (:func:`row_power_sums`);
2. a histogram of the pixels above a low cut: counts and power sums per bin of probability (:class:`Sweep`);
3. a lower bound of the best score, and upper bounds for all the volumes that end inside one bin, leave a narrow *band*
   of bins: no volume outside it can be best (:func:`_band`). A row whose pixels under the low cut are not excluded by
   their bound is done again with a lower cut;
4. the pixels of the band are sorted and their volumes scored by quadrature; all other pixels enter through power sums.

Everything that decides is float64 or int64. A row's result does not depend on the rows beside it, nor on the tiles the
map is read in: sums run over blocks aligned to the row, or over integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from utils.rankdice_integral import BLOCK, POWERS, SLACK, Pixels, RowFacts, Runs, best_volume, block_sum, empty_score
from utils.rankdice_sweep import Sweep, Task, row_power_sums

# From this mean volume on, four power sums stand for any set of pixels: what they leave out is less than
# 36 / mu^4 < 1e-10 of the score. Below it only pixels with p <= mu / SERIES_MEAN may enter so; of the others there are
# at most SERIES_MEAN, since each adds more than mu / SERIES_MEAN to mu.
SERIES_MEAN = 800.0
FEW_PIXELS = 2048  # smaller maps are not searched by bins: all pixels above the cut are sorted and scored
LEAST_BINS, MOST_BINS = 1024, 8192
PIXELS_PER_BIN = 512
PLATEAU_PARTS = 1024
BAND_LIMIT = 16384  # a band with more pixels is narrowed further before it is sorted
NARROWINGS = 6
RETRIES = 3


class Volumes(NamedTuple):
    """The volume found for each row.

    Attributes:
        volumes: int64 ``(R,)``.
        cutoffs: ``(R,)``, smallest probability in the mask, ``inf`` for an empty mask; dtype of the rows.
        scores: float64 ``(R,)``.
        surplus: int64 ``(R,)``, how many of the pixels that equal the cut-off are left out of the mask.
        drawn: bool ``(R,)``, whether the mask is written already, but for the surplus.
    """

    volumes: Tensor
    cutoffs: Tensor
    scores: Tensor
    surplus: Tensor
    drawn: Tensor

    @classmethod
    def empty(cls, count: int, like: Tensor) -> Volumes:
        """Return ``count`` empty masks with score 0."""
        return cls(
            torch.zeros(count, dtype=torch.int64, device=like.device),
            torch.full((count,), torch.inf, dtype=like.dtype, device=like.device),
            torch.zeros(count, dtype=torch.float64, device=like.device),
            torch.zeros(count, dtype=torch.int64, device=like.device),
            torch.zeros(count, dtype=torch.bool, device=like.device),
        )

    def put(self, index: Tensor, part: Volumes) -> None:
        """Write the results of rows ``index``."""
        for mine, theirs in zip(self, part, strict=True):
            mine[index] = theirs.to(mine.dtype)


@dataclass
class Band:
    """The pixels of some rows among which the best volume ends.

    Attributes:
        low, high: int64 bins or float64 probabilities ``(R,)``, both ends included.
        count: int64 ``(R,)``, how many pixels.
        rank: int64 ``(R,)``, how many pixels above the band.
        above: float64 ``(R, 4)``, their power sums.
    """

    low: Tensor
    high: Tensor
    count: Tensor
    rank: Tensor
    above: Tensor

    def __getitem__(self, index: Tensor) -> Band:
        return Band(self.low[index], self.high[index], self.count[index], self.rank[index], self.above[index])


def solve(
    rows: Tensor, masks: Tensor, highest: Tensor, active: Tensor, metric: str, smooth: float, budget: int
) -> Volumes:
    """Find the best volume of every active row; the others get the empty mask.

    Args:
        rows: ``(R, N)`` probabilities, contiguous.
        masks: bool ``(R, N)``, contiguous, all False; the rows that come back as ``drawn`` are written.
        highest: ``(R,)`` largest value of each row.
        active: bool ``(R,)``.
        metric: "dice" or "iou".
        smooth: the constant g.
        budget: bytes of working memory, about.
    """
    found = Volumes.empty(rows.shape[0], rows)
    # With g > 0 the score of an empty mask depends on the probabilities, so that pruned rows have work to do as well.
    chosen = (active if smooth == 0 else torch.ones_like(active)).nonzero().view(-1)
    if chosen.numel() == 0 or rows.shape[1] == 0:
        found.scores[:] = float(smooth > 0)
        return found
    task = Task(rows, masks, metric, smooth, budget)
    bins = min(MOST_BINS, max(LEAST_BINS, 1 << (rows.shape[1] // PIXELS_PER_BIN).bit_length()))
    bins = bins if rows.shape[1] >= FEW_PIXELS else 2
    for index in chosen.split(max(1, budget // (bins * 8 * 64))):
        facts = RowFacts(row_power_sums(task, index), highest.new_zeros(index.numel()).double(), active[index])
        # Some volume scores about S2 / S1 or more: a mask cut at a uniformly random height has mean mass S2 and mean
        # volume S1; and the best cut is about half the best score. The bounds check what this only makes likely.
        half_score = 0.45 * facts.power[:, 1] / facts.mean.clamp(min=1e-300)
        one_by_one = facts.mean / SERIES_MEAN
        cut = torch.where(facts.searched, torch.minimum(half_score, one_by_one), one_by_one)
        found.put(index, _solve_rows(task, index, facts, highest[index].double(), cut, bins, RETRIES))
    return found


def _solve_rows(
    task: Task, index: Tensor, facts: RowFacts, highest: Tensor, cut: Tensor, bins: int, retries: int
) -> Volumes:
    """Solve rows ``index``, looking first at the pixels from probability ``cut`` up."""
    info = torch.finfo(task.rows.dtype)
    smallest = info.tiny * info.eps
    cut = cut.clamp(min=smallest).to(task.rows.dtype).double()
    sweep = Sweep(task, index, cut, torch.ones_like(cut), facts.mean, bins)
    band, under = _first_band(task, facts, sweep)
    under &= cut > smallest
    heavy = ~under & (band.count > BAND_LIMIT)
    easy = ~(under | heavy)
    found = Volumes.empty(index.numel(), task.rows)
    if bool(easy.any()):
        found.put(easy.nonzero().view(-1), _solve_easy(task, sweep, facts, band, easy))
        if sweep.draw(found.cutoffs):
            found.drawn[:] = easy
    sweep.kept.clear()
    part = heavy.nonzero().view(-1)
    if part.numel():
        found.put(part, _solve_heavy(task, index[part], facts[part], cut[part], highest[part]))
    part = under.nonzero().view(-1)
    if part.numel():
        lower = cut[part] / 4 if retries else torch.zeros_like(cut[part])
        found.put(part, _solve_rows(task, index[part], facts[part], highest[part], lower, bins, retries - 1))
    return found


# --- where the best volume can be -------------------------------------------------------------------------------------


@dataclass
class Search:
    """Bins of some rows with what lies in and above each, and the first and last bin that the bounds leave.

    Attributes:
        low, high: int64 ``(R,)``; ``low > high`` where nothing is left.
        counts: int64 ``(R, bins)``.
        ranks: int64 ``(R, bins)``, pixels above each bin.
        powers: 4 x float64 ``(R, bins)``, power sums of the pixels in each bin.
        above: float64 ``(R, 4)``, power sums of the pixels above all bins.
    """

    low: Tensor
    high: Tensor
    counts: Tensor
    ranks: Tensor
    powers: list[Tensor]
    above: Tensor

    def band(self) -> Band:
        """Return what lies from bin ``low`` to bin ``high``."""
        bins = self.counts.shape[1]
        low, high = self.low.clamp(max=bins - 1).unsqueeze(1), self.high.clamp(min=0).unsqueeze(1)
        rank = self.ranks.gather(1, high).squeeze(1)
        end = (self.ranks.gather(1, low) + self.counts.gather(1, low)).squeeze(1)
        higher = torch.arange(bins, device=low.device) > high
        above = torch.stack([block_sum(power * higher) for power in self.powers], 1)
        return Band(self.low, self.high, torch.where(self.low <= self.high, end - rank, 0), rank, self.above + above)


def _search(task: Task, facts: RowFacts, sweep: Sweep, rank: Tensor, above: Tensor, orders: int) -> Search:
    """Bound the scores of the volumes in each bin; ``rank`` pixels with power sums ``above`` precede the bins.

    Raises ``facts.lower`` where a volume at the end of a bin is known to score more. ``orders``: see
    :meth:`Sweep.histogram`.
    """
    counts, powers = sweep.histogram(orders)
    runs, ranks = sweep.runs(counts, powers[0], rank, above[:, 0])
    facts.lower = runs.lower(task.metric, task.smooth, facts)
    low, high = _left_over(task, facts, runs)
    return Search(low, high, counts, ranks, powers, above)


def _left_over(task: Task, facts: RowFacts, runs: Runs) -> tuple[Tensor, Tensor]:
    """Return the first and the last run whose upper bound reaches the lower bound of the row."""
    able = runs.upper(task.metric, task.smooth, facts) >= (facts.lower * (1 - SLACK)).unsqueeze(1)
    number = torch.arange(able.shape[1], device=able.device).expand_as(able)
    return torch.where(able, number, able.shape[1]).amin(1), torch.where(able, number, -1).amax(1)


def _first_band(task: Task, facts: RowFacts, sweep: Sweep) -> tuple[Band, Tensor]:
    """Return the band, and which rows may have their best volume among the pixels under the sweep's cut."""
    none = torch.zeros_like(sweep.index)
    search = _search(task, facts, sweep, none, torch.zeros_like(facts.power), 1)
    rank = (search.ranks[:, :1] + search.counts[:, :1]).double()
    mass = sweep.total
    under = Runs(
        rank=rank,
        mass=mass,
        count=task.rows.shape[1] - rank,
        own=facts.mean.unsqueeze(1) - mass,
        low=torch.zeros_like(rank),
        high=sweep.low.unsqueeze(1),
    )
    bound = under.upper(task.metric, task.smooth, facts).squeeze(1)
    few = (facts.mean < SERIES_MEAN) | (task.rows.shape[1] < FEW_PIXELS)  # every pixel above the cut, one by one
    search.low = torch.where(few, 0, torch.where(facts.searched, search.low, sweep.bins))
    search.high = torch.where(few, sweep.bins - 1, torch.where(facts.searched, search.high, -1))
    return search.band(), facts.searched & (bound >= facts.lower * (1 - SLACK))


# --- the best volume of a band ----------------------------------------------------------------------------------------


@dataclass
class Ragged:
    """Values of several rows behind each other, descending in each row."""

    values: Tensor
    starts: Tensor

    @classmethod
    def sort(cls, row: Tensor, values: Tensor, counts: Tensor) -> Ragged:
        """Sort ``values`` of rows ``row`` (0 to R - 1), ``counts`` of each."""
        order = values.argsort(descending=True)
        order = order[row[order].argsort(stable=True)]
        return cls(values[order], counts.cumsum(0) - counts)

    def padded(self, part: Tensor, counts: Tensor, width: int) -> Tensor:
        """Return rows ``part`` as ``(len(part), width)``, filled up with zeros."""
        steps = torch.arange(width, device=part.device)
        real = steps < counts[part].unsqueeze(1)
        place = self.starts[part].unsqueeze(1) + steps
        if self.values.numel() == 0:
            return torch.zeros(place.shape, dtype=torch.float64, device=part.device)
        return torch.where(real, self.values[place.clamp_(max=self.values.numel() - 1)], 0.0)


def _solve_easy(task: Task, sweep: Sweep, facts: RowFacts, band: Band, easy: Tensor) -> Volumes:
    """Solve the rows ``easy`` (bool) of a sweep: their bands are small."""
    row, values = sweep.within(torch.where(easy, band.low, sweep.bins), torch.where(easy, band.high, -1))
    part = easy.nonzero().view(-1)
    band = band[part]
    ragged = Ragged.sort((easy.cumsum(0) - 1)[row], values, band.count)
    return _solve_band(task, facts[part], band, lambda rows, width: ragged.padded(rows, band.count, width))


def _solve_band(
    task: Task,
    facts: RowFacts,
    band: Band,
    padded: Callable[[Tensor, int], Tensor],
    left_ties: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Volumes:
    """Score the volumes of bands, rows of similar width together.

    Args:
        task: what is asked.
        facts: of the rows.
        band: the bands; ``low`` and ``high`` are not looked at.
        padded: gives the values ``(len(part), width)`` of the rows ``part``.
        left_ties: int64 ``(R,)``, pixels behind the band that equal its last.
        extra: ``(R, E)`` pixels above and below the band that are not left to the power sums.
    """
    found = Volumes.empty(facts.mean.numel(), task.rows)
    nothing = facts.power.new_zeros(facts.mean.numel(), 1)
    extra_above, extra_below = extra or (nothing, nothing)
    left_ties = torch.zeros_like(band.rank) if left_ties is None else left_ties
    # The width depends on the row's own band only, so that its sums do not depend on the rows beside it.
    size = torch.ceil(torch.log2(band.count.clamp(min=16).double())).long()
    for exponent in size.unique().tolist():
        width = 2**exponent
        rows = (size == exponent).nonzero().view(-1)
        for part in rows.split(max(1, task.budget // (width * 8 * 16))):
            pixels = Pixels(
                padded(part, width), band.rank[part], band.above[part], extra_above[part], extra_below[part]
            )
            found.put(part, _choose(task, facts[part], pixels, left_ties[part]))
    return found


def _choose(task: Task, facts: RowFacts, pixels: Pixels, left_ties: Tensor) -> Volumes:
    """Return the best volume of each row, 0 where nothing may be chosen or the empty mask scores as much."""
    where, score = best_volume(task.metric, task.smooth, facts, pixels)
    cut = pixels.values.gather(1, where.unsqueeze(1))
    surplus = (
        (pixels.values >= cut).sum(1)
        - (where + 1)
        + torch.where(cut.squeeze(1) == _last_value(pixels.values), left_ties, 0)
    )
    empty = torch.zeros_like(score)
    if task.smooth > 0:
        empty = empty_score(task.smooth, facts, pixels, SERIES_MEAN)
    none = ~facts.searched | (pixels.values[:, 0] <= 0) | (empty >= score)
    return Volumes(
        torch.where(none, 0, pixels.rank + where + 1),
        torch.where(none, torch.inf, cut.squeeze(1)),
        torch.where(none, empty, score),
        torch.where(none, 0, surplus),
        torch.zeros_like(none),
    )


def _last_value(values: Tensor) -> Tensor:
    """Return the smallest value above zero of each row ``(R,)``."""
    return torch.where(values > 0, values, torch.inf).amin(1)


# --- rows with wide bands: plateaus, and maps with next to no contrast ------------------------------------------------


def _solve_heavy(task: Task, index: Tensor, facts: RowFacts, low: Tensor, high: Tensor) -> Volumes:
    """Solve rows ``index``, whose best volumes end between probabilities ``low`` and ``high``.

    The interval is cut into bins again and again, until few pixels, one single value, or no progress is left.
    """
    found = Volumes.empty(index.numel(), task.rows)
    open_rows = torch.arange(index.numel(), device=index.device)
    rank = torch.zeros_like(index)
    band = Band(low, high, torch.full_like(index, task.rows.shape[1]), rank, torch.zeros_like(facts.power))
    for turn in range(NARROWINGS):
        mine = facts[open_rows]
        sweep = Sweep(task, index[open_rows], band.low, band.high, mine.mean, MOST_BINS)
        next_band = _search(task, mine, sweep, band.rank, band.above, POWERS).band()
        next_band.low, next_band.high = sweep.extremes(next_band.low, next_band.high)
        facts.lower[open_rows] = mine.lower
        done = (next_band.count <= BAND_LIMIT) | (next_band.low == next_band.high)
        if turn:
            done |= next_band.count > 0.7 * band.count
        if turn == NARROWINGS - 1:
            done = torch.ones_like(done)
        flat = next_band.low == next_band.high
        for which, finish in ((done & flat, _solve_plateau), (done & ~flat, _solve_wide)):
            part = which.nonzero().view(-1)
            if part.numel():
                names = open_rows[part]
                found.put(names, finish(task, index[names], facts[names], next_band[part]))
        left = (~done).nonzero().view(-1)
        open_rows, band = open_rows[left], next_band[left]
        if left.numel() == 0:
            break
    return found


def _solve_wide(task: Task, index: Tensor, facts: RowFacts, band: Band) -> Volumes:
    """Solve rows by all the pixels of their bands, however many."""
    row, values = Sweep(task, index, band.low, band.high, facts.mean, 2).pixels()
    ragged = Ragged.sort(row, values, band.count)
    extra = _extra(task, index, facts, band)
    return _solve_band(task, facts, band, lambda part, width: ragged.padded(part, band.count, width), extra=extra)


def _solve_plateau(task: Task, index: Tensor, facts: RowFacts, band: Band) -> Volumes:
    """Solve rows whose bands hold one single probability: their volumes need no pixels to be scored."""
    value, start, end = band.high, torch.zeros_like(band.count), band.count
    steps = torch.arange(PLATEAU_PARTS + 1, device=index.device)
    for _ in range(4):
        edges = start.unsqueeze(1) + (end - start).unsqueeze(1) * steps // PLATEAU_PARTS
        count = edges.diff(dim=1).double()
        level = value.unsqueeze(1).expand_as(count)
        first = edges[:, :-1].double()
        runs = Runs(
            band.rank.unsqueeze(1) + first, band.above[:, :1] + level * first, count, level * count, level, level
        )
        facts.lower = runs.lower(task.metric, task.smooth, facts)
        low, high = _left_over(task, facts, runs)
        start = edges.gather(1, low.clamp(max=PLATEAU_PARTS - 1).unsqueeze(1)).squeeze(1)
        end = edges.gather(1, high.clamp(min=0).unsqueeze(1) + 1).squeeze(1)
    exponents = torch.arange(1, POWERS + 1, device=index.device)
    above = band.above + start.unsqueeze(1) * value.unsqueeze(1) ** exponents
    part = Band(value, value, end - start, band.rank + start, above)

    def padded(rows: Tensor, width: int) -> Tensor:
        real = torch.arange(width, device=rows.device) < part.count[rows].unsqueeze(1)
        return torch.where(real, value[rows].unsqueeze(1), 0.0)

    return _solve_band(task, facts, part, padded, band.count - end, _extra(task, index, facts, band))


def _extra(task: Task, index: Tensor, facts: RowFacts, band: Band) -> tuple[Tensor, Tensor]:
    """Return the pixels above and below the bands that power sums cannot stand for, ``(R, 2 BLOCK)`` at most each."""
    nothing = facts.power.new_zeros(index.numel(), 1)
    few = facts.mean < SERIES_MEAN
    if not bool(few.any()):
        return nothing, nothing
    low = torch.where(few, facts.mean / SERIES_MEAN, 2.0)
    row, values = Sweep(task, index, low, torch.ones_like(low), facts.mean, 2).pixels()
    parts = []
    for hit in (values > band.high[row], values < band.low[row]):
        counts = torch.zeros_like(index).scatter_add_(0, row[hit], torch.ones_like(row[hit]))
        ragged = Ragged.sort(row[hit], values[hit], counts)
        everything = torch.arange(index.numel(), device=index.device)
        parts.append(ragged.padded(everything, counts, 2 * BLOCK))
    return parts[0], parts[1]
