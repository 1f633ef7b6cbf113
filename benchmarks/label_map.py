"""Compare label maps: the total score that they expect, and the mean Dice that they reach.

    python -m benchmarks.label_map --probs FILE.npz

The file contains ``labels`` uint8 ``(N, H, W)``, 255 for ignored pixels, and ``probs`` or ``logits8`` ``(N, C, H, W)``,
where ``p = sigmoid(logits8 / 255 * 16 - 8)``. The candidates are argmax, our label map and package rankseg's multiclass
RMA, if it is installed, among all classes and among those that the rule of presence chooses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils import presence
from utils.rankdice import label_map, rank_dice


def mean_dice(labels: Tensor, target: Tensor, classes: int) -> float:
    """Return the mean over images of the mean Dice over the classes in the target or in the labels."""
    means = []
    for mine, true in zip(labels, target, strict=True):
        mine, true = mine[true != 255], true[true != 255]
        a, b = torch.bincount(mine, minlength=classes), torch.bincount(true, minlength=classes)
        both = torch.bincount(mine[mine == true], minlength=classes)
        means.append((2 * both / (a + b))[a + b > 0].mean())
    return float(torch.stack(means).mean())


def expected_total(labels: Tensor, probs: Tensor, chosen: Tensor) -> float:
    """Return the mean over images of the sum that ``label_map`` maximizes, over the chosen classes."""
    own = torch.nn.functional.one_hot(labels, probs.shape[1]).movedim(-1, 1)
    mass, volume = (own * probs.double()).sum((2, 3)), own.sum((2, 3))
    scores = 2 * mass / (volume + probs.double().sum((2, 3)) + 1)
    return float((scores * chosen).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_map", description="Compare label maps.")
    parser.add_argument("--probs", type=Path, required=True, help=".npz with logits8 or probs, and labels")
    parser.add_argument("--every", type=int, default=1, help="take every n-th image")
    args = parser.parse_args()
    with np.load(args.probs) as file:
        target = torch.from_numpy(file["labels"][:: args.every]).long()
        key = "probs" if "probs" in file else "logits8"
        probs = torch.from_numpy(file[key][:: args.every]).float()
    if key == "logits8":
        probs = (probs / 255 * 16 - 8).sigmoid()
    found = rank_dice(probs, prune=None)
    rule, _ = presence.choose(found.highest, found.scores)
    pruned = found.highest > 0.5
    choices = {"all classes": torch.ones_like(rule), "classes above 0.5": pruned, "classes by the rule": rule}
    try:
        from rankseg import RankSEG

        # Both take the same classes, so the peer must not prune.
        peer = RankSEG(output_mode="multiclass", metric="dice", solver="RMA", pruning_prob=0.0).predict
    except ImportError:
        print("package rankseg is not installed (pip install rankseg): it is left out")
        peer = None
    rows = []
    for name, chosen in choices.items():
        some = probs * chosen[..., None, None]
        maps = {"argmax": some.argmax(1), "label_map": label_map(probs, chosen, found=found)}
        if peer is not None:
            maps["rankseg multiclass RMA"] = peer(some)
        for method, labels in maps.items():
            total, dice = expected_total(labels, probs, chosen), mean_dice(labels, target, probs.shape[1])
            rows.append(f"{name:20s} {method:24s}{total:16.4f}{100 * dice:12.2f}")
    print(f"{len(probs)} images\n{'':45s}{'expected total':>16s}{'mDice, %':>12s}", *rows, sep="\n")


if __name__ == "__main__":
    main()
