"""Test results as files: ``results.json``, the scores of every image as CSV, TensorBoard scalars."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.evaluation import Evaluation
from utils.facts import Facts
from utils.files import csv_text, write_text
from utils.rankdice import METRICS

# The page of a test of all procedures; written by :mod:`utils.report.page`, removed if an earlier run left it.
PAGE = "report.html"


def write(content: Mapping[str, Any], outcome: Evaluation, facts: Facts, folder: Path) -> list[Path]:
    """Write ``results.json`` and ``per_image.csv``, each whole or not at all; return their paths.

    Remove the ``report.html`` and the confusion matrices of an earlier run: files side by side belong together.
    """
    paths = [folder / "results.json", folder / "per_image.csv"]
    write_text(paths[0], json.dumps(content, indent=2) + "\n")
    write_text(paths[1], _per_image(outcome, facts))
    with suppress(OSError):
        for path in (folder / PAGE, *folder.glob("confusion_*.csv")):
            path.unlink(missing_ok=True)
    return paths


def to_be_replaced(folder: Path, protocol: Mapping[str, Any]) -> str | None:
    """Describe the results in a folder that the new ones replace.

    None if there are none, or if they are of the same checkpoint over as many images or fewer.
    """
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["protocol"]
        source, images = _source(found), int(found["images"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if Path(source).resolve() != Path(_source(protocol)).resolve():
        return f"the results of {source}"
    return f"results over {images} images" if images > protocol["images"] else None


def _source(protocol: Mapping[str, Any]) -> str:
    """Return what was scored: the folder of saved probabilities, or the checkpoint."""
    return str(protocol.get("probabilities") or protocol["checkpoint"])


def write_scalars(content: Mapping[str, Any], folder: Path) -> None:
    """Write the scores as TensorBoard scalars into the folder, ``test_PROCEDURE/SCORE`` (``tester.tensorboard``)."""
    from torch.utils.tensorboard import SummaryWriter  # loading it takes a second, and few runs ask for it

    epoch = content["protocol"]["epoch"]
    with SummaryWriter(str(folder)) as writer:
        for name, scores in content["procedures"].items():
            for key, value in scores.items():
                values = {f"{key}/{c}": v for c, v in value.items()} if isinstance(value, Mapping) else {key: value}
                for tag, number in values.items():
                    if number is not None:
                        writer.add_scalar(f"test_{name}/{tag}", number, epoch)


def _per_image(outcome: Evaluation, facts: Facts) -> str:
    """Return one line per image, worst mean Dice of the last procedure first."""
    columns: dict[str, list[float]] = {}
    for name, metrics in outcome.metrics.items():
        images, scores, expected = metrics.rows()
        own = metrics.classes
        found = {"mDice": scores.dice[:, own].nanmean(dim=1), "mIoU": scores.iou[:, own].nanmean(dim=1)}
        found["PixelAcc"] = scores.pixel_accuracy.nanmean(dim=1)
        if expected is not None:
            found[f"expected_{METRICS[metrics.expects].title}"] = expected[:, own].nanmean(dim=1)
        found |= {f"Dice_{facts.class_names[c]}": scores.dice[:, c] for c in own}
        columns |= {f"{name}_{key}": values.tolist() for key, values in found.items()}
        last = columns[f"{name}_mDice"]
    order = sorted(range(len(images)), key=lambda i: (math.isnan(last[i]), last[i], images[i]))
    rows = [[images[i], *("" if math.isnan(v[i]) else f"{v[i]:.6f}" for v in columns.values())] for i in order]
    return csv_text([["image", *columns], *rows])
