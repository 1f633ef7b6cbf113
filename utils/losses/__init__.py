"""Training losses: logits and integer labels in, one number out.

Every loss here

* takes logits ``(B, C, H, W)`` in any floating dtype and integer labels ``(B, H, W)``, and changes neither;
* computes in float32 (float64 for float64 logits), whatever autocast says, and is finite for any finite logits;
* ignores pixels with the label ``ignore_index``: the logits there, even nan, change neither value nor gradient; a batch
  without other pixels gives 0 with zero gradient;
* treats one-channel logits as a binary task: labels 0 (background) and 1, probability ``sigmoid(logit)``;
* has an attribute ``activation``, which turns logits trained with it into probabilities ("softmax" or "sigmoid"; one
  channel always uses the sigmoid), and an attribute ``proper``: whether it is strictly proper.

A loss is *strictly proper* (Gneiting & Raftery, JASA 2007) if only the true conditional probabilities p = P(label |
image) minimize its expectation. RankDice needs calibrated probabilities, so it needs such a loss (Dai & Li, JMLR 2023,
Section 4). Arguments that move the minimum (class weights, label smoothing, hard-pixel mining) set ``loss.proper`` to
False. In the docstrings of the losses, p is the predicted probability, y the label, t the one-hot label, and N the
number of pixels that are not ignored.
"""

from __future__ import annotations

from typing import Any

from utils.losses import lovasz, pixel, region
from utils.losses.base import SegmentationLoss
from utils.registry import Registry

LOSSES = Registry(
    "loss",
    {
        "CrossEntropyLoss2d": pixel.CrossEntropyLoss2d,
        "BCEWithLogitsLoss2d": pixel.BCEWithLogitsLoss2d,
        "BCEWithLogitsFocalLoss2d": pixel.BCEWithLogitsFocalLoss2d,
        "DiceLoss": region.DiceLoss,
        "BDiceLoss": region.BDiceLoss,
        "BCEDiceLoss": region.BCEDiceLoss,
        "CE_DiceLoss": region.CE_DiceLoss,
        "FocalLoss": pixel.FocalLoss,
        "LovaszSoftmax": lovasz.LovaszSoftmax,
        "LovaszHinge": lovasz.LovaszHinge,
        "LogCoshDiceLoss": region.LogCoshDiceLoss,
        "TverskyLoss": region.TverskyLoss,
    },
    provided=("ignore_index",),
)


def build(type: str, ignore_index: int = 255, **args: Any) -> SegmentationLoss:
    """Return the loss called ``type``.

    Raises:
        UserError: there is no such loss.
        ValueError: an unknown argument, or a value out of range.
    """
    LOSSES.check(type, args)
    return LOSSES[type](ignore_index=ignore_index, **args)


def is_proper(type: str, **args: Any) -> bool:
    """Return whether the loss ``type`` with ``args`` (as in a config) is strictly proper."""
    return _as_in_config(type, args).proper


def gives_probabilities(type: str, **args: Any) -> bool:
    """Return whether the outputs of a network trained with a loss (``args`` as in a config) can pass as probabilities.

    True for strictly proper losses. True also for a cross-entropy with label smoothing, with a focal factor, or added
    to a Dice loss: after a temperature is fitted (``test.py --fit``), its outputs are close enough.
    """
    loss = _as_in_config(type, args)
    return loss.proper or loss.nearly_proper


def _as_in_config(type: str, args: dict[str, Any]) -> SegmentationLoss:
    if args.get("weight") == "balanced":
        args = {**args, "weight": [1.0]}
    return build(type, **args)
