"""From images to masks with a trained model, in a few lines of Python::

    from utils.predictor import Predictor

    predict = Predictor("saved/.../best_model.pth")
    result = predict("street.jpg")  # a path, a PIL image, an array or a tensor; or a list of them
    result.labels  # (H, W) class ids
    result.masks  # (C, H, W) the overlapping masks of the rankdice procedure
    result.scores  # (C,) the expected Dice of each of them

The probabilities are those that ``test.py`` scores (:mod:`utils.predict.network`), averaged over the views of the
chosen mode; the procedures decide as there (:mod:`utils.predict.segmentation`). Images that are too large are predicted
in tiles, and decided from a temporary file within bounded memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.checkpoint import LoadedModel, load_model
from utils.cli import MODES
from utils.errors import UserError, did_you_mean
from utils.images import Pixels, ValueRange, read_pixels, to_pixels
from utils.predict import PROCEDURES, PredictOptions, tiling
from utils.predict.network import AMP_DTYPES, SCALES, check_finite, choose_device
from utils.predict.segmentation import Decider, Segmentation

ImageLike = str | Path | Image.Image | np.ndarray | Tensor

# The largest view of an image that is predicted as a whole, not in tiles: 1024 x 2048 pixels at scale 2.
MAX_PIXELS = 2**23


class Predictor:
    """A trained model that segments images.

    Args:
        model: a checkpoint's path, or what :func:`utils.checkpoint.load_model` returned. A list of these is an
            ensemble: its probabilities are the mean of its members', and the first gives classes and options.
        predict: "T", "max" or "rankdice"; None: "rankdice" if the config's ``predict.test`` says so, else "max".
        mode: "multiscale" (the mean over ``scales``), "sliding" (overlapping tiles, blended), or "single" (one
            forward pass over the whole image); None: the config's ``predict.mode``.
        scales: of mode multiscale.
        flip: also use the mirror image of every view.
        tile: side of a tile in pixels, or its (height, width); None: the crop size of the training, else 512.
        overlap: smallest fraction of a tile that its neighbor also covers.
        batch_size: images, or tiles, per forward pass.
        device: None: the GPU if there is one. A loaded model is moved to it.
        options: of the procedures; None: those of the config.
        temperature: of the probabilities; None: the config's.
        max_pixels: a larger view is predicted in tiles instead.
        memory: bytes that the probabilities of one image may take; a larger image is streamed. None: 512 MiB on the
            CPU, a tenth of the memory of a GPU. The peak is a few times as high.
        amp: precision of the network: "off", "bf16" or "fp16"; None: the config's ``trainer.amp``, which ``test.py``
            uses. True: bf16 on the CPU, fp16 on a GPU. Half precision is faster on hardware that supports it, and
            gives probabilities of about three digits.
        keep_masks: whether results carry ``masks``; None: all but those of streamed images, whose probabilities would
            stay on disk until the result is closed.
        keep_probs: whether results carry ``probs``.
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
        keep_masks: bool | None = None,
        keep_probs: bool = False,
        values: ValueRange | None = None,
    ) -> None:
        amp_name = amp if isinstance(amp, str) else "off"
        for name, value, known in (
            ("predict", predict or "max", PROCEDURES),
            ("mode", mode or "single", MODES),
            ("amp", amp_name, AMP_DTYPES),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}{did_you_mean(value, known)}")
        self.device = choose_device(device)
        models = [model] if isinstance(model, str | Path | LoadedModel) else model
        members = [m if isinstance(m, LoadedModel) else load_model(m, self.device) for m in models]
        loaded = replace(members[0], others=members[1:])
        settings = loaded.config.predict
        self.facts, self.config = loaded.facts, loaded.config
        self.mode: str = mode if mode is not None else loaded.config.predict.mode
        half = torch.bfloat16 if self.device.type == "cpu" else torch.float16
        changes: dict[str, Any] = {} if amp is None else {"amp": half if amp is True else AMP_DTYPES[amp_name]}
        if temperature is not None:
            changes["temperature"] = temperature
        seen = tuple(scales) if self.mode == "multiscale" else (1.0,)
        self.network = loaded.network(self.device, scales=seen, flip=flip, **changes)
        self.procedure = predict or ("rankdice" if settings.test == "rankdice" else "max")
        self.values = values or ValueRange.of(self.facts.value_range, self.facts.nodata)
        self.options = options or PredictOptions.from_config(settings)
        self.scales = tuple(scales)
        self.cut = tiling.Tiles(_training_crop(loaded) if tile is None else tile, overlap, batch_size)
        self.batch_size, self.max_pixels = batch_size, max_pixels
        if memory is None:
            on_gpu = self.device.type == "cuda"
            memory = torch.cuda.get_device_properties(self.device).total_memory // 10 if on_gpu else 512 * 2**20
        self.memory = memory
        self._check()
        self.decide = Decider(
            self.procedure, self.options, keep_masks is not False, keep_probs, stream_masks=keep_masks is True
        )

    def _check(self) -> None:
        for name in ("max_pixels", "memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales: expected positive numbers, got {list(self.scales)}")
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

        Pixels without data have the mean color.
        """
        channels = self.facts.in_channels
        if isinstance(image, Tensor):
            if image.ndim != 3:
                raise ValueError(f"images: expected a tensor (channels, H, W), got shape {tuple(image.shape)}")
            image = image.float() if image.dtype == torch.bfloat16 else image  # which numpy lacks
            image = image.detach().cpu().permute(1, 2, 0).numpy()
        if isinstance(image, str | Path):
            pixels = read_pixels(image, channels, self.values)
        elif isinstance(image, np.ndarray | Image.Image):
            pixels = to_pixels(image, channels, self.values)
        else:
            raise TypeError(f"images: a path, PIL image, array or tensor expected, got {type(image).__name__}")
        return pixels._replace(image=pixels.filled(self.facts.mean))

    @torch.inference_mode()
    def segment(self, images: Sequence[Pixels]) -> list[Segmentation]:
        """Segment images as :meth:`read` returns them; those of one size share forward passes."""
        results: dict[int, Segmentation] = {}
        groups: dict[Any, list[int]] = {}
        for index, (image, _) in enumerate(images):
            groups.setdefault((image.shape, image.dtype.str), []).append(index)
        for (shape, _), members in groups.items():
            size = 1 if self.streams(*shape[:2]) else self.batch_size
            for first in range(0, len(members), size):
                part = members[first : first + size]
                found = self._segment_equal([images[index] for index in part])
                results |= zip(part, found, strict=True)
        return [results[index] for index in range(len(images))]

    def _segment_equal(self, images: list[Pixels]) -> list[Segmentation]:
        """Segment images of one size in one batch."""
        height, width = images[0].image.shape[:2]
        # Arrays of PIL images are read-only, which torch would warn of.
        arrays = [image if image.flags.writeable else image.copy() for image, _ in images]
        tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
        if self.streams(height, width):  # one image, whose probabilities are never in memory as a whole
            classes, cut = self.facts.num_classes, replace(self.cut, max_bytes=self.memory)
            forward = lambda tiles: check_finite(self.network.probabilities(tiles))  # noqa: E731
            blocks = tiling.sliding_blocks(forward, tensors[0], classes, cut)
            result = self.decide.stream(blocks, (classes, height, width), images[0].missing)
            return [replace(result, tiled=self.mode != "sliding")]
        probs = check_finite(self.probabilities(torch.stack(tensors)))
        found = self.decide(probs, [pixels.missing for pixels in images])
        return [replace(one, tiled=self.tiles(height, width)) for one in found]

    # ------------------------------------------------------------------------------------------ probabilities

    def views(self) -> dict[str, Any]:
        """Return what else probabilities depend on, besides the network: how files are read and images are cut."""
        cut = (self.mode == "sliding", self.cut.sides, self.cut.overlap, self.max_pixels)
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
            probs = tiling.sliding(self.network.probabilities, images, self.facts.num_classes, self.cut)
            return probs.clamp_(max=1.0)
        return self.network.probabilities(images)


def _training_crop(loaded: LoadedModel) -> int | tuple[int, int]:
    """Return the side of the crops in training, or their (height, width); 512 if images were not cropped."""
    crop = loaded.config.train_loader.args.get("crop_size")
    if isinstance(crop, Sequence) and len(crop) == 2 and min(crop) > 0:
        return int(crop[0]), int(crop[1])
    return crop if isinstance(crop, int) and crop > 0 else 512
