"""From logits to masks: probabilities, and the prediction procedures ``T``, ``max`` and ``rankdice``.

A procedure maps probabilities ``(B, C, H, W)`` to a :class:`Prediction`. ``T`` and ``rankdice`` give one boolean
mask per class (masks of different classes may overlap or leave a pixel to none); ``max`` gives one label per
pixel. :func:`label_map` makes one label per pixel of any of them, for pictures.

With one output channel (a binary task) the channel is the probability of the class itself: labels are 0
(background) and 1, and ``max`` is the threshold 0.5.

``python -m utils.predict --probs FOLDER -p rankdice`` decides probabilities again that ``test.py --save-probs`` wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from utils import rankdice as rd
from utils.config.schema import Predict

Activation = Literal["softmax", "sigmoid"]


class Prediction(NamedTuple):
    """What a procedure decided; exactly one of ``masks`` and ``labels`` is given.

    ``masks``: bool ``(B, C, H, W)``.
    ``labels``: int64 ``(B, H, W)``, class ids (with one channel: 0 or 1).
    ``scores``: the expected score of each mask ``(B, C)``, where the procedure knows it (rankdice).
    ``volumes``: int64 ``(B, C)``, pixels per mask, where the procedure knows it.
    """

    masks: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    volumes: Tensor | None = None


@dataclass(frozen=True)
class PredictOptions:
    """What the procedures may be told; the fields of ``predict`` in the config.

    ``classes``: the classes of interest; the others get no mask from rankdice, which saves their cost. None: all.
    """

    threshold: float = 0.5
    solver: str = "exact"
    metric: str = "dice"
    smooth: float = 0.0
    prune: float | None = 0.5
    classes: tuple[int, ...] | None = None

    @classmethod
    def from_config(cls, predict: Predict) -> PredictOptions:
        """Return the options of a config's ``predict`` section."""
        chosen = predict.rankdice
        return cls(
            threshold=predict.threshold,
            solver=chosen.solver,
            metric=chosen.metric,
            smooth=chosen.smooth,
            prune=chosen.prune,
            classes=None if predict.CoI == "all" else tuple(predict.CoI),
        )

    def with_metric(self, metric: str) -> PredictOptions:
        """Return the same options for another rankdice metric."""
        return replace(self, metric=metric)


def probabilities(logits: Tensor, activation: Activation, temperature: float = 1.0) -> Tensor:
    """Return float32 probabilities ``(B, C, H, W)`` of logits of any floating type.

    Args:
        logits: ``(B, C, H, W)``.
        activation: "softmax" over the classes or "sigmoid" per class, as the loss was trained with. One channel
            always means sigmoid.
        temperature: logits are divided by it first (calibration); > 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, found {temperature}")
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if activation == "sigmoid" or logits.shape[1] == 1:
        return logits.sigmoid()
    if activation != "softmax":
        raise ValueError(f"activation: expected 'softmax' or 'sigmoid', found {activation!r}")
    return logits.softmax(dim=1)


def _argmax(values: Tensor) -> Tensor:
    # Like argmax(dim=1), ties to the lowest class included; on a CPU torch.max is three to ten times faster.
    return values.max(dim=1).indices


def predict_max(probs: Tensor, options: PredictOptions = PredictOptions()) -> Prediction:  # noqa: B008
    """Give every pixel its most probable class (argmax); the lowest class wins ties."""
    if probs.shape[1] == 1:
        return Prediction(labels=(probs[:, 0] > 0.5).long())
    return Prediction(labels=_argmax(probs))


def predict_threshold(probs: Tensor, options: PredictOptions = PredictOptions()) -> Prediction:  # noqa: B008
    """Give every class the pixels whose probability is above ``options.threshold``."""
    return Prediction(masks=probs > options.threshold)


def predict_rankdice(probs: Tensor, options: PredictOptions = PredictOptions()) -> Prediction:  # noqa: B008
    """Give every class the mask with the highest expected Dice (or IoU); see :mod:`utils.rankdice`."""
    if options.classes is None:
        found = rank_dice(probs, options)
        return Prediction(masks=found.masks, scores=found.scores, volumes=found.volumes)
    chosen = torch.tensor(options.classes, device=probs.device)
    found = rank_dice(probs[:, chosen], options)
    masks = torch.zeros_like(probs, dtype=torch.bool).index_copy_(1, chosen, found.masks)
    scores = found.scores.new_zeros(probs.shape[:2]).index_copy_(1, chosen, found.scores)
    volumes = found.volumes.new_zeros(probs.shape[:2]).index_copy_(1, chosen, found.volumes)
    return Prediction(masks=masks, scores=scores, volumes=volumes)


def rank_dice(probs: Tensor, options: PredictOptions) -> rd.RankDice:
    """Call :func:`utils.rankdice.rank_dice` with the options of a config."""
    return rd.rank_dice(probs, metric=options.metric, solver=options.solver, smooth=options.smooth, prune=options.prune)


Procedure = Callable[[Tensor, PredictOptions], Prediction]
PROCEDURES: dict[str, Procedure] = {"T": predict_threshold, "max": predict_max, "rankdice": predict_rankdice}


def predict_logits(
    procedure: str, logits: Tensor, activation: Activation, temperature: float, options: PredictOptions
) -> Prediction:
    """Apply a procedure to logits; ``max`` needs no probabilities for it, since they rise with the logits."""
    if procedure == "max":
        return Prediction(labels=(logits[:, 0] > 0).long() if logits.shape[1] == 1 else _argmax(logits))
    return PROCEDURES[procedure](probabilities(logits, activation, temperature), options)


def label_map(
    procedure: str,
    probs: Tensor,
    options: PredictOptions = PredictOptions(),  # noqa: B008
    unassigned: int = 255,
) -> Tensor:
    """Return one label per pixel, int64 ``(B, H, W)``, under a procedure, for pictures and PNG masks.

    ``max`` gives the most probable class; ``T`` the most probable class among those above the threshold, and
    ``unassigned`` where there is none; ``rankdice`` the label map with the highest total of expected scores
    (:func:`utils.rankdice.label_map`). One channel gives 0 (background) and 1.

    All classes take part, those of no interest too: classes of interest say what is scored, and a picture in which
    the background may not win would be painted over with them.
    """
    if probs.shape[1] == 1:
        prediction = PROCEDURES[procedure](probs, options)
        if prediction.masks is not None:
            return prediction.masks[:, 0].long()
        assert prediction.labels is not None
        return prediction.labels
    if procedure == "max":
        return _argmax(probs)
    if procedure == "T":
        best, labels = probs.max(dim=1)
        return torch.where(best > options.threshold, labels, unassigned)
    return rd.label_map(probs, smooth=options.smooth)


def classes_of_interest(options: PredictOptions, num_classes: int) -> Sequence[int]:
    """Return the ids of the classes that the mean scores are taken over."""
    return options.classes if options.classes is not None else range(num_classes)
