"""From probabilities to labels, masks and scores, in the same way for images of any size.

:class:`Decider` turns the probabilities of a batch, or the stream of blocks of an image that does not fit in memory,
into one :class:`Segmentation` per image. Predictor, ``inference.py``, the demo page and ``python -m utils.predict`` use
it; the procedures themselves are in :mod:`utils.predict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.predict import PROCEDURES, PredictOptions, label_map, single_class, spool, taking_part_in_labels
from utils.predict.files import label_type, labels_for_png
from utils.predict.spool import HALF_VALUES, Spool
from utils.predict.tiling import Block
from utils.presence import choose_classes
from utils.rankdice import rank_counts

STREAMED = ("T", "max", "rankdice")  # procedures for images that do not fit in memory
_ROWS = 64  # decided at a time, pixel by pixel: argmax makes int64


@dataclass(frozen=True, repr=False)
class Segmentation:
    """What was found in one image of ``H x W`` pixels.

    ``numpy.asarray(segmentation)`` is ``labels``; ``repr`` shows what was found, without the arrays.

    Attributes:
        labels: ``(H, W)`` class ids, uint8 (uint16 with more than 255 classes); 255 (65535) for unassigned pixels:
            those without data, and those that procedure T leaves.
        scores: float32 ``(C,)``, the expected Dice (or IoU) of each class's mask, 0 without a mask; None for procedures
            that do not know it.
        volumes: int64 ``(C,)``, the pixels of those masks.
        masks: bool ``(H, W)`` by class, overlapping: an array ``(C, H, W)``, or :class:`StreamedMasks`.
        probs: float32 ``(C, H, W)`` on the CPU, or the :class:`utils.predict.spool.Spool` of a streamed image.
        tiled: whether a large image was predicted in tiles although the mode would have seen it whole.
        presence: float32 ``(C,)``, the probability that each class is in the image, NaN for classes of no interest;
            None without a presence fit, and for procedures that do not look at it.
    """

    labels: np.ndarray
    scores: np.ndarray | None = None
    volumes: np.ndarray | None = None
    masks: np.ndarray | StreamedMasks | None = None
    probs: Tensor | Spool | None = None
    tiled: bool = False
    presence: np.ndarray | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.labels, dtype=dtype, copy=copy) if copy is not None else np.asarray(self.labels, dtype)

    def __repr__(self) -> str:
        height, width = self.labels.shape
        found = ", ".join(str(label) for label in np.unique(self.labels))
        parts = [f"{height} x {width}", f"labels {found or 'none'}"]
        if self.scores is not None and self.volumes is not None:
            scores = zip(self.scores.tolist(), self.volumes.tolist(), strict=True)
            listed = ", ".join(f"{c}: {score:.3f}" for c, (score, volume) in enumerate(scores) if volume)
            parts.append(f"expected scores {{{listed}}}")
        parts += [f"with {name}" for name in ("masks", "probs") if getattr(self, name) is not None]
        parts += ["tiled"] * self.tiled
        return f"Segmentation({', '.join(parts)})"

    @property
    def expected(self) -> float | None:
        """The mean of ``scores`` over the classes that have a mask; None if none has."""
        if self.scores is None or self.volumes is None or not self.volumes.any():
            return None
        return float(self.scores[self.volumes > 0].mean())

    def close(self) -> None:
        """Free the disk space of a streamed image; its masks and probabilities cannot be read afterwards."""
        for kept in (self.probs, getattr(self.masks, "spool", None)):
            if isinstance(kept, Spool):
                kept.close()


@dataclass(frozen=True)
class StreamedMasks:
    """The overlapping masks of a streamed image, made from its spool one at a time: ``masks[c]`` is bool ``(H, W)``."""

    spool: Spool
    make: Callable[[int], np.ndarray]

    def __getitem__(self, c: int) -> np.ndarray:
        return self.make(c)


@dataclass(frozen=True)
class Decider:
    """A procedure with its options, and what is kept of an image."""

    procedure: str  # "T", "max" or "rankdice"
    options: PredictOptions
    keep_masks: bool = False  # whether results carry masks
    keep_probs: bool = False  # whether results carry probs
    stream_masks: bool = False  # whether streamed images also carry masks, which keeps their probabilities on disk

    def __call__(self, probs: Tensor, missing: Sequence[np.ndarray | None] = ()) -> list[Segmentation]:
        """Decide on a batch.

        Args:
            probs: float32 ``(B, C, H, W)``; those of pixels without data become 0.
            missing: per image the pixels without data, bool ``(H, W)``, or None. They belong to no class.
        """
        for image, where in zip(probs, missing, strict=False):
            erase(image, where)
        found = PROCEDURES[self.procedure](probs, self.options)
        labels = labels_for_png(self.procedure, probs, found, self.options)
        for image, where in zip(labels, missing, strict=False):
            if where is not None:
                image[where] = np.iinfo(labels.dtype).max
        numbers: dict[str, Any] = {
            "scores": None if found.scores is None else found.scores.float().cpu().numpy(),
            "volumes": None if found.volumes is None else found.volumes.cpu().numpy(),
            "presence": _known(found.presence, self.options),
            "masks": found.masks.cpu().numpy() if self.keep_masks and found.masks is not None else None,
            "probs": probs.cpu() if self.keep_probs else None,
        }
        return [
            Segmentation(labels[i], **{name: value[i] for name, value in numbers.items() if value is not None})
            for i in range(len(probs))
        ]

    # -- images whose probabilities do not fit in memory -----------------------------------------------------------

    @property
    def by_pixel(self) -> bool:
        """Whether the label of a pixel depends on that pixel alone."""
        return self.procedure == "T" or self.procedure == "max" and not self.options.restricts_max

    def stream(
        self, blocks: Iterable[Block], shape: tuple[int, int, int], missing: np.ndarray | None = None
    ) -> Segmentation:
        """Decide on one image whose probabilities are never in memory as a whole.

        The decision is the same as that of :meth:`__call__` for the probabilities as float16. If nothing but the pixels
        themselves matters and nothing is kept, they are not rounded and not written to disk.

        Args:
            blocks: a partition of the image, from top to bottom within each column.
            shape: ``(C, H, W)``.
            missing: the pixels without data, bool ``(H, W)``; they belong to no class.

        Raises:
            UserError: the solver needs all probabilities in memory, or the disk is too small.
        """
        if missing is not None:
            blocks = _erased(blocks, missing)
        keep_masks = self.stream_masks and self.procedure != "max"
        if self.by_pixel and not keep_masks and not self.keep_probs:
            result = Segmentation(self._by_pixel(((b.y, b.x, b.scores) for b in blocks), shape))
        else:
            self._check_streamed(*shape)
            with ExitStack() as disk_space:
                disk = Spool(*shape)
                disk_space.callback(disk.close)
                for block in blocks:
                    disk.write(block)
                result = self._spooled(disk)
                result = replace(
                    result, masks=result.masks if keep_masks else None, probs=disk if self.keep_probs else None
                )
                if keep_masks or self.keep_probs:
                    disk_space.pop_all()
        if missing is not None:
            result.labels[missing] = np.iinfo(result.labels.dtype).max
        return result

    def _check_streamed(self, classes: int, height: int, width: int) -> None:
        if self.by_pixel:
            return
        what, instead = f"procedure {self.procedure!r}", f"one of the procedures {', '.join(STREAMED)}"
        if self.procedure in STREAMED:
            what, instead = f"solver {self.options.solver!r}", "the solver 'exact'"
            if self.options.solver in ("exact", "rma"):
                return
        raise UserError(
            f"{what} needs the probabilities of the whole {width} x {height} image in memory "
            f"({4 * classes * height * width / 2**30:.1f} GiB); use {instead}, or allow more memory (--memory)"
        )

    def _by_pixel(self, pieces: Iterable[tuple[int, int, Tensor]], shape: tuple[int, int, int]) -> np.ndarray:
        """Return the label map, from pieces of the probabilities ``(C, h, w)`` with their row and column."""
        classes, height, width = shape
        kind = label_type(classes)
        labels = np.empty((height, width), kind)
        for y, x, probs in pieces:
            for top in range(0, probs.shape[1], _ROWS):
                rows = probs[None, :, top : top + _ROWS]
                part = label_map(self.procedure, rows, self.options, unassigned=int(np.iinfo(kind).max))[0]
                labels[y + top : y + top + len(part), x : x + part.shape[1]] = part.cpu().numpy().astype(kind)
        return labels

    def _spooled(self, disk: Spool) -> Segmentation:
        if self.by_pixel:
            bands = ((y, 0, torch.from_numpy(band).float()) for y, band in disk.bands())
            masks = StreamedMasks(disk, lambda c: disk.above(c, self.options.threshold))
            return Segmentation(self._by_pixel(bands, disk.shape), masks=masks)
        counts = disk.counts()
        ranked = rank_counts(torch.from_numpy(HALF_VALUES), torch.from_numpy(counts), self.options.ranking)
        highest = HALF_VALUES[::-1][(counts[:, ::-1] > 0).argmax(axis=1)]
        choice = choose_classes(torch.from_numpy(highest)[None], ranked[2][None], self.options)
        volumes = ranked[0].masked_fill(~choice.chosen[0], 0)
        masks = StreamedMasks(disk, lambda c: spool.top_pixels(disk, c, int(volumes[c]), float(ranked[1][c])))
        labels, seen = self._label_map(disk, counts, choice.chosen, masks), _known(choice.presence, self.options)
        presence = None if seen is None else seen[0]
        if self.procedure == "max":
            return Segmentation(labels, presence=presence)
        scores = choice.scores.masked_fill(~choice.chosen, 0)[0].float().numpy()
        return Segmentation(labels, scores, volumes.numpy(), masks, presence=presence)

    def _label_map(self, disk: Spool, counts: np.ndarray, chosen: Tensor, masks: StreamedMasks) -> np.ndarray:
        """Return the label map of a procedure that looks at the whole image."""
        if disk.shape[0] == 1:
            mask = disk.above(0, 0.5) & bool(chosen) if self.procedure == "max" else masks[0]
            return mask.astype(np.uint8)
        taking_part = taking_part_in_labels(chosen, self.options)
        if self.procedure == "max":
            return spool.most_probable(disk, taking_part)
        only = single_class(disk.shape[0], self.options)
        if only is not None:
            return np.where(masks[only], only, 1 - only).astype(np.uint8)
        return spool.label_map(disk, counts, taking_part, self.options.smooth)


def _known(presence: Tensor | None, options: PredictOptions) -> np.ndarray | None:
    """Return the probabilities that classes are in the image ``(B, C)``; None without a fit, which alone knows them."""
    return presence.float().cpu().numpy() if presence is not None and options.chooses_by == "fitted" else None


def erase(probs: Tensor, missing: np.ndarray | None) -> None:
    """Set the probabilities ``(C, h, w)`` of pixels without data to 0, so that no procedure counts them."""
    if missing is not None:
        probs[:, torch.from_numpy(np.ascontiguousarray(missing)).to(probs.device)] = 0


def _erased(blocks: Iterable[Block], missing: np.ndarray) -> Iterator[Block]:
    for block in blocks:
        height, width = block.scores.shape[1:]
        erase(block.scores, missing[block.y : block.y + height, block.x : block.x + width])
        yield block
