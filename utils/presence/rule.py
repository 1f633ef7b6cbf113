"""The rule that decides which classes get a mask, from the probability that each is in the image.

:mod:`utils.presence` describes it. Rows are images and columns are the classes of interest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.rankdice.table import upload

CLIP = 1e-6  # keeps logits finite
SCORE_CENTER = 0.6

_ROUNDING = 1e-6  # sums of probabilities may leave [0, 1] by this much
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
    highest, scores = checked("highest", highest), checked("scores", scores)
    if highest.shape != scores.shape:
        raise ValueError(f"scores: expected the shape of highest {tuple(highest.shape)}, got {tuple(scores.shape)}")
    if fit is None:
        return Estimate(highest, scores, scores)
    own = torch.tensor(fit["class_bias"], dtype=torch.float64, device=highest.device)
    if own.shape != highest.shape[1:]:
        raise ValueError(f"fit: made for {len(own)} classes, got {highest.shape[1]}")
    z = (logit(scores) - fit["center"]) / fit["spread"]
    presence = (0.5 * logit(highest) + fit["weight"] * z + fit["bias"] + own).sigmoid()
    given = (scores + fit["score_shift"] + fit["score_slope"] * (scores - SCORE_CENTER)).clamp(*_SCORE_RANGE)
    product = presence * given
    own = torch.tensor(fit["mask_class"], dtype=torch.float64, device=highest.device)
    expected = product + fit["mask_shift"] + fit["mask_slope"] * (product - SCORE_CENTER) + own
    return Estimate(presence, given, expected.clamp(0.0, 1.0))


def choose(highest: Tensor, scores: Tensor, fit: Mapping[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Choose the classes that get a mask.

    Images are independent: results do not depend on the batch. The work is done on the CPU: it takes many operations on
    few numbers, each of which a GPU would have to start.

    Args:
        highest, scores, fit: see :func:`estimate`.

    Returns:
        ``chosen``, bool ``(N, C)``, and ``presence``, float64 ``(N, C)``, the probability that the class is in the
        image.

    Raises:
        ValueError: see :func:`estimate`.
    """
    believed = estimate(highest.cpu(), scores.cpu(), fit)
    alone = believed.scores if fit is None else torch.full_like(believed.scores, fit["mean_score"])
    return upload(_decide(believed, alone), highest.device), upload(believed.presence, highest.device)


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


def mean_scores(chosen: Tensor, measured: Tensor, present: Tensor) -> Tensor:
    """Return the mean score of each image over the classes that are present or chosen, float64 ``(N,)``.

    It is NaN where there is no such class.

    Args:
        chosen: bool ``(N, C)``, the classes with a mask.
        measured: ``(N, C)``, the scores of the masks; only read where a class is chosen and present.
        present: bool ``(N, C)``, whether the class is in the target.
    """
    return torch.where(chosen & present, measured.double(), 0.0).sum(1) / (chosen | present).sum(1)


def logit(values: Tensor) -> Tensor:
    """Return ``log(p / (1 - p))``, finite also for 0 and 1."""
    return torch.logit(values, eps=CLIP)


def checked(name: str, values: Tensor) -> Tensor:
    """Return probabilities or scores ``(N, C)`` as float64 in [0, 1].

    Raises:
        ValueError: another shape, or values outside [0, 1] or not finite.
    """
    values = values.double()
    if values.dim() != 2:
        raise ValueError(f"{name}: expected (images, classes), got shape {tuple(values.shape)}")
    if not bool(((values >= -_ROUNDING) & (values <= 1 + _ROUNDING)).all()):  # NaN fails too
        raise ValueError(f"{name}: expected finite numbers in [0, 1]")
    return values.clamp(0.0, 1.0)
