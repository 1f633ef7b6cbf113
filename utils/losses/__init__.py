"""Training losses: logits and integer labels in, one number out.

Every loss here

* takes logits ``(B, C, H, W)`` in any floating dtype and integer labels ``(B, H, W)``, and changes neither;
* computes in float32 (float64 for float64 logits), whatever autocast says, and is finite for any finite logits;
* leaves pixels labelled ``ignore_index`` out: neither value nor gradient depends on what the network says
  there, not even if it says nan; a batch without any other pixel gives 0 with zero gradient;
* reads one-channel logits as a binary task: labels 0 (background) and 1, probability ``sigmoid(logit)``;
* says in ``activation`` how probabilities are made from logits trained with it ("softmax" or "sigmoid", one
  channel always being sigmoid), and in ``proper`` whether it is strictly proper.

A loss is *strictly proper* (Gneiting & Raftery, JASA 2007) if only the true conditional probabilities
p = P(label | image) minimise its expectation. RankDice ranks and sums probabilities, so it needs such a loss
(Dai & Li, JMLR 2023, Section 4); arguments that tilt the minimiser (class weights, label smoothing, hard-pixel
mining) make ``loss.proper`` False on the instance. Below, p is the predicted probability, y the label, t its
one-hot code, N the number of counted pixels.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError, did_you_mean
from utils.losses.base import (
    Classes,
    RegionLoss,
    SegmentationLoss,
    Weights,
    non_negative,
    one_hot,
    positive,
    weight_buffer,
    weight_for,
    weighted_mean,
)
from utils.losses.lovasz import LovaszHinge, LovaszSoftmax

# -- per pixel -------------------------------------------------------------------------------------------------


def _two_classes(logits: Tensor) -> Tensor:
    """Return one-channel logits z as the two channels (0, z), whose softmax is (1 - sigmoid(z), sigmoid(z))."""
    if logits.shape[1] > 1:
        return logits
    return torch.cat([torch.zeros_like(logits), logits], dim=1)


def _focal_factor(log_p: Tensor, gamma: float) -> Tensor:
    """Return (1 - p) ** gamma. The clamp keeps the gradient finite at p = 1 for gamma < 1."""
    return (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny) ** gamma


def _hardest(losses: Tensor, valid: Tensor, fraction: float) -> Tensor:
    """Return bool like ``valid``: the ``fraction`` of valid pixels with the largest loss, at least one."""
    order = losses.detach().masked_fill(~valid, -1.0).flatten().argsort(descending=True)
    keep = torch.arange(order.numel(), device=order.device) < (valid.sum() * fraction).ceil()
    return torch.zeros_like(keep).scatter_(0, order, keep).view_as(valid)


class CrossEntropyLoss2d(SegmentationLoss):
    """Cross-entropy: ``-1/N sum_n log p_n[y_n]``. Strictly proper (the logarithmic score, Good 1952).

    One channel: the binary cross-entropy, i.e. this formula with the logits (0, z).

    Args:
        ignore_index: pixels with this label count nowhere.
        weight: per class; the mean becomes ``sum w[y] loss / sum w[y]`` as in torch. The minimiser is then
            proportional to w p: no longer proper. One channel takes two entries: background, class.
        label_smoothing: e in [0, 1); the target becomes ``(1 - e) t + e / C`` (Szegedy et al., CVPR 2016),
            and so does the minimiser: not proper.
        top_k: fraction in (0, 1] of the counted pixels of a batch, the hardest ones, that are averaged
            (online hard-pixel mining, Wu et al., arXiv 1605.06885). Below 1: not proper.
    """

    proper = True
    weight: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        weight: Weights = None,
        label_smoothing: float = 0.0,
        top_k: float = 1.0,
    ) -> None:
        super().__init__(ignore_index)
        weight_buffer(self, "weight", weight)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 <= label_smoothing < 1")
        if not 0 < top_k <= 1:
            raise ValueError(f"top_k is {top_k}; expected a fraction of the pixels, 0 < top_k <= 1")
        self.label_smoothing = label_smoothing
        self.top_k = top_k
        self.proper = weight is None and label_smoothing == 0 and top_k == 1
        self.nearly_proper = weight is None

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        logits2 = _two_classes(logits)
        weight = None if self.weight is None else weight_for(self.weight, logits, logits2.shape[1])
        losses = F.cross_entropy(logits2, target, weight, reduction="none", label_smoothing=self.label_smoothing)
        keep = valid if self.top_k == 1 else _hardest(losses, valid, self.top_k)
        # The losses carry the weights of their classes already.
        weights = keep.to(losses.dtype) if weight is None else weight[target] * keep
        return (losses * keep).sum() / positive(weights.sum())


class FocalLoss(SegmentationLoss):
    """Focal loss on the softmax: ``-1/N sum_n (1 - p_n[y_n])^gamma log p_n[y_n]``.

    Source: Lin et al., ICCV 2017. Not strictly proper for gamma > 0: its minimiser is less certain than the
    truth (Charoenphakdee et al., CVPR 2021, Theorem 3); with gamma = 0 it is the cross-entropy.
    The mean is over the counted pixels; the published one divides by the ignored ones too.

    Args:
        ignore_index: pixels with this label count nowhere.
        gamma: focusing parameter >= 0.
        weight: per class, as in :class:`CrossEntropyLoss2d` (the paper's alpha).
    """

    nearly_proper = True
    weight: Tensor | None

    def __init__(self, ignore_index: int = 255, gamma: float = 2.0, weight: Weights = None) -> None:
        super().__init__(ignore_index)
        self.gamma = non_negative("gamma", gamma)
        weight_buffer(self, "weight", weight)
        self.proper = gamma == 0 and weight is None
        self.nearly_proper = weight is None

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        logits2 = _two_classes(logits)
        cross_entropy = F.cross_entropy(logits2, target, reduction="none")
        weights = valid.to(logits.dtype)
        if self.weight is not None:
            weights = weights * weight_for(self.weight, logits, logits2.shape[1])[target]
        return weighted_mean(_focal_factor(-cross_entropy, self.gamma) * cross_entropy, weights)


class BCEWithLogitsLoss2d(SegmentationLoss):
    """One-vs-rest cross-entropy on sigmoids: ``-1/(N C) sum_nc t log p + (1 - t) log(1 - p)``.

    Strictly proper: each channel is a logarithmic score of its own class's probability. The one-hot target is
    made here from the integer labels.

    Args:
        ignore_index: pixels with this label count nowhere.
        weight: per class; weighs the channels of the mean (still proper for C > 1, yet reported as not proper,
            because one channel takes two entries, background and class, which tilt the minimiser).
        pos_weight: per channel; multiplies the ``t log p`` term as in torch, against classes that are rare
            within their own channel. Not proper.
    """

    proper = True
    activation = "sigmoid"
    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(self, ignore_index: int = 255, weight: Weights = None, pos_weight: list[float] | None = None) -> None:
        super().__init__(ignore_index)
        weight_buffer(self, "weight", weight)
        weight_buffer(self, "pos_weight", pos_weight)
        self.proper = weight is None and pos_weight is None

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        channels = logits.shape[1]
        pos_weight = None
        if self.pos_weight is not None:
            pos_weight = weight_for(self.pos_weight, logits, channels, "pos_weight").unsqueeze(1)
        truth = one_hot(logits, target, valid)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none", pos_weight=pos_weight)
        return weighted_mean(losses, _channel_weights(self.weight, logits, target, valid))


class BCEWithLogitsFocalLoss2d(SegmentationLoss):
    """Focal loss on sigmoids, one-vs-rest: ``-1/(N C) sum_nc a_t (1 - p_t)^gamma log p_t``.

    p_t is p where t = 1 and 1 - p elsewhere. Source: Lin et al., ICCV 2017, equation 5. Not strictly proper for
    gamma > 0 (Charoenphakdee et al., CVPR 2021). The focal factor is taken per pixel and class; the published
    code took it of the batch's mean loss, which focuses on nothing: that bug is not kept.

    Args:
        ignore_index: pixels with this label count nowhere.
        gamma: focusing parameter >= 0.
        alpha: a_t is alpha where t = 1 and 1 - alpha elsewhere; None: 1 everywhere.
        weight: per class, as in :class:`BCEWithLogitsLoss2d`.
    """

    activation = "sigmoid"
    nearly_proper = True
    weight: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        gamma: float = 2.0,
        alpha: float | None = None,
        weight: Weights = None,
    ) -> None:
        super().__init__(ignore_index)
        self.gamma = non_negative("gamma", gamma)
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; expected 0 <= alpha <= 1 or None")
        self.alpha = alpha
        weight_buffer(self, "weight", weight)
        self.proper = gamma == 0 and alpha is None and weight is None
        self.nearly_proper = alpha is None and weight is None

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        truth = one_hot(logits, target, valid)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        losses = _focal_factor(-cross_entropy, self.gamma) * cross_entropy
        if self.alpha is not None:
            losses = losses * (self.alpha * truth + (1 - self.alpha) * (1 - truth))
        return weighted_mean(losses, _channel_weights(self.weight, logits, target, valid))


def _channel_weights(weight: Tensor | None, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return the weights ``(B, C, N)`` of one-vs-rest terms: 0 at invalid pixels.

    C > 1: ``weight[c]`` for channel c; C = 1: ``weight[label]``, two entries.
    """
    channels = logits.shape[1]
    counted = valid.unsqueeze(1).to(logits.dtype).expand_as(logits)
    if weight is None:
        return counted
    weight = weight_for(weight, logits, max(channels, 2))
    return counted * (weight.unsqueeze(1) if channels > 1 else weight[target].unsqueeze(1))


# -- per region ------------------------------------------------------------------------------------------------


class TverskyLoss(RegionLoss):
    """Tversky loss: ``1 - (TP + s) / (TP + alpha FP + beta FN + s)``, per class, with soft counts.

    TP = sum p t, FP = sum p (1 - t), FN = sum (1 - p) t. Source: Salehi et al., MLMI 2017 (arXiv 1706.05721).
    Not proper: like Dice, minimising it pushes probabilities to 0 and 1.

    Args:
        ignore_index: pixels with this label count nowhere.
        alpha, beta: cost of false alarms and of misses; beta > alpha favours recall.
        smooth: s >= 0. Where the fraction is 0 / 0 the loss is 0.
        per_class: one fraction per class, then their mean; else one over all classes, which for a softmax does
            not tell alpha from beta.
        per_image: one fraction per image, then their mean; else one over the batch.
        classes: "all", or only the classes "present" in the labels of the region (with ``per_class``).
        weight: per class, in the mean (with ``per_class``, C > 1).
    """

    def __init__(
        self,
        ignore_index: int = 255,
        alpha: float = 0.3,
        beta: float = 0.7,
        smooth: float = 1.0,
        per_class: bool = True,
        per_image: bool = False,
        classes: Classes = "all",
        weight: Weights = None,
    ) -> None:
        super().__init__(ignore_index, classes, weight)
        self.alpha = non_negative("alpha", alpha)
        self.beta = non_negative("beta", beta)
        self.smooth = non_negative("smooth", smooth)
        if not per_class and (weight is not None or classes != "all"):
            raise ValueError("weight and classes choose among classes; they need per_class = true")
        self.per_class = per_class
        self.per_image = per_image

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        channels = logits.shape[1]
        p = self.probabilities(logits) * valid.unsqueeze(1)
        t = one_hot(logits, target, valid)
        hit, said, true = (self._sum(x) for x in ((p * t).sum(2), p.sum(2), t.sum(2)))  # (R, K) each
        # TP + alpha FP + beta FN
        below = (1 - self.alpha - self.beta) * hit + self.alpha * said + self.beta * true + self.smooth
        index = torch.where(below > 0, (hit + self.smooth) / below.clamp_min(1e-12), 1.0)
        counted = valid.any(1, keepdim=True) if self.per_image else valid.any().view(1, 1)
        return self.mean_of_regions(1 - index, true > 0, counted, channels if self.per_class else 1)

    def _sum(self, sums: Tensor) -> Tensor:
        """Add up ``(B, C)`` as the options say: ``(B or 1, C or 1)``."""
        sums = sums if self.per_image else sums.sum(0, keepdim=True)
        return sums if self.per_class else sums.sum(1, keepdim=True)


class DiceLoss(TverskyLoss):
    """Soft Dice loss on the softmax: ``1 - (2 sum p t + s) / (sum p + sum t + s)`` = Tversky(1/2, 1/2).

    Source: Milletari et al., 3DV 2016. Not proper: the minimiser is a hard mask, so RankDice has nothing to rank.

    By default the sums run over batch, pixels and classes, as published. For a softmax over C > 1 channels
    ``sum p = sum t = N``, so that default is the mean of 1 - p[y], which ignores class sizes; ``per_class``
    gives the Dice loss of the literature.

    Args:
        ignore_index: pixels with this label count nowhere.
        smooth: s >= 0. Where the fraction is 0 / 0 the loss is 0.
        per_class, per_image, classes, weight: as in :class:`TverskyLoss`.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        smooth: float = 1.0,
        per_class: bool = False,
        per_image: bool = False,
        classes: Classes = "all",
        weight: Weights = None,
    ) -> None:
        # (2 TP + s) / (2 TP + FP + FN + s) is Tversky's fraction with s / 2.
        super().__init__(ignore_index, 0.5, 0.5, smooth / 2, per_class, per_image, classes, weight)


class BDiceLoss(DiceLoss):
    """Soft Dice loss on sigmoids, one-vs-rest; arguments as :class:`DiceLoss`. Not proper."""

    activation = "sigmoid"


class LogCoshDiceLoss(DiceLoss):
    """``log(cosh(Dice loss))``; arguments as :class:`DiceLoss`. Not proper.

    Source: Jadon, *A survey of loss functions for semantic segmentation*, CIBCB 2020.
    """

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        return super().compute(logits, target, valid).cosh().log()


class CE_DiceLoss(SegmentationLoss):  # noqa: N801 (the published name)
    """Cross-entropy plus soft Dice on the softmax. Not proper, the Dice part is not.

    Args:
        ignore_index: pixels with this label count nowhere.
        smooth, per_class, per_image, classes: of the Dice part, see :class:`DiceLoss`.
        weight: per class, of the cross-entropy part, see :class:`CrossEntropyLoss2d`.
        dice_weight: factor of the Dice part.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        smooth: float = 1.0,
        weight: Weights = None,
        per_class: bool = False,
        per_image: bool = False,
        classes: Classes = "all",
        dice_weight: float = 1.0,
    ) -> None:
        super().__init__(ignore_index)
        self.cross_entropy = CrossEntropyLoss2d(ignore_index, weight)
        self.dice = DiceLoss(ignore_index, smooth, per_class, per_image, classes)
        self.dice_weight = non_negative("dice_weight", dice_weight)
        self.nearly_proper = self.cross_entropy.proper

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        dice = self.dice.compute(logits, target, valid)
        return self.cross_entropy.compute(logits, target, valid) + self.dice_weight * dice


