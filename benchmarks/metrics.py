"""What do the scores of a batch cost? ``python -m benchmarks.metrics [--quick] [--device cuda] [--json FILE]``.

One batch of predictions (label maps, or a mask per class) and its target, ignored pixels included, become scores:

* ours: ``utils.metrics.Metrics``: every score of the report, per image and over the data set.
* histograms: intersection and union of the whole batch from three ``histc`` over floats, as
  yassouali/pytorch-segmentation counts. Gives the IoU of the data set only.
* loop: Dice and IoU of each image and class in turn, as the published RankSEG evaluation counts.
* torchmetrics (``pip install torchmetrics``): JaccardIndex for the IoU of the data set, DiceScore for the Dice of the
  images. DiceScore does not support ignored pixels, so it gets one-hot maps that are empty there.

First the script checks that the scores that two methods share agree. Then it times them in turns.
"""

# ruff: noqa: E402 (threads are set up before torch is imported)
from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import utils  # noqa: F401 - before torch: sets how long its idle threads wait

# isort: split

import torch
from torch import Tensor

from benchmarks.rankdice import field_logits, race
from utils.metrics import Metrics
from utils.predict import Prediction

Shape = tuple[int, int, int, int]
Scores = dict[str, float]
# Takes prediction, target (B, H, W) and the number of classes; a prediction is labels (B, H, W) or masks (B, C, H, W).
Way = Callable[[Tensor, Tensor, int], Scores]

IGNORED = 255
TOLERANCE = 1e-5  # torchmetrics and histc count in float32
LABELS: list[Shape] = [(8, 21, 512, 512), (1, 19, 1024, 2048), (1, 150, 512, 512), (16, 2, 256, 256)]
MASKS: list[Shape] = [(8, 21, 512, 512), (1, 19, 1024, 2048)]
QUICK_LABELS: list[Shape] = [(8, 21, 512, 512), (1, 150, 512, 512)]
QUICK_MASKS: list[Shape] = [(4, 21, 512, 512)]


# -- the ways --------------------------------------------------------------------------------------------------


def ours(predicted: Tensor, target: Tensor, classes: int) -> Scores:
    """Return every score of the report that is one number."""
    metrics = Metrics(classes, IGNORED)
    metrics.update(Prediction(masks=predicted) if predicted.ndim == 4 else Prediction(labels=predicted), target)
    return {name: value for name, value in metrics.compute().items() if isinstance(value, float)}


def histograms(labels: Tensor, target: Tensor, classes: int) -> Scores:
    """Return the IoU of the batch from histograms of label maps."""

    def areas(values: Tensor) -> Tensor:
        return torch.histc(values.float(), bins=classes, min=0, max=classes - 1)

    valid = target != IGNORED
    labels = torch.where(valid, labels, -1)
    intersection = areas(torch.where(labels == target, labels, -1))
    union = areas(labels) + areas(torch.where(valid, target, -1)) - intersection
    return {"Dataset_mIoU": float((intersection / union)[union > 0].mean())}


def loop(predicted: Tensor, target: Tensor, classes: int) -> Scores:
    """Return mDice and mIoU from each image and class in turn."""
    means = []
    for guess, truth in zip(predicted, target, strict=True):
        valid = truth != IGNORED
        scores = []
        for c in range(classes):
            mask = (guess[c] if guess.ndim == 3 else guess == c) & valid
            own = truth == c
            both, total = int((mask & own).sum()), int(mask.sum() + own.sum())
            if total:
                scores.append((2 * both / total, both / (total - both)))
        if scores:
            means.append([sum(column) / len(scores) for column in zip(*scores, strict=True)])
    dice, iou = (sum(column) / len(means) for column in zip(*means, strict=True))
    return {"Mean_Dice": dice, "Mean_IoU": iou}


