"""Decisions over images whose probabilities do not fit in memory.

The probabilities of a finished band of tiles go to a temporary file in float16 (:class:`Spool`). What a procedure
needs of them is small: float16 has 15,361 values in [0, 1], so one class of one image, however large, *is* the
table of how often each value occurs, and RankDice of the whole image is solved on that table
(:func:`rank_dice_counts`): the same optimum over the same pixels, not one per tile. A label map then takes a few
passes over the file, a few rows at a time.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.predict.tiling import Block

# What a pass over a spool holds of it at a time, as float16.
CHUNK_BYTES = 32 * 2**20
_PASS_BYTES = 2 * 2**20
# float16 bit patterns of the numbers in [0, 1] are 0 .. 0x3C00, in the same order as the numbers.
HALF_VALUES = np.arange(0x3C00 + 1, dtype=np.uint16).view(np.float16).astype(np.float64)

# Gauss-Laguerre rule of the integral over s; its nodes are shared by volumes whose rates differ by up to _SPREAD.
_NODES, _WEIGHTS = np.polynomial.laguerre.laggauss(24)
_SPREAD = 1.3
_INTERIOR = 256  # volumes tried at a time inside a run of equal probabilities


class Volume(NamedTuple):
    """The best mask of one class: its pixels, the lowest probability inside (inf: none), the expected score."""

    pixels: int
    cutoff: float
    score: float


class Spool:
    """The probabilities ``(classes, H, W)`` of one image in a temporary file, float16.

    The file has no name (nothing stays behind, whatever happens) and lies in ``folder``, by default where
    ``TMPDIR`` points. It is read and written explicitly, not mapped, so that memory in use stays what it is.

    Raises:
        UserError: the folder has not the space that is needed.
    """

    def __init__(self, num_classes: int, height: int, width: int, folder: str | Path | None = None) -> None:
        self.shape = (num_classes, height, width)
        self._blocks: list[tuple[int, int, int, int, int]] = []  # y, x, h, w, offset in the file
        self._end = 0
        folder = folder or tempfile.gettempdir()
        needed, free = 2 * num_classes * height * width, shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"the probabilities of a {width} x {height} image take {needed / 2**30:.1f} GiB of temporary space, "
                f"and {folder} has {free / 2**30:.1f} GiB free; point TMPDIR to a larger disk, or use --predict max"
            )
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def write(self, block: Block) -> None:
        """Append a finished block; blocks partition the image and come from top to bottom within each column."""
        _, tall, wide = block.scores.shape
        self._blocks.append((block.y, block.x, tall, wide, self._end))
        for plane in block.scores:  # one class at a time: no second copy of the band
            half = plane.half().cpu().contiguous().numpy()
            self._file.write(half.data)
            self._end += half.nbytes

    def bands(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(y, probabilities)``: the image's rows in order, float16 ``(classes, rows, W)``, ``rows`` small."""
        classes, _, width = self.shape
        self._file.flush()
        step = max(1, max_bytes // (2 * classes * width))
        for y in sorted({block[0] for block in self._blocks}):
            row = [block for block in self._blocks if block[0] == y]
            tall = row[0][2]
            for top in range(0, tall, step):
                rows = min(step, tall - top)
                band = np.empty((classes, rows, width), np.float16)
                for _, x, _, wide, offset in row:
                    for c in range(classes):
                        start = offset + 2 * wide * (c * tall + top)
                        data = os.pread(self._file.fileno(), 2 * wide * rows, start)
                        band[c, :, x : x + wide] = np.frombuffer(data, np.float16).reshape(rows, wide)
                yield y + top, band

    def planes(self, c: int) -> Iterator[np.ndarray]:
        """Yield the rows of class ``c`` in order, float16 ``(rows, W)``."""
        width = self.shape[2]
        self._file.flush()
        for y in sorted({block[0] for block in self._blocks}):
            row = [block for block in self._blocks if block[0] == y]
            band = np.empty((row[0][2], width), np.float16)
            for _, x, tall, wide, offset in row:
                data = os.pread(self._file.fileno(), 2 * wide * tall, offset + 2 * wide * c * tall)
                band[:, x : x + wide] = np.frombuffer(data, np.float16).reshape(tall, wide)
            yield band

    def counts(self) -> np.ndarray:
        """Return how often each float16 value occurs: int64 ``(classes, 15361)``, ascending (``HALF_VALUES``)."""
        table = np.zeros((self.shape[0], len(HALF_VALUES)), np.int64)
        for _, band in self.bands():
            for c, plane in enumerate(band.view(np.uint16)):
                table[c] += np.bincount(plane.ravel(), minlength=len(HALF_VALUES))
        return table


# ------------------------------------------------------------------------------------- RankDice of a table


def rank_dice_counts(
    values: np.ndarray,
    counts: np.ndarray,
    metric: str = "dice",
    solver: str = "exact",
    smooth: float = 0.0,
    prune: float | None = 0.5,
) -> Volume:
    """Solve RankDice for one row of pixels given as a table of its probabilities.

    The expected score of every volume ``tau`` that ends a run of equal probabilities is computed as the
    one-dimensional integral (``s`` from 0 to infinity, ``u = 1 - exp(-s)``, ``F(s) = prod (1 - p u)``)

        Dice(tau) = int exp(-s (tau + g)) F(s) [2 exp(-s) sum_{j <= tau} p_j / (1 - p_j u) + g] ds
        IoU(tau)  = (C(tau) + g) int exp(-s (tau + g)) prod_{j > tau} (1 - p_j u) ds

    in float64; then the volumes inside the two runs around the best one (inside a run of equal probabilities the
    score rises or falls throughout but for terms of the order 1 / tau^2).

    Args:
        values: float64 ``(K,)`` ascending, in [0, 1].
        counts: int64 ``(K,)``, how many pixels have each value.
        metric: "dice" or "iou".
        solver: "exact", or "rma" (the reciprocal moment approximation of the same scores).
        smooth: ``g``.
        prune: the mask is empty where no pixel has a higher probability than this; None: never.

    Returns:
        What :func:`utils.rankdice.rank_dice` finds for the pixels one by one.
    """
    present = counts > 0
    p, n = values[present][::-1], counts[present][::-1].astype(np.float64)
    row = _Row(p, n, metric, smooth, solver == "rma")
    empty = float(row.scores(np.zeros(1))[0]) if smooth else 0.0
    if p[0] <= (prune or 0.0):
        return Volume(0, math.inf, empty)
    ends = np.cumsum(n)
    at_ends = row.scores(ends)
    best = int(np.argmax(at_ends))
    tau, score = ends[best], at_ends[best]
    low = ends[best - 1] + 1 if best else 1.0
    high = ends[min(best + 1, len(ends) - 1)]
    while True:  # the interior: all volumes of a short stretch, else a grid, and again around its best
        tries = np.unique(np.rint(np.linspace(low, high, min(_INTERIOR, int(high - low) + 1))))
        at_tries = row.scores(tries)
        place = int(np.argmax(at_tries))
        if at_tries[place] > score:
            tau, score = tries[place], at_tries[place]
        step = tries[1] - tries[0] if len(tries) > 1 else 1
        if step <= 1:
            break
        low, high = max(1.0, tries[place] - step), min(ends[-1], tries[place] + step)
    if empty >= score:
        return Volume(0, math.inf, empty)
    return Volume(int(tau), float(p[np.searchsorted(ends, tau)]), float(score))


class _Row:
    """One class of one image as a table: probabilities ``p``, descending, with multiplicities ``n``."""

    def __init__(self, p: np.ndarray, n: np.ndarray, metric: str, smooth: float, approximate: bool) -> None:
        self.p, self.n, self.metric, self.g = p, n, metric, smooth
        self.approximate = approximate
        self.ends = np.concatenate([[0.0], np.cumsum(n)])
        self.mass = np.concatenate([[0.0], np.cumsum(n * p)])  # C at the ends
        self.mu = self.mass[-1]

    def scores(self, tau: np.ndarray) -> np.ndarray:
        """Return the expected score of each volume of ``tau``, ascending float64."""
        run = np.clip(np.searchsorted(self.ends, tau) - 1, 0, len(self.p) - 1)  # the run that the volume ends in
        inside = tau - self.ends[run]
        c = self.mass[run] + inside * self.p[run]
        if self.approximate:
            return self._reciprocal_moment(tau, c)
        result = np.empty_like(tau)
        rate = np.maximum(tau + self.mu + self.g, 1e-12)
        start = 0
        while start < len(tau):
            stop = int(np.searchsorted(rate, rate[start] * _SPREAD, side="right"))
            part = slice(start, stop)
            centre = float(np.sqrt(rate[start] * rate[stop - 1]))
            result[part] = self._integrate(tau[part], run[part], inside[part], c[part], centre)
            start = stop
        return result

    def _reciprocal_moment(self, tau: np.ndarray, c: np.ndarray) -> np.ndarray:
        g, mu = self.g, self.mu
        if self.metric == "iou":
            return (c + g) / np.maximum(tau + mu - c + g, 1e-300)
        return 2 * c / (tau + mu + 1 + g) + (g / (tau + mu + g) if g else 0.0)

    def _integrate(
        self, tau: np.ndarray, run: np.ndarray, inside: np.ndarray, c: np.ndarray, rate: float
    ) -> np.ndarray:
        s = _NODES / rate
        # 1 - p u, without the cancellation of 1 - p (1 - exp(-s)) where p is 1
        factor = (1 - self.p)[:, None] + self.p[:, None] * np.exp(-s)  # (K, nodes)
        logs = np.log(factor)
        cumulative = np.concatenate([np.zeros((1, len(s))), np.cumsum(self.n[:, None] * logs, axis=0)])
        exponent = _NODES - np.outer(tau + self.g, s)  # (tau, nodes)
        if self.metric == "iou":
            below = cumulative[-1] - cumulative[run] - inside[:, None] * logs[run]
            return (c + self.g) * (np.exp(exponent + below) @ _WEIGHTS) / rate
        share = self.p[:, None] / factor
        sums = np.concatenate([np.zeros((1, len(s))), np.cumsum(self.n[:, None] * share, axis=0)])
        above = sums[run] + inside[:, None] * share[run]
        return (np.exp(exponent + cumulative[-1]) * (2 * np.exp(-s) * above + self.g)) @ _WEIGHTS / rate


# --------------------------------------------------------------------------------------------- label maps


def top_pixels(spool: Spool, c: int, volume: Volume) -> np.ndarray:
    """Return the mask of class ``c``, bool ``(H, W)``: exactly ``volume.pixels``, ties broken by pixel index."""
    mask = np.zeros(spool.shape[1:], bool)
    if not volume.pixels:
        return mask
    cut = np.float16(volume.cutoff)
    above = sum(int((plane > cut).sum()) for plane in spool.planes(c))
    left, y = volume.pixels - above, 0
    for plane in spool.planes(c):
        ties = plane == cut
        rank = np.cumsum(ties.ravel(), dtype=np.int64).reshape(ties.shape)
        mask[y : y + len(plane)] = (plane > cut) | (ties & (rank <= left))
        left = max(0, left - int(rank[-1, -1]))
        y += len(plane)
    return mask


def label_masks(spool: Spool, volumes: Mapping[int, Volume], unassigned: int) -> np.ndarray:
    """Return one label per pixel: the most probable class among the masks that hold it, else ``unassigned``.

    What :func:`utils.predict.stored.pictures` makes of masks that have no label map of their own.

    Args:
        spool: the probabilities.
        volumes: the best mask of each class that has one.
        unassigned: label of pixels in no mask.
    """
    labels = np.full(spool.shape[1:], unassigned, np.uint8 if unassigned < 256 else np.uint16)
    best = np.full(spool.shape[1:], -1, np.float16)
    for c, volume in sorted(volumes.items()):
        if not volume.pixels:
            continue
        mask, y = top_pixels(spool, c, volume), 0
        for plane in spool.planes(c):
            rows = slice(y, y + len(plane))
            better = mask[rows] & (plane > best[rows])
            labels[rows][better] = c
            best[rows][better] = plane[better]
            y += len(plane)
    return labels


def label_map(
    spool: Spool, mass: np.ndarray, classes: Sequence[int] | None = None, smooth: float = 0.0, rounds: int = 20
) -> np.ndarray:
    """Return one label per pixel, int32 or smaller ``(H, W)``, with a high total of expected scores.

    The ascent of :func:`utils.rankdice.label_map`, a few rows at a time: from the most probable classes, every
    pixel goes to the class with the largest gain ``(2 p - s_c) / (tau_c + mu_c + 1)``, as long as the total of
    ``s_c = 2 C_c / (tau_c + mu_c + 1)`` rises.

    Args:
        spool: the probabilities.
        mass: the sum of the probabilities per class, float64 ``(classes,)``.
        classes: the classes that take part; None: all.
    """
    chosen = np.arange(spool.shape[0]) if classes is None else np.asarray(sorted(classes))
    mu = torch.from_numpy(mass[chosen])
    offset, slope = torch.zeros_like(mu), torch.ones_like(mu)
    labels, best = None, -1.0
    for _ in range(rounds + 1):
        candidate, tau, inside = _assign(spool, chosen, slope, offset)
        size = tau + mu + 1 + smooth
        score = (2 * inside + smooth) / size
        if labels is not None and float(score.sum()) <= best:
            break
        labels, best = candidate, float(score.sum())
        slope, offset = 2 / size, score / size
    assert labels is not None
    return labels


def _assign(spool: Spool, chosen: np.ndarray, slope: Tensor, offset: Tensor) -> tuple[np.ndarray, Tensor, Tensor]:
    """Give every pixel the class with the largest ``slope * p - offset``; count pixels and probability per class."""
    kind = torch.uint8 if len(chosen) <= 256 else torch.int32
    names = chosen.astype(np.uint8 if spool.shape[0] <= 256 else np.uint16)
    labels = np.empty(spool.shape[1:], names.dtype)
    tau, inside = torch.zeros(len(chosen), dtype=torch.float64), torch.zeros(len(chosen), dtype=torch.float64)
    for y, band in spool.bands(_PASS_BYTES):
        # Class by class on rows that stay in the cache: several times faster than argmax over a stack of them.
        best = winner = own = None
        for k, c in enumerate(chosen.tolist()):
            probs = torch.from_numpy(band[c]).float()
            gain = probs.double().mul_(slope[k]).sub_(offset[k])  # float32 would lose the smallest objects' digits
            if best is None or winner is None or own is None:
                best, winner, own = gain, torch.zeros_like(gain, dtype=kind), probs
                continue
            better = gain > best
            torch.maximum(best, gain, out=best)
            winner.masked_fill_(better, k)
            own = torch.where(better, probs, own)
        assert winner is not None
        assert own is not None
        index = winner.flatten().int()
        tau += torch.bincount(index, minlength=len(chosen))
        inside += torch.bincount(index, own.flatten().double(), minlength=len(chosen))
        labels[y : y + band.shape[1]] = names[winner.numpy()]
    return labels, tau, inside
