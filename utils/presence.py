"""Decide which classes are in an image.

RankDice finds the best mask of a class, but not whether the class is in the image. A mask for an absent class scores
0, and so does a missing mask for a present class. This module weighs the two risks.

For one image, let class ``c`` be present with probability ``pi_c``, and let ``d_c`` be the expected Dice of its mask if
it is. The score of an image is the mean over the classes in the target or in the prediction. Let ``m`` be the expected
mean score of the other classes. Giving ``c`` a mask

* adds ``d_c`` to the sum of scores if the class is present;
* adds a zero to the mean if it is absent, which costs ``m``.

So the class gets a mask if ``pi_c * d_c > (1 - pi_c) * m``. docs/presence.md has the derivation and the gains.

Without a fit, ``pi_c`` is the largest probability of the class and ``d_c`` the expected score that RankDice reports.
:func:`fit` learns both from validation images. Rows are images and columns are the classes of interest everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils import evidence

# Below these limits, nothing is fitted.
FEWEST_IMAGES = 10
FEWEST_ROWS = 20  # (image, class) pairs with the class, and without it
FEWEST_PER_CLASS = 5  # images with a class, and without it, for an offset of its own
FEW_IMAGES = 40  # a warning below
FOLDS = 5

_CLIP = 1e-6  # keeps logits finite
_ROUNDING = 1e-6  # sums of probabilities may leave [0, 1] by this much
_PRESENCE_RIDGE, _SCORE_RIDGE = 1.0, 10.0
_SCORE_CENTER = 0.6
_SCORE_RANGE = (0.02, 1.0)
_ROUNDS = 20  # three or four are usual
_NOBODY = 1e-9  # an expected number of other classes below this is none


class Estimate(NamedTuple):
    """The estimates for each (image, class) row, float64 ``(N, C)``.

    Attributes:
        presence: the probability that the class is in the image, ``pi``.
        scores: the expected score of its mask if the class is in the image, ``d``.
        expected: the expected score of its mask: ``pi * d``, corrected by the scores of such masks in validation.
            Without a fit it is the score that RankDice expects.
    """

    presence: Tensor
    scores: Tensor
    expected: Tensor


def estimate(highest: Tensor, scores: Tensor, fit: Mapping[str, Any] | None = None) -> Estimate:
    """Return the probability that each class is in the image, and the expected score of its mask.

    Args:
        highest: ``(N, C)``, the largest probability of each class in each image, in [0, 1].
        scores: ``(N, C)``, the expected score of its RankDice mask (``rank_dice`` with ``prune=None``), in [0, 1].
        fit: the result of :func:`fit`; None: presence is ``highest``, and scores are not corrected.

    Raises:
        ValueError: shapes differ, values are outside [0, 1] or not finite, or the fit is for other columns.
    """
    highest, scores = _checked("highest", highest), _checked("scores", scores)
    if highest.shape != scores.shape:
        raise ValueError(f"scores: expected the shape of highest {tuple(highest.shape)}, got {tuple(scores.shape)}")
    if fit is None:
        return Estimate(highest, scores, scores)
    own = torch.tensor(fit["class_bias"], dtype=torch.float64, device=highest.device)
    if own.shape != highest.shape[1:]:
        raise ValueError(f"fit: made for {len(own)} classes, got {highest.shape[1]}")
    z = (_logit(scores) - fit["center"]) / fit["spread"]
    presence = (0.5 * _logit(highest) + fit["weight"] * z + fit["bias"] + own).sigmoid()
    given = (scores + fit["score_shift"] + fit["score_slope"] * (scores - _SCORE_CENTER)).clamp(*_SCORE_RANGE)
    product = presence * given
    own = torch.tensor(fit["mask_class"], dtype=torch.float64, device=highest.device)
    expected = product + fit["mask_shift"] + fit["mask_slope"] * (product - _SCORE_CENTER) + own
    return Estimate(presence, given, expected.clamp(0.0, 1.0))


def choose(highest: Tensor, scores: Tensor, fit: Mapping[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Choose the classes that get a mask.

    Images are independent: results do not depend on the batch.

    Args:
        highest, scores, fit: see :func:`estimate`.

    Returns:
        ``chosen``, bool ``(N, C)``, and ``presence``, float64 ``(N, C)``, the probability that the class is in the
        image.

    Raises:
        ValueError: see :func:`estimate`.
    """
    believed = estimate(highest, scores, fit)
    alone = believed.scores if fit is None else torch.full_like(believed.scores, fit["mean_score"])
    return _decide(believed, alone), believed.presence


