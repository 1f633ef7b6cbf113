"""Score a model on a loader: one forward pass, any number of prediction procedures.

The trainer uses this for validation, and ``test.py`` for testing. No other code computes counts from logits.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
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
from utils.progress import live_scores, progress_bar
from utils.rankdice import METRICS

OTHER_METRICS = {metric: f"rankdice_{metric}" for metric in METRICS if metric != "dice"}
"""The names in :func:`all_decisions` of RankDice with another metric than Dice."""


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
        """The metric whose expected value the procedure states, a name in utils.rankdice.METRICS, or None."""
        return self.options.metric if self.procedure == "rankdice" and not self.as_labels else None


def single_decision(procedure: str, options: PredictOptions) -> dict[str, Decision]:
    """Return one procedure with the options of inference, under its name in :func:`all_decisions`."""
    name = "max_present" if procedure == "max" and options.restricts_max else procedure
    return {name: Decision(procedure, options)}


def deployed(procedure: str, options: PredictOptions) -> str:
    """Return the name in :func:`all_decisions` of what inference.py does with a procedure and these options."""
    if procedure == "T" and options.threshold != 0.5:
        return "T_tuned"
    if procedure == "rankdice" and options.metric in OTHER_METRICS:
        return OTHER_METRICS[options.metric]
    return next(iter(single_decision(procedure, options)))


def all_decisions(options: PredictOptions) -> dict[str, Decision]:
    """Return every procedure side by side, by the names of the results.

    * ``T``: threshold 0.5; ``T_tuned``: the config's threshold, if it differs;
    * ``max``: the plain argmax; ``max_present``: argmax over the classes predicted to be in the image;
    * ``rankdice``: the masks with the highest expected Dice, as the config says;
    * ``rankdice_paper``: the same for all classes with a probability above 0.5;
    * ``rankdice_map``: the label map that ``inference.py`` writes for ``rankdice``;
    * ``rankdice_iou``: the masks with the highest expected IoU; the same for every other metric of RankDice;
    * all other procedures, as the config says.
    """
    decisions = {"T": Decision("T", replace(options, threshold=0.5))}
    if options.threshold != 0.5:
        decisions["T_tuned"] = Decision("T", options)
    dice = replace(options, metric="dice")
    others = {}
    for metric, name in OTHER_METRICS.items():
        able = METRICS[metric].solvers
        solver = options.solver if options.solver in able else able[0]
        others[name] = Decision("rankdice", replace(options, metric=metric, solver=solver))
    return decisions | {
        "max": Decision("max", replace(options, presence="all")),
        "max_present": Decision("max", replace(options, presence=options.chooses_by)),
        "rankdice": Decision("rankdice", dice),
        "rankdice_paper": Decision("rankdice", replace(dice, presence="prune", prune=0.5)),
        "rankdice_map": Decision("rankdice", options, as_labels=True),
        **others,
        **{name: Decision(name, options) for name in PROCEDURES if name not in ("T", "max", "rankdice")},
    }


@dataclass
class Evaluator:
    """What stays the same from batch to batch of an evaluation."""

    network: AnyNetwork  # from images to probabilities
    classes: tuple[int, ...] | None = None  # of interest; None: all
    count_ignored: bool = False  # see utils.metrics.Metrics
    # Scored per image and averaged over the images with labeled pixels, so that it does not depend on the batches.
    loss: nn.Module | None = None

    @property
    def facts(self) -> Facts:
        """The facts of the data that the network was trained on."""
        return self.network.facts


@dataclass
class Part:
    """Images of equal size after their forward pass, with probabilities and predictions, for observers."""

    batch: Batch
    logits: Tensor  # (B, C, H, W)
    probs: Tensor  # float32 (B, C, H, W)
    target: Tensor  # (B, H, W)
    predictions: dict[str, Prediction]  # per decision
    counts: dict[str, Counts]


@dataclass
class Evaluation:
    """The outcome: metrics per decision, the losses, and what each decision cost."""

    metrics: dict[str, Metrics]
    losses: dict[str, float]  # of each image with labeled pixels
    # Seconds and images of decoding under each decision, and of the forward passes ("forward"); the first batch, which
    # warms up, is not counted.
    laps: dict[str, tuple[float, int]]
    peak_bytes: dict[str, int]  # peak memory of a decision, in addition to the probabilities; 0: not measured
    images: int = 0
    decisions: dict[str, Decision] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)  # the (height, width) that occur
    without_mask: Counter[str] = field(default_factory=Counter)  # images that RankDice left without one, by decision

    @property
    def loss(self) -> float:
        """The mean of the losses, the same for any order of the images; NaN if there are none."""
        ordered = [self.losses[image] for image in sorted(self.losses)]
        return sum(ordered) / len(ordered) if ordered else float("nan")

    def milliseconds(self, step: str) -> float:
        """Return what an image took under a decision, or in the forward pass ("forward")."""
        seconds, images = self.laps[step]
        return 1000 * seconds / max(images, 1)

    @classmethod
    def merged(cls, shares: Sequence[Evaluation]) -> Evaluation:
        """Return the evaluations of different images under the same decisions as one."""
        first = shares[0]
        metrics = {name: copy.copy(of_first) for name, of_first in first.metrics.items()}
        for name, together in metrics.items():
            together.reset()
            together.merge([share.metrics[name] for share in shares])
        return cls(
            metrics=metrics,
            losses={image: loss for share in shares for image, loss in share.losses.items()},
            laps={
                step: (sum(s.laps[step][0] for s in shares), sum(s.laps[step][1] for s in shares))
                for step in first.laps
            },
            peak_bytes={name: max(share.peak_bytes[name] for share in shares) for name in first.peak_bytes},
            images=sum(share.images for share in shares),
            decisions=first.decisions,
            sizes=set().union(*(share.sizes for share in shares)),
            without_mask=sum((share.without_mask for share in shares), Counter()),
        )


@torch.no_grad()
def evaluate(
    evaluator: Evaluator,
    loader: Any,
    decisions: Mapping[str, Decision],
    *,
    title: str | None = None,
    on_part: Callable[[Part], None] | None = None,
    measure_memory: bool = False,
) -> Evaluation:
    """Score every image of a loader once under each decision.

    With several processes each scores its share, and all return the same, complete outcome.

    Args:
        evaluator: the model and how it is used.
        loader: yields :class:`utils.batch.Batch`; see :class:`Limited`.
        decisions: name -> decision; empty if only ``on_part`` is needed.
        title: of the progress bar; None: no bar.
        on_part: called with the images, probabilities and predictions of each forward pass.
        measure_memory: also measure the memory of each decision on the CPU, by running it once more for each batch that
            is larger than all before.

    Raises:
        UserError: the data has a label that is not a class of the model.
    """
    work = _Batches(evaluator, decisions, on_part, 0 if measure_memory else float("inf"))
    bar = None if title is None else progress_bar(loader, desc=title)
    for batch in loader if bar is None else bar:
        for part in equal_sizes(batch):
            work.add(part)
        if decisions and bar is not None:
            bar.set_postfix_str(live_scores(work.live_scores()), refresh=False)
    return Evaluation.merged(distributed.gather(work.finished()))


@dataclass
class _Batches:
    """One process's share of an evaluation."""

    evaluator: Evaluator
    decisions: Mapping[str, Decision]
    on_part: Callable[[Part], None] | None
    measured: float  # elements of the largest map whose decisions' memory was measured; infinite: do not measure

    def __post_init__(self) -> None:
        evaluator, decisions = self.evaluator, self.decisions
        facts = evaluator.facts
        counted = (facts.num_classes, facts.ignore_index, evaluator.classes, evaluator.count_ignored)
        new = partial(Metrics, *counted, keep_images=True)
        metrics = {name: new(expects=decision.expects or "dice") for name, decision in decisions.items()}
        self.found = Evaluation(metrics, {}, {}, {}, decisions=dict(decisions))
        # What the progress bar shows: of RankDice, if it is among the decisions.
        self.shown = "rankdice" if "rankdice" in decisions else next(iter(decisions), None)
        self.live = Metrics(facts.num_classes, classes=evaluator.classes)
        self.clock = Clock(evaluator.network.device, [*decisions, "forward"])

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
        self.found.images += len(batch.names)
        self.found.sizes.add((int(target.shape[1]), int(target.shape[2])))
        if evaluator.loss is not None:
            labeled = (target != evaluator.facts.ignore_index).flatten(1).any(dim=1).tolist()
            for i, name in enumerate(batch.names):
                if not labeled[i]:
                    continue  # its loss of 0 would lower the mean
                self.found.losses[name] = float(evaluator.loss(logits[i : i + 1].float(), target[i : i + 1]))
        predictions, counts = self._decide(batch, probs, target)
        if self.shown is not None:
            self.live.add(counts[self.shown])
        if self.on_part is not None:
            self.on_part(Part(batch, logits, probs, target, predictions, counts))

    def live_scores(self) -> dict[str, float]:
        """Return the mean scores and the mean loss of this process so far."""
        losses = self.found.losses
        return self.live.compute() | ({"loss": sum(losses.values()) / len(losses)} if losses else {})

    def _decide(self, batch: Batch, probs: Tensor, target: Tensor) -> tuple[dict[str, Prediction], dict[str, Counts]]:
        """Return the predictions, if ``on_part`` needs them, and the counts of every decision."""
        largest = probs.numel() > self.measured
        if largest:
            self.measured = probs.numel()
        predictions, counts = {}, {}
        for name, decide in self.decisions.items():
            if largest:
                self.clock.measure_memory(name, partial(decide, probs))
            with self.clock.measure(name, len(probs)):
                prediction = decide(probs)
            counts[name] = self.found.metrics[name].update(prediction, target, batch.names)
            if prediction.volumes is not None:
                self.found.without_mask[name] += int((prediction.volumes == 0).all(1).sum())
            if self.on_part is not None:
                predictions[name] = prediction
            del prediction
        return predictions, counts

    def finished(self) -> Evaluation:
        """Return the outcome of this process."""
        peaks = {name: self.clock.peak[name] for name in self.decisions}
        return replace(self.found, laps=self.clock.totals(), peak_bytes=peaks)


