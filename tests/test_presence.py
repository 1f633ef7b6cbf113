"""Which classes are in an image: the rule against exhaustive search, the fit against simulated data, and its guard."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.presence import choose, estimate, fit, learn, learning
from utils.rankdice import rank_dice


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# -- the rule ------------------------------------------------------------------------------------------------------


def test_closed_forms() -> None:
    # One class is certain, with Dice 0.8. Another one has Dice 0.5 and is present with probability p. It gets a mask if
    # 0.5 p > (1 - p) 0.8, that is, p > 8/13.
    for p, expected in ((8 / 13 - 0.01, False), (8 / 13 + 0.01, True)):
        chosen, seen = choose(tensor([1.0, p]), tensor([0.8, 0.5]))
        assert chosen.tolist() == [[True, expected]]
        assert seen.tolist() == [[1.0, p]]
    # With a mean of 0.4, a lower p is enough: 0.5 p > (1 - p) 0.4.
    assert choose(tensor([1.0, 0.46]), tensor([0.4, 0.5]))[0].tolist() == [[True, True]]
    assert choose(tensor([1.0, 0.42]), tensor([0.4, 0.5]))[0].tolist() == [[True, False]]


def test_a_single_class_needs_more_than_even_odds_or_what_the_fit_says() -> None:
    assert choose(tensor([0.51], [0.49]), tensor([0.3], [0.9]))[0].tolist() == [[True], [False]]
    fitted = identity(1) | {"mean_score": 0.9}
    # highest 0.5 is presence 0.5: a mask when d > m
    assert choose(tensor([0.5], [0.5]), tensor([0.95], [0.85]), fitted)[0].tolist() == [[True], [False]]


def expected_mean(pi: np.ndarray, d: np.ndarray, chosen: tuple[bool, ...]) -> float:
    """Return the expected mean score of an image over all ways in which classes can be present; 0/0 counts 0."""
    total = 0.0
    for there in itertools.product((False, True), repeat=len(pi)):
        chance = np.prod([p if t else 1 - p for p, t in zip(pi, there, strict=True)])
        counted = [t or c for t, c in zip(there, chosen, strict=True)]
        scores = [x for x, t, c in zip(d, there, chosen, strict=True) if t and c]
        total += chance * sum(scores) / max(1, sum(counted))
    return float(total)


@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_the_rule_is_close_to_exhaustive_search(classes: int) -> None:
    rng = np.random.default_rng(classes)
    pi, d = rng.beta(0.6, 0.6, (60, classes)), rng.uniform(0.2, 0.95, (60, classes))
    pi[:, 0] = 1  # as a background that is always there
    chosen, _ = choose(torch.from_numpy(pi), torch.from_numpy(d))
    best, found, pruned = [], [], []
    for p, s, c in zip(pi, d, chosen.tolist(), strict=True):
        best.append(max(expected_mean(p, s, x) for x in itertools.product((False, True), repeat=classes)))
        found.append(expected_mean(p, s, tuple(c)))
        pruned.append(expected_mean(p, s, tuple(p > 0.5)))
    lost = np.array(best) - np.array(found)
    assert lost.max() < 0.02
    assert lost.mean() < 0.0005
    assert np.mean(pruned) < np.mean(found)  # and pruning is not


rows_of_images = st.integers(1, 7).flatmap(
    lambda c: st.lists(
        st.tuples(st.lists(st.floats(0, 1), min_size=c, max_size=c), st.lists(st.floats(0, 1), min_size=c, max_size=c)),
        min_size=1,
        max_size=6,
    )
)


@settings(max_examples=200, deadline=None)
@given(rows_of_images)
def test_what_is_chosen_obeys_the_rule_and_a_batch_is_its_images(drawn: Any) -> None:
    highest, scores = (tensor(*[row[k] for row in drawn]) for k in (0, 1))
    chosen, seen = choose(highest, scores)
    alone = [choose(highest[i : i + 1], scores[i : i + 1])[0] for i in range(len(drawn))]
    assert torch.equal(chosen, torch.cat(alone))
    assert torch.equal(seen, highest)
    # Order of classes does not matter.
    back = torch.arange(highest.shape[1] - 1, -1, -1)
    turned = choose(highest[:, back], scores[:, back])[0][:, back]
    for i in range(len(drawn)):
        m = others(highest[i], scores[i], chosen[i])
        margin = highest[i] * scores[i] - (1 - highest[i]) * m
        steady = margin.abs() > 1e-9
        # In rare images, no choice satisfies the rule for all classes; these get one mask too many.
        broken = steady & (chosen[i] != (margin > 0))
        assert not broken.any() or (chosen[i] & broken).any()
        if steady.all() and not broken.any():
            assert torch.equal(turned[i], chosen[i])


def others(pi: Tensor, d: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean score that the other classes can expect, class by class."""
    found = d.clone()
    for c in range(len(pi)):
        rest = [k for k in range(len(pi)) if k != c]
        count = sum(1.0 if chosen[k] else float(pi[k]) for k in rest)
        if count > 1e-9:
            found[c] = sum(float(pi[k] * d[k]) for k in rest if chosen[k]) / count
    return found


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_a_class_that_is_more_probable_or_scores_higher_keeps_its_mask(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    highest, scores = torch.rand(2, 1, classes, generator=generator, dtype=torch.float64)
    chosen, _ = choose(highest, scores)
    m = others(highest[0], scores[0], chosen[0])
    for c in range(classes):
        if not chosen[0, c]:
            continue
        for values in (highest, scores):
            raised = values.clone()
            raised[0, c] = (values[0, c] + 1) / 2
            pair = (raised, scores) if values is highest else (highest, raised)
            gain = float(pair[0][0, c] * pair[1][0, c] - (1 - pair[0][0, c]) * m[c])
            assert gain > 0  # against the same others
            if choose(*pair)[0][0].equal(chosen[0]):
                continue
            # If the other classes change, they only lose masks.
            assert choose(*pair)[0][0, c]


def test_wrong_arguments_are_named() -> None:
    good = tensor([0.5, 0.6])
    with pytest.raises(ValueError, match="highest: expected finite numbers"):
        choose(tensor([0.5, float("nan")]), good)
    with pytest.raises(ValueError, match="scores: expected finite numbers"):
        choose(good, tensor([0.5, 1.2]))
    with pytest.raises(ValueError, match=r"scores: expected the shape of highest \(1, 2\)"):
        choose(good, tensor([0.5]))
    with pytest.raises(ValueError, match=r"highest: expected \(images, classes\)"):
        choose(good[0], good[0])
    with pytest.raises(ValueError, match="fit: made for 3 classes, got 2"):
        choose(good, good, identity(3))
    with pytest.raises(ValueError, match="present: expected shape"):
        learn(good, good, good, tensor([1.0]).bool())


# -- the fit -------------------------------------------------------------------------------------------------------


def identity(classes: int) -> dict[str, Any]:
    """Return a fit that takes half the logit of the largest probability and scores as they are."""
    names = ("weight", "center", "bias", "score_shift", "score_slope", "mask_shift", "mask_slope")
    zeros = dict.fromkeys(("class_bias", "mask_class"), [0.0] * classes)
    return dict.fromkeys(names, 0.0) | zeros | {"images": 0, "spread": 1.0, "mean_score": 0.5}


def test_expected_scores_of_masks_are_corrected_per_class() -> None:
    highest, scores = tensor([0.9, 0.6]), tensor([0.8, 0.4])
    plain = estimate(highest, scores, identity(2)).expected
    fit = identity(2) | {"mask_shift": 0.02, "mask_slope": 0.5, "mask_class": [0.1, -0.05]}
    expected = plain + 0.02 + 0.5 * (plain - 0.6) + torch.tensor([0.1, -0.05], dtype=torch.float64)
    torch.testing.assert_close(estimate(highest, scores, fit).expected, expected.clamp(0, 1))


def drawn(images: int, classes: int = 5, seed: int = 0, always: bool = False) -> tuple[Tensor, ...]:
    """Draw validation rows from a known fit, in which the largest probability is biased."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, classes, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    highest = (0.6 * torch.randn(images, classes, generator=generator, dtype=torch.float64) - 1.2).sigmoid()
    odds = 0.5 * torch.logit(highest) + 1.5 * (torch.logit(scores) / 1.7) + torch.linspace(0.5, 1.5, classes)
    present = torch.rand(images, classes, generator=generator, dtype=torch.float64) < odds.sigmoid()
    present[:, 0] = True
    highest[:, 0] = 0.99
    if always:
        present[:] = True
    measured = (0.8 * scores + 0.1 + 0.05 * torch.randn(images, classes, generator=generator)).clamp(0, 1)
    return highest, scores, measured, present


def test_the_fit_finds_what_was_drawn_and_gains_where_it_says() -> None:
    found = learn(*drawn(400))
    assert found.fit is not None
    assert found.fitted is not None
    assert found.pruned is not None
    fitted, pruned = float(found.fitted.nanmean()), float(found.pruned.nanmean())
    assert fitted > pruned + 0.05
    highest, scores, measured, present = drawn(2000, seed=1)
    believed = estimate(highest, scores, found.fit)
    # calibrated: of the rows with a presence near p, a share of p is present; the scores are right on average
    for low in (0.2, 0.4, 0.6, 0.8):
        near = (believed.presence > low - 0.1) & (believed.presence < low + 0.1)
        assert float(present[near].double().mean()) == pytest.approx(float(believed.presence[near].mean()), abs=0.05)
    assert float((believed.scores - measured)[present].mean()) == pytest.approx(0, abs=0.01)
    chosen = choose(highest, scores, found.fit)[0]
    truth = torch.where(present, measured, 0.0)
    for c in range(5):  # class by class, where there are enough masks
        if chosen[:, c].sum() > 200:
            error = (believed.expected - truth)[chosen[:, c], c].mean()
            assert float(error) == pytest.approx(0, abs=0.03), c
    rows = learning._Rows.checked(highest, scores, measured, present)
    gains = rows.mean_scores(choose(highest, scores, found.fit)[0]) - rows.mean_scores(highest > 0.5)
    assert float(gains.nanmean()) == pytest.approx(fitted - pruned, abs=0.02)
    assert json.loads(json.dumps(found.fit)) == found.fit
    assert fit(*drawn(400)) == found.fit


def test_the_regression_is_at_the_optimum_of_its_likelihood() -> None:
    highest, scores, measured, present = drawn(60, 3)
    found = learning._fit(learning._Rows.checked(highest, scores, measured, present))
    names = ("weight", "bias")

    def loss(values: dict[str, Any]) -> float:
        p = estimate(highest, scores, values).presence
        entropy = -torch.where(present, p, 1 - p).log().sum()
        penalty = sum(values[name] ** 2 for name in names) + sum(b * b for b in values["class_bias"])
        return float(entropy + 0.5 * penalty)

    lowest = loss(found)
    for step in (-1e-3, 1e-3):
        assert all(loss(found | {name: found[name] + step}) > lowest for name in names)
        for c in (1, 2):
            shifted = list(found["class_bias"])
            shifted[c] += step
            assert loss(found | {"class_bias": shifted}) > lowest
    assert found["class_bias"][0] == 0  # always present, so it has no offset


def test_classes_in_every_image_leave_no_fit() -> None:
    found = learn(*drawn(200, always=True))
    assert found.fit is None
    assert "every class is in every validation image" in found.reason
    assert fit(*drawn(200, always=True)) is None


@pytest.mark.parametrize(
    ("images", "classes", "said"),
    [(9, 20, "9 validation images are too few"), (10, 2, "pairs of a validation image and a class without")],
)
def test_the_guard_says_why(images: int, classes: int, said: str) -> None:
    found = learn(*drawn(images, classes))
    assert found.fit is None
    assert said in found.reason


def test_few_images_warn_and_rare_classes_get_no_offset() -> None:
    found = learn(*drawn(39))
    assert found.fit is not None
    assert "39 validation images are few" in str(found.warning)
    assert learn(*drawn(40)).warning is None
    highest, scores, measured, present = drawn(100)
    present[:, 2] = False
    present[:4, 2] = True
    class_bias = learning._fit(learning._Rows.checked(highest, scores, measured, present))["class_bias"]
    assert class_bias[2] == 0
    present[:5, 2] = True
    class_bias = learning._fit(learning._Rows.checked(highest, scores, measured, present))["class_bias"]
    assert class_bias[2] != 0


def test_a_fit_that_gains_nothing_is_not_kept() -> None:
    # Pruning is right everywhere.
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(60, 4, generator=generator) < 0.7
    highest = torch.where(present, 0.9, 0.1).double()
    scores = torch.full((60, 4), 0.7, dtype=torch.float64)
    found = learn(highest, scores, scores, present)
    assert found.fit is None
    assert "no clear gain" in found.reason
    assert found.found is not None
    assert found.fitted.nanmean() <= found.pruned.nanmean()


def test_a_gain_within_the_noise_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn(100)
    found = learn(*rows)
    assert found.fit is not None
    # The same images, but each is shown four times in a row, as in a video: a quarter counts.
    assert learning.independent_images(*(rows[k].repeat_interleave(4, dim=0) for k in (0, 1, 3))) < 130
    monkeypatch.setattr(learning.evidence, "CLEAR", 100.0)
    noisy = learn(*rows)
    assert noisy.fit is None
    assert noisy.found == found.fit
    assert "no clear gain" in noisy.reason


def test_a_single_class_learns_from_the_mean_score() -> None:
    generator = torch.Generator().manual_seed(0)
    highest = torch.rand(300, 1, generator=generator, dtype=torch.float64)
    present = torch.rand(300, 1, generator=generator, dtype=torch.float64) < (torch.logit(highest) / 2 + 1.5).sigmoid()
    scores = torch.full_like(highest, 0.6)
    found = learn(highest, scores, scores, present)
    assert found.fit is not None
    assert found.fitted is not None
    assert found.fitted.nanmean() > found.pruned.nanmean()
    rows = learning._Rows.checked(highest, scores, scores, present)
    chosen = choose(highest, scores, found.fit)[0]
    assert found.fit["mean_score"] == pytest.approx(float(rows.mean_scores(chosen).nanmean()))


# -- a well-trained network ----------------------------------------------------------------------------------------


def test_real_validation_images_with_every_class_leave_no_fit(shared_dir: Path) -> None:
    with np.load(shared_dir / "data" / "camvid_probs" / "val.npz") as data:
        logits, labels = data["logits8"][::4], torch.from_numpy(data["labels"][::4]).long()
    probs = torch.sigmoid(torch.from_numpy(logits.astype(np.float32)) / 255 * 16 - 8)
    found = rank_dice(probs, prune=None)
    present = torch.stack([(labels == c).flatten(1).any(1) for c in range(11)], dim=1)
    learned = learn(probs.flatten(2).amax(2), found.scores.clamp(0, 1), found.scores.clamp(0, 1), present)
    assert learned.fit is None
    assert "absence cannot be learned" in learned.reason
