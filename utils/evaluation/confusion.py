"""Confusion matrices: which class is mistaken for which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.evaluation import Part
from utils.files import csv_text


class Confusion:
    """Counts pixels by their class in the target and in the label map, for each procedure that gives one label.

    Procedures with overlapping masks are left out: a pixel of theirs can have several labels, or none.

    Args:
        num_classes: of the data; with one output channel there are two labels, background and the class.
        ignore_index: label of pixels that are ignored.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.size, self.ignore_index = max(num_classes, 2), ignore_index
        self.counts: dict[str, Tensor] = {}

    def add(self, part: Part) -> None:
        """Count the images of a part."""
        valid = part.target != self.ignore_index
        target = part.target[valid].long()
        for name, prediction in part.predictions.items():
            if prediction.labels is None:
                continue
            index = target * self.size + prediction.labels[valid].long()
            joint = torch.bincount(index, minlength=self.size**2).view(self.size, self.size).cpu()
            self.counts[name] = self.counts.get(name, 0) + joint

    def merge(self, others: Iterable[Confusion]) -> None:
        """Add what other processes have counted."""
        for other in others:
            for name, counts in other.counts.items():
                self.counts[name] = self.counts.get(name, 0) + counts

    def compute(self) -> dict[str, list[list[int]]]:
        """Return procedure -> pixels by target (row) and prediction (column)."""
        return {name: counts.tolist() for name, counts in self.counts.items()}


def as_csv(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Return a confusion matrix as CSV: a row per class of the target, a column per class of the prediction."""
    rows = ([name, *row] for name, row in zip(class_names, matrix, strict=True))
    return csv_text([["target \\ prediction", *class_names], *rows])


def shares(matrix: Sequence[Sequence[int]]) -> list[list[float | None]]:
    """Return each row divided by its sum: the diagonal contains the recall of each class; None for an absent class."""
    return [[value / sum(row) if sum(row) else None for value in row] for row in matrix]


def worst(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the five confusions that cost a class the largest share of its pixels, the largest first."""
    found: list[dict[str, Any]] = [
        {"target": class_names[t], "prediction": class_names[p], "share": share, "pixels": matrix[t][p]}
        for t, row in enumerate(shares(matrix))
        for p, share in enumerate(row)
        if t != p and share
    ]
    return sorted(found, key=lambda f: -f["share"])[:5]
