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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils import rankdice
from utils.presence.learning import Learned, fit, learn
from utils.presence.rule import Estimate, choose, estimate, mean_scores
from utils.rankdice.table import upload

__all__ = ["Choice", "Estimate", "Learned", "Options", "choose", "choose_classes", "estimate", "fit", "learn"]
__all__ += ["mean_scores"]


@dataclass(frozen=True)
class Options:
    """How :func:`choose_classes` chooses.

    Attributes:
        metric: of RankDice, see :class:`utils.rankdice.Options`.
        prune: as there; only used if ``presence`` is "prune".
        classes: the classes of interest; the others get no mask from RankDice, which saves their cost. None: all.
        presence: which classes get a mask: "auto", "fitted", "rule", "prune" or "all".
        fit: behind "fitted", as the config's ``presence_fit``.
    """

    metric: str = rankdice.Options.metric
    prune: float | None = rankdice.Options.prune
    classes: tuple[int, ...] | None = None
    presence: str = "auto"
    fit: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def chooses_by(self) -> str:
        """How classes are chosen: ``presence``, with "auto" resolved to "fitted" or, without a fit, "prune"."""
        if self.presence != "auto":
            return self.presence
        return "prune" if self.fit is None else "fitted"


class Choice(NamedTuple):
    """Which classes are taken to be in each image, ``(B, C)``; see :class:`Prediction` for the fields."""

    chosen: Tensor
    presence: Tensor
    scores: Tensor


def choose_classes(highest: Tensor, scores: Tensor, options: Options) -> Choice:
    """Decide which classes of interest are in each image: the one place that does.

    Args:
        highest: ``(B, C)``, the largest probability of each class in each image.
        scores: ``(B, C)``, the expected score of its mask, from RankDice with ``options.metric``, without pruning
            unless ``options.chooses_by`` is "prune".
        options: how to decide.

    Returns:
        The chosen classes, their presence, and the expected score of a mask of each, all on the device of ``scores``.
        Classes of no interest are not chosen.
    """
    columns = range(scores.shape[1]) if options.classes is None else options.classes
    # On the CPU, as in `choose`.
    device, own = scores.device, torch.tensor(list(columns))
    highest, expected = highest.cpu().double()[:, own], scores.cpu().double()[:, own]
    how = options.chooses_by
    seen = highest
    if how == "fitted":
        assert options.fit is not None  # the config is checked, and auto is resolved
        # The fit for these classes; the offset of a class that it has not seen is 0.
        place, names = {c: i for i, c in enumerate(options.fit["classes"])}, ("class_bias", "mask_class")
        offsets = {name: [options.fit[name][place[c]] if c in place else 0.0 for c in columns] for name in names}
        fit, metrics = {**options.fit, **offsets}, (options.metric, options.fit["metric"])
        chosen, seen = choose(highest, rankdice.converted(expected, *metrics), fit)
        corrected = estimate(highest, rankdice.converted(expected, *metrics), fit).expected
        expected = rankdice.converted(corrected, *reversed(metrics))
    elif how == "rule":
        chosen, seen = choose(highest, expected)
    else:
        chosen = highest > (options.prune if how == "prune" and options.prune is not None else 0.0)
    parts = [chosen, seen, expected]
    if options.classes is not None:
        shape = tuple(scores.shape)
        empty = chosen.new_zeros(shape), seen.new_full(shape, torch.nan), expected.new_zeros(shape)
        parts = [every.index_copy_(1, own, part) for every, part in zip(empty, parts, strict=True)]
    return Choice(*(upload(part, device) for part in parts))
