"""What does a presence fit gain on held-out images?

    python -m benchmarks.presence FOLDER                                # by drive
    python -m benchmarks.presence FOLDER --checkpoints best_model.pth   # and for few validation images

FOLDER contains probabilities of a well-trained network on photographs of several drives: ``train.npz`` with ``names``
(``DRIVE_...``), ``logits8`` (uint8, ``p = sigmoid(logits8 / 255 * 16 - 8)``) and ``labels`` (255: not labeled). The
checkpoints are networks trained on Shapes.

No image is scored with a fit that used it. Neighboring images in a drive look alike. Intervals are over images, so they
do not cover the variation between roads. The table for few images shows presence alone (:func:`utils.presence.learn`),
the one by drive all that ``train.py`` fits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import markdown
from dataloaders import build
from utils import presence
from utils.batch import Batch
from utils.checkpoint import load_model
from utils.errors import UserError, run
from utils.evaluation import Decision, Evaluator, Part, all_decisions, evaluate
from utils.evaluation.comparison import Difference, differences, image_means
from utils.evaluation.fitting import Fit, fit
from utils.evaluation.temperature import LogitSample, fit_temperature
from utils.facts import Facts
from utils.files import write_text
from utils.metrics import Metrics, count, image_scores
from utils.predict import Activation, Prediction, PredictOptions
from utils.predict.network import SavedNetwork
from utils.rankdice import rank_dice

ROWS = ("max", "max_present", "T", "all", "rule", "rankdice_paper", "rankdice", "rankdice_map")
PAIRS = {
    "rankdice against max": ("rankdice", "max"),
    "rankdice_paper against max": ("rankdice_paper", "max"),
    "rankdice against rankdice_paper": ("rankdice", "rankdice_paper"),
}
SIZES = (10, 20, 40, 100, 200)
DRAWS = 10  # fits on photographs for each number of images
SCENES = 700  # of Shapes, for each checkpoint
CALIBRATED = 100  # of them, for the temperature


class Images(NamedTuple):
    """Images of one network: probabilities ``(N, C, H, W)`` and labels ``(N, H, W)``. It is a loader, too."""

    names: list[str]
    probs: Tensor
    labels: Tensor
    activation: Activation

    @property
    def dataset(self) -> list[str]:
        """What counts the images."""
        return self.names

    def batches(self) -> Iterator[Batch]:
        """Yield one image at a time."""
        for name, probs, label in zip(self.names, self.probs, self.labels, strict=True):
            yield Batch(probs[None].float(), label[None].long(), [name])

    def part(self, chosen: Sequence[int] | np.ndarray) -> Images:
        """Return some of the images."""
        index = torch.as_tensor(np.asarray(chosen))
        return Images([self.names[i] for i in index], self.probs[index], self.labels[index], self.activation)


class Loader:
    """Images in the form that the evaluation expects."""

    def __init__(self, images: Images) -> None:
        self.images, self.dataset = images, images.names

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        return self.images.batches()


def main() -> int:
    """Score every drive and, with checkpoints, fits on few images; print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presence", description="Gains of presence.")
    parser.add_argument("folder", help="folder with train.npz")
    parser.add_argument("--checkpoints", nargs="+", default=[], metavar="FILE", help="networks trained on Shapes")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args()
    drives = read(Path(args.folder) / "train.npz")
    result: dict[str, Any] = {"drives": {name: scored(name, drives) for name in drives}}
    print(text(result["drives"]))
    if args.checkpoints:
        result["few"] = few_images(drives, [Path(path) for path in args.checkpoints])
        print("\n" + markdown.table(*few_table(result["few"])))
    if args.json:
        write_text(Path(args.json), json.dumps(result, indent=2) + "\n")
    return 0


# ------------------------------------------------------------------------------------------------------ images


