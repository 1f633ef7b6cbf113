"""Boundary IoU agrees with SciPy's erosion and with cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from utils.batch import Batch
from utils.evaluation import Part
from utils.evaluation.boundary import BoundaryIoU, boundary, distance_of
from utils.facts import Facts
from utils.predict import Prediction

FACTS = Facts(3, ("a", "b", "c"), ((0, 0, 0),) * 3, (0.5,) * 3, (0.2,) * 3, 255)


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_the_boundary_is_what_an_erosion_removes(distance) -> None:
    rng = np.random.default_rng(distance)
    noise = ndimage.gaussian_filter(rng.standard_normal((4, 3, 31, 40)), (0, 0, 3, 3))
    masks = noise > 0
    square = np.ones((3, 3), bool)
    expected = [m & ~ndimage.binary_erosion(m, square, distance, border_value=0) for m in masks.reshape(12, 31, 40)]
    found = boundary(torch.from_numpy(masks), distance)
    assert np.array_equal(found.reshape(12, 31, 40).numpy(), np.stack(expected))


def test_distances_are_shares_of_the_diagonal() -> None:
    assert distance_of(300, 400) == 10
    assert distance_of(3, 4) == 1


def scores(labels: torch.Tensor, target: torch.Tensor, masks: torch.Tensor | None = None) -> dict:
    names = [str(i) for i in range(len(target))]
    prediction = Prediction(labels=labels) if masks is None else Prediction(masks=masks)
    gathered = BoundaryIoU(FACTS, [1, 2])
    probs = torch.zeros(len(target), 3, *target.shape[1:])
    gathered.add(Part(Batch(probs, target, names), probs, probs, target, {"p": prediction}, {}))
    return gathered.compute()["p"]


def test_a_square_moved_by_one_pixel_by_hand() -> None:
    target = torch.zeros(1, 20, 20, dtype=torch.long)
    target[:, 5:11, 5:11] = 1
    labels = torch.zeros_like(target)
    labels[:, 5:11, 6:12] = 1
    # Rings of 20 pixels, one pixel wide. The top and bottom rows share 5 pixels each; the columns share none.
    found = scores(labels, target)
    assert found["Class_Boundary_IoU"][1] == pytest.approx(10 / 30)
    assert found["Mean_Boundary_IoU"] == pytest.approx(10 / 30)
    assert found["Class_Boundary_IoU"][2] != found["Class_Boundary_IoU"][2]
    masks = torch.stack([labels == c for c in range(3)], dim=1)
    assert scores(labels, target, masks)["Class_Boundary_IoU"][1] == pytest.approx(10 / 30)


def test_ignored_pixels_belong_to_no_mask() -> None:
    target = torch.zeros(1, 12, 12, dtype=torch.long)
    target[:, 2:8, 2:8] = 1
    target[:, :, 6:] = 255
    labels = target.clone()
    labels[:, 2:8, 6:11] = 2
    found = scores(labels, target)
    assert found["Class_Boundary_IoU"][1] == 1
    assert found["Class_Boundary_IoU"][2] != found["Class_Boundary_IoU"][2]
