"""Score a model on a loader: one forward pass, any number of prediction procedures.

Used by the trainer for validation and by ``test.py``; the path from logits to counts exists only here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed
from utils.batch import Batch, Normalize, equal_sizes
from utils.checkpoint import Facts
from utils.errors import UserError
from utils.metrics import Metrics
from utils.predict import PROCEDURES, Activation, Prediction, PredictOptions, probabilities

Progress = Callable[[Any], Any]


@dataclass(frozen=True)
class Decision:
    """One column of a comparison: a procedure and what it was told."""

    procedure: str
    options: PredictOptions = PredictOptions()

    def __call__(self, probs: Tensor) -> Prediction:
        """Turn probabilities ``(B, C, H, W)`` into masks or labels."""
        return PROCEDURES[self.procedure](probs, self.options)


@dataclass
class Evaluator:
    """What stays the same from batch to batch of an evaluation.

    Args:
        model: returns logits ``(B, C, H, W)``; is put into evaluation mode.
        facts: of the data the model was trained on.
        activation: "softmax" or "sigmoid", see :func:`utils.predict.probabilities`.
        device: where the model is.
        temperature: see :func:`utils.predict.probabilities`.
        classes: the classes of interest; None: all.
        count_ignored: see :class:`utils.metrics.Metrics`.
        loss: scored per image and averaged over images, so that it does not depend on the batches; None: no loss.
        amp: dtype of autocast for the forward pass; None: float32.
        channels_last: memory layout of the images.
    """

    model: nn.Module
    facts: Facts
    activation: Activation
    device: torch.device
    temperature: float = 1.0
    classes: tuple[int, ...] | None = None
    count_ignored: bool = False
    loss: nn.Module | None = None
    amp: torch.dtype | None = None
    channels_last: bool = False
    normalize: Normalize = field(init=False)

    def __post_init__(self) -> None:
        """Move what the batches need to the device."""
        self.normalize = Normalize(self.facts.mean, self.facts.std).to(self.device)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images as the loaders give them."""
        images = self.normalize(images.to(self.device, non_blocking=True))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            output = self.model(images)
        return output["out"] if isinstance(output, dict) else output

    def new_metrics(self) -> Metrics:
        """Return empty metrics that keep their images."""
        return Metrics(
            self.facts.num_classes,
            self.facts.ignore_index,
            classes=self.classes,
            count_ignored=self.count_ignored,
            keep_images=True,
        )


@dataclass
class Part:
    """What is known of some images of equal size after their forward pass, for those who want to look.

    ``probs``: float32 ``(B, C, H, W)``; ``target``: ``(B, H, W)``; ``predictions``: per decision.
    """

    batch: Batch
    probs: Tensor
    target: Tensor
    predictions: dict[str, Prediction]


@dataclass
class Evaluation:
    """The outcome: metrics per decision, the mean loss, and what each decision cost.

    ``seconds``: per decision, decoding only, over all images of this process; ``peak_bytes``: the most memory a
    decision took beside the probabilities (CUDA only); ``forward_seconds``: the forward passes.
    """

    metrics: dict[str, Metrics]
    loss: float
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    forward_seconds: float
    images: int


@torch.no_grad()
def evaluate(
    evaluator: Evaluator,
    loader: Any,
    decisions: Mapping[str, Decision],
    *,
    progress: Progress = iter,
    on_part: Callable[[Part], None] | None = None,
    limit_batches: int | None = None,
) -> Evaluation:
    """Score every image of a loader once under each decision.

    With several processes each scores its share, and all return the same, complete outcome.

    Args:
        evaluator: the model and how it is used.
        loader: yields :class:`utils.batch.Batch`.
        decisions: name -> decision.
        progress: wraps the iteration (tqdm).
        on_part: called with the images, probabilities and predictions of each forward pass.
        limit_batches: stop after so many batches.

    Raises:
        UserError: a label of the data that the model has no class for.
    """
    evaluator.model.eval()
    metrics = {name: evaluator.new_metrics() for name in decisions}
    clock = _Clock(evaluator.device, decisions)
    losses: dict[str, float] = {}
    for batch in progress(_limited(loader, limit_batches)):
        for part in equal_sizes(batch):
            with clock.measure("forward"):
                logits = evaluator.logits(part.images)
                probs = probabilities(logits, evaluator.activation, evaluator.temperature)
            target = part.labels.to(evaluator.device, non_blocking=True)
            _check_labels(target, evaluator.facts, part.names)
            if evaluator.loss is not None:
                for i, name in enumerate(part.names):
                    losses[name] = float(evaluator.loss(logits[i : i + 1].float(), target[i : i + 1]))
            predictions = {}
            for name, decide in decisions.items():
                with clock.measure(name):
                    prediction = decide(probs)
                metrics[name].update(prediction, target, part.names)
                if on_part is not None:
                    predictions[name] = prediction
                del prediction
            if on_part is not None:
                on_part(Part(part, probs, target, predictions))
    return _gather(metrics, losses, clock, decisions)


