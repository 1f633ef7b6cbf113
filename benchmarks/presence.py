"""What does presence gain? ``python -m benchmarks.presence FOLDER [--json FILE]``.

FOLDER holds probabilities of a well-trained network on photographs of several drives: ``train.npz`` with ``names``
(``DRIVE_...``), ``logits8`` (uint8, ``p = sigmoid(logits8 / 255 * 16 - 8)``) and ``labels`` (255: not labelled).

Each drive is scored with a fit on the other drives, so no image is scored with what it has taught. Neighbours in a
drive are alike: intervals are over images, and say nothing about other roads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import presence, tables
from utils.errors import UserError, run
from utils.evaluation import Decision, all_decisions
from utils.evaluation.comparison import differences, image_means
from utils.files import write_text
from utils.metrics import Metrics, count, image_scores
from utils.predict import PROCEDURES, PredictOptions

ROWS = ("max", "max_present", "T", "all", "rule", "rankdice_paper", "rankdice", "rankdice_map")


def main() -> int:
    """Score every drive, print two tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presence", description="Gains of presence, by drive.")
    parser.add_argument("folder", help="folder with train.npz")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args()
    drives = read(Path(args.folder) / "train.npz")
    result = {name: scored(name, drives) for name in drives}
    print(text(result))
    if args.json:
        write_text(Path(args.json), json.dumps(result, indent=2) + "\n")
    return 0


Images = list[tuple[str, Tensor, Tensor]]


def read(path: Path) -> dict[str, Images]:
    """Return name, probabilities ``(C, H, W)`` and labels ``(H, W)`` of the images of each drive."""
    try:
        with np.load(path, allow_pickle=False) as data:
            names, logits, labels = data["names"], data["logits8"], data["labels"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: expected names, logits8 and labels: {error}") from None
    drives: dict[str, Images] = {}
    for name, one, label in sorted(zip(map(str, names), logits, labels, strict=True), key=lambda item: item[0]):
        probs = torch.sigmoid(torch.from_numpy(one.astype(np.float32)) / 255 * 16 - 8)
        drives.setdefault(name.split("_")[0], []).append((name, probs, torch.from_numpy(label).long()))
    return drives


def rows_of(images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return largest probabilities, expected scores, measured scores and presence ``(N, C)``."""
    found = []
    for _, probs, label in images:
        prediction = PROCEDURES["rankdice"](probs[None], PredictOptions(presence="all"))
        counts = count(prediction, label[None], len(probs), 255)
        assert prediction.scores is not None
        measured = image_scores(counts).dice.nan_to_num(0.0)
        found.append((probs.flatten(1).amax(1), prediction.scores[0], measured[0], counts.target[0] > 0))
    highest, scores, measured, present = (torch.stack(column) for column in zip(*found, strict=True))
    return highest, scores, measured, present


def scored(name: str, drives: dict[str, Images]) -> dict[str, Any]:
    """Score one drive with a fit on the others."""
    learned = presence.learn(*rows_of([image for other, images in drives.items() if other != name for image in images]))
    classes = len(drives[name][0][1])
    fit = learned.fit and learned.fit | {"classes": list(range(classes)), "metric": "dice"}
    decisions = all_decisions(PredictOptions(fit=fit)) | {
        how: Decision("rankdice", PredictOptions(presence=how)) for how in ("all", "rule")
    }
    metrics = {row: Metrics(classes, keep_images=True) for row in ROWS}
    for image, probs, label in drives[name]:
        for row in ROWS:
            metrics[row].update(decisions[row](probs[None]), label[None], [image])
    rows = rows_of(drives[name])
    known = presence.image_scores(rows[3], rows[2], rows[3])
    means = {row: image_means(m) for row, m in metrics.items()}
    pairs = {"rankdice against max": ("rankdice", "max"), "fit against pruning": ("rankdice", "rankdice_paper")}
    scores = {row: m.compute() for row, m in metrics.items()}
    return {
        "images": len(drives[name]),
        "fit": learned.reason,
        "kept": learned.fit is not None,
        "true presence": float(known.nanmean()),
        "differences": {
            title: vars(differences(means[a][:, None], means[b][:, None])[0]) for title, (a, b) in pairs.items()
        },
        "scores": {
            row: {key: s[key] for key in ("Mean_Dice", "Dataset_mIoU", "Multiclass_Accuracy")}
            for row, s in scores.items()
        },
    }


def text(result: dict[str, Any]) -> str:
    """Return the tables of docs/presence.md."""
    head = ["drive", "images", "fit", *ROWS, "true presence"]
    body = [
        [
            name,
            str(one["images"]),
            "kept" if one["kept"] else "none",
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
        [f"{name}, {title}", f"{100 * d['mean']:+.1f}", f"{100 * d['low']:+.1f} to {100 * d['high']:+.1f}"]
        for name, one in result.items()
        for title, d in one["differences"].items()
    ]
    parts = [
        tables.plain(head, body),
        tables.plain(["difference of mDice", "points", "95 % interval"], gains),
        tables.plain(["label map", "mDice", "data-set mIoU", "accuracy"], maps),
    ]
    return "\n\n".join([*parts, *(f"{name}: {one['fit']}" for name, one in result.items())])


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


if __name__ == "__main__":
    run(main)
