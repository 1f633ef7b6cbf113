"""Comparisons: intervals against closed forms and a plain loop, counts, and the verdict."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from utils.evaluation.comparison import Difference, bootstrap, compare, differences, verdict, worst_mean
from utils.metrics import Metrics
from utils.predict import Prediction

NAN = float("nan")


def test_the_interval_of_a_mean_is_the_normal_one_for_many_images() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(0.2, 0.8, (2000, 1))
    change = rng.normal(0.01, 0.05, (2000, 1))
    low, high = bootstrap(base + change, base)[:, 0]
    half = 1.96 * change.std() / math.sqrt(2000)
    assert low == pytest.approx(change.mean() - half, abs=half * 0.06)
    assert high == pytest.approx(change.mean() + half, abs=half * 0.06)


def test_pairing_takes_out_what_makes_an_image_hard() -> None:
    base = np.random.default_rng(2).uniform(0, 1, (50, 1))
    low, high = bootstrap(base + 0.01, base)[:, 0]
    assert low == pytest.approx(0.01)
    assert high == pytest.approx(0.01)


def test_every_draw_is_what_a_plain_loop_computes() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.uniform(size=(7, 2)), rng.uniform(size=(7, 2))
    a[2, 0] = b[4, 1] = NAN
    draws = np.random.default_rng(5).integers(0, 7, (40, 7))
    loop = np.array([[np.nanmean(a[d, k]) - np.nanmean(b[d, k]) for k in range(2)] for d in draws])
    np.testing.assert_allclose(
        bootstrap(a, b, resamples=40, level=0.8, seed=5), np.nanquantile(loop, [0.1, 0.9], axis=0)
    )


def test_blocks_of_draws_change_nothing(monkeypatch) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.uniform(size=(30, 3)), rng.uniform(size=(30, 3))
    whole = bootstrap(a, b, resamples=500)
    monkeypatch.setattr("utils.evaluation.comparison._BLOCK", 100)
    np.testing.assert_array_equal(bootstrap(a, b, resamples=500), whole)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(200):
        change = rng.normal(0.02, 0.1, (60, 1))
        low, high = bootstrap(change, np.zeros_like(change), resamples=400, level=0.9)[:, 0]
        hits += low <= 0.02 <= high
    assert 165 <= hits <= 195  # 90 % of 200, within 3.5 standard deviations


def test_too_few_scores_have_no_interval() -> None:
    assert np.isnan(bootstrap(np.array([[0.5, NAN]]), np.array([[0.4, NAN]]))).all()
    assert np.isnan(bootstrap(np.zeros((0, 1)), np.zeros((0, 1)))).all()


def test_counts_and_extremes() -> None:
    base = np.array([0.5, 0.5, 0.5, 0.5, NAN, 0.5])
    scores = np.array([0.7, 0.5004, 0.4, 0.2, 0.9, NAN])
    (d,) = differences(scores[:, None], base[:, None])
    assert (d.better, d.same, d.worse) == (1, 1, 2)
    assert d.largest_gain == pytest.approx(0.2)
    assert d.largest_loss == pytest.approx(-0.3)
    assert d.mean == pytest.approx(np.nanmean(scores) - np.nanmean(base))  # the one in the table


def test_worst_tenth() -> None:
    values = np.array([0.9, 0.1, NAN, *[0.8] * 18, 0.2])
    assert worst_mean(values) == pytest.approx((0.1 + 0.2 + 0.8) / 3)  # 21 images: 2.1, so 3
    assert worst_mean(np.array([0.4])) == 0.4
    assert math.isnan(worst_mean(np.array([NAN])))


def difference(mean: float, low: float, high: float) -> Difference:
    return Difference(mean, low, high, 30, 10, 20, 0.1, -0.1)


def scored(**means: float) -> dict:
    return {name: {"Mean_Dice": mean} for name, mean in means.items()}


def test_verdicts() -> None:
    up, down, none = difference(0.02, 0.01, 0.03), difference(-0.02, -0.03, -0.01), difference(0.01, -0.01, 0.03)
    assert [d.clear for d in (up, down, none)] == [1, -1, 0]
    said = verdict(scored(max=0.5, T=0.48, rankdice=0.52), {"T": down, "rankdice": up}, 60)
    assert said.startswith("For masks use rankdice: mDice +0.0200 against max (95% interval +0.0100 to +0.0300)")
    assert "better in 30, the same in 10 and worse in 20 of 60 images." in said
    assert said.endswith("T is worse than max here: -0.0200 (95% interval -0.0300 to -0.0100).")
    said = verdict(scored(max=0.5, rankdice=0.51), {"rankdice": none}, 60, "rankdice")
    assert said.startswith("For masks keep max: on 60 images, no procedure is clearly better; the best, rankdice, has")
    assert "worse" not in said
    said = verdict(scored(max=0.5, T=0.48), {"T": down}, 60)
    assert said.startswith("For masks keep max: every other procedure is worse.")
    # A tiny lead does not justify a less simple procedure; a real lead does.
    assert "use T:" in verdict(scored(max=0.5, T=0.52, rankdice=0.5201), {"T": up, "rankdice": up}, 60)
    assert "use rankdice:" in verdict(scored(max=0.5, T=0.52, rankdice=0.53), {"T": up, "rankdice": up}, 60)
    assert "no interval" in verdict(scored(max=0.5, T=0.52), {"T": difference(0.02, NAN, NAN)}, 1)
    nothing = verdict(scored(max=NAN, T=NAN), {"T": difference(NAN, NAN, NAN)}, 0)
    assert nothing == "No result: no image could be scored."


def test_masks_and_label_maps_are_judged_apart() -> None:
    up, none = difference(0.02, 0.01, 0.03), difference(0.001, -0.01, 0.012)
    scores = scored(max=0.5, rankdice=0.501, rankdice_map=0.52)
    scores["max"] |= {"Dataset_mIoU": 0.40, "Multiclass_Accuracy": 0.93}
    scores["rankdice_map"] |= {"Dataset_mIoU": 0.41, "Multiclass_Accuracy": 0.92}
    said = verdict(scores, {"rankdice": none, "rankdice_map": up}, 60)
    assert said.startswith("For masks keep max")
    assert "For label maps use rankdice_map: mDice +0.0200" in said
    assert said.endswith("Its share of pixels with the right label is lower: 0.9200, max 0.9300.")
    assert "data-set" not in said


def test_a_procedure_that_changes_nothing_is_not_called_the_best() -> None:
    same, none = Difference(0.0, 0.0, 0.0, 0, 60, 0, 0.0, 0.0), difference(-0.001, -0.01, 0.008)
    scores = scored(max=0.5, T=0.5, rankdice=0.499)
    assert verdict(scores, {"T": same}, 60) == "For masks keep max: T gives the same scores."
    said = verdict(scores, {"T": same, "rankdice": none}, 60)
    assert said.startswith("For masks keep max: on 60 images, no procedure is clearly better; the best, rankdice, has")


def test_few_or_seen_images_decide_nothing() -> None:
    up = difference(0.02, 0.01, 0.03)
    said = verdict(scored(max=0.5, T=0.52), {"T": up}, 5)
    assert said.startswith("Not decisive: 5 images are few; test on more. For masks the best here is T:")
    said = verdict(scored(max=0.5, T=0.52), {"T": up}, 60, doubt="the test data chose the checkpoint")
    assert said.startswith("Not decisive: the test data chose the checkpoint. For masks the best here is T:")
    assert " use " not in said


def test_the_verdict_names_what_is_worse_and_the_configured_procedure_first() -> None:
    down, none = difference(-0.0013, -0.002, -0.0005), difference(-0.0001, -0.01, 0.003)
    scores = scored(max=0.5, T=0.4987, rankdice=0.4987, rankdice_iou=0.4999)
    said = verdict(scores, {"T": down, "rankdice": down, "rankdice_iou": none}, 50, "rankdice")
    assert "keep max" in said
    assert "rankdice_iou, has mDice -0.0001" in said
    configured = (
        "rankdice, the config's predict.test, is worse than max here: -0.0013 (95% interval -0.0020 to -0.0005)"
    )
    assert said.endswith(f"{configured}. So is T.")  # procedures with the same scores share a sentence
    four = dict.fromkeys(("T", "rankdice", "rankdice_paper", "rankdice_iou"), down)
    assert verdict(dict.fromkeys(("max", *four), {"Mean_Dice": 0.5}), four, 50).endswith(
        "T is worse than max here: -0.0013 (95% interval -0.0020 to -0.0005). So are rankdice, rankdice_paper and "
        "rankdice_iou."
    )
    lower = difference(-0.0014, -0.002, -0.0005)
    said = verdict(scores | {"T": {"Mean_Dice": 0.4986}}, {"T": lower, "rankdice": down}, 50, "rankdice")
    assert said.index(configured) < said.index("T is worse than max here: -0.0014")


def test_procedures_are_compared_by_the_means_of_the_table() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (12, 8, 8), generator=generator)
    metrics = {}
    for name, share in (("T", 0.4), ("max", 0.2), ("rankdice", 0.0)):
        noise = torch.rand(target.shape, generator=generator) < share
        metrics[name] = Metrics(3, keep_images=True)
        labels = torch.where(noise, torch.randint(0, 3, target.shape, generator=generator), target)
        metrics[name].update(Prediction(labels=labels), target, [f"{i:02}" for i in range(12)])
    found = compare(metrics, ("a", "b", "c"))
    scores = {name: m.compute() for name, m in metrics.items()}
    for name in ("T", "rankdice"):
        d = found["Mean_Dice"][name]
        assert d["mean"] == pytest.approx(scores[name]["Mean_Dice"] - scores["max"]["Mean_Dice"])
        assert d["low"] < d["mean"] < d["high"]
        one = found["Class_Dice"][name]["b"]["mean"]
        assert one == pytest.approx(scores[name]["Class_Dice"][1] - scores["max"]["Class_Dice"][1])
    assert "For masks the best here is rankdice" in found["verdict"]  # of 12 images
    worse = compare({"max": metrics["rankdice"], "T": metrics["T"]}, ("a", "b", "c"), "T")
    assert "T, the config's predict.test, is worse than max here" in worse["verdict"]
    assert compare({"max": metrics["max"]}, ("a", "b", "c")) is None
    assert compare({"T": metrics["T"], "rankdice": metrics["rankdice"]}, ("a", "b", "c")) is None
