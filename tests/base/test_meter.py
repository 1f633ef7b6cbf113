"""The live scores of an epoch."""

from __future__ import annotations

import math

import pytest
import torch

from base.meter import Meter
from utils.metrics import Metrics
from utils.predict import PROCEDURES, PredictOptions
from utils.progress import live_scores


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


def test_a_saved_state_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.metrics.AT_ONCE", 2)
    meter = Meter(Metrics(2, 255), torch.device("cpu"))
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    for _ in range(3):
        meter.update(torch.tensor(1.0), PROCEDURES["max"](torch.rand(1, 2, 4, 4), PredictOptions()), target)
    state = meter.state_dict()
    meter.load_state_dict(state)
    sums, (waiting,) = state["metrics"]["sums"], state["metrics"]["waiting"]
    wrong = torch.zeros(5, 0)
    for name in sums:
        with pytest.raises(ValueError, match=name):
            meter.load_state_dict(state | {"metrics": {"sums": sums | {name: wrong}, "waiting": [waiting]}})
        with pytest.raises(KeyError, match=name):
            meter.load_state_dict(state | {"metrics": {"sums": {k: v for k, v in sums.items() if k != name}}})
    assert waiting.shape == (1, 8)
    with pytest.raises(ValueError, match="waiting"):
        meter.load_state_dict(state | {"metrics": {"sums": sums, "waiting": [wrong]}})
    with pytest.raises(RuntimeError):
        meter.load_state_dict(state | {"loss": torch.zeros(3)})


def test_a_state_with_sums_only_is_read() -> None:
    """Checkpoints once contained nothing else."""
    meter = Meter(Metrics(2, 255), torch.device("cpu"))
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    meter.update(torch.tensor(1.0), PROCEDURES["max"](torch.rand(1, 2, 4, 4), PredictOptions()), target)
    before = meter.scores()
    meter.load_state_dict(meter.state_dict() | {"metrics": meter.metrics.totals()})
    assert meter.scores() == before


@pytest.mark.parametrize(("procedure", "shown"), [("max", "Accuracy 0.500"), ("T", "PixelAcc 0.667")])
def test_the_bar_shows_the_share_of_correct_labels_if_there_is_one(procedure, shown) -> None:
    """An untrained head is mostly right about each class alone, but not about the labels."""
    probs = torch.tensor([0.6, 0.2, 0.2])[None, :, None, None].expand(1, 3, 1, 4)
    target = torch.tensor([[[0, 0, 1, 2]]])
    meter = Meter(Metrics(3), torch.device("cpu"))
    meter.update(torch.tensor(1.0), PROCEDURES[procedure](probs, PredictOptions()), target)
    scores = {key.removeprefix("train_"): value for key, value in meter.scores().items()}
    assert f"| {shown} |" in live_scores(scores)
