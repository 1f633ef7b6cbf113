"""From logits to masks: probabilities, which classes are in an image, and the procedures ``T``, ``max``, ``rankdice``.

Everything that turns probabilities ``(B, C, H, W)`` into masks or labels goes through two calls::

    options = PredictOptions.from_config(config.predict)
    found = PROCEDURES[procedure](probs, options)  # a Prediction: masks or labels, chosen classes, expected scores
    labels = label_map(procedure, probs, options, found)  # one label per pixel, for files and pictures

``T`` and ``rankdice`` give one boolean mask per class; masks of different classes may overlap, and a pixel may be in
none. ``max`` gives one label per pixel. :func:`utils.presence.choose_classes` decides which classes get a mask.

With one output channel (a binary task), the channel is the probability of the class: labels are 0
(background) and 1, and ``max`` is the threshold 0.5.

``python -m utils.predict --probs FOLDER -p rankdice`` applies a procedure to probabilities that were saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from utils import presence
from utils import rankdice as rd
from utils.config.schema import Predict

Activation = Literal["softmax", "sigmoid"]


class Prediction(NamedTuple):
    """What a procedure decided; exactly one of ``masks`` and ``labels`` is given."""

    masks: Tensor | None = None  # bool (B, C, H, W)
    labels: Tensor | None = None  # int64 (B, H, W), class ids (with one channel: 0 or 1)
    scores: Tensor | None = None  # float64 (B, C), the expected score of each mask, 0 without a mask; None: not known
    volumes: Tensor | None = None  # int64 (B, C), pixels per mask
    chosen: Tensor | None = None  # bool (B, C), the classes of interest taken to be in the image; None: not decided
    presence: Tensor | None = None  # float64 (B, C), the probability that a class is in the image; NaN: of no interest
    unfitted: Tensor | None = None  # float64 (B, C), scores before the presence fit corrected them; None without a fit
    ranked: rd.RankDice | None = None  # what RankDice found for all classes, if a label map can start from it


@dataclass(frozen=True)
class PredictOptions(presence.Options):
    """Options of the procedures: the fields of ``predict`` in the config."""

    threshold: float = 0.5  # of procedure T
    solver: str = rd.Options.solver  # of RankDice, like metric and prune
    smooth: float = rd.Options.smooth

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
            presence=predict.presence,
            fit=None if predict.presence_fit is None else predict.presence_fit.model_dump(),
        )

    @property
    def ranking(self) -> rd.Options:
        """The options of RankDice itself, which only prunes if that is how classes are chosen."""
        return rd.Options(self.metric, self.solver, self.smooth, self.prune if self.chooses_by == "prune" else None)

    @property
    def why_empty(self) -> str:
        """Why RankDice leaves an image without a mask."""
        if self.chooses_by == "prune" and self.prune is not None:
            return f"no class has a probability above predict.rankdice.prune ({self.prune:g})"
        if self.chooses_by in ("fitted", "rule"):
            return f"no class was predicted to be in the image (predict.presence: {self.chooses_by})"
        return "all probabilities are 0, or an empty mask scores best (predict.rankdice.smooth)"

    @property
    def restricts_max(self) -> bool:
        """Whether ``max`` takes the most probable class among the chosen ones only.

        It does if presence was asked for or learned; otherwise ``max`` is the plain argmax.
        """
        return self.chooses_by != "all" and not (self.presence == "auto" and self.fit is None)


def probabilities(
    logits: Tensor, activation: Activation, temperature: float = 1.0, bias: Sequence[float] | None = None
) -> Tensor:
    """Return float32 probabilities ``(B, C, H, W)`` of logits of any floating type.

    Args:
        logits: ``(B, C, H, W)``.
        activation: "softmax" over the classes or "sigmoid" per class, as the loss was trained with. One channel
            always means sigmoid.
        temperature: logits are divided by it first (calibration); > 0.
        bias: ``C`` numbers, added to the logits after that; None: nothing is added.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, found {temperature}")
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if bias is not None:
        if len(bias) != logits.shape[1]:
            raise ValueError(f"bias: expected {logits.shape[1]} numbers, one per class, found {len(bias)}")
        logits = logits + torch.tensor(bias, dtype=logits.dtype, device=logits.device).view(-1, 1, 1)
    if activation == "sigmoid" or logits.shape[1] == 1:
        return logits.sigmoid()
    if activation != "softmax":
        raise ValueError(f"activation: expected 'softmax' or 'sigmoid', found {activation!r}")
    return logits.softmax(dim=1)


def _argmax(values: Tensor) -> Tensor:
    # Like argmax(dim=1), ties to the lowest class included; on a CPU torch.max is three to ten times faster.
    return values.max(dim=1).indices


# -- the procedures ------------------------------------------------------------------------------------------------


def predict_max(probs: Tensor, options: PredictOptions = PredictOptions()) -> Prediction:  # noqa: B008
    """Assign every pixel to its most probable class (argmax); ties go to the lowest class id.

    If presence was asked for or learned (:attr:`PredictOptions.restricts_max`), only the chosen classes take part.
    """
    if not options.restricts_max:
        return Prediction(labels=(probs[:, 0] > 0.5).long() if probs.shape[1] == 1 else _argmax(probs))
    found = _rank(probs, options)
    choice = presence.choose_classes(found.highest, found.scores, options)
    taking_part = taking_part_in_labels(choice.chosen, options)
    if probs.shape[1] == 1:
        labels = (probs[:, 0] > 0.5) & choice.chosen[:, :, None]
        return Prediction(labels=labels.long(), chosen=choice.chosen, presence=choice.presence)
    labels = _argmax(probs.masked_fill(~taking_part[:, :, None, None], -1.0))
    return Prediction(labels=labels, chosen=choice.chosen, presence=choice.presence)


