"""From images to probabilities, in the same way for all users.

Validation during training, ``test.py``, ``inference.py``, :class:`utils.predictor.Predictor` and the export all call
:class:`Network`, so they see the same probabilities: the same padding, views, mixed precision, memory format,
temperature and link function (softmax or sigmoid).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.batch import Normalize
from utils.config.schema import Config
from utils.errors import UserError
from utils.facts import Facts
from utils.predict import Activation, probabilities, tiling

# trainer.amp of the config -> the dtype of autocast.
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Smaller images are padded: after five halvings, nothing would be left of them.
SMALLEST_SIDE = 32
# Of mode multiscale.
SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Network:
    """A trained network in evaluation mode, called with images as the loaders yield them."""

    model: nn.Module  # returns logits (B, C, H, W) for normalized images, or {"out": logits}
    facts: Facts  # of the data the model was trained on
    activation: Activation  # see utils.predict.probabilities
    device: torch.device = _CPU  # where the model is; images are moved to it
    temperature: float = 1.0  # logits are divided by it
    bias: Sequence[float] | None = None  # added to the logits after that, one number per class; None: nothing is added
    amp: torch.dtype | None = None  # of autocast; None: float32
    channels_last: bool = False  # memory format of the images in the network
    scales: Sequence[float] = (1.0,)  # probabilities are the mean over these views and their mirror images
    flip: bool = False  # (tiling.views)
    normalize: Normalize = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a number above 0, found {self.temperature}")
        self.model.eval()
        object.__setattr__(self, "normalize", Normalize(self.facts.mean, self.facts.std).to(self.device))

    @classmethod
    def from_config(
        cls, model: nn.Module, facts: Facts, activation: Activation, config: Config, **changes: Any
    ) -> Network:
        """Return a network set up as a config says; ``changes``: other values for fields."""
        settings: dict[str, Any] = {
            "temperature": config.predict.temperature,
            "bias": config.predict.bias,
            "amp": AMP_DTYPES[config.trainer.amp],
            "channels_last": config.trainer.channels_last,
        }
        return cls(model, facts, activation, **(settings | changes))

    @property
    def averages(self) -> bool:
        """Whether probabilities are the mean over several views of an image."""
        return self.flip or tuple(self.scales) != (1.0,)

    def settings(self) -> dict[str, Any]:
        """Return all that the probabilities depend on, except the weights and the image."""
        names = ("activation", "temperature", "bias", "amp", "channels_last", "scales", "flip")
        return {name: getattr(self, name) for name in names} | {"mean": self.facts.mean, "std": self.facts.std}

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, C, H, W)`` of one view, in the dtype that the model computes in.

        Args:
            images: ``(B, channels, H, W)``, uint8, or floating point in [0, 1]. Sides under 32 pixels, and sides that
                are not multiples of the model's ``size_divisor``, are padded with the border's pixels; the logits
                are cropped back.
        """
        return self._seen(self._normalized(images))

    def probabilities(self, images: Tensor) -> Tensor:
        """Return float32 probabilities ``(B, C, H, W)``, the mean over the views; ``images``: see :meth:`logits`."""
        if not self.averages:
            return self._link(self.logits(images))
        probs = tiling.views(self._seen, self._normalized(images), self.scales, self.flip, link=self._link)
        return probs.clamp_(max=1.0)  # the mean of ones may round to slightly more

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities ``(B, C, H, W)``; for a mean over views, the logits that give the mean."""
        if not self.averages:
            logits = self.logits(images)
            return logits, self._link(logits)
        probs = self.probabilities(images)
        return unlink(probs, self.activation), probs

    def _normalized(self, images: Tensor) -> Tensor:
        return self.normalize(images.to(self.device, non_blocking=True))

    def _seen(self, images: Tensor) -> Tensor:
        """Return the logits of normalized images, padded if the model does not support their size."""
        height, width = images.shape[-2:]
        images = tiling.pad_to(images, SMALLEST_SIDE, getattr(self.model, "size_divisor", 1))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.amp) if self.amp is not None else nullcontext():
            output = self.model(images)
        return (output["out"] if isinstance(output, dict) else output)[..., :height, :width]

    def _link(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.activation, self.temperature, self.bias)


@dataclass(frozen=True)
class Ensemble:
    """Several networks for the same classes; the probabilities are the mean of theirs.

    Has the interface of :class:`Network`, with facts, link function and device of the first. Each member keeps its own
    normalization, temperature and precision.

    Raises:
        UserError: the members differ in their classes, channels or link function.
    """

    members: tuple[Network, ...]
    facts: Facts = field(init=False, repr=False)
    activation: Activation = field(init=False)
    device: torch.device = field(init=False)

    temperature = 1.0  # the members have applied their own

    def __post_init__(self) -> None:
        first, *others = self.members
        for name in ("facts", "activation", "device"):
            object.__setattr__(self, name, getattr(first, name))
        for other in others:
            for name in ("num_classes", "class_names", "in_channels", "ignore_index"):
                expected, found = getattr(first.facts, name), getattr(other.facts, name)
                if expected != found:
                    raise UserError(
                        f"the models of an ensemble must agree in {name}: the first has {expected}, another has {found}"
                    )
            if other.activation != first.activation and first.facts.num_classes > 1:
                raise UserError(
                    "the models of an ensemble must all use a softmax, or all sigmoids: the loss of the first implies "
                    f"{first.activation}, that of another {other.activation}"
                )

    @property
    def averages(self) -> bool:
        """Whether the members average over several views of an image."""
        return any(member.averages for member in self.members)

    def settings(self) -> list[dict[str, Any]]:
        """Return all that the probabilities depend on, except the weights and the image."""
        return [member.settings() for member in self.members]

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the mean of the members' probabilities, float32 ``(B, C, H, W)``."""
        total = self.members[0].probabilities(images)
        for member in self.members[1:]:
            total = total + member.probabilities(images).to(total.device)
        return (total / len(self.members)).clamp_(max=1.0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities, and the logits that give them."""
        probs = self.probabilities(images)
        return unlink(probs, self.activation), probs


@dataclass(frozen=True)
class SavedNetwork:
    """Has the interface of :class:`Network`; its "images" are saved probabilities."""

    facts: Facts
    activation: Activation  # how logits are made from the probabilities
    device: torch.device  # where they are moved to
    temperature: float = 1.0  # and bias: applied to those logits (utils.predict.probabilities)
    bias: Sequence[float] | None = None

    averages = False

    def settings(self) -> dict[str, Any]:
        """Return what the probabilities depend on, except the files."""
        return {"temperature": self.temperature, "bias": self.bias}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities ``(B, C, H, W)``."""
        images = images.to(self.device)
        logits = unlink(images, self.activation)
        if self.temperature == 1 and self.bias is None:
            return logits, images  # the very numbers that were saved
        return logits, probabilities(logits, self.activation, self.temperature, self.bias)


#: What an evaluation needs.
AnyNetwork = Network | Ensemble | SavedNetwork


def unlink(probs: Tensor, activation: Activation) -> Tensor:
    """Return logits ``(B, C, H, W)`` whose softmax or sigmoid is ``probs``."""
    tiny = torch.finfo(probs.dtype).tiny
    logits = probs.clamp_min(tiny).log()
    if activation == "sigmoid" or probs.shape[1] == 1:
        logits = logits - (1 - probs).clamp_min(tiny).log()
    return logits


def check_finite(probs: Tensor, names: Sequence[str] = ()) -> Tensor:
    """Return probabilities ``(B, C, H, W)`` as they are, unless they contain NaN or infinity.

    Raises:
        UserError: names the first such image, if names are given, and the usual causes.
    """
    bad = ~probs.flatten(1).sum(dim=1).isfinite()  # one pass, no copy; values in [0, 1] cannot overflow float32
    if bad.any():
        name = f"{names[int(bad.nonzero()[0])]}: " if names else ""
        raise UserError(
            f"{name}the network's probabilities are not finite (NaN or infinity). Either the image or the weights "
            "contain such values (the training diverged), or half precision overflows (try trainer.amp bf16 or off)"
        )
    return probs


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return a usable device: from its name, a GPU's number as text, or None for the GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    if device is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else _CPU
    if isinstance(device, str) and device.isdigit():
        device = f"cuda:{device}"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = f"the CPU and {count} GPU(s), 0 to {count - 1}" if count else "the CPU only, no GPU was found"
        # Without any GPU, torch's own message asks for a driver; for a GPU that exists it names the real problem.
        named = isinstance(device, torch.device) and (device.index or 0) < count
        reason = f" ({str(error).strip().splitlines()[0]})" if named else ""
        use = "use one of them, or cpu" if count else "use -d cpu, or leave -d out"
        raise UserError(f"device {str(device)!r} cannot be used{reason}: this machine has {there}; {use}") from None
    return device