def _decide(believed: Estimate, alone: Tensor) -> Tensor:
    """Apply the rule until no decision changes; ``alone`` stands for ``m`` where there are no other classes."""
    presence, scores, _ = believed
    gain, absent = presence * scores, 1 - presence
    chosen = presence > 0.5
    for turn in range(_ROUNDS + chosen.shape[1]):
        # A class that gets a mask is always counted in the image's mean; another one only if it is present.
        total, count = torch.where(chosen, gain, 0.0), torch.where(chosen, 1.0, presence)
        others = (total.sum(1, keepdim=True) - total).clamp_min(0.0)
        number = count.sum(1, keepdim=True) - count
        mean = torch.where(number > _NOBODY, others / number.clamp_min(_NOBODY), alone)
        before, chosen = chosen, gain > absent * mean
        if turn >= _ROUNDS:
            chosen = chosen | before  # rarely the decisions cycle; this ends the cycle
        if torch.equal(before, chosen):
            break
    return chosen


def image_scores(chosen: Tensor, measured: Tensor, present: Tensor) -> Tensor:
    """Return the mean score of each image over the classes that are present or chosen, float64 ``(N,)``.

    It is NaN where there is no such class.

    Args:
        chosen: bool ``(N, C)``, the classes with a mask.
        measured: ``(N, C)``, the scores of the masks; only read where a class is chosen and present.
        present: bool ``(N, C)``, whether the class is in the target.
    """
    return torch.where(chosen & present, measured.double(), 0.0).sum(1) / (chosen | present).sum(1)


# ---------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class Learned:
    """The result of :func:`learn`.

    Attributes:
        fit: for :func:`choose`, or None if it is not trusted or does not clearly gain.
        reason: a sentence that says why there is no fit, or what it gains.
        warning: a sentence that says why the fit may be unreliable, or None.
        found: the fit whether or not it gains; None where nothing could be fitted.
        pruned, fitted: float64 ``(N,)``, the score of each image with pruning, and with a fit on other images; None
            where nothing could be fitted.
    """

    fit: dict[str, Any] | None
    reason: str
    warning: str | None = None
    found: dict[str, Any] | None = None
    pruned: Tensor | None = None
    fitted: Tensor | None = None


def fit(
    highest: Tensor, scores: Tensor, measured: Tensor, present: Tensor, prune: float | None = 0.5
) -> dict[str, Any] | None:
    """Return the fit of :func:`learn`: a dictionary of numbers, or None where it is not trusted or gains nothing."""
    return learn(highest, scores, measured, present, prune).fit


def learn(
    highest: Tensor,
    scores: Tensor,
    measured: Tensor,
    present: Tensor,
    prune: float | None = 0.5,
    folds: Tensor | None = None,
) -> Learned:
    """Fit presence and expected scores on validation images, and keep the fit only if it clearly helps on others.

    The model of presence is ``logit pi_c = logit(highest) / 2 + weight * z + bias + class_bias_c``, where ``z`` is the
    standardized logit of the expected score: a logistic regression with a ridge. A linear regression corrects the
    expected scores of the classes that are present. In each fold, a fit on the other folds is compared with pruning.
    :func:`utils.evidence.clear` decides whether its gain is more than noise.

    Args:
        highest, scores: see :func:`estimate`. Images must be in the order in which they were taken: neighbors in a
            video are alike, must fall into the same fold, and count less.
        measured: ``(N, C)``, the score of each class's mask; only read where the class is present.
        present: bool ``(N, C)``, whether the class is in the target.
        prune: what the fit is compared with: masks for the classes whose largest probability is above it; None: masks
            for all classes.
        folds: int ``(N,)``, the fold of each image; None: five folds of consecutive images.

    Returns:
        The fit, or None with the reason: fewer than 10 images, fewer than 20 rows with or without their class, or no
        clear gain. The fit is a plain dictionary: ``images``, ``weight``, ``center`` and ``spread`` (of the logit of
        the score), ``bias``, ``class_bias``, ``score_shift``, ``score_slope``, ``mean_score`` (per image, for tasks
        with a single class), and ``mask_shift``, ``mask_slope``, ``mask_class``, which correct the expected scores of
        masks.

    Raises:
        ValueError: see :func:`estimate`; ``measured`` or ``present`` has another shape.
    """
    rows = _Rows.checked(highest, scores, measured, present)
    objection = _objection(rows)
    if objection is not None:
        return Learned(None, objection)
    images = len(rows.highest)
    folds = consecutive(images) if folds is None else folds
    chosen, product = _pruned(rows, prune), rows.scores.clone()
    pruned = rows.image_scores(chosen)
    for fold in folds.unique():
        own = folds == fold
        chosen[own], product[own] = _held_out(rows[~own], rows[own], prune)
    fitted, worth = rows.image_scores(chosen), independent_images(highest, scores, present)
    gains = fitted - pruned
    outcome = (
        f"on images it has not seen, a fit scores {float(fitted.nanmean()):.4f} and pruning scores "
        f"{float(pruned.nanmean()):.4f} (standard error of the difference "
        f"{evidence.standard_error(gains, worth):.4f})"
    )
    warning = None
    if images < FEW_IMAGES:
        warning = f"{images} validation images are few for learning which classes are in an image; use {FEW_IMAGES}"
    found = _fit(rows) | _mask_correction(rows, chosen, product)
    if not evidence.clear(gains, worth):
        return Learned(None, f"{outcome}: no clear gain", None, found, pruned, fitted)
    return Learned(found, outcome, warning, found, pruned, fitted)