class BCEDiceLoss(SegmentationLoss):
    """One-vs-rest cross-entropy plus soft Dice, both on sigmoids. Not proper, the Dice part is not.

    Args:
        ignore_index: pixels with this label count nowhere.
        smooth, per_class, per_image, classes: of the Dice part, see :class:`DiceLoss`.
        weight, pos_weight: of the cross-entropy part, see :class:`BCEWithLogitsLoss2d`.
        dice_weight: factor of the Dice part.
    """

    activation = "sigmoid"

    def __init__(
        self,
        ignore_index: int = 255,
        smooth: float = 1.0,
        weight: Weights = None,
        pos_weight: list[float] | None = None,
        per_class: bool = False,
        per_image: bool = False,
        classes: Classes = "all",
        dice_weight: float = 1.0,
    ) -> None:
        super().__init__(ignore_index)
        self.cross_entropy = BCEWithLogitsLoss2d(ignore_index, weight, pos_weight)
        self.dice = BDiceLoss(ignore_index, smooth, per_class, per_image, classes)
        self.dice_weight = non_negative("dice_weight", dice_weight)
        self.nearly_proper = self.cross_entropy.proper

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        dice = self.dice.compute(logits, target, valid)
        return self.cross_entropy.compute(logits, target, valid) + self.dice_weight * dice


