"""The live scores of an epoch."""

from __future__ import annotations

import math

import torch

from base.meter import Meter
from utils.metrics import Metrics
from utils.predict import PROCEDURES, PredictOptions


def test_batches_without_a_labeled_pixel_do_not_enter_the_loss() -> None:
    meter = Meter(Metrics(2, 255), torch.device("cpu"))
    prediction = PROCEDURES["max"](torch.rand(1, 2, 4, 4), PredictOptions())
    void, labeled = torch.full((1, 4, 4), 255), torch.zeros(1, 4, 4, dtype=torch.long)
    meter.update(torch.tensor(0.0), prediction, void)
    assert math.isnan(meter.scores()["train_loss"])
    for loss in (2.0, 4.0):
        meter.update(torch.tensor(loss), prediction, labeled)
    meter.update(torch.tensor(0.0), prediction, void)
    assert meter.scores()["train_loss"] == 3.0
