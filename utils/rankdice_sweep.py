"""Reading the map for the exact RankDice solver: tiles, power sums, and histograms of the probable pixels.

A result does not depend on the tiles: sums run over blocks aligned to the row, or over integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from utils.rankdice_integral import BLOCK, POWERS, SLACK, Runs, block_sum

CACHE_PIXELS = 1 << 16  # what stays in the cache of one core as float64
PIXEL_BYTES = 64  # working memory per pixel of a tile when all its pixels are above the cut, about
PART_BYTES = 32  # of a pixel that is kept
CROWDED = 0.4  # from this share of pixels in the bins on, by its bound, a tile is binned as it lies: measured


class Tile(NamedTuple):
    """A piece of some rows.

    Attributes:
        names: positions among the chosen rows.
        columns: the pixels.
        place: where the piece begins in the flattened map; None if its rows are not neighbours.
        values: reads the piece, ``(names, columns)``.
    """

    names: slice
    columns: slice
    place: int | None
    values: Callable[[], Tensor]


def tiles(rows: Tensor, chosen: Tensor, pixels: int) -> Iterator[Tile]:
    """Walk over rows ``chosen`` (ascending) in tiles of about ``pixels`` pixels: whole rows, or parts of one.

    Neighbouring rows are read in place, others are gathered tile by tile.
    """
    count, width = chosen.numel(), rows.shape[1]
    if count == 0 or width == 0:
        return
    first = int(chosen[0])
    together = int(chosen[-1]) - first + 1 == count
    per_tile = max(1, pixels // width)
    length = width if pixels >= width else max(BLOCK, pixels // BLOCK * BLOCK)

    def values(names: slice, columns: slice) -> Tensor:
        if together:
            return rows[first + names.start : first + names.stop, columns]
        return rows[:, columns].index_select(0, chosen[names])

    for row in range(0, count, per_tile):
        names = slice(row, min(row + per_tile, count))
        for start in range(0, width, length):
            columns = slice(start, min(start + length, width))
            place = (first + row) * width + start if together else None
            yield Tile(names, columns, place, partial(values, names, columns))


@dataclass
class Task:
    """What is asked, of which map, and where the masks go."""

    rows: Tensor
    masks: Tensor
    metric: str
    smooth: float
    budget: int

    @property
    def tile_pixels(self) -> int:
        """Return how many pixels a tile may have."""
        return max(BLOCK, self.budget // PIXEL_BYTES // 2)


def row_power_sums(task: Task, index: Tensor) -> Tensor:
    """Return ``sum_j p_j^n``, n = 1..4, float64 ``(R, 4)``."""
    width = task.rows.shape[1]
    pixels = CACHE_PIXELS * torch.get_num_threads() if task.rows.device.type == "cpu" else task.tile_pixels
    sums = torch.empty(POWERS, index.numel(), -(-width // BLOCK), dtype=torch.float64, device=task.rows.device)
    space = torch.empty(2, max(pixels, BLOCK, min(width, pixels)), dtype=torch.float64, device=task.rows.device)
    for tile in tiles(task.rows, index, pixels):
        read = tile.values()
        values, power = (part[: read.numel()].view(read.shape) for part in space)
        values.copy_(read)
        first, whole = tile.columns.start // BLOCK, read.shape[1] // BLOCK
        edge = whole * BLOCK
        for n in range(POWERS):
            if n:
                torch.mul(values if n == 1 else power, values, out=power)
            current = power if n else values
            if whole:
                head = current[:, :edge].unflatten(1, (whole, BLOCK))
                sums[n, tile.names, first : first + whole] = head.sum(2)
            if edge < read.shape[1]:
                sums[n, tile.names, first + whole] = current[:, edge:].sum(1)
    return block_sum(sums).T.contiguous()


class Part(NamedTuple):
    """The pixels of a tile that lie in the bins of a sweep.

    Attributes:
        row: position among the sweep's rows; ``(1,)`` for a tile inside one row, so that what depends on it is
            broadcast and not gathered.
        key: ``row * bins + bin``.
        values: float64 probabilities.
        place: where in the flattened map; None if the tile has no place.
    """

    row: Tensor
    key: Tensor
    values: Tensor
    place: Tensor | None


class Sweep:
    """The pixels of some rows between two probabilities, in bins.

    Bin ``b`` of ``bins`` starts at ``low + b (high - low) / (bins - 1)``; the last one holds the pixels at ``high``.
    :meth:`histogram` reads the map and keeps the pixels of as many tiles as the budget has room for. The other tiles
    are read again by what follows, which asks for a few bins only.

    Attributes:
        total: float64 ``(R, 1)``, sum of the pixels in all bins; from :meth:`histogram` on.
    """

    total: Tensor

    def __init__(self, task: Task, index: Tensor, low: Tensor, high: Tensor, mean: Tensor, bins: int) -> None:
        """Args: see :class:`Sweep`; ``mean``: of the rows, to scale the integer sums."""
        self.task, self.index, self.bins = task, index, bins
        self.low, self.high = low, high
        self.width = ((high - low) / (bins - 1)).clamp(min=1e-300)
        self.steps = 1 / self.width
        # The unit of the integer sums: a row's sum stays under 2^62, its rounding under 2^-61 d of mu.
        self.unit = torch.exp2(torch.ceil(torch.log2(mean + 1)) - 61)
        self.up_to_one = bool((high >= 1).all())
        # The share of the pixels at low or above is mean / low at most, in practice about half of that.
        crowded = mean / low.clamp(min=1e-300) > CROWDED * task.rows.shape[1]
        self.crowded = crowded.tolist() if crowded.device.type == "cpu" and self.up_to_one else []
        self.kept: list[Part | None] = []  # by tile

    def _tiles(self) -> Iterator[Tile]:
        return tiles(self.task.rows, self.index, self.task.tile_pixels)

    def _marks(self, tile: Tile) -> Tensor | None:
        """Return the piece of the masks that belongs to a tile; None if it is no piece."""
        if tile.place is None:
            return None
        shape = (tile.names.stop - tile.names.start, tile.columns.stop - tile.columns.start)
        return self.task.masks.view(-1)[tile.place : tile.place + shape[0] * shape[1]].view(shape)

    def _read(self, tile: Tile, low: Tensor, high: Tensor | None, marks: Tensor | None = None) -> Part:
        """Return the pixels from ``low`` to ``high`` ``(R,)``; ``marks`` (bool, as the tile) then tells which."""
        values = tile.values()
        inside = torch.ge(values, low[tile.names].to(values.dtype).unsqueeze(1), out=marks)
        if high is not None:
            inside &= values <= high[tile.names].to(values.dtype).unsqueeze(1)
        flat = inside.view(-1).nonzero().view(-1)
        row = torch.arange(tile.names.start, tile.names.stop, device=flat.device)
        if row.numel() > 1:
            ends = torch.arange(1, row.numel() + 1, device=flat.device) * values.shape[1]
            row = row[torch.bucketize(flat, ends, right=True)]
        found = values.reshape(-1)[flat].double()
        key = (found - self.low[row]).mul_(self.steps[row]).long().clamp_(max=self.bins - 1)
        key += row * self.bins
        return Part(row, key, found, None if tile.place is None else flat.add_(tile.place))

    def histogram(self, orders: int) -> tuple[Tensor, list[Tensor]]:
        """Return counts and the power sums of the bins, ``(R, bins)``.

        The first ``orders`` power sums are summed up as integers: any order of the pixels gives the same. The others
        follow from the mean of each bin, as if its pixels were spread evenly: with 1024 bins and mean volumes of
        SERIES_MEAN and more, the scores do not see the difference.
        """
        size = (self.index.numel(), self.bins)
        counts = self.index.new_zeros(size)
        sums = [self.index.new_zeros(size) for _ in range(orders)]
        room = self.task.budget // 2
        for tile in self._tiles():
            crowded = self.crowded[tile.names]
            if sum(crowded) * 2 > len(crowded):
                self._count(tile, counts, sums)
                self.kept.append(None)
                continue
            part = self._read(tile, self.low, None if self.up_to_one else self.high, self._marks(tile))
            self._add(part, counts, sums)
            room -= PART_BYTES * part.key.numel()
            self.kept.append(part if room >= 0 else None)
            del part  # before the next one is read
        self.total = sums[0].sum(1, keepdim=True).double() * self.unit.unsqueeze(1)
        powers = [part.double() * self.unit.unsqueeze(1) for part in sums]
        mean = powers[0] / counts.clamp(min=1)
        spread = (self.width**2 / 12).unsqueeze(1)
        for n in range(orders + 1, POWERS + 1):
            powers.append(counts * (mean**n + n * (n - 1) / 2 * mean ** (n - 2) * spread))
        return counts, powers

    def _add(self, part: Part, counts: Tensor, sums: list[Tensor]) -> None:
        """Add the pixels of a tile to the histogram."""
        counts.view(-1).scatter_add_(0, part.key, counts.new_ones(1).expand_as(part.key))
        power = part.values * (1 / self.unit)[part.row]
        for n, total in enumerate(sums):
            if n:
                power *= part.values
            total.view(-1).scatter_add_(0, part.key, power.long())

    def _count(self, tile: Tile, counts: Tensor, sums: list[Tensor]) -> None:
        """Add a tile to the histogram without gathering its pixels: cheaper where most of them are in some bin.

        The pixels under ``low`` go into a bin of their own in front. Not for a GPU, where all would wait for that one.
        """
        values = tile.values()
        count, width = values.shape
        shift = torch.arange(count).mul_(self.bins + 1).unsqueeze(1)
        low, steps, scale = (part[tile.names].unsqueeze(1) for part in (self.low, self.steps, 1 / self.unit))
        new = torch.zeros(1 + len(sums), count, self.bins + 1, dtype=torch.int64)
        together = max(1, CACHE_PIXELS // width)
        for first in range(0, count, together):
            some = slice(first, first + together)
            for start in range(0, width, CACHE_PIXELS):
                piece = values[some, start : start + CACHE_PIXELS].double()
                key = (piece - low[some]).mul_(steps[some]).floor_().clamp_(-1, self.bins - 1).long().add_(1)
                key = key.add_(shift[some]).view(-1)
                new[0].view(-1).scatter_add_(0, key, counts.new_ones(1).expand_as(key))
                power = piece * scale[some]
                for n in range(len(sums)):
                    if n:
                        power *= piece
                    new[n + 1].view(-1).scatter_add_(0, key, power.long().view(-1))
        for whole, own in zip((counts, *sums), new, strict=True):
            whole[tile.names] += own[:, 1:]

    def draw(self, cutoffs: Tensor) -> bool:
        """Mark the pixels from the cut-offs ``(R,)`` up in the masks; False if the rows are not read in place."""
        if not self.up_to_one:
            return False
        for tile, part in zip(self._tiles(), self.kept, strict=True):
            marks = self._marks(tile)
            if marks is None:
                return False
            if part is None:
                torch.ge(tile.values(), cutoffs[tile.names].unsqueeze(1), out=marks)
            else:  # all the pixels of the bins are marked: unmark those under the cut-off
                assert part.place is not None
                gone = part.place[(part.values < cutoffs.double()[part.row]).nonzero().view(-1)]
                self.task.masks.view(-1).index_fill_(0, gone, False)
        return True

    def pixels(self) -> tuple[Tensor, Tensor]:
        """Return row and value of all the pixels."""
        parts = [self._read(tile, self.low, None if self.up_to_one else self.high) for tile in self._tiles()]
        return torch.cat([part.row.expand_as(part.values) for part in parts]), torch.cat([p.values for p in parts])

    def within(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and value of the pixels in the bins ``first`` to ``last`` ``(R,)``, none where first > last."""
        parts = list(self._within(first, last))
        return torch.cat([row for row, _ in parts]), torch.cat([values for _, values in parts])

    def extremes(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest probability in the bins ``first`` to ``last`` ``(R,)``."""
        low = torch.full_like(self.low, torch.inf)
        high = torch.full_like(self.low, -torch.inf)
        for row, values in self._within(first, last):
            low.scatter_reduce_(0, row, values, "amin")
            high.scatter_reduce_(0, row, values, "amax")
        return low, high

    def _within(self, first: Tensor, last: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        bins = torch.arange(self.bins, device=self.index.device)
        table = ((bins >= first.unsqueeze(1)) & (bins <= last.unsqueeze(1))).view(-1)
        # Read again with a bin more on either side: the table tells exactly, by the keys.
        low = torch.maximum(self.low, self.low + (first - 1) * self.width).masked_fill_(first > last, torch.inf)
        high = torch.minimum(self.high, self.low + (last + 2) * self.width)
        for tile, part in zip(self._tiles(), self.kept, strict=True):
            part = part or self._read(tile, low, high)
            hit = table[part.key].nonzero().view(-1)
            row, values = part.key[hit] // self.bins, part.values[hit]
            del part  # before the next one is read
            yield row, values

    def runs(self, counts: Tensor, own: Tensor, rank: Tensor, above: Tensor) -> tuple[Runs, Tensor]:
        """Return the bins as runs of volumes after ``rank`` pixels that sum up to ``above``, and their int64 ranks."""
        ranks = counts.flip(1).cumsum(1).flip(1) - counts + rank.unsqueeze(1)
        mass = own.flip(1).cumsum(1).flip(1) - own + above.unsqueeze(1)
        edges = self.low.unsqueeze(1) + self.width.unsqueeze(1) * torch.arange(self.bins, device=counts.device)
        high = self.high.unsqueeze(1) * (1 + SLACK)
        low = torch.minimum(edges, high) * (1 - SLACK)
        upper = torch.cat([torch.minimum(edges[:, 1:] * (1 + SLACK), high), high], 1)
        return Runs(ranks.double(), mass, counts.double(), own, low, upper), ranks
