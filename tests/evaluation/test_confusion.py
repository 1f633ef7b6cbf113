"""Confusion matrices agree with torchmetrics, add up over processes, and are written as text and CSV."""

from __future__ import annotations

import csv

import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from utils.batch import Batch
from utils.evaluation import Part
from utils.evaluation.confusion import Confusion, as_csv, shares, worst
from utils.predict import Prediction


def part(labels: torch.Tensor, target: torch.Tensor) -> Part:
    names = [str(i) for i in range(len(target))]
    probs = torch.zeros(len(target), 3, *target.shape[1:])
    masks = torch.stack([labels == c for c in range(3)], dim=1)
    predictions = {"max": Prediction(labels=labels), "rankdice": Prediction(masks=masks)}
    return Part(Batch(probs, target, names), probs, probs, target, predictions, {})


def test_it_is_that_of_torchmetrics_for_any_split_over_processes() -> None:
    torch.manual_seed(0)
    labels, target = torch.randint(0, 3, (6, 5, 7)), torch.randint(0, 3, (6, 5, 7))
    target[torch.rand(target.shape) < 0.2] = 255
    other = MulticlassConfusionMatrix(num_classes=3, ignore_index=255)
    expected = other(labels, target).tolist()
    found = [Confusion(3, 255) for _ in range(2)]
    for i in range(6):
        found[i % 2].add(part(labels[i : i + 1], target[i : i + 1]))
    found[0].merge(found[1:])
    assert found[0].compute() == {"max": expected}


def test_rows_are_classes_of_the_target() -> None:
    matrix = [[8, 2, 0], [0, 0, 0], [1, 3, 4]]
    assert shares(matrix) == [[0.8, 0.2, 0.0], [None] * 3, [0.125, 0.375, 0.5]]
    first, second, third = worst(matrix, ["a", "b", "c"])
    assert first == {"target": "c", "prediction": "b", "share": 0.375, "pixels": 3}
    assert (second["target"], third["prediction"]) == ("a", "a")
    rows = list(csv.reader(as_csv(matrix, ["a", "b, c", "d"]).splitlines()))
    assert rows[0][1:] == ["a", "b, c", "d"]
    assert rows[3] == ["d", "1", "3", "4"]