def predict_threshold(probs: Tensor, options: PredictOptions = PredictOptions()) -> Prediction:  # noqa: B008
    """Return a mask per class: the pixels whose probability is above ``options.threshold``."""
    return Prediction(masks=probs > options.threshold)


def predict_rankdice(probs: Tensor, options: PredictOptions = PredictOptions()) -> Prediction:  # noqa: B008
    """Return masks of the chosen classes with the highest expected Dice (or IoU); see :mod:`utils.rankdice`."""
    found = _rank(probs, options)
    choice = presence.choose_classes(found.highest, found.scores, options)
    masks, volumes, scores = found.masks, found.volumes, choice.scores
    if options.chooses_by in ("fitted", "rule"):  # pruned classes have no masks to take away
        absent = ~choice.chosen
        masks = masks.masked_fill_(absent[:, :, None, None], False)
        volumes, scores = volumes.masked_fill(absent, 0), scores.masked_fill(absent, 0)
    unfitted = torch.where(choice.chosen, found.scores, 0.0) if options.chooses_by == "fitted" else None
    complete = options.chooses_by != "prune" and options.classes is None
    ranked = found if complete and (options.metric, options.solver) == ("dice", "exact") else None
    return Prediction(masks, None, scores, volumes, choice.chosen, choice.presence, unfitted, ranked)


def _rank(probs: Tensor, options: PredictOptions) -> rd.RankDice:
    """Return the RankDice masks of the classes of interest, and zeros for the others."""
    own = probs if options.classes is None else probs[:, list(options.classes)]
    found = rd.rank_dice(own, **vars(options.ranking))
    if options.classes is None:
        return found
    where = torch.tensor(options.classes, device=probs.device)
    return rd.RankDice(*(x.new_zeros(probs.shape[: x.dim()]).index_copy_(1, where, x) for x in found))


def taking_part_in_labels(chosen: Tensor, options: PredictOptions) -> Tensor:
    """Return the classes that may appear in a label map, bool ``(B, C)``.

    Classes of no interest always take part: classes of interest say what is scored, and without the
    background, they would cover the whole label map. An image without a chosen class allows all.
    """
    taking_part = chosen
    if options.classes is not None:
        others = torch.ones_like(chosen)
        others[:, list(options.classes)] = False
        taking_part = chosen | others
    return taking_part | ~taking_part.any(dim=1, keepdim=True)


def single_class(classes: int, options: PredictOptions) -> int | None:
    """Return the class of interest if it is one of two classes, else None. Its best label map is its mask."""
    return options.classes[0] if classes == 2 and options.classes is not None and len(options.classes) == 1 else None


Procedure = Callable[[Tensor, PredictOptions], Prediction]
PROCEDURES: dict[str, Procedure] = {"T": predict_threshold, "max": predict_max, "rankdice": predict_rankdice}


def predict_logits(
    procedure: str,
    logits: Tensor,
    activation: Activation,
    temperature: float,
    options: PredictOptions,
    bias: Sequence[float] | None = None,
) -> Prediction:
    """Apply a procedure to logits; a plain ``max`` needs no probabilities, since they rise with the logits."""
    if procedure == "max" and bias is None and not options.restricts_max:
        return Prediction(labels=(logits[:, 0] > 0).long() if logits.shape[1] == 1 else _argmax(logits))
    return PROCEDURES[procedure](probabilities(logits, activation, temperature, bias), options)


def label_map(
    procedure: str,
    probs: Tensor,
    options: PredictOptions = PredictOptions(),  # noqa: B008
    found: Prediction | None = None,
    unassigned: int = 255,
) -> Tensor:
    """Return one label per pixel, int64 ``(B, H, W)``, under a procedure, for pictures and PNG masks.

    Labels stay as they are (``max``). From masks without a choice of classes (``T``), a pixel gets the most probable
    class whose mask contains it, and ``unassigned`` where there is none. With one (``rankdice``), it is the label map
    with the highest total of expected scores (:func:`utils.rankdice.label_map`), for both metrics, among the classes
    that are taken to be in the image. Where one class is scored against the rest (:func:`single_class`), it is the mask
    of that class. One channel gives 0 (background) and 1.

    Args:
        procedure: a name of ``PROCEDURES``.
        probs: ``(B, C, H, W)``.
        options: of the procedure.
        found: what the procedure decided for the same probabilities, if it is known already.
        unassigned: the label of pixels without a class.
    """
    found = PROCEDURES[procedure](probs, options) if found is None else found
    if found.labels is not None:
        return found.labels
    assert found.masks is not None
    if probs.shape[1] == 1:
        return found.masks[:, 0].long()
    if found.chosen is None:
        best, labels = probs.masked_fill(~found.masks, -1.0).max(dim=1)
        return torch.where(best < 0, unassigned, labels)
    only = single_class(probs.shape[1], options)
    if only is not None:
        return torch.where(found.masks[:, only], only, 1 - only)
    return rd.label_map(
        probs, classes=taking_part_in_labels(found.chosen, options), smooth=options.smooth, found=found.ranked
    )