def _limited(loader: Any, limit: int | None) -> Any:
    if limit is None or limit >= len(loader):
        return loader
    return _Limited(loader, limit)


class _Limited:
    """The first batches of a loader, with a length for progress bars."""

    def __init__(self, loader: Any, limit: int) -> None:
        self.loader, self.limit = loader, limit

    def __len__(self) -> int:
        return self.limit

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(self.loader):
            if index == self.limit:
                return
            yield batch


def _check_labels(target: Tensor, facts: Facts, names: list[str]) -> None:
    highest = max(facts.num_classes, 2) - 1  # one channel has the labels 0 and 1
    wrong = ((target > highest) | (target < 0)) & (target != facts.ignore_index)
    if wrong.any():
        image = int(wrong.flatten(1).any(dim=1).nonzero()[0])
        values = sorted(set(target[image][wrong[image]].tolist()))[:5]
        raise UserError(
            f"{names[image]}: its labels hold {values}, the model has the classes 0 to {highest} and ignores "
            f"{facts.ignore_index}; is this the data set the model was trained on? (classes, ignore_index)"
        )


class _Clock:
    """Adds up what each step takes: seconds, and on CUDA the memory above what was there before."""

    def __init__(self, device: torch.device, names: Mapping[str, Any]) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.seconds = dict.fromkeys([*names, "forward"], 0.0)
        self.peak = dict.fromkeys([*names, "forward"], 0)

    def measure(self, name: str) -> _Lap:
        return _Lap(self, name)


class _Lap:
    def __init__(self, clock: _Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        if self.clock.cuda is not None:
            torch.cuda.synchronize(self.clock.cuda)
            torch.cuda.reset_peak_memory_stats(self.clock.cuda)
            self.memory = torch.cuda.memory_allocated(self.clock.cuda)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        clock = self.clock
        if clock.cuda is not None:
            torch.cuda.synchronize(clock.cuda)
            used = torch.cuda.max_memory_allocated(clock.cuda) - self.memory
            clock.peak[self.name] = max(clock.peak[self.name], used)
        clock.seconds[self.name] += time.perf_counter() - self.start


def _gather(
    metrics: dict[str, Metrics], losses: dict[str, float], clock: _Clock, decisions: Mapping[str, Decision]
) -> Evaluation:
    """Bring the shares of all processes together."""
    shares = distributed.gather((metrics, losses, clock.seconds, clock.peak))
    merged: dict[str, Metrics] = {}
    all_losses: dict[str, float] = {}
    for name in decisions:
        merged[name] = shares[0][0][name]
        merged[name].merge([share[0][name] for share in shares[1:]])
    for _, share, _, _ in shares:
        all_losses |= share
    ordered = [all_losses[name] for name in sorted(all_losses)]
    seconds = {name: sum(share[2][name] for share in shares) for name in clock.seconds}
    return Evaluation(
        metrics=merged,
        loss=sum(ordered) / len(ordered) if ordered else float("nan"),
        seconds={name: seconds[name] for name in decisions},
        peak_bytes={name: max(share[3][name] for share in shares) for name in decisions},
        forward_seconds=seconds["forward"],
        images=len(next(iter(merged.values())).images) if merged else 0,
    )
