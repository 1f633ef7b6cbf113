"""Prediction: probabilities from logits, and the procedures T, max and rankdice on cases computed by hand."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import cli, predict
from utils.config import schema
from utils.errors import UserError
from utils.evaluation import all_decisions
from utils.predict import (
    PROCEDURES,
    Prediction,
    PredictOptions,
    label_map,
    predict_logits,
    probabilities,
)
from utils.predict.segmentation import Decider
from utils.predict.tiling import Block
from utils.rankdice import METRICS, SOLVERS, Metric, rank_dice


def image(*channels: list[float]) -> torch.Tensor:
    """Return an image with one row of pixels, ``(1, C, 1, W)``."""
    return torch.tensor(channels)[None, :, None, :]


def rows(mask: torch.Tensor) -> list:
    return mask.int().squeeze(0).squeeze(-2).tolist()


# -- probabilities ---------------------------------------------------------------------------------------------


def test_softmax_and_sigmoid_in_closed_form() -> None:
    logits = image([0.0, 2.0], [0.0, 0.0])
    e2 = torch.tensor(2.0).exp().item()
    assert torch.allclose(probabilities(logits, "softmax"), image([0.5, e2 / (1 + e2)], [0.5, 1 / (1 + e2)]))
    assert torch.allclose(probabilities(logits, "sigmoid"), image([0.5, e2 / (1 + e2)], [0.5, 0.5]))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_one_channel_is_always_a_sigmoid(activation) -> None:
    assert torch.allclose(probabilities(image([0.0, 3.0]), activation), image([0.0, 3.0]).sigmoid())


def test_temperature_divides_the_logits() -> None:
    logits = image([1.0, -2.0], [0.5, 4.0])
    assert torch.equal(probabilities(logits, "softmax", 2.0), (logits / 2).softmax(1))
    assert torch.equal(probabilities(logits, "sigmoid", 0.5), (logits / 0.5).sigmoid())
    hot = probabilities(logits, "softmax", 1e6)
    assert torch.allclose(hot, torch.full_like(hot, 0.5), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_float32_made_in_float32(dtype) -> None:
    logits = (torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    before = logits.clone()
    found = probabilities(logits, "softmax", 1.5)
    assert found.dtype == torch.float32
    assert torch.allclose(found, (logits.double() / 1.5).softmax(1).float(), atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(2, 4, 4), atol=1e-6)
    assert torch.equal(logits, before)


def test_half_precision_logits_at_their_limit_stay_finite() -> None:
    logits = torch.tensor([65504.0, -65504.0], dtype=torch.float16).view(1, 2, 1, 1)
    assert probabilities(logits, "softmax", 0.01).flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("activation", "temperature"), [("softmax", 0.0), ("softmax", -1.0), ("relu", 1.0)])
def test_wrong_arguments_are_named(activation, temperature) -> None:
    with pytest.raises(ValueError, match="temperature|activation"):
        probabilities(image([0.0], [1.0]), activation, temperature)


# -- procedures ------------------------------------------------------------------------------------------------


def test_the_tables_name_the_same_procedures() -> None:
    assert tuple(PROCEDURES) == cli.PROCEDURES == typing.get_args(schema.Procedure)


def test_a_new_procedure_needs_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def above_mean(probs: torch.Tensor, options: PredictOptions) -> Prediction:
        return Prediction(masks=probs > probs.mean((2, 3), keepdim=True))

    monkeypatch.setitem(PROCEDURES, "above_mean", above_mean)
    probs = image([0.1, 0.9, 0.2], [0.8, 0.1, 0.2])
    assert all_decisions(PredictOptions())["above_mean"](probs).masks is not None
    assert rows(label_map("above_mean", probs, unassigned=9)) == [1, 0, 9]
    (found,) = Decider("above_mean", PredictOptions())(probs)
    assert found.labels.tolist() == [[1, 0, 255]]
    with pytest.raises(UserError, match="'above_mean' needs the probabilities of the whole"):
        Decider("above_mean", PredictOptions()).stream([], (2, 1, 3))


def test_the_metrics_of_rankdice_have_the_names_that_a_config_may_give() -> None:
    assert typing.get_args(Metric) == tuple(METRICS)
    assert all(set(score.solvers) <= set(SOLVERS) for score in METRICS.values())


def test_max_takes_the_most_probable_class_and_the_lowest_of_equals() -> None:
    probs = image([0.5, 0.2, 0.4], [0.3, 0.2, 0.4], [0.2, 0.6, 0.2])
    found = PROCEDURES["max"](probs, PredictOptions())
    assert found.masks is None
    assert found.labels.dtype == torch.int64
    assert rows(found.labels) == [0, 2, 0]


def test_t_takes_every_class_above_the_threshold_and_not_at_it() -> None:
    probs = image([0.5, 0.51, 0.3], [0.5, 0.6, 0.7])
    found = PROCEDURES["T"](probs, PredictOptions())
    assert found.labels is None
    assert found.masks.dtype == torch.bool
    assert rows(found.masks) == [[0, 1, 0], [0, 1, 1]]
    assert rows(PROCEDURES["T"](probs, PredictOptions(threshold=0.29)).masks) == [[1, 1, 1], [1, 1, 1]]


def test_rankdice_takes_the_volume_with_the_highest_expected_dice() -> None:
    # Pixels 0.9 and 0.4: {0} alone scores 2 E[Y0 / (1 + |Y|)] = 2 * 0.9 * (0.6 / 2 + 0.4 / 3) = 0.78,
    # both score 2 E[|Y| / (2 + |Y|)] = 2 * (0.58 * 1 / 3 + 0.36 * 2 / 4) = 0.7467: so the first alone.
    probs = image([0.9, 0.4], [0.8, 0.7])
    found = PROCEDURES["rankdice"](probs, PredictOptions(prune=None))
    assert rows(found.masks) == [[1, 0], [1, 1]]
    assert found.volumes.tolist() == [[1, 2]]
    assert found.scores[0, 0].item() == pytest.approx(0.78, abs=1e-6)
    assert found.scores[0, 1].item() == pytest.approx(2 * (0.38 / 3 + 0.56 / 2), abs=1e-6)


def test_rankdice_passes_on_every_option() -> None:
    probs = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 0.9
    for options in (
        PredictOptions(metric="iou"),
        PredictOptions(smooth=3.0),
        PredictOptions(prune=0.89),
        PredictOptions(prune=None, metric="iou"),
    ):
        found = PROCEDURES["rankdice"](probs, options)
        expected = rank_dice(probs, options.metric, options.solver, options.smooth, options.prune)
        assert torch.equal(found.masks, expected.masks)
        assert torch.equal(found.scores, expected.scores)


def test_a_solver_that_cannot_do_the_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="iou"):
        PROCEDURES["rankdice"](image([0.9, 0.4]), PredictOptions(solver="ba", metric="iou"))


def test_classes_of_interest_get_the_masks_they_get_among_all() -> None:
    probs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)).mul(3).softmax(1)
    everything = PROCEDURES["rankdice"](probs, PredictOptions())
    some = PROCEDURES["rankdice"](probs, PredictOptions(classes=(3, 1)))
    for name in ("masks", "scores", "volumes"):
        assert torch.equal(getattr(some, name)[:, [1, 3]], getattr(everything, name)[:, [1, 3]]), name
        assert not getattr(some, name)[:, [0, 2]].any(), name


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_one_channel(procedure) -> None:
    probs = image([0.9, 0.5, 0.1])
    found = PROCEDURES[procedure](probs, PredictOptions())
    decided = found.labels if found.masks is None else found.masks[:, 0]
    expected = {"T": [1, 0, 0], "max": [1, 0, 0], "rankdice": [1, 1, 0]}[procedure]
    assert rows(decided) == expected
    assert rows(label_map(procedure, probs)) == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.sampled_from(["softmax", "sigmoid"]),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_max_of_logits_is_max_of_probabilities(seed, channels, activation, temperature) -> None:
    # The logits of a pixel differ by at least 1/2, because torch's vectorized sigmoid may round equal ones differently.
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(2, channels, 5, 5, generator=generator).argsort(dim=1)
    logits = ranks / 2 + torch.randint(-8, 8, (2, 1, 5, 5), generator=generator) / 2 + 0.25
    direct = predict_logits("max", logits, activation, temperature, PredictOptions())
    longer = PROCEDURES["max"](probabilities(logits, activation, temperature), PredictOptions())
    assert torch.equal(direct.labels, longer.labels)


def test_of_equal_logits_the_lowest_class_wins() -> None:
    logits = image([1.0, 2.0], [1.0, 3.0], [0.0, 3.0])
    assert rows(predict_logits("max", logits, "softmax", 1.0, PredictOptions()).labels) == [0, 1]
    assert rows(predict_logits("max", image([0.0, 0.1]), "sigmoid", 1.0, PredictOptions()).labels) == [0, 1]


@pytest.mark.parametrize("procedure", ["T", "rankdice"])
def test_other_procedures_go_from_logits_through_probabilities(procedure) -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    options = PredictOptions(threshold=0.3)
    found = predict_logits(procedure, logits, "softmax", 2.0, options)
    assert torch.equal(found.masks, PROCEDURES[procedure](probabilities(logits, "softmax", 2.0), options).masks)


def test_temperature_changes_t_and_rankdice_but_not_max() -> None:
    logits = image([2.0, 1.0, 0.2], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    options = PredictOptions()
    cold, hot = (
        {name: predict_logits(name, logits, "softmax", temperature, options) for name in PROCEDURES}
        for temperature in (1.0, 4.0)
    )
    assert torch.equal(cold["max"].labels, hot["max"].labels)
    assert not torch.equal(cold["T"].masks, hot["T"].masks)
    assert not torch.equal(cold["rankdice"].masks, hot["rankdice"].masks)


def test_exactly_one_of_masks_and_labels_is_given() -> None:
    probs = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(4)).softmax(1)
    for procedure in PROCEDURES.values():
        found = procedure(probs, PredictOptions())
        assert isinstance(found, Prediction)
        assert (found.masks is None) != (found.labels is None)


# -- pictures --------------------------------------------------------------------------------------------------


def test_label_maps() -> None:
    probs = image([0.7, 0.4, 0.1], [0.2, 0.3, 0.1], [0.1, 0.3, 0.8])
    assert rows(label_map("max", probs)) == [0, 0, 2]
    assert rows(label_map("T", probs)) == [0, 255, 2]
    assert rows(label_map("T", probs, PredictOptions(threshold=0.35), unassigned=9)) == [0, 0, 2]
    assert rows(label_map("T", probs, unassigned=9)) == [0, 9, 2]
    assert label_map("rankdice", probs).dtype == torch.int64


def test_rankdice_gives_a_small_uncertain_object_pixels_that_max_does_not() -> None:
    # 12 background pixels at 0.55: assigning the object's best pixels, at 0.45, to the object raises the total Dice.
    background = [0.99] * 12 + [0.55] * 3
    probs = image(background, [1 - p for p in background])
    assert rows(label_map("max", probs)) == [0] * 15
    assert rows(label_map("rankdice", probs, PredictOptions(presence="all"))) == [0] * 12 + [1] * 3
    assert rows(label_map("rankdice", probs)) == [0] * 15  # pruned: nowhere above 0.5


def test_a_picture_may_show_classes_of_no_interest() -> None:
    # If only class 1 were allowed, it would cover everything.
    probs = image([0.99, 0.99, 0.05], [0.01, 0.01, 0.95])
    for procedure in PROCEDURES:
        assert rows(label_map(procedure, probs, PredictOptions(classes=(1,)))) == [0, 0, 1], procedure


@pytest.mark.parametrize("presence", ["prune", "all", "rule"])
@pytest.mark.parametrize("own", [0, 1])
def test_of_two_classes_the_one_of_interest_gets_its_mask(own: int, presence: str) -> None:
    first = torch.rand(40, 50, generator=torch.Generator().manual_seed(own)).pow(2).half().float()
    probs = torch.stack([first, 1 - first])[None].half().float()
    decide = Decider("rankdice", PredictOptions(classes=(own,), presence=presence), keep_masks=True)
    whole = decide(probs.clone())[0]
    assert 0 < whole.masks[own].sum() < 2000
    np.testing.assert_array_equal(whole.labels, np.where(whole.masks[own], own, 1 - own))
    streamed = decide.stream([Block(0, 0, probs[0, :, :17]), Block(17, 0, probs[0, :, 17:])], (2, 40, 50))
    np.testing.assert_array_equal(streamed.labels, whole.labels)


# -- options ---------------------------------------------------------------------------------------------------


def test_every_option_of_the_config_arrives() -> None:
    section = schema.Predict(
        CoI=[2, 0],
        threshold=0.4,
        rankdice={"solver": "rma", "metric": "iou", "smooth": 2.0, "prune": None},
    )
    assert PredictOptions.from_config(section) == PredictOptions(
        threshold=0.4, solver="rma", metric="iou", smooth=2.0, prune=None, classes=(2, 0)
    )
    assert PredictOptions.from_config(schema.Predict()) == PredictOptions()
    assert set(schema.RankDiceOptions.model_fields) < set(PredictOptions.__dataclass_fields__)
    assert predict.PredictOptions().classes is None