def consecutive(images: int) -> Tensor:
    """Return the fold of each image if folds are consecutive, int64 ``(N,)``."""
    return torch.arange(images) * FOLDS // max(images, 1)


def independent_images(highest: Tensor, scores: Tensor, present: Tensor) -> float:
    """Return how many independent images these rows are worth, see :func:`utils.evidence.independent`."""
    columns = [_logit(highest.double()), _logit(scores.double()), present.double()]
    return evidence.independent(torch.cat([column.cpu() for column in columns], dim=1))


@dataclass(frozen=True)
class _Rows:
    """Rows of validation images, float64 (``present`` bool) ``(N, C)`` on the CPU; ``measured`` is 0 if absent."""

    highest: Tensor
    scores: Tensor
    measured: Tensor
    present: Tensor

    @classmethod
    def checked(cls, highest: Tensor, scores: Tensor, measured: Tensor, present: Tensor) -> _Rows:
        highest, scores, _ = (value.cpu() for value in estimate(highest, scores))
        for name, value in (("measured", measured), ("present", present)):
            if value.shape != highest.shape:
                raise ValueError(f"{name}: expected shape {tuple(highest.shape)}, got {tuple(value.shape)}")
        present = present.bool().cpu()
        return cls(highest, scores, _checked("measured", torch.where(present, measured.double().cpu(), 0.0)), present)

    def __getitem__(self, images: Tensor) -> _Rows:
        return _Rows(self.highest[images], self.scores[images], self.measured[images], self.present[images])

    def image_scores(self, chosen: Tensor) -> Tensor:
        return image_scores(chosen, self.measured, self.present)


def _objection(rows: _Rows, share: float = 1.0) -> str | None:
    """Return why presence cannot be learned from these rows (a ``share`` of all images), or None."""
    images, there = len(rows.highest), int(rows.present.sum())
    absent = rows.present.numel() - there
    if images < share * FEWEST_IMAGES:
        return (
            f"{images} validation images are too few to learn which classes are in an image; use at least "
            f"{FEWEST_IMAGES}"
        )
    if not absent:
        return "every class is in every validation image, so absence cannot be learned"
    for count, what in ((absent, "without"), (there, "with")):
        if count < share * FEWEST_ROWS:
            return (
                f"only {count} pairs of a validation image and a class {what} pixels of the class; "
                f"learning which classes are in an image needs {FEWEST_ROWS}"
            )
    return None


def _pruned(rows: _Rows, prune: float | None) -> Tensor:
    return rows.highest > (0.0 if prune is None else prune)


def _held_out(others: _Rows, own: _Rows, prune: float | None) -> tuple[Tensor, Tensor]:
    """Apply a fit on the other folds to the images of a fold; return the chosen classes and ``pi * d``."""
    share = len(others.highest) / (len(others.highest) + len(own.highest))
    if _objection(others, share) is not None:
        return _pruned(own, prune), own.scores
    found = _fit(others, share)
    believed = estimate(own.highest, own.scores, found)
    return choose(own.highest, own.scores, found)[0], believed.presence * believed.scores


