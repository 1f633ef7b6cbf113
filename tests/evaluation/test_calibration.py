"""Calibration: known temperatures are recovered, the sweep equals single thresholds, reliability by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from utils.batch import Batch
from utils.evaluation import Part
from utils.evaluation.reliability import Reliability, chosen_pixels, threshold_scores
from utils.evaluation.temperature import Calibration, LogitSample, fit_bias, fit_temperature
from utils.facts import Facts
from utils.losses import gives_probabilities
from utils.metrics import Metrics
from utils.predict import PredictOptions, predict_threshold, probabilities

FACTS = Facts(3, ("a", "b", "c"), ((0, 0, 0),) * 3, (0.5,) * 3, (0.2,) * 3, 255)


def drawn(count: int, classes: int, activation: str, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits, and labels drawn from their probabilities at a temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator) * 3
    if classes == 1:
        return logits, (torch.rand(count, generator=generator) < (logits[:, 0] / temperature).sigmoid()).long()
    return logits, (logits / temperature).softmax(1).multinomial(1, generator=generator)[:, 0]


def part(logits: torch.Tensor, target: torch.Tensor, activation: str = "softmax", temperature: float = 1.0) -> Part:
    names = [f"image{i}" for i in range(len(target))]
    probs = probabilities(logits, activation, temperature)
    return Part(Batch(torch.zeros(len(target), 3, 1, 1), target, names), logits, probs, target, {}, {})


def nll(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> float:
    if logits.shape[1] == 1:
        return float(
            torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0].double() / temperature, target.double())
        )
    return float(torch.nn.functional.cross_entropy(logits.double() / temperature, target))


@pytest.mark.parametrize("truth", [0.4, 1.0, 2.5])
@pytest.mark.parametrize(("classes", "activation"), [(5, "softmax"), (1, "softmax"), (1, "sigmoid")])
def test_the_temperature_labels_were_drawn_with_is_found(truth, classes, activation) -> None:
    logits, target = drawn(60_000, classes, activation, truth)
    found = fit_temperature(logits, target, activation)
    assert found == pytest.approx(truth, rel=0.03)
    best = nll(logits, target, found)
    assert best <= nll(logits, target, found * 1.001) + 1e-12
    assert best <= nll(logits, target, found / 1.001) + 1e-12


def test_one_against_the_rest_has_its_own_likelihood() -> None:
    logits, target = drawn(4000, 3, "softmax", 1.0)
    found = fit_temperature(logits, target, "sigmoid")
    truth = torch.nn.functional.one_hot(target, 3).double()

    def loss(t: float) -> float:
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits.double() / t, truth))

    assert loss(found) <= min(loss(found * 1.001), loss(found / 1.001))


def test_a_perfect_network_cannot_drive_the_temperature_to_zero() -> None:
    logits = torch.eye(3).repeat(50, 1) * 4
    assert fit_temperature(logits, logits.argmax(1), "softmax") == 0.1


def test_a_network_that_is_wrong_cannot_drive_it_to_infinity() -> None:
    logits = torch.eye(3).repeat(50, 1) * 4
    assert fit_temperature(logits, (logits.argmax(1) + 1) % 3, "softmax") == 10.0


def test_huge_logits_and_constant_ones_end() -> None:
    logits, target = drawn(500, 4, "softmax", 1.0)
    found = fit_temperature(logits * 1e4, target, "softmax", bounds=(1e-3, 1e6))
    assert found == pytest.approx(1e4, rel=0.2)
    assert math.isfinite(fit_temperature(torch.zeros(10, 3), torch.zeros(10, dtype=torch.long), "softmax"))


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "softmax")
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(torch.full((2, 3), math.nan), torch.zeros(2, dtype=torch.long), "softmax")


def test_the_sample_does_not_depend_on_batches_and_leaves_ignored_pixels_out(monkeypatch) -> None:
    monkeypatch.setattr("utils.evaluation.temperature.SAMPLE_BYTES", 4 * 3 * 5 * 20)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3, 9, 9, generator=generator)
    target = torch.randint(0, 3, (5, 9, 9), generator=generator)
    target[:, :4] = 255
    together, apart = LogitSample(FACTS, 5), LogitSample(FACTS, 5)
    whole = part(logits, target)
    together.add(whole)
    for i in reversed(range(5)):
        share = LogitSample(FACTS, 5)
        share.add(
            replace(whole, batch=Batch(None, None, [f"image{i}"]), logits=logits[i : i + 1], target=target[i : i + 1])
        )
        apart.rows |= share.rows
    for a, b in zip(together.stacked(), apart.stacked(), strict=True):
        assert torch.equal(a, b)
    assert len(together.stacked()[1]) == 5 * 20
    assert (together.stacked()[1] < 3).all()


def test_few_pixels_are_all_taken() -> None:
    target = torch.tensor([[0, 255], [1, 1]])
    assert chosen_pixels("x", target, 255, 10).tolist() == [0, 2, 3]
    assert len(chosen_pixels("x", torch.full((2, 2), 255), 255, 10)) == 0


@pytest.mark.parametrize("classes", [None, (0, 2)])
@pytest.mark.parametrize("count_ignored", [False, True])
@pytest.mark.parametrize("channels", [3, 1])
def test_the_sweep_gives_what_each_threshold_scores(channels, count_ignored, classes) -> None:
    if channels == 1 and classes:
        pytest.skip("one class")
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, channels, 8, 8, generator=generator) * 2
    target = torch.randint(0, max(channels, 2), (4, 8, 8), generator=generator)
    target[0] = target[0].clamp(max=0)
    target[:, :2] = 255
    facts = replace(FACTS, num_classes=channels)
    seen = part(logits, target)
    seen.probs[0, 0, 4, 4] = torch.tensor(0.3)  # a probability at a threshold is not above it
    thresholds = (0.1, 0.3, 0.5, 0.8)
    found = [
        threshold_scores(*one, facts, thresholds, classes, count_ignored)
        for one in zip(seen.probs, target, strict=True)
    ]
    for threshold, mean in zip(thresholds, torch.stack(found).nanmean(0).tolist(), strict=True):
        metrics = Metrics(channels, 255, classes=classes, count_ignored=count_ignored, keep_images=True)
        metrics.update(predict_threshold(seen.probs, PredictOptions(threshold=threshold)), target, seen.batch.names)
        assert mean == pytest.approx(metrics.compute()["Mean_Dice"], abs=1e-12)


def test_the_sweep_takes_channels_last_maps_without_a_warning(recwarn) -> None:
    logits = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    torch.set_warn_always(True)  # else torch warns only the first time in a process
    try:
        seen = part(logits, torch.zeros(2, 8, 8, dtype=torch.long), "sigmoid")
        threshold_scores(seen.probs[0], seen.target[0], FACTS)
    finally:
        torch.set_warn_always(False)
    assert not [str(w.message) for w in recwarn]


def test_reliability_by_hand() -> None:
    gathered = Reliability(2, 255, "softmax")
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
    gathered.add_pixels(probs, torch.tensor([0, 1, 1, 0]))
    found = gathered.compute()
    assert found["pixels"] == 4
    assert found["NLL"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.7) + math.log(0.5)) / 4, abs=1e-6)
    assert found["Brier"] == pytest.approx((0.02 + 1.62 + 0.18 + 0.5) / 4, abs=1e-6)
    # Confidence: bins of 0.9 (twice, one right), 0.7 (right), 0.5 (right).
    assert found["ECE"] == pytest.approx((2 * 0.4 + 0.3 + 0.5) / 4, abs=1e-6)
    # Each class: |1.8 - 1| + |0.3 - 0| + |0.5 - 1|; the other class mirrors it.
    assert found["Class_ECE"] == pytest.approx((0.8 + 0.3 + 0.5) / 4, abs=1e-6)
    assert found["confidence"][-1] == pytest.approx([0.9, 0.5, 0.5], abs=1e-6)
    assert sum(share for *_, share in found["classes"]) == pytest.approx(1)


def test_reliability_of_one_channel_and_of_nothing() -> None:
    gathered = Reliability(1, 255, "softmax")
    assert math.isnan(gathered.compute()["ECE"])
    gathered.add_pixels(torch.tensor([[0.8], [0.2], [1.0]]), torch.tensor([1, 0, 1]))
    found = gathered.compute()
    assert found["ECE"] == pytest.approx(0.4 / 3, abs=1e-6)
    assert found["Class_ECE"] == pytest.approx(0.4 / 3, abs=1e-6)
    assert found["NLL"] == pytest.approx(-2 * math.log(0.8) / 3, abs=1e-6)


def test_shares_of_processes_add_up_and_probabilities_that_are_true_have_no_error() -> None:
    logits, target = drawn(40_000, 4, "softmax", 1.0)
    whole, half = Reliability(4, 255, "softmax"), Reliability(4, 255, "softmax")
    probs = logits.softmax(1)
    whole.add_pixels(probs, target)
    half.add_pixels(probs[:15_000], target[:15_000])
    other = Reliability(4, 255, "softmax")
    other.add_pixels(probs[15_000:], target[15_000:])
    half.merge([other])
    assert half.compute()["ECE"] == pytest.approx(whole.compute()["ECE"], rel=1e-9)
    assert whole.compute()["ECE"] < 0.01
    sure = Reliability(4, 255, "softmax")
    sure.add_pixels((logits / 0.3).softmax(1), target)
    assert sure.compute()["ECE"] > 0.05


@pytest.mark.parametrize(("classes", "activation"), [(4, "softmax"), (3, "sigmoid"), (1, "sigmoid")])
def test_a_bias_per_class_is_found_again(classes, activation) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(60_000, classes, generator=generator)
    bias = torch.linspace(-1, 1.5, classes)
    if classes > 1 and activation == "softmax":
        bias = bias - bias.mean()  # a shift of all classes changes nothing
    odds = logits / 1.6 + bias
    if activation == "softmax":
        target = torch.multinomial(odds.softmax(1), 1, generator=generator)[:, 0]
    elif classes == 1:
        target = (torch.rand(len(odds), generator=generator) < odds[:, 0].sigmoid()).long()
    else:  # each pixel has one label, so labels cannot be drawn from independent sigmoids
        target = torch.multinomial(odds.sigmoid(), 1, generator=generator)[:, 0]
    found = fit_bias(logits, target, activation, torch.ones(classes, dtype=torch.bool))
    assert found is not None
    if activation == "softmax" or classes == 1:
        assert found.temperature == pytest.approx(1.6, rel=0.03)
        assert torch.tensor(found.bias).sub(bias).abs().max() < 0.05
    # It is the optimum: no small step improves the likelihood.
    best = _nll(found, logits, target, activation)
    for k in range(classes):
        for step in (-0.02, 0.02):
            moved = [b + step * (i == k) for i, b in enumerate(found.bias)]
            assert _nll(Calibration(found.temperature, tuple(moved)), logits, target, activation) > best - 1e-9
        assert _nll(Calibration(found.temperature * 1.02, found.bias), logits, target, activation) > best
    assert best <= _nll(Calibration(fit_temperature(logits, target, activation)), logits, target, activation)


def test_only_common_classes_get_a_bias() -> None:
    logits, target = drawn(5_000, 4, "softmax", 1.0)
    found = fit_bias(logits, target, "softmax", torch.tensor([True, False, True, False]))
    assert found.bias[1] == found.bias[3] == 0
    assert found.bias[0] != 0


def _nll(calibration: Calibration, logits: torch.Tensor, target: torch.Tensor, activation: str) -> float:
    gathered = Reliability(logits.shape[1], 255, activation)
    gathered.add_pixels(calibration(logits.double()[:, :, None, None], activation)[:, :, 0, 0].double(), target)
    return gathered.compute()["NLL"]


@pytest.mark.parametrize(
    ("loss", "usable"),
    [
        ({"type": "CrossEntropyLoss2d"}, True),
        ({"type": "FocalLoss", "gamma": 2.0}, True),
        ({"type": "BCEWithLogitsFocalLoss2d"}, True),
        ({"type": "BCEWithLogitsFocalLoss2d", "alpha": 0.25}, False),
        ({"type": "FocalLoss", "weight": "balanced"}, False),
        ({"type": "CrossEntropyLoss2d", "weight": "balanced"}, False),
        ({"type": "CrossEntropyLoss2d", "label_smoothing": 0.1}, True),
        ({"type": "CrossEntropyLoss2d", "top_k": 0.2, "label_smoothing": 0.1}, True),
        ({"type": "CE_DiceLoss", "per_class": True}, True),
        ({"type": "CE_DiceLoss", "weight": "balanced"}, False),
        ({"type": "BCEDiceLoss"}, True),
        ({"type": "BCEDiceLoss", "pos_weight": [2.0]}, False),
        ({"type": "DiceLoss"}, False),
    ],
)
def test_losses_whose_outputs_can_pass_as_probabilities(loss, usable) -> None:
    assert gives_probabilities(**loss) == usable