def read(path: Path) -> dict[str, Images]:
    """Return the images of each drive, in the order in which they were taken."""
    try:
        with np.load(path, allow_pickle=False) as data:
            names, logits, labels = data["names"], data["logits8"], data["labels"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: expected names, logits8 and labels: {error}") from None
    order = np.argsort(names)
    names = [str(names[i]) for i in order]
    probs = torch.sigmoid(torch.from_numpy(logits[order].astype(np.float32)) / 255 * 16 - 8)
    every = Images(names, probs, torch.from_numpy(labels[order]), "sigmoid")
    drive_of = np.array([name.split("_")[0] for name in names])
    return {drive: every.part(np.flatnonzero(drive_of == drive)) for drive in np.unique(drive_of)}


def scenes(checkpoint: Path) -> Images:
    """Return validation scenes of Shapes with the probabilities of a network before any fit."""
    network = load_model(checkpoint).single("cpu", temperature=1.0, bias=None)
    loader = build("Shapes", split="val", length=SCENES, size=96, batch_size=20, num_workers=0)
    names: list[str] = []
    found: list[tuple[Tensor, Tensor]] = []

    def keep(part: Part) -> None:
        names.extend(part.batch.names)
        found.append((part.probs, part.target.byte()))

    evaluate(Evaluator(network), loader, {}, on_part=keep)
    probs, labels = (torch.cat(column) for column in zip(*found, strict=True))
    return Images(names, probs, labels, network.activation)


def network_of(images: Images, found: Fit | None = None) -> SavedNetwork:
    """Return a network that gives these probabilities, with what was fitted."""
    classes = images.probs.shape[1]
    facts = Facts(classes, tuple(map(str, range(classes))), ((0, 0, 0),) * classes, (0.0,) * 3, (1.0,) * 3, 255)
    own = SavedNetwork(facts, images.activation, torch.device("cpu"))
    return (
        own if found is None else replace(own, temperature=found.calibration.temperature, bias=found.calibration.bias)
    )


def fitted(images: Images) -> Fit:
    """Fit as ``train.py`` does."""
    return fit(Evaluator(network_of(images)), Loader(images), PredictOptions())


# ------------------------------------------------------------------------------------------------------ by drive


def scored(name: str, drives: dict[str, Images]) -> dict[str, Any]:
    """Score one drive with a fit on the others."""
    images, others = drives[name], [other for drive, other in drives.items() if drive != name]
    found = fitted(_joined(others))
    used = PredictOptions(threshold=found.threshold, fit=found.presence)
    plain, deployed = all_decisions(PredictOptions()), all_decisions(used)
    before = {row: plain[row] for row in ("max", "rankdice_paper", "T")} | {
        how: Decision("rankdice", PredictOptions(presence=how)) for how in ("all", "rule")
    }
    after = {row: deployed[row] for row in ("max_present", "rankdice", "rankdice_map")}
    metrics: dict[str, Metrics] = {}
    for network, decisions in ((network_of(images), before), (network_of(images, found), after)):
        metrics |= evaluate(Evaluator(network), Loader(images), decisions).metrics
    scores = {row: m.compute() for row, m in metrics.items()}
    return {
        "images": len(images.names),
        "fit": found.notes,
        "kept": found.chosen + (", presence" if found.presence else ""),
        "true presence": _known(images),
        "mDice of the images": {row: image_means(m).tolist() for row, m in metrics.items()},
        "scores": {
            row: {key: s[key] for key in ("Mean_Dice", "Dataset_mIoU", "Multiclass_Accuracy")}
            for row, s in scores.items()
        },
    }


def gains_of(parts: Sequence[dict[str, Any]]) -> dict[str, Difference]:
    """Return the differences in mDice over the images of some drives, each with the fit on the others."""
    means = [part["mDice of the images"] for part in parts]
    joined = {row: np.concatenate([own[row] for own in means])[:, None] for row in ROWS}
    return {title: differences(joined[a], joined[b])[0] for title, (a, b) in PAIRS.items()}


def _joined(parts: Sequence[Images]) -> Images:
    names = [name for part in parts for name in part.names]
    return Images(names, torch.cat([p.probs for p in parts]), torch.cat([p.labels for p in parts]), parts[0].activation)


def _known(images: Images) -> float:
    """Return the mDice of RankDice masks for exactly the classes of the target."""
    means = []
    for batch in images.batches():
        probs, label = batch.images, batch.labels
        assert isinstance(probs, Tensor)
        assert isinstance(label, Tensor)
        counts = count(Prediction(masks=rank_dice(probs, prune=None).masks), label, probs.shape[1], 255)
        means.append(image_scores(counts).dice[counts.target > 0].mean())
    return float(torch.stack(means).mean())


def text(result: dict[str, Any]) -> str:
    """Return the tables of docs/presence.md."""
    head = ["drive", "images", "kept", *ROWS, "true presence"]
    body = [
        [
            name,
            str(one["images"]),
            one["kept"],
            *(_points(one["scores"][row]["Mean_Dice"]) for row in ROWS),
            _points(one["true presence"]),
        ]
        for name, one in result.items()
    ]
    maps = [
        [f"{name}, {row}", *(_points(one["scores"][row][key]) for key in ("Mean_Dice", "Dataset_mIoU"))]
        + [_points(one["scores"][row]["Multiclass_Accuracy"])]
        for name, one in result.items()
        for row in ("max", "max_present", "rankdice_map")
    ]
    gains = [
        [f"{name}, {title}", f"{100 * d.mean:+.1f}", f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"]
        for name, some in [*((name, [one]) for name, one in result.items()), ("all drives", list(result.values()))]
        for title, d in gains_of(some).items()
    ]
    parts = [
        markdown.table(head, body),
        markdown.table(["difference of mDice", "points", "95 % interval"], gains),
        markdown.table(["label map", "mDice", "data-set mIoU", "accuracy"], maps),
    ]
    return "\n\n".join([*parts, *(f"{name}: {' '.join(one['fit'])}" for name, one in result.items())])


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


# ------------------------------------------------------------------------------------------------------ few images


class Rows(NamedTuple):
    """What presence is learned from, ``(N, C)``; see :func:`utils.presence.learn`."""

    highest: Tensor
    scores: Tensor
    measured: Tensor
    present: Tensor

    def part(self, chosen: Sequence[int] | np.ndarray) -> Rows:
        """Return the rows of some images."""
        return Rows(*(column[torch.as_tensor(np.asarray(chosen))] for column in self))


class Draw(NamedTuple):
    """A fit on ``images``, scored on others: gains in points.

    ``gain`` is 0 if the fit is not kept; ``always`` is the gain of every fit, kept or not.
    """

    images: int
    gain: float
    always: float
    kept: bool


def rows_of(images: Images, network: SavedNetwork) -> Rows:
    """Return the rows of all images."""
    found = []
    for batch in images.batches():
        assert isinstance(batch.images, Tensor)
        assert isinstance(batch.labels, Tensor)
        probs, label = network.forward(batch.images)[1], batch.labels
        masks = rank_dice(probs, prune=None)
        counts = count(Prediction(masks=masks.masks), label, probs.shape[1], 255)
        measured = image_scores(counts).dice.nan_to_num(0.0)
        found.append((masks.highest[0], masks.scores[0].clamp(0, 1), measured[0], counts.target[0] > 0))
    return Rows(*(torch.stack(column) for column in zip(*found, strict=True)))


def few_images(drives: dict[str, Images], checkpoints: Sequence[Path]) -> dict[str, list[Draw]]:
    """Learn presence from few images, score on others: images of other drives, other scenes of Shapes."""
    found = {"photographs, scored on other drives": list(_photographs(drives))}
    for path in checkpoints:
        found.setdefault(f"Shapes, {len(checkpoints)} networks", []).extend(_shapes(scenes(path)))
    return found


def _shapes(images: Images) -> Iterator[Draw]:
    """Yield fits on scenes of Shapes, scored on all others, with the temperature that some of the scenes give."""
    network = network_of(images)
    sample = LogitSample(network.facts, CALIBRATED)
    evaluate(Evaluator(network), Loader(images.part(range(CALIBRATED))), {}, on_part=sample.add)
    temperature = fit_temperature(*sample.stacked(), images.activation)
    rows, total = rows_of(images, replace(network, temperature=temperature)), len(images.names)
    for size in SIZES:
        for first in range(0, total - size + 1, max(size, 70)):
            own = range(first, first + size)
            yield gain(rows.part(own), rows.part([i for i in range(total) if i not in own]))


def _photographs(drives: dict[str, Images]) -> Iterator[Draw]:
    """Yield fits on consecutive images and on random ones, of one drive or two, scored on the other drives."""
    generator = np.random.default_rng(0)
    every = {name: rows_of(images, network_of(images)) for name, images in drives.items()}
    names = list(drives)

    def joined(chosen: Sequence[str]) -> Rows:
        return Rows(*(torch.cat(parts) for parts in zip(*(every[name] for name in chosen), strict=True)))

    for source in [[name] for name in names] + [[a for a in names if a != name] for name in names]:
        rows, others = joined(source), joined([name for name in names if name not in source])
        total = len(rows.highest)
        for size in SIZES:
            for draw in range(DRAWS if size < total else 0):
                first = int(generator.integers(total - size + 1))
                random = np.sort(generator.choice(total, size, replace=False))
                yield gain(rows.part(random if draw % 2 else range(first, first + size)), others)
        yield gain(rows, others)


def gain(own: Rows, others: Rows) -> Draw:
    """Learn presence from some images; return what it gains on others over the paper's pruning."""
    learned = presence.learn(*own)
    if learned.found is None:
        return Draw(len(own.highest), 0.0, 0.0, False)
    pruned, fitted = (
        presence.mean_scores(chosen, others.measured, others.present).nanmean()
        for chosen in (others.highest > 0.5, presence.choose(others.highest, others.scores, learned.found)[0])
    )
    points, kept = 100 * float(fitted - pruned), learned.fit is not None
    return Draw(len(own.highest), points if kept else 0.0, points, kept)


def few_table(found: dict[str, list[Draw]]) -> tuple[list[str], list[list[str]]]:
    """Return the table "fitted on n images, gain on others": mean (worst draw), and how many fits were kept."""
    limits = [*SIZES, 1000]
    body = []
    for title, draws in found.items():
        sets = [[d for d in draws if low <= d.images < high] for low, high in pairwise(limits)]
        kept = [f"{sum(d.kept for d in some)} of {len(some)}" if some else "-" for some in sets]
        body.append([f"{title}: fit if kept", *(_mean_and_worst([d.gain for d in some]) for some in sets)])
        body.append([f"{title}: fit always", *(_mean_and_worst([d.always for d in some]) for some in sets)])
        body.append([f"{title}: kept", *kept])
    return [
        "images",
        *(f"n = {low}" if low == SIZES[-1] else f"{low} to {high - 1}" for low, high in pairwise(limits)),
    ], body


def _mean_and_worst(gains: Sequence[float]) -> str:
    return f"{statistics.fmean(gains):+.1f} ({min(gains):+.1f})" if gains else "-"


if __name__ == "__main__":
    run(main)
