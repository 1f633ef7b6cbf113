"""Score a model on a loader: one forward pass, any number of prediction procedures.

Used by the trainer for validation and by ``test.py``; the path from logits to counts exists only here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed
from utils.batch import Batch, equal_sizes
from utils.errors import UserError
from utils.evaluation.cost import Clock
from utils.facts import Facts
from utils.metrics import Counts, Metrics
from utils.predict import PROCEDURES, Prediction, PredictOptions, label_map
from utils.predict.network import AnyNetwork, check_finite
from utils.progress import live_scores

Progress = Callable[[Any], Any]

# Solvers of utils.rankdice that can maximize the expected IoU.
IOU_SOLVERS = ("exact", "rma")


@dataclass(frozen=True)
class Decision:
    """One column of a comparison: a procedure and its options.

    ``as_labels``: score the label map that inference writes, see :func:`utils.predict.label_map`, not the masks.
    """

    procedure: str
    options: PredictOptions = PredictOptions()
    as_labels: bool = False

    def __call__(self, probs: Tensor) -> Prediction:
        """Turn probabilities ``(B, C, H, W)`` into masks or labels."""
        found = PROCEDURES[self.procedure](probs, self.options)
        if not self.as_labels:
            return found
        labels = label_map(self.procedure, probs, self.options, found)
        return Prediction(labels=labels, chosen=found.chosen, presence=found.presence)

    @property
    def expects(self) -> str | None:
        """The score that the procedure states an expectation of: "dice", "iou" or None."""
        return self.options.metric if self.procedure == "rankdice" and not self.as_labels else None


def single_decision(procedure: str, options: PredictOptions) -> dict[str, Decision]:
    """Return one procedure with the options of inference, under its name in :func:`all_decisions`."""
    name = "max_present" if procedure == "max" and options.restricts_max else procedure
    return {name: Decision(procedure, options)}


def deployed(procedure: str, options: PredictOptions) -> str:
    """Return the name in :func:`all_decisions` of what inference.py does with a procedure and these options."""
    if procedure == "T" and options.threshold != 0.5:
        return "T_tuned"
    if procedure == "rankdice" and options.metric == "iou":
        return "rankdice_iou"
    return next(iter(single_decision(procedure, options)))


def all_decisions(options: PredictOptions) -> dict[str, Decision]:
    """Return every procedure side by side, by the names of the results.

    * ``T``: threshold 0.5; ``T_tuned``: the config's threshold, if it differs;
    * ``max``: the plain argmax; ``max_present``: argmax over the classes predicted to be in the image;
    * ``rankdice``: the masks with the highest expected Dice, as the config says;
    * ``rankdice_paper``: the same for all classes with a probability above 0.5;
    * ``rankdice_map``: the label map that ``inference.py`` writes for ``rankdice``;
    * ``rankdice_iou``: the masks with the highest expected IoU.
    """
    decisions = {"T": Decision("T", replace(options, threshold=0.5))}
    if options.threshold != 0.5:
        decisions["T_tuned"] = Decision("T", options)
    dice = options.with_metric("dice")
    solver = options.solver if options.solver in IOU_SOLVERS else "exact"
    return decisions | {
        "max": Decision("max", replace(options, presence="all")),
        "max_present": Decision("max", replace(dice, presence=options.chooses_by)),
        "rankdice": Decision("rankdice", dice),
        "rankdice_paper": Decision("rankdice", replace(dice, presence="prune", prune=0.5)),
        "rankdice_map": Decision("rankdice", dice, as_labels=True),
        "rankdice_iou": Decision("rankdice", replace(options, metric="iou", solver=solver)),
    }


@dataclass
class Evaluator:
    """What stays the same from batch to batch of an evaluation.

    Args:
        network: from images to probabilities; is put into evaluation mode.
        classes: the classes of interest; None: all.
        count_ignored: see :class:`utils.metrics.Metrics`.
        loss: scored per image and averaged over the images with labeled pixels, so that it does not depend on the
            batches; None: no loss.
    """

    network: AnyNetwork
    classes: tuple[int, ...] | None = None
    count_ignored: bool = False
    loss: nn.Module | None = None

    @property
    def facts(self) -> Facts:
        """The facts of the data that the network was trained on."""
        return self.network.facts

    def new_metrics(self, decision: Decision) -> Metrics:
        """Return empty metrics for what is decided so, which keep their images."""
        return Metrics(
            self.facts.num_classes,
            self.facts.ignore_index,
            classes=self.classes,
            count_ignored=self.count_ignored,
            keep_images=True,
            expects=decision.expects or "dice",
        )


@dataclass
class Part:
    """Images of equal size after their forward pass, with probabilities and predictions, for observers.

    ``logits``, ``probs``: ``(B, C, H, W)``, probabilities float32; ``target``: ``(B, H, W)``; ``predictions`` and
    ``counts``: per decision.
    """

    batch: Batch
    logits: Tensor
    probs: Tensor
    target: Tensor
    predictions: dict[str, Prediction]
    counts: dict[str, Counts]


@dataclass
class Evaluation:
    """The outcome: metrics per decision, the mean loss, and what each decision cost.

    ``seconds``: of decoding all images under each decision, the forward passes not counted; the first batch, which
    warms up, is counted at the pace of the others. ``peak_bytes``: the most memory a decision took beside the
    probabilities; 0: not measured. ``forward_seconds``: of the forward passes. ``sizes``: the (height, width) that
    occur. ``without_mask``: how many images RankDice left without a mask, by decision.
    """

    metrics: dict[str, Metrics]
    loss: float
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    forward_seconds: float
    images: int
    decisions: dict[str, Decision] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    without_mask: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    evaluator: Evaluator,
    loader: Any,
    decisions: Mapping[str, Decision],
    *,
    progress: Progress = iter,
    on_part: Callable[[Part], None] | None = None,
    limit_batches: int | None = None,
    limit_images: int | None = None,
    measure_memory: bool = False,
) -> Evaluation:
    """Score every image of a loader once under each decision.

    With several processes each scores its share, and all return the same, complete outcome.

    Args:
        evaluator: the model and how it is used.
        loader: yields :class:`utils.batch.Batch`.
        decisions: name -> decision; none if only ``on_part`` looks.
        progress: wraps the iteration (tqdm).
        on_part: called with the images, probabilities and predictions of each forward pass.
        limit_batches: stop after so many batches (of each process).
        limit_images: stop after so many images, of all processes together.
        measure_memory: on the CPU, too, measure each decision's memory: once more per larger batch than before.

    Raises:
        UserError: a label of the data that the model has no class for.
    """
    evaluator.network.eval()
    work = _Work(evaluator, decisions, on_part, measure_memory)
    bar = progress(_limited(loader, limit_batches, limit_images))
    for batch in bar:
        for part in equal_sizes(batch):
            work.add(part)
        if decisions and hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str(live_scores(work.live_scores()), refresh=False)
    return work.gather()


class _Work:
    """One process's share of an evaluation."""

    def __init__(
        self,
        evaluator: Evaluator,
        decisions: Mapping[str, Decision],
        on_part: Callable[[Part], None] | None,
        measure_memory: bool,
    ) -> None:
        self.evaluator, self.decisions, self.on_part = evaluator, dict(decisions), on_part
        self.metrics = {name: evaluator.new_metrics(decision) for name, decision in decisions.items()}
        # What the progress bar shows: of RankDice, if it is among the decisions.
        self.shown = "rankdice" if "rankdice" in self.decisions else next(iter(self.decisions), None)
        self.live = Metrics(evaluator.facts.num_classes, classes=evaluator.classes)
        self.clock = Clock(evaluator.network.device, [*decisions, "forward"])
        self.losses: dict[str, float] = {}
        self.images = 0
        self.sizes: set[tuple[int, int]] = set()
        self.without_mask: Counter[str] = Counter()
        self.measured = 0 if measure_memory else float("inf")  # elements of the largest map that was measured

    def add(self, batch: Batch) -> None:
        """Score a batch of images of equal size."""
        evaluator = self.evaluator
        assert isinstance(batch.images, Tensor)  # as equal_sizes() gives them
        assert isinstance(batch.labels, Tensor)
        with self.clock.measure("forward", len(batch.images)):
            logits, probs = evaluator.network.forward(batch.images)
        check_finite(probs, batch.names)
        target = batch.labels.to(evaluator.network.device, non_blocking=True)
        _check_labels(target, evaluator.facts, batch.names)
        self.images += len(batch.names)
        self.sizes.add((int(target.shape[1]), int(target.shape[2])))
        if evaluator.loss is not None:
            labeled = (target != evaluator.facts.ignore_index).flatten(1).any(dim=1).tolist()
            for i, name in enumerate(batch.names):
                if not labeled[i]:
                    continue  # its loss of 0 would lower the mean
                self.losses[name] = float(evaluator.loss(logits[i : i + 1].float(), target[i : i + 1]))
        predictions, counts = self._decide(batch, probs, target)
        if self.shown is not None:
            self.live.add(counts[self.shown])
        if self.on_part is not None:
            self.on_part(Part(batch, logits, probs, target, predictions, counts))

    def live_scores(self) -> dict[str, float]:
        """Return the mean scores and the mean loss of this process so far."""
        scores = self.live.compute()
        return scores | ({"loss": sum(self.losses.values()) / len(self.losses)} if self.losses else {})

    def _decide(self, batch: Batch, probs: Tensor, target: Tensor) -> tuple[dict[str, Prediction], dict[str, Counts]]:
        """Return the predictions, if someone looks at them, and counts of every decision."""
        largest = probs.numel() > self.measured
        if largest:
            self.measured = probs.numel()
        predictions, counts = {}, {}
        for name, decide in self.decisions.items():
            if largest:
                self.clock.measure_memory(name, partial(decide, probs))
            with self.clock.measure(name, len(probs)):
                prediction = decide(probs)
            counts[name] = self.metrics[name].update(prediction, target, batch.names)
            if prediction.volumes is not None:
                self.without_mask[name] += int((prediction.volumes == 0).all(1).sum())
            if self.on_part is not None:
                predictions[name] = prediction
            del prediction
        return predictions, counts

    def gather(self) -> Evaluation:
        """Bring the shares of all processes together."""
        clock = self.clock
        own = (self.metrics, self.losses, clock.totals(), clock.peak, self.images, self.sizes, self.without_mask)
        shares = distributed.gather(own)
        merged = shares[0][0]
        for name in self.decisions:
            merged[name].merge([share[0][name] for share in shares[1:]])
        losses = {image: value for share in shares for image, value in share[1].items()}
        ordered = [losses[image] for image in sorted(losses)]
        laps = {name: [share[2][name] for share in shares] for name in self.clock.laps}
        images = sum(share[4] for share in shares)
        return Evaluation(
            metrics=merged,
            loss=sum(ordered) / len(ordered) if ordered else float("nan"),
            seconds={name: images * _pace(laps[name]) for name in self.decisions},
            peak_bytes={name: max(share[3][name] for share in shares) for name in self.decisions},
            forward_seconds=images * _pace(laps["forward"]),
            images=images,
            decisions=self.decisions,
            sizes=sorted(set().union(*(share[5] for share in shares))),
            without_mask=dict(sum((share[6] for share in shares), Counter())),
        )


