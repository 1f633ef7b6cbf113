"""The picture of validation images in TensorBoard: rows of three, titles, and the names of the classes that occur."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from base.pictures import COUNT, Pictures
from tests.base.test_trainer import FACTS
from utils.batch import Batch
from utils.evaluation import Part
from utils.predict import PROCEDURES, PredictOptions, label_map


def part(images: int, label: int) -> Part:
    probs = torch.zeros(images, 3, 8, 10)
    probs[:, 0] = 1.0
    batch = Batch(torch.zeros(images, 3, 8, 10, dtype=torch.uint8), torch.zeros(images, 8, 10), ["a"] * images)
    return Part(batch, probs, probs, torch.full((images, 8, 10), label), {}, {})


def colors(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(color) for color in picture.reshape(-1, 3).tolist()}


def test_the_legend_names_what_occurs() -> None:
    pictures = Pictures(FACTS, "max", PredictOptions())
    pictures.add(part(2, 1))
    drawn = pictures.draw()
    assert drawn.dtype == np.uint8
    assert FACTS.palette[1] in colors(drawn[-40:])
    assert FACTS.palette[2] not in colors(drawn)
    before = drawn.shape
    pictures.add(part(4, 2))
    pictures.add(part(4, 2))
    assert len(pictures.rows) == COUNT
    assert pictures.draw().shape[0] > before[0]
    assert FACTS.palette[2] in colors(pictures.draw()[-40:])


def test_the_prediction_is_the_label_map_of_the_procedure() -> None:
    probs = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0)).softmax(1)
    options = PredictOptions(presence="rule", prune=None)
    shown = {}
    for procedure in PROCEDURES:
        pictures = Pictures(FACTS, procedure, options)
        pictures.add(replace(part(2, 1), probs=probs))
        shown[procedure] = np.stack([row[2] for row in pictures.rows])
        assert np.array_equal(shown[procedure], label_map(procedure, probs, options).numpy())
    assert not np.array_equal(shown["rankdice"], shown["max"])