LOSSES: dict[str, type[SegmentationLoss]] = {
    loss.__name__: loss
    for loss in (
        CrossEntropyLoss2d,
        BCEWithLogitsLoss2d,
        BCEWithLogitsFocalLoss2d,
        DiceLoss,
        BDiceLoss,
        BCEDiceLoss,
        CE_DiceLoss,
        FocalLoss,
        LovaszSoftmax,
        LovaszHinge,
        LogCoshDiceLoss,
        TverskyLoss,
    )
}


def loss_class(type: str) -> type[SegmentationLoss]:
    """Return the loss called ``type``; raise :class:`UserError` with the nearest name if there is none."""
    if type not in LOSSES:
        hint = did_you_mean(type, LOSSES)
        raise UserError(f"there is no loss called {type!r}{hint} Known: {', '.join(LOSSES)}")
    return LOSSES[type]


def signature_of(type: str) -> inspect.Signature:
    """Return what ``args`` of the loss ``type`` may hold: names, defaults, evaluated annotations."""
    signature = inspect.signature(loss_class(type), eval_str=True)
    return signature.replace(parameters=[p for n, p in signature.parameters.items() if n != "ignore_index"])


def build(type: str, ignore_index: int = 255, **args) -> SegmentationLoss:
    """Return the loss called ``type``.

    Raises:
        UserError: there is no such loss.
        TypeError, ValueError: an argument it does not take, or a value out of range.
    """
    return loss_class(type)(ignore_index=ignore_index, **args)


def is_proper(type: str, **args) -> bool:
    """Return whether the loss ``type`` with ``args`` (as in a config) is strictly proper."""
    return _as_in_config(type, args).proper


def gives_probabilities(type: str, **args) -> bool:
    """Return whether outputs trained with the loss ``type`` and ``args`` (as in a config) can pass as probabilities.

    Those of a strictly proper loss, and, with a temperature (``test.py --fit``), those of a cross-entropy that is
    smoothed, focussed or summed with a Dice loss.
    """
    loss = _as_in_config(type, args)
    return loss.proper or loss.nearly_proper


def _as_in_config(type: str, args: dict) -> SegmentationLoss:
    if args.get("weight") == "balanced":
        args = {**args, "weight": [1.0]}
    return build(type, **args)