def torchmetrics_ways(device: str) -> dict[str, Way]:
    """Return the ways of torchmetrics, or none where it is not installed."""
    try:
        from torchmetrics.classification import MulticlassJaccardIndex
        from torchmetrics.segmentation import DiceScore
    except ImportError:
        print("torchmetrics is not installed (pip install torchmetrics): its rows are left out\n")
        return {}

    def jaccard(labels: Tensor, target: Tensor, classes: int) -> Scores:
        metric = MulticlassJaccardIndex(classes, ignore_index=IGNORED, validate_args=False).to(device)
        metric.update(labels, target)
        return {"Dataset_mIoU": float(metric.compute())}

    def dice(predicted: Tensor, target: Tensor, classes: int) -> Scores:
        metric = DiceScore(classes, average="macro", aggregation_level="samplewise", input_format="one-hot").to(device)
        numbers = torch.arange(classes, device=target.device).view(-1, 1, 1)
        masks = predicted if predicted.ndim == 4 else predicted[:, None] == numbers
        valid = (target != IGNORED)[:, None]
        metric.update((masks & valid).int(), (target[:, None] == numbers).int())
        return {"Mean_Dice": float(metric.compute())}

    return {"torchmetrics JaccardIndex": jaccard, "torchmetrics DiceScore": dice}


def ways_for(kind: str, device: str) -> dict[str, Way]:
    """Return the ways for "labels" or "masks" by name; the first is ours."""
    peers = torchmetrics_ways(device)
    if kind == "masks":
        return {"ours": ours, "loop": loop} | {name: way for name, way in peers.items() if "Dice" in name}
    return {"ours": ours, "histograms": histograms, "loop": loop} | peers


# -- measuring -------------------------------------------------------------------------------------------------


def batch(kind: str, shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Return a prediction and a target (B, H, W) that differ here and there; a band of the target is ignored."""
    logits = field_logits(shape, device)
    target = logits.argmax(1)
    target[:, : max(1, shape[2] // 50)] = IGNORED
    logits += 0.5 * field_logits(shape, device, seed=1)
    return (logits.argmax(1) if kind == "labels" else logits > 4.0), target


def check(found: dict[str, Scores]) -> float:
    """Return the largest difference between our scores and a peer's.

    Raises:
        ValueError: a difference above ``TOLERANCE``, or a score that only one side defines.
    """
    largest = 0.0
    for name, scores in found.items():
        for score, value in scores.items():
            mine = found["ours"][score]
            difference = 0.0 if math.isnan(mine) and math.isnan(value) else abs(mine - value)
            if not difference <= TOLERANCE:
                raise ValueError(f"{score}: ours is {mine}, {name} gives {value}")
            largest = max(largest, difference)
    return largest


def compare(kind: str, shape: Shape, rounds: int, device: str) -> dict[str, object]:
    """Check the ways' scores on one batch, then return their seconds."""
    predicted, target = batch(kind, shape, device)
    ways = ways_for(kind, device)
    found = {name: way(predicted, target, shape[1]) for name, way in ways.items()}
    difference = check(found)
    gives = {name: [s for s, value in scores.items() if not math.isnan(value)] for name, scores in found.items()}
    seconds = race({name: partial(way, predicted, target, shape[1]) for name, way in ways.items()}, rounds, device)
    return {"kind": kind, "shape": shape, "difference": difference, "gives": gives, "seconds": seconds}


def show(title: str, result: dict) -> None:
    """Print medians and their ratio to ours."""
    print(f"\n{title}; largest difference of a score {result['difference']:.1e}")
    print(f"  {'':28s}{'median ms':>12s}{'x ours':>10s}")
    base = median(result["seconds"]["ours"])
    for name, spent in result["seconds"].items():
        print(f"  {name:28s}{1e3 * median(spent):12.2f}{median(spent) / base:10.2f}", flush=True)


def peer_version() -> str | None:
    """Return the version of torchmetrics, None where it is not installed."""
    try:
        return version("torchmetrics")
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description="Time the scores of a batch.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer batches, fewer rounds")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 9, quick 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    rounds = args.rounds or (5 if args.quick else 9)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, torchmetrics {peer_version()}, {where}, {rounds} rounds")
    shapes = {"labels": QUICK_LABELS if args.quick else LABELS, "masks": QUICK_MASKS if args.quick else MASKS}
    maps = {}
    for kind in shapes:
        for shape in shapes[kind]:
            title = f"{kind} {'x'.join(map(str, shape))}"
            maps[title] = compare(kind, shape, rounds, args.device)
            show(title, maps[title])
    result = {"torch": torch.__version__, "torchmetrics": peer_version(), "device": where, "maps": maps}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
