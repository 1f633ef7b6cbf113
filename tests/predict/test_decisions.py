"""Which classes get a mask: the same decision for masks, label maps and streamed images, by default the paper's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from utils import presence
from utils.config import schema
from utils.predict import PROCEDURES, PredictOptions, label_map, probabilities
from utils.rankdice import rank_dice

MODES = ("fitted", "rule", "prune", "all")


def probs(seed: int = 0, classes: int = 4, images: int = 5) -> Tensor:
    """Return maps in which some classes are rare."""
    generator = torch.Generator().manual_seed(seed)
    level = 3 * torch.randn(images, classes, 1, 1, generator=generator)
    return (2 * torch.randn(images, classes, 9, 11, generator=generator) + level).softmax(1)


def a_fit(classes: tuple[int, ...] = (0, 1, 2, 3), metric: str = "dice") -> dict[str, Any]:
    count = len(classes)
    numbers = {"weight": 0.8, "center": -0.5, "spread": 1.5, "bias": 0.3, "score_shift": 0.05, "score_slope": -0.1}
    numbers |= {"mean_score": 0.6, "mask_shift": 0.01, "mask_slope": 0.1}
    lists = {"class_bias": [0.5 * i - 0.5 for i in range(count)], "mask_class": [0.01 * i for i in range(count)]}
    return numbers | lists | {"images": 50, "classes": list(classes), "metric": metric}


def options(how: str, **changes: Any) -> PredictOptions:
    return PredictOptions(presence=how, fit=a_fit() if how == "fitted" else None, **changes)


def test_without_a_fit_auto_is_the_papers_procedure_bit_for_bit() -> None:
    for smooth in (0.0, 2.0):
        found = PROCEDURES["rankdice"](probs(), PredictOptions(smooth=smooth))
        expected = rank_dice(probs(), smooth=smooth)
        for name in ("masks", "volumes", "scores"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert found.unfitted is None
    assert torch.equal(PROCEDURES["max"](probs(), PredictOptions()).labels, probs().argmax(1))


@pytest.mark.parametrize("how", MODES)
def test_masks_are_those_of_rankdice_for_the_chosen_classes(how: str) -> None:
    found = PROCEDURES["rankdice"](probs(), options(how))
    every = rank_dice(probs(), prune=None)
    chosen = found.chosen
    if how in ("fitted", "rule"):
        expected, seen = presence.choose(probs().flatten(2).amax(2), every.scores, options(how).fit)
        assert torch.equal(chosen, expected)
        assert torch.equal(found.presence, seen)
        assert chosen.any()
        assert not chosen.all()
    else:
        assert torch.equal(chosen, probs().flatten(2).amax(2) > (0.5 if how == "prune" else 0.0))
    assert torch.equal(found.masks, every.masks & chosen[:, :, None, None])
    assert torch.equal(found.volumes, found.masks.sum((2, 3)))
    assert not found.scores[~chosen].any()


def test_expected_scores_are_those_of_the_fit_and_the_former_ones_are_kept() -> None:
    found = PROCEDURES["rankdice"](probs(), options("fitted"))
    every = rank_dice(probs(), prune=None)
    expected = presence.estimate(probs().flatten(2).amax(2), every.scores, a_fit()).expected
    assert torch.equal(found.scores, torch.where(found.chosen, expected, 0.0))
    assert torch.equal(found.unfitted, torch.where(found.chosen, every.scores, 0.0))


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("procedure", ["max", "rankdice"])
def test_only_chosen_classes_are_in_a_label_map(how: str, procedure: str) -> None:
    found = PROCEDURES[procedure](probs(), options(how))
    labels = label_map(procedure, probs(), options(how), found)
    assert torch.equal(labels, label_map(procedure, probs(), options(how)))
    if procedure == "max" and how == "all":
        assert torch.equal(labels, probs().argmax(1))
        return
    for one, picture, p in zip(found.chosen, labels, probs(), strict=True):
        assert set(picture.unique().tolist()) <= set(one.nonzero()[:, 0].tolist())
        if procedure == "max":
            assert torch.equal(picture, p.masked_fill(~one[:, None, None], -1).argmax(0))


def test_an_image_without_a_chosen_class_still_gets_a_complete_label_map() -> None:
    unsure = torch.full((1, 3, 4, 4), 1 / 3)
    unsure[:, 1] += 0.01
    found = PROCEDURES["rankdice"](unsure, PredictOptions())
    assert not found.chosen.any()
    assert label_map("rankdice", unsure).max() < 3
    assert (PROCEDURES["max"](unsure, PredictOptions(presence="prune")).labels == 1).all()


def test_presence_looks_at_classes_of_interest_only_and_a_fit_serves_others() -> None:
    chosen = options("fitted", classes=(2, 0))
    found = PROCEDURES["rankdice"](probs(), chosen)
    every = rank_dice(probs(), prune=None)
    fit = a_fit() | {"class_bias": [0.5, -0.5], "mask_class": [0.02, 0.0]}
    expected, seen = presence.choose(probs().flatten(2).amax(2)[:, [2, 0]], every.scores[:, [2, 0]], fit)
    assert torch.equal(found.chosen[:, [2, 0]], expected)
    assert torch.equal(found.presence[:, [2, 0]], seen)
    assert found.presence[:, [1, 3]].isnan().all()
    assert not found.chosen[:, [1, 3]].any()
    # a class that the fit has not seen gets no offset of its own
    partly = presence.choose_classes(probs().flatten(2).amax(2), every.scores, PredictOptions(fit=a_fit((0, 1))))
    offsets = a_fit() | {"class_bias": [-0.5, 0.0, 0.0, 0.0], "mask_class": [0.0, 0.01, 0.0, 0.0]}
    assert torch.equal(partly.presence, presence.choose(probs().flatten(2).amax(2), every.scores, offsets)[1])


def test_a_fit_on_dice_serves_iou() -> None:
    dice, iou = (PROCEDURES["rankdice"](probs(), replace(options("fitted"), metric=m)) for m in ("dice", "iou"))
    assert (dice.chosen == iou.chosen).double().mean() > 0.9
    both = dice.chosen & iou.chosen
    assert torch.allclose(iou.scores[both], (dice.scores / (2 - dice.scores))[both], atol=0.05)


def test_a_single_class_is_chosen_or_the_image_is_background() -> None:
    one = torch.tensor([0.9, 0.6]).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    fit = a_fit((0,)) | {"class_bias": [0.0], "bias": -3.0, "weight": 2.0, "mean_score": 0.9}
    for procedure in ("max", "rankdice"):
        chosen = PredictOptions(fit=fit)
        found = PROCEDURES[procedure](one, chosen)
        assert found.chosen.tolist() == [[True], [False]]
        assert label_map(procedure, one, chosen).flatten(1).float().mean(1).tolist() == [1, 0]


def test_options_follow_the_config() -> None:
    assert PredictOptions().chooses_by == "prune"
    assert not PredictOptions().restricts_max
    assert PredictOptions(fit=a_fit()).chooses_by == "fitted"
    assert PredictOptions(fit=a_fit()).restricts_max
    assert [options(how).restricts_max for how in MODES] == [True, True, True, False]
    section = schema.Predict(presence_fit=a_fit())
    found = PredictOptions.from_config(section)
    assert (found.chooses_by, found.fit) == ("fitted", a_fit())
    assert schema.Predict(**section.model_dump()) == section
    with pytest.raises(ValueError, match="'fitted' needs presence_fit"):
        schema.Predict(presence="fitted")
    with pytest.raises(ValueError, match="must have the same length"):
        schema.Predict(presence_fit=a_fit() | {"class_bias": [0.0]})


def test_a_bias_is_added_after_the_temperature() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    bias = (0.5, -1.0, 0.0)
    shift = torch.tensor(bias).view(3, 1, 1)
    assert torch.allclose(probabilities(logits, "softmax", 2.0, bias), (logits / 2 + shift).softmax(1))
    assert torch.allclose(probabilities(logits, "sigmoid", 2.0, bias), (logits / 2 + shift).sigmoid())
    with pytest.raises(ValueError, match="bias: expected 3 numbers, one per class, found 2"):
        probabilities(logits, "softmax", 1.0, (0.0, 1.0))