def _pace(shares: Sequence[tuple[float, int]]) -> float:
    """Return seconds per image from the seconds and images of each process."""
    return sum(seconds for seconds, _ in shares) / max(1, sum(images for _, images in shares))


def _limited(loader: Any, batches: int | None, images: int | None) -> Any:
    if images is not None:
        # Images are dealt out to the processes in turn: the first ones of the data set are the first of each share.
        images = len(range(distributed.rank(), images, distributed.world_size()))
    elif batches is None or batches >= len(loader):
        return loader
    return _Limited(loader, len(loader) if batches is None else batches, images)


class _Limited:
    """The first batches or images of a loader, with a length for progress bars."""

    def __init__(self, loader: Any, batches: int, images: int | None) -> None:
        self.loader, self.batches, self.images = loader, batches, images

    def __len__(self) -> int:
        size = getattr(getattr(self.loader, "batches", None), "batch_size", None)
        if self.images is None or not size:
            return self.batches
        return min(self.batches, -(-self.images // size))

    def __iter__(self) -> Iterator[Batch]:
        left = self.images
        if left == 0:
            return
        for index, batch in enumerate(self.loader, start=1):
            if left is None:
                yield batch
            else:
                yield Batch(batch.images[:left], batch.labels[:left], batch.names[:left])
                left -= len(batch.names)
            if index == self.batches or left is not None and left <= 0:
                return


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
