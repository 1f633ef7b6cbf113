"""Losses that are a mean over regions (classes, images or both): Tversky, Dice, and their sums with a cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.bounds import NonNegative
from utils.losses.base import (
    Classes,
    SegmentationLoss,
    Weights,
    one_hot,
    weight_buffer,
    weight_for,
    weighted_mean,
)
from utils.losses.pixel import BCEWithLogitsLoss2d, CrossEntropyLoss2d


class RegionLoss(SegmentationLoss):
    """Base of losses that are a mean over regions: classes, images, or both."""

    weight: Tensor | None

    def __init__(self, ignore_index: int, classes: Classes, weight: Weights) -> None:
        super().__init__(ignore_index)
        self.classes = classes
        weight_buffer(self, "weight", weight)

    def mean_of_regions(self, terms: Tensor, present: Tensor, counted: Tensor, channels: int) -> Tensor:
        """Return the weighted mean of ``terms`` ``(R, K)``, R images (or 1) and K classes (or 1).

        ``present`` ``(R, K)``: the class occurs; ``counted`` ``(R, 1)``: the image has a valid pixel.
        """
        weights = counted.expand_as(terms).to(terms.dtype)
        # With one channel no other class punishes false positives in images without the class, so those images count.
        if self.classes == "present" and channels > 1:
            weights = weights * present
        if self.weight is not None:
            if channels == 1:
                raise ValueError("weight needs several classes; a network with one channel has no class weights")
            weights = weights * weight_for(self.weight, terms, channels)
        return weighted_mean(terms, weights)


class TverskyLoss(RegionLoss):
    """Tversky loss: ``1 - (TP + s) / (TP + alpha FP + beta FN + s)``, per class, with soft counts.

    TP = sum p t, FP = sum p (1 - t), FN = sum (1 - p) t. Source: Salehi et al., MLMI 2017 (arXiv 1706.05721).
    Not proper: it pushes probabilities to 0 and 1, like Dice.

    Args:
        alpha, beta: cost of false positives and of false negatives; beta > alpha favors recall.
        smooth: s >= 0. If the fraction is 0 / 0, the loss is 0.
        per_class: one fraction per class, then their mean; else one over all classes, for which alpha and beta are
            interchangeable with a softmax.
        per_image: one fraction per image, then their mean; else one over the batch.
        classes: "all", or only the classes "present" in the labels of the region (with ``per_class``).
        weight: per class, in the mean (with ``per_class``, C > 1).
    """

    def __init__(
        self,
        ignore_index: int = 255,
        alpha: NonNegative = 0.3,
        beta: NonNegative = 0.7,
        smooth: NonNegative = 1.0,
        per_class: bool = True,
        per_image: bool = False,
        classes: Classes = "all",
        weight: Weights = None,
    ) -> None:
        super().__init__(ignore_index, classes, weight)
        self.alpha, self.beta, self.smooth = alpha, beta, smooth
        if not per_class and (weight is not None or classes != "all"):
            raise ValueError("weight and classes need per_class = true")
        self.per_class = per_class
        self.per_image = per_image

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        channels = logits.shape[1]
        p = self.probabilities(logits) * valid.unsqueeze(1)
        t = one_hot(logits, target, valid)
        hit, predicted, true = (self._sum(x) for x in ((p * t).sum(2), p.sum(2), t.sum(2)))  # (R, K) each
        # TP + alpha FP + beta FN
        below = (1 - self.alpha - self.beta) * hit + self.alpha * predicted + self.beta * true + self.smooth
        index = torch.where(below > 0, (hit + self.smooth) / below.clamp_min(1e-12), 1.0)
        counted = valid.any(1, keepdim=True) if self.per_image else valid.any().view(1, 1)
        return self.mean_of_regions(1 - index, true > 0, counted, channels if self.per_class else 1)

    def _sum(self, sums: Tensor) -> Tensor:
        """Sum ``(B, C)`` as the options say; returns ``(B or 1, C or 1)``."""
        sums = sums if self.per_image else sums.sum(0, keepdim=True)
        return sums if self.per_class else sums.sum(1, keepdim=True)


class DiceLoss(TverskyLoss):
    """Soft Dice loss on the softmax: ``1 - (2 sum p t + s) / (sum p + sum t + s)`` = Tversky(1/2, 1/2).

    Source: Milletari et al., 3DV 2016. Not proper: the minimum is a hard mask.

    By default the sums run over batch, pixels and classes, as published. For a softmax over C > 1 channels ``sum p =
    sum t = N``, so this default is the mean of 1 - p[y], which ignores class sizes. ``per_class`` gives the Dice loss
    of the literature.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        smooth: NonNegative = 1.0,
        per_class: bool = False,
        per_image: bool = False,
        classes: Classes = "all",
        weight: Weights = None,
    ) -> None:
        # (2 TP + s) / (2 TP + FP + FN + s) is Tversky's fraction with s / 2.
        super().__init__(ignore_index, 0.5, 0.5, smooth / 2, per_class, per_image, classes, weight)


class BDiceLoss(DiceLoss):
    """Soft Dice loss on sigmoids, one-vs-rest. Not proper."""

    activation = "sigmoid"


class LogCoshDiceLoss(DiceLoss):
    """``log(cosh(Dice loss))``. Not proper.

    Source: Jadon, *A survey of loss functions for semantic segmentation*, CIBCB 2020.
    """

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        return super().compute(logits, target, valid).cosh().log()


class _SumWithDice(SegmentationLoss):
    """A cross-entropy plus soft Dice. Not proper, because of the Dice part.

    Args:
        smooth, per_class, per_image, classes: of the Dice part, see :class:`DiceLoss`.
        weight, pos_weight: of the cross-entropy part, see its class.
        dice_weight: factor of the Dice part.
    """

    def _add(self, cross_entropy: SegmentationLoss, dice: DiceLoss, dice_weight: float) -> None:
        self.cross_entropy, self.dice, self.dice_weight = cross_entropy, dice, dice_weight
        self.nearly_proper = cross_entropy.proper

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        dice = self.dice.compute(logits, target, valid)
        return self.cross_entropy.compute(logits, target, valid) + self.dice_weight * dice


class CE_DiceLoss(_SumWithDice):  # noqa: N801 (the published name)
    """Cross-entropy plus soft Dice on the softmax. Not proper, because of the Dice part."""

    def __init__(
        self,
        ignore_index: int = 255,
        smooth: NonNegative = 1.0,
        weight: Weights = None,
        per_class: bool = False,
        per_image: bool = False,
        classes: Classes = "all",
        dice_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__(ignore_index)
        dice = DiceLoss(ignore_index, smooth, per_class, per_image, classes)
        self._add(CrossEntropyLoss2d(ignore_index, weight), dice, dice_weight)


class BCEDiceLoss(_SumWithDice):
    """One-vs-rest cross-entropy plus soft Dice, both on sigmoids. Not proper, because of the Dice part."""

    activation = "sigmoid"

    def __init__(
        self,
        ignore_index: int = 255,
        smooth: NonNegative = 1.0,
        weight: Weights = None,
        pos_weight: list[NonNegative] | None = None,
        per_class: bool = False,
        per_image: bool = False,
        classes: Classes = "all",
        dice_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__(ignore_index)
        dice = BDiceLoss(ignore_index, smooth, per_class, per_image, classes)
        self._add(BCEWithLogitsLoss2d(ignore_index, weight, pos_weight), dice, dice_weight)
