"""Learn from validation images which classes are in an image: the fit behind presence "fitted"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils import evidence
from utils.errors import are
from utils.presence import newton
from utils.presence.rule import CLIP, SCORE_CENTER, checked, choose, estimate, logit, mean_scores

# Below these limits, nothing is fitted.
FEWEST_IMAGES = 10
FEWEST_ROWS = 20  # (image, class) pairs with the class, and without it
FEWEST_PER_CLASS = 5  # images with a class, and without it, for an offset of its own
FEW_IMAGES = 40  # a warning below
FOLDS = 5

_PRESENCE_RIDGE, _SCORE_RIDGE = 1.0, 10.0


@dataclass(frozen=True)
class Learned:
    """The result of :func:`learn`.

    Attributes:
        fit: for :func:`choose`, or None if it is not reliable or does not clearly gain.
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
    """Return the fit of :func:`learn`: a dictionary of numbers, or None if it is not reliable or gains nothing."""
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
    pruned = rows.mean_scores(chosen)
    for fold in folds.unique():
        own = folds == fold
        chosen[own], product[own] = _held_out(rows[~own], rows[own], prune)
    fitted, worth = rows.mean_scores(chosen), independent_images(highest, scores, present)
    gains = fitted - pruned
    outcome = (
        f"on held-out images, a fit scores {float(fitted.nanmean()):.4f} and pruning scores "
        f"{float(pruned.nanmean()):.4f} (standard error of the difference "
        f"{evidence.standard_error(gains, worth):.4f})"
    )
    warning = None
    if images < FEW_IMAGES:
        warning = f"{are(images, 'validation image')} few for learning which classes are in an image; use {FEW_IMAGES}"
    found = _fit(rows) | _mask_correction(rows, chosen, product)
    if not evidence.clear(gains, worth):
        return Learned(None, f"{outcome}: no clear gain", None, found, pruned, fitted)
    return Learned(found, outcome, warning, found, pruned, fitted)


def consecutive(images: int) -> Tensor:
    """Return the fold of each image if folds are consecutive, int64 ``(N,)``."""
    return torch.arange(images) * FOLDS // max(images, 1)


def independent_images(highest: Tensor, scores: Tensor, present: Tensor) -> float:
    """Return how many independent images these rows are worth, see :func:`utils.evidence.independent`."""
    columns = [logit(highest.double()), logit(scores.double()), present.double()]
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
        return cls(highest, scores, checked("measured", torch.where(present, measured.double().cpu(), 0.0)), present)

    def __getitem__(self, images: Tensor) -> _Rows:
        return _Rows(self.highest[images], self.scores[images], self.measured[images], self.present[images])

    def mean_scores(self, chosen: Tensor) -> Tensor:
        return mean_scores(chosen, self.measured, self.present)


def _objection(rows: _Rows, share: float = 1.0) -> str | None:
    """Return why presence cannot be learned from these rows (a ``share`` of all images), or None."""
    images, there = len(rows.highest), int(rows.present.sum())
    absent = rows.present.numel() - there
    if images < share * FEWEST_IMAGES:
        return (
            f"{are(images, 'validation image')} too few to learn which classes are in an image; use at least "
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
    odds = logit(rows.scores)
    center, spread = float(odds.mean()), float(odds.std().clamp_min(CLIP))
    z = (odds - center) / spread
    offsets = torch.eye(len(own), dtype=torch.float64)[:, own].expand(images, -1, -1)
    features = torch.cat([z.unsqueeze(2), torch.ones_like(z).unsqueeze(2), offsets], dim=2)
    weights = _logistic(features.flatten(0, 1), 0.5 * logit(rows.highest).flatten(), rows.present.flatten())
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
        found["mean_score"] = float(rows.mean_scores(choose(rows.highest, rows.scores, found)[0]).nanmean())
    return found


def _logistic(features: Tensor, offset: Tensor, truth: Tensor) -> Tensor:
    """Return the weights of a logistic regression with a ridge."""
    target, start = truth.double(), torch.zeros(features.shape[1], dtype=torch.float64)
    ridge = _PRESENCE_RIDGE * torch.eye(len(start), dtype=torch.float64)

    def terms(weights: Tensor) -> tuple[float, Tensor, Tensor]:
        odds = offset + features @ weights
        p = odds.sigmoid()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(odds, target, reduction="sum")
        loss = float(entropy + 0.5 * _PRESENCE_RIDGE * weights.square().sum())
        gradient = features.T @ (p - target) + _PRESENCE_RIDGE * weights
        return loss, gradient, features.T @ (features * (p * (1 - p)).unsqueeze(1)) + ridge

    return newton.minimum(terms, start, tolerance=1e-10)


def _line(scores: Tensor) -> Tensor:
    """Return the features of a linear correction of scores, ``(..., 2)``."""
    return torch.stack([torch.ones_like(scores), scores - SCORE_CENTER], dim=-1)


def _ridge(features: Tensor, target: Tensor) -> list[float]:
    """Return the weights of a ridge regression of ``target`` ``(R,)`` on ``features`` ``(R, K)``."""
    ridge = _SCORE_RIDGE * torch.eye(features.shape[1], dtype=torch.float64)
    return torch.linalg.solve(features.T @ features + ridge, features.T @ target).tolist()
