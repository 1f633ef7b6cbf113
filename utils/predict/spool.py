"""Decisions over images whose probabilities do not fit in memory.

The probabilities of a finished band of tiles go to a temporary file in float16 (:class:`Spool`). What a procedure
needs of them is small: float16 has 15,361 values in [0, 1], so one class of one image, however large, *is* the
table of how often each value occurs, and RankDice of the whole image is solved on that table
(:func:`utils.rankdice.rank_counts`): the same optimum over the same pixels, not one per tile. A label map then takes
a few passes over the file, a few rows at a time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.predict.tiling import Block
from utils.rankdice import Options, rank_counts
from utils.rankdice.label_map import Classes, ascend, check_classes

# The part of a spool that is in memory at a time, as float16.
CHUNK_BYTES = 32 * 2**20
_PASS_BYTES = 2 * 2**20
# float16 bit patterns of the numbers in [0, 1] are 0 .. 0x3C00, in the same order as the numbers.
HALF_VALUES = np.arange(0x3C00 + 1, dtype=np.uint16).view(np.float16).astype(np.float64)


class Spool:
    """The probabilities ``(classes, H, W)`` of one image in a temporary file, float16.

    The file has no name, so it never stays behind. It is where ``TMPDIR`` points. It is read and written explicitly,
    not mapped, so that the memory in use does not grow.

    Raises:
        UserError: not enough free space there.
    """

    def __init__(self, num_classes: int, height: int, width: int) -> None:
        self.shape = (num_classes, height, width)
        self._blocks: list[tuple[int, int, int, int, int]] = []  # y, x, h, w, offset in the file
        self._end = 0
        folder = tempfile.gettempdir()
        needed, free = 2 * num_classes * height * width, shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"the probabilities of a {width} x {height} image take {needed / 2**30:.1f} GiB of temporary space, "
                f"and {folder} has {free / 2**30:.1f} GiB free; set TMPDIR to a folder on a larger disk, or use "
                "--predict max"
            )
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        weakref.finalize(self, self._file.close)

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

    def bands(
        self, max_bytes: int = CHUNK_BYTES, classes: Sequence[int] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(y, probabilities)``: the image's rows in order, float16 ``(classes, rows, W)``, ``rows`` small."""
        classes, width = range(self.shape[0]) if classes is None else classes, self.shape[2]
        self._file.flush()
        step = max(1, max_bytes // (2 * len(classes) * width))
        for y in sorted({block[0] for block in self._blocks}):
            row = [block for block in self._blocks if block[0] == y]
            tall = row[0][2]
            for top in range(0, tall, step):
                rows = min(step, tall - top)
                band = np.empty((len(classes), rows, width), np.float16)
                for _, x, _, wide, start in row:
                    for plane, c in zip(band, classes, strict=True):
                        at = start + 2 * wide * (c * tall + top)
                        data = np.frombuffer(os.pread(self._file.fileno(), 2 * wide * rows, at), np.float16)
                        plane[:, x : x + wide] = data.reshape(rows, wide)
                yield y + top, band

    def planes(self, c: int) -> Iterator[np.ndarray]:
        """Yield the rows of class ``c`` in order, float16 ``(rows, W)``."""
        return (band[0] for _, band in self.bands(classes=[c]))

    def above(self, c: int, threshold: float) -> np.ndarray:
        """Return the pixels where class ``c`` is more probable than ``threshold``, bool ``(H, W)``."""
        return np.concatenate([plane.astype(np.float32) > threshold for plane in self.planes(c)])

    def counts(self) -> np.ndarray:
        """Return how often each float16 value occurs: int64 ``(classes, 15361)``, ascending (``HALF_VALUES``)."""
        table = np.zeros((self.shape[0], len(HALF_VALUES)), np.int64)
        for _, band in self.bands():
            for c, plane in enumerate(band.view(np.uint16)):
                table[c] += np.bincount(plane.ravel(), minlength=len(HALF_VALUES))
        return table


# --------------------------------------------------------------------------------------------- label maps


def top_pixels(spool: Spool, c: int, pixels: int, cutoff: float) -> np.ndarray:
    """Return the mask of class ``c``, bool ``(H, W)``: its ``pixels`` most probable ones, ties broken by pixel index.

    ``cutoff``: the lowest probability inside.
    """
    mask = np.zeros(spool.shape[1:], bool)
    if not pixels:
        return mask
    cut = np.float16(cutoff)
    left, y = pixels - sum(int((plane > cut).sum()) for plane in spool.planes(c)), 0
    for plane in spool.planes(c):
        ties = plane == cut
        rank = np.cumsum(ties.ravel(), dtype=np.int64).reshape(ties.shape)
        mask[y : y + len(plane)] = (plane > cut) | (ties & (rank <= left))
        left = max(0, left - int(rank[-1, -1]))
        y += len(plane)
    return mask


def most_probable(spool: Spool, classes: Tensor) -> np.ndarray:
    """Return the most probable class of each pixel, ``(H, W)``, among those that take part, bool ``(1, C)``."""
    labels = np.empty(spool.shape[1:], np.uint8 if spool.shape[0] <= 256 else np.uint16)
    for y, band in spool.bands(_PASS_BYTES):
        probs = torch.from_numpy(band).float().masked_fill_(~classes[0][:, None, None], -1.0)
        labels[y : y + band.shape[1]] = probs.max(dim=0).indices.numpy()
    return labels


def label_map(
    spool: Spool, counts: np.ndarray, classes: Sequence[int] | Tensor | None = None, smooth: float = 0.0
) -> np.ndarray:
    """Return one label per pixel, ``(H, W)``, as :func:`utils.rankdice.label_map`, a few rows at a time.

    Args:
        spool: the probabilities.
        counts: of the spool, ``Spool.counts()``.
        classes: the classes that take part, indices or bool ``(1, C)``; None: all.
        smooth: ``g``.
    """
    number, height, width = spool.shape
    chosen = check_classes(classes, 1, number, torch.device("cpu"))
    values, table = torch.from_numpy(HALF_VALUES), torch.from_numpy(counts)
    volumes, _, scores = rank_counts(values, table, Options(smooth=smooth, prune=None))
    mean = (table.double() @ values)[None]

    def bands() -> Iterator[tuple[int, Tensor]]:
        for y, band in spool.bands(_PASS_BYTES):
            yield y * width, torch.from_numpy(band).view(1, number, -1).double()

    labels = ascend(bands, height * width, Classes(mean, volumes[None].double(), scores[None], chosen), smooth)
    return labels.view(height, width).numpy().astype(np.uint8 if number <= 256 else np.uint16)