def _mask_correction(rows: _Rows, chosen: Tensor, product: Tensor) -> dict[str, Any]:
    """Correct ``pi * d`` by the scores of the masks chosen in held-out images, 0 where the class is absent.

    Masks with a high expected score are chosen more often, and classes differ. Without this correction the expected
    score of a class is wrong by up to 0.1.
    """
    features = torch.cat([_line(product), torch.eye(product.shape[1]).double().expand(len(product), -1, -1)], dim=2)
    shift, slope, *own = _ridge(features[chosen], (rows.measured - product)[chosen])
    return {"mask_shift": shift, "mask_slope": slope, "mask_class": own}


def _fit(rows: _Rows, share: float = 1.0) -> dict[str, Any]:
    """Return the fit for rows that allow one."""
    with_class, images = rows.present.sum(0), len(rows.highest)
    least = share * FEWEST_PER_CLASS
    own = (with_class >= least) & (images - with_class >= least)  # classes with an offset of their own
    odds = _logit(rows.scores)
    center, spread = float(odds.mean()), float(odds.std().clamp_min(_CLIP))
    z = (odds - center) / spread
    offsets = torch.eye(len(own), dtype=torch.float64)[:, own].expand(images, -1, -1)
    features = torch.cat([z.unsqueeze(2), torch.ones_like(z).unsqueeze(2), offsets], dim=2)
    weights = _logistic(features.flatten(0, 1), 0.5 * _logit(rows.highest).flatten(), rows.present.flatten())
    class_bias = torch.zeros(len(own), dtype=torch.float64)
    class_bias[own] = weights[2:]
    shift, slope = _ridge(_line(rows.scores[rows.present]), (rows.measured - rows.scores)[rows.present])
    found: dict[str, Any] = {
        "images": images,
        "weight": float(weights[0]),
        "center": center,
        "spread": spread,
        "bias": float(weights[1]),
        "class_bias": class_bias.tolist(),
        "score_shift": shift,
        "score_slope": slope,
        "mean_score": float(rows.measured[rows.present].mean()),
        "mask_shift": 0.0,
        "mask_slope": 0.0,
        "mask_class": [0.0] * len(own),
    }
    for _ in range(FOLDS):  # mean score and chosen classes depend on each other if there is a single class
        found["mean_score"] = float(rows.image_scores(choose(rows.highest, rows.scores, found)[0]).nanmean())
    return found


def _logistic(features: Tensor, offset: Tensor, truth: Tensor) -> Tensor:
    """Return the weights of a logistic regression with a ridge, by Newton steps that are halved if they overshoot."""
    target = truth.double()

    def loss(w: Tensor) -> float:
        odds = offset + features @ w
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(odds, target, reduction="sum")
        return float(entropy + 0.5 * _PRESENCE_RIDGE * w.square().sum())

    weights = torch.zeros(features.shape[1], dtype=torch.float64)
    ridge = _PRESENCE_RIDGE * torch.eye(len(weights), dtype=torch.float64)
    lowest = loss(weights)
    for _ in range(100):
        p = (offset + features @ weights).sigmoid()
        gradient = features.T @ (p - target) + _PRESENCE_RIDGE * weights
        step = torch.linalg.solve(features.T @ (features * (p * (1 - p)).unsqueeze(1)) + ridge, gradient)
        while (found := loss(weights - step)) > lowest and float(step.abs().max()) > 1e-12:
            step = step / 2
        if found > lowest:
            break
        weights, lowest = weights - step, found
        if float(step.abs().max()) < 1e-10:
            break
    return weights


def _line(scores: Tensor) -> Tensor:
    """Return the features of a linear correction of scores, ``(..., 2)``."""
    return torch.stack([torch.ones_like(scores), scores - _SCORE_CENTER], dim=-1)


def _ridge(features: Tensor, target: Tensor) -> list[float]:
    """Return the weights of a ridge regression of ``target`` ``(R,)`` on ``features`` ``(R, K)``."""
    ridge = _SCORE_RIDGE * torch.eye(features.shape[1], dtype=torch.float64)
    return torch.linalg.solve(features.T @ features + ridge, features.T @ target).tolist()


def _logit(values: Tensor) -> Tensor:
    return torch.logit(values, eps=_CLIP)


def _checked(name: str, values: Tensor) -> Tensor:
    values = values.double()
    if values.dim() != 2:
        raise ValueError(f"{name}: expected (images, classes), got shape {tuple(values.shape)}")
    if not bool(((values >= -_ROUNDING) & (values <= 1 + _ROUNDING)).all()):  # NaN fails too
        raise ValueError(f"{name}: expected finite numbers in [0, 1]")
    return values.clamp(0.0, 1.0)