class Limited:
    """The first batches of a loader, of each process, or its first images, of all processes together.

    Has a length, for progress bars. None: no limit.
    """

    def __init__(self, loader: Any, batches: int | None = None, images: int | None = None) -> None:
        self.loader, self.batches = loader, batches
        # Images are dealt out to the processes in turn: the first ones of the data set are the first of each share.
        self.images = None if images is None else len(range(distributed.rank(), images, distributed.world_size()))

    def __len__(self) -> int:
        size = getattr(getattr(self.loader, "batches", None), "batch_size", None)
        of_images = -(-self.images // size) if size and self.images is not None else None
        return min(limit for limit in (len(self.loader), self.batches, of_images) if limit is not None)

    def __iter__(self) -> Iterator[Batch]:
        left = self.images
        for batch in islice(self.loader, 0 if left == 0 else self.batches):
            if left is None:
                yield batch
                continue
            yield Batch(batch.images[:left], batch.labels[:left], batch.names[:left])
            left -= len(batch.names)
            if left <= 0:
                return


def _check_labels(target: Tensor, facts: Facts, names: list[str]) -> None:
    highest = max(facts.num_classes, 2) - 1  # one channel has the labels 0 and 1
    wrong = ((target > highest) | (target < 0)) & (target != facts.ignore_index)
    if wrong.any():
        image = int(wrong.flatten(1).any(dim=1).nonzero()[0])
        values = sorted(set(target[image][wrong[image]].tolist()))[:5]
        raise UserError(
            f"{names[image]}: its labels contain {values}, but the model has the classes 0 to {highest} and ignores "
            f"{facts.ignore_index}; is this the data set the model was trained on? (classes, ignore_index)"
        )
