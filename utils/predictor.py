"""From images to masks with a trained model, in a few lines of Python::

    from utils.predictor import Predictor

    predict = Predictor("saved/.../best_model.pth")
    result = predict("street.jpg")  # a path, a PIL image, an array or a tensor; or a list of them
    result.labels  # (H, W) class ids
    result.masks  # (C, H, W) the overlapping masks of the rankdice procedure
    result.scores  # (C,) the Dice each of them can be expected to have

The probabilities are those of the whole image, averaged over the views of the chosen mode; procedures decide on
them as ``test.py`` does. Images too large for that are predicted in tiles and decided from a temporary file
(:mod:`utils.predict.spool`), within bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.checkpoint import LoadedModel, load_model
from utils.errors import UserError, did_you_mean
from utils.images import Pixels, ValueRange, read_pixels, to_pixels
from utils.predict import (
    PROCEDURES,
    Choice,
    PredictOptions,
    choose_classes,
    label_map,
    taking_part_in_labels,
    tiling,
)
from utils.predict import spool as streaming
from utils.predict.network import AMP_DTYPES, Ensemble, Network, check_finite, choose_device
from utils.predict.stored import pictures

ImageLike = str | Path | Image.Image | np.ndarray | Tensor

MODES = ("multiscale", "sliding", "single")
SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
UNASSIGNED = 255
# The network's activations for one view; above it an image is predicted in tiles. 1024 x 2048 at scale 2 fits.
MAX_PIXELS = 2**23


@dataclass(frozen=True, repr=False)
class Segmentation:
    """What a predictor found in one image of ``H x W`` pixels.

    ``labels``: ``(H, W)`` class ids, uint8 (uint16 with more than 255 classes); 255 (65535) for pixels without a class:
    those without data (``nodata``).
    ``scores``: float32 ``(C,)``, the expected Dice (or IoU) of each class's rankdice mask, 0 for empty masks;
    None for other procedures.
    ``volumes``: int64 ``(C,)``, the pixels of those masks.
    ``presence``: float32 ``(C,)``, the probability that each class is in the image, NaN for classes of no interest;
    None where the procedure does not look at it.
    ``masks``: bool ``(C, H, W)``, overlapping masks, where the procedure makes them and the image is not streamed.
    ``probs``: the probabilities, where they were asked for: float32 ``(C, H, W)`` on the CPU, or a
    :class:`utils.predict.spool.Spool` for a streamed image (close it after use).
    ``tiled``: whether a large image was predicted in tiles although the mode would have seen it whole.

    ``numpy.asarray(segmentation)`` is ``labels``; ``repr`` tells what was found, without the arrays.
    """

    labels: np.ndarray
    scores: np.ndarray | None = None
    volumes: np.ndarray | None = None
    masks: np.ndarray | None = None
    probs: Tensor | streaming.Spool | None = None
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
        """Return the mean of ``scores`` over the classes that have a mask; None where there is none."""
        if self.scores is None or self.volumes is None or not self.volumes.any():
            return None
        return float(self.scores[self.volumes > 0].mean())


class Predictor:
    """A trained model that segments images.

    Args:
        model: a checkpoint's path, or what :func:`utils.checkpoint.load_model` returned. A list of these is an
            ensemble: its probabilities are the mean of its members', and the first gives classes and options.
        predict: "T", "max" or "rankdice"; None: "rankdice" if the config's ``predict.test`` says so, else "max".
        mode: "multiscale" (the mean over ``scales``), "sliding" (overlapping tiles, blended), or "single" (one
            forward pass over the whole image); None: the config's ``predict.mode``.
        scales: of mode multiscale.
        flip: see the mirror image of every view as well.
        tile: side of a tile in pixels, or its (height, width); None: the crop size of the training, else 512.
        overlap: least share of a tile that it has in common with its neighbours.
        batch_size: images, or tiles, per forward pass.
        device: None: the GPU where there is one. A loaded model is moved to it.
        options: of the procedures; None: those of the config.
        temperature: of the probabilities; None: the config's.
        max_pixels: a larger view is predicted in tiles instead.
        memory: bytes that the probabilities of one image may take; a larger image is streamed. None: 512 MiB on the
            CPU, a tenth of the memory of a GPU. The peak is a few times as high.
        amp: precision of the network: "off", "bf16" or "fp16"; None: the config's ``trainer.amp``, which ``test.py``
            uses. True: bf16 on the CPU, fp16 on a GPU. Half precision is faster on hardware that supports it, and
            gives probabilities of about three digits.
        keep_masks, keep_probs: whether results carry ``masks`` and ``probs``.
        values: what the numbers of images mean; None: as in training (``value_range`` and ``nodata`` of its data).

    Raises:
        ValueError: an argument is out of its range.
        UserError: the checkpoint or the device cannot be used.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel | Sequence[str | Path | LoadedModel],
        *,
        predict: str | None = None,
        mode: str | None = None,
        scales: Sequence[float] = SCALES,
        flip: bool = False,
        tile: int | tuple[int, int] | None = None,
        overlap: float = 0.25,
        batch_size: int = 4,
        device: str | torch.device | None = None,
        options: PredictOptions | None = None,
        temperature: float | None = None,
        max_pixels: int = MAX_PIXELS,
        memory: int | None = None,
        amp: bool | str | None = None,
        keep_masks: bool = True,
        keep_probs: bool = False,
        values: ValueRange | None = None,
    ) -> None:
        self.device = choose_device(device)
        models = [model] if isinstance(model, str | Path | LoadedModel) else model
        members = [m if isinstance(m, LoadedModel) else load_model(m, self.device) for m in models]
        loaded = members[0]
        settings = loaded.config.predict
        self.facts, self.config = loaded.facts, loaded.config
        self.mode: str = mode if mode is not None else loaded.config.predict.mode
        changes: dict[str, Any] = {} if amp is None else {"amp": _amp(amp, self.device)}
        if temperature is not None:
            changes["temperature"] = temperature
        seen = tuple(scales) if self.mode == "multiscale" else (1.0,)
        networks = tuple(member.network(self.device, scales=seen, flip=flip, **changes) for member in members)
        self.network: Network | Ensemble = networks[0] if len(networks) == 1 else Ensemble(networks)
        self.procedure = predict or ("rankdice" if settings.test == "rankdice" else "max")
        self.values = values or ValueRange.of(self.facts.value_range, self.facts.nodata)
        self.options = options or PredictOptions.from_config(settings)
        self.scales = tuple(scales)
        self.tile = tile or _training_crop(loaded) or 512
        self.overlap, self.batch_size, self.max_pixels = overlap, batch_size, max_pixels
        self.memory = memory or _default_memory(self.device)
        self.keep_masks, self.keep_probs = keep_masks, keep_probs
        self._check()

    def _check(self) -> None:
        for name, value, known in (("predict", self.procedure, PROCEDURES), ("mode", self.mode, MODES)):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}{did_you_mean(value, known)}")
        for name in ("batch_size", "max_pixels", "memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1 expected, got {getattr(self, name)}")
        if min(self.tile if isinstance(self.tile, tuple) else [self.tile]) < 1:
            raise ValueError(f"tile: at least 1 expected, got {self.tile}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: a share in [0, 1) expected, got {self.overlap}")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales: positive numbers expected, got {list(self.scales)}")
        outside = [c for c in self.options.classes or () if not 0 <= c < self.facts.num_classes]
        if outside:
            raise UserError(
                f"predict.CoI: found {outside}; the model has the classes 0 to {self.facts.num_classes - 1}"
            )

    # ------------------------------------------------------------------------------------------ calling

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """Segment one image, or a list of images.

        Args:
            images: a path; a PIL image; an array ``(H, W)`` or ``(H, W, channels)`` or a tensor
                ``(channels, H, W)``, RGB; or a list of these. Their numbers mean what those of the training data
                mean: ``value_range`` and ``nodata`` of the training, else uint8 or floating point in [0, 1].

        Returns:
            A :class:`Segmentation`, or a list of them.
        """
        if isinstance(images, Sequence) and not isinstance(images, str):
            return self.segment([self.read(image) for image in images])
        return self.segment([self.read(images)])[0]

    def read(self, image: ImageLike) -> Pixels:
        """Return any kind of image with the channels that the model takes, and where it has no data.

        Pixels without data have the mean colour.
        """
        channels = self.facts.in_channels
        if isinstance(image, str | Path):
            return self._filled(read_pixels(image, channels, self.values))
        if isinstance(image, Tensor):
            if image.ndim != 3:
                raise ValueError(f"images: a tensor (channels, H, W) expected, got shape {tuple(image.shape)}")
            image = image.detach().cpu().permute(1, 2, 0).numpy()
        if not isinstance(image, np.ndarray | Image.Image):
            raise TypeError(f"images: a path, PIL image, array or tensor expected, got {type(image).__name__}")
        return self._filled(to_pixels(image, channels, self.values))

    def _filled(self, pixels: Pixels) -> Pixels:
        return pixels._replace(image=pixels.filled(self.facts.mean))

    @torch.inference_mode()
    def segment(self, images: Sequence[Pixels]) -> list[Segmentation]:
        """Segment images as :meth:`read` returns them; those of one size share forward passes."""
        results: dict[int, Segmentation] = {}
        groups: dict[Any, list[int]] = {}
        for index, (image, _) in enumerate(images):
            groups.setdefault((image.shape, image.dtype.str), []).append(index)
        for (shape, _), members in groups.items():
            if self.streams(*shape[:2]):
                for index in members:
                    results[index] = self._stream(_to_tensor(images[index].image), images[index].missing)
                continue
            for first in range(0, len(members), self.batch_size):
                part = members[first : first + self.batch_size]
                batch = torch.stack([_to_tensor(images[index].image) for index in part])
                probs = self.probabilities(batch)
                check_finite(probs)
                for row, index in zip(probs, part, strict=True):
                    erase(row, images[index].missing)
                for index, result in zip(part, self._decide(probs), strict=True):
                    results[index] = replace(result, tiled=self.tiles(*shape[:2]))
        for index, (_, missing) in enumerate(images):
            if missing is not None:
                results[index].labels[missing] = self._unassigned
        return [results[index] for index in range(len(images))]

    # ------------------------------------------------------------------------------------------ probabilities

    def views(self) -> dict[str, Any]:
        """Return what probabilities depend on beside the network: how files are read, and how images are cut."""
        cut = (self.mode == "sliding", self.tile, self.overlap, self.max_pixels)
        return {"values": str(self.values), "cut": cut}

    def tiles(self, height: int, width: int) -> bool:
        """Return whether an image of this size is cut into tiles although the mode is not "sliding"."""
        largest = max(1.0, *self.scales) if self.mode == "multiscale" else 1.0
        return self.mode != "sliding" and height * width * largest**2 > self.max_pixels

    def streams(self, height: int, width: int) -> bool:
        """Return whether the probabilities of an image of this size are too large to be held in memory."""
        return 4 * self.facts.num_classes * height * width > self.memory

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return float32 probabilities ``(B, C, H, W)`` on the model's device, averaged over the mode's views.

        Args:
            images: ``(B, channels, H, W)``, uint8 or floating point in [0, 1], on any device.
        """
        height, width = images.shape[-2:]
        if self.mode == "sliding" or self.tiles(height, width):
            tiles = tiling.Tiles(self.tile, self.overlap, self.batch_size)
            return tiling.sliding(self.network.probabilities, images, self.facts.num_classes, tiles).clamp_(max=1.0)
        return self.network.probabilities(images)

    def _checked(self, images: Tensor) -> Tensor:
        probs = self.network.probabilities(images)
        check_finite(probs)
        return probs

    # ------------------------------------------------------------------------------------------ decisions

    def _decide(self, probs: Tensor) -> list[Segmentation]:
        """Turn the probabilities of a batch into results, by the procedures that ``test.py`` uses."""
        found = PROCEDURES[self.procedure](probs, self.options)
        labels = pictures(self.procedure, probs, found, self.options)
        masks = found.masks.cpu().numpy() if self.keep_masks and found.masks is not None else None
        scores = None if found.scores is None else found.scores.float().cpu().numpy()
        volumes = None if found.volumes is None else found.volumes.cpu().numpy()
        presence = None if found.presence is None else found.presence.float().cpu().numpy()
        kept = probs.cpu() if self.keep_probs else None
        return [
            Segmentation(
                labels=labels[i],
                scores=None if scores is None else scores[i],
                volumes=None if volumes is None else volumes[i],
                presence=None if presence is None else presence[i],
                masks=None if masks is None else masks[i],
                probs=None if kept is None else kept[i],
            )
            for i in range(len(probs))
        ]

    @property
    def _unassigned(self) -> int:
        return UNASSIGNED if self.facts.num_classes <= UNASSIGNED else 65535

    def _small(self, labels: Tensor) -> np.ndarray:
        """Return labels in the smallest type that holds every class id and the mark of unassigned pixels."""
        return labels.cpu().numpy().astype(np.uint8 if self.facts.num_classes <= UNASSIGNED else np.uint16)

    # ------------------------------------------------------------------------------------------ large images

    def _stream(self, image: Tensor, missing: np.ndarray | None) -> Segmentation:
        """Segment one image ``(channels, H, W)`` whose probabilities are never in memory as a whole."""
        classes, (height, width) = self.facts.num_classes, image.shape[-2:]
        tiles = tiling.Tiles(self.tile, self.overlap, self.batch_size, max_bytes=self.memory)
        blocks = _without(missing, tiling.sliding_blocks(self._checked, image, classes, tiles))
        tiled = self.mode != "sliding"
        if self._decides_by_pixel and not self.keep_probs:
            return Segmentation(self._stream_labels(blocks, height, width), tiled=tiled)
        self._check_streamed_solver(height, width)
        spool = streaming.Spool(classes, height, width)
        try:
            result = replace(self._stream_decide(blocks, spool), tiled=tiled)
        except BaseException:
            spool.close()
            raise
        if not self.keep_probs:
            spool.close()
        return result

    @property
    def _decides_by_pixel(self) -> bool:
        """Whether the label of a pixel depends on that pixel alone."""
        return self.procedure == "T" or self.procedure == "max" and not self.options.restricts_max

    def _check_streamed_solver(self, height: int, width: int) -> None:
        if not self._decides_by_pixel and self.options.solver not in ("exact", "rma"):
            needed = 4 * self.facts.num_classes * height * width
            raise UserError(
                f"solver {self.options.solver!r} needs the probabilities of the whole {width} x {height} image in "
                f"memory ({needed / 2**30:.1f} GiB); use the solver 'exact', or allow the memory"
            )

    def _stream_labels(self, blocks: Iterable[tiling.Block], height: int, width: int) -> np.ndarray:
        """Decide pixel by pixel, block by block: for the procedures that need no more than a pixel."""
        labels = np.empty((height, width), np.uint8 if self.facts.num_classes <= UNASSIGNED else np.uint16)
        for block in blocks:
            tall, wide = block.scores.shape[1:]
            for top in range(0, tall, 64):  # a few rows: argmax makes int64
                rows = block.scores[None, :, top : top + 64]
                part = self._small(label_map(self.procedure, rows, self.options, unassigned=self._unassigned))[0]
                labels[block.y + top : block.y + top + len(part), block.x : block.x + wide] = part
        return labels

    def _stream_decide(self, blocks: Iterable[tiling.Block], spool: streaming.Spool) -> Segmentation:
        classes, height, width = spool.shape
        if self._decides_by_pixel:
            return Segmentation(self._stream_labels(_written(blocks, spool), height, width), probs=spool)
        for block in blocks:
            spool.write(block)
        counts = spool.counts()
        wanted = range(classes) if self.options.classes is None else sorted(self.options.classes)
        found = {c: self._volume(counts[c]) for c in wanted}
        volumes, scores = torch.zeros(1, classes, dtype=torch.int64), torch.zeros(1, classes, dtype=torch.float64)
        for c, volume in found.items():
            volumes[0, c], scores[0, c] = volume.pixels, volume.score
        highest = torch.tensor([[float(streaming.HALF_VALUES[row.nonzero()[0][-1]]) for row in counts]])
        choice = choose_classes(highest, scores, self.options)
        labels = self._stream_label_map(spool, counts, found[0] if classes == 1 else None, choice)
        kept = spool if self.keep_probs else None
        if self.procedure == "max":
            return Segmentation(labels, probs=kept, presence=choice.presence[0].float().numpy())
        absent = ~choice.chosen
        return Segmentation(
            labels,
            scores=choice.scores.masked_fill(absent, 0)[0].float().numpy(),
            volumes=volumes.masked_fill(absent, 0)[0].numpy(),
            presence=choice.presence[0].float().numpy(),
            probs=kept,
        )

    def _stream_label_map(
        self, spool: streaming.Spool, counts: np.ndarray, only: streaming.Volume | None, choice: Choice
    ) -> np.ndarray:
        """Return the label map of a spooled image; ``only``: the mask of a model with one channel."""
        if only is None:
            taking_part = taking_part_in_labels(choice.chosen, self.options)
            if self.procedure == "max":
                return streaming.most_probable(spool, taking_part)
            return streaming.label_map(spool, counts, taking_part, self.options.smooth)
        if not bool(choice.chosen[0, 0]):
            return np.zeros(spool.shape[1:], np.uint8)
        if self.procedure == "rankdice":
            return streaming.top_pixels(spool, 0, only).astype(np.uint8)
        return np.concatenate([plane > 0.5 for plane in spool.planes(0)]).astype(np.uint8)

    def _volume(self, counts: np.ndarray) -> streaming.Volume:
        chosen = self.options
        prune = chosen.prune if chosen.decides == "prune" else None
        return streaming.rank_dice_counts(
            streaming.HALF_VALUES, counts, chosen.metric, chosen.solver, chosen.smooth, prune
        )


def erase(probs: Tensor, missing: np.ndarray | None) -> None:
    """Set the probabilities ``(C, h, w)`` of pixels without data to 0, so that no procedure counts them."""
    if missing is not None:
        probs[:, torch.from_numpy(np.ascontiguousarray(missing)).to(probs.device)] = 0


def _without(missing: np.ndarray | None, blocks: Iterable[tiling.Block]) -> Iterator[tiling.Block]:
    for block in blocks:
        height, width = block.scores.shape[1:]
        part = None if missing is None else missing[block.y : block.y + height, block.x : block.x + width]
        erase(block.scores, part)
        yield block


def _written(blocks: Iterable[tiling.Block], spool: streaming.Spool) -> Iterator[tiling.Block]:
    for block in blocks:
        spool.write(block)
        yield block


def _amp(amp: bool | str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast."""
    if isinstance(amp, str):
        if amp not in AMP_DTYPES:
            raise ValueError(f"amp: {amp!r} is none of {', '.join(AMP_DTYPES)}{did_you_mean(amp, AMP_DTYPES)}")
        return AMP_DTYPES[amp]
    return None if not amp else torch.bfloat16 if device.type == "cpu" else torch.float16


def _default_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 10
    return 512 * 2**20


def _training_crop(loaded: LoadedModel) -> int | None:
    crop = loaded.config.train_loader.args.get("crop_size")
    return crop if isinstance(crop, int) and crop > 0 else None


def _to_tensor(image: np.ndarray) -> Tensor:
    """Return ``(H, W, C)`` as a tensor ``(C, H, W)`` that shares its memory."""
    if not image.flags.writeable:
        image = image.copy()  # torch would warn of it; arrays of PIL images are read-only
    return torch.from_numpy(image).permute(2, 0, 1)
