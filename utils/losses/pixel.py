"""Losses that are a mean over pixels: cross-entropy and focal losses, on the softmax and on sigmoids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.bounds import NonNegative, Share, ShareAboveZero, ShareBelowOne
from utils.losses.base import (
    SegmentationLoss,
    Weights,
    one_hot,
    positive,
    weight_buffer,
    weight_for,
    weighted_mean,
)


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
        weight: per class; the mean becomes ``sum w[y] loss / sum w[y]`` as in torch. The minimum is then
            proportional to w p, so the loss is not proper. One channel takes two entries: background, class.
        label_smoothing: e in [0, 1); the target becomes ``(1 - e) t + e / C`` (Szegedy et al., CVPR 2016),
            and so does the minimum: not proper.
        top_k: average only this fraction of the batch's pixels, the hardest ones (online hard-pixel mining, Wu et al.,
            arXiv 1605.06885). Below 1: not proper.
    """

    proper = True
    weight: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        weight: Weights = None,
        label_smoothing: ShareBelowOne = 0.0,
        top_k: ShareAboveZero = 1.0,
    ) -> None:
        super().__init__(ignore_index)
        weight_buffer(self, "weight", weight)
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
        # F.cross_entropy has multiplied the losses by the class weights.
        weights = keep.to(losses.dtype) if weight is None else weight[target] * keep
        return (losses * keep).sum() / positive(weights.sum())


class FocalLoss(SegmentationLoss):
    """Focal loss on the softmax: ``-1/N sum_n (1 - p_n[y_n])^gamma log p_n[y_n]``.

    Source: Lin et al., ICCV 2017. Not strictly proper for gamma > 0: its minimum is underconfident (Charoenphakdee et
    al., CVPR 2021, Theorem 3). With gamma = 0 it is the cross-entropy. The mean is over the pixels that are not
    ignored; the published loss divides by all pixels.

    Args:
        gamma: focusing parameter >= 0.
        weight: per class, as in :class:`CrossEntropyLoss2d` (the paper's alpha).
    """

    nearly_proper = True
    weight: Tensor | None

    def __init__(self, ignore_index: int = 255, gamma: NonNegative = 2.0, weight: Weights = None) -> None:
        super().__init__(ignore_index)
        self.gamma = gamma
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

    Strictly proper: each channel is a logarithmic score of the probability of its class.

    Args:
        weight: per class; weights the channels in the mean. That is proper for C > 1, but reported as not proper,
            because one channel takes two entries, background and class, which move the minimum.
        pos_weight: per channel; multiplies the ``t log p`` term as in torch, for rare classes. Not proper.
    """

    proper = True
    activation = "sigmoid"
    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self, ignore_index: int = 255, weight: Weights = None, pos_weight: list[NonNegative] | None = None
    ) -> None:
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

    p_t is p where t = 1 and 1 - p elsewhere. Source: Lin et al., ICCV 2017, equation 5. Not strictly proper for gamma >
    0 (Charoenphakdee et al., CVPR 2021). Each pixel and class has its own focal factor; the published code computes one
    factor from the batch's mean loss, which is a bug.

    Args:
        gamma: focusing parameter >= 0.
        alpha: a_t is alpha where t = 1 and 1 - alpha elsewhere; None: 1 everywhere.
        weight: per class, as in :class:`BCEWithLogitsLoss2d`.
    """

    activation = "sigmoid"
    nearly_proper = True
    weight: Tensor | None

    def __init__(
        self, ignore_index: int = 255, gamma: NonNegative = 2.0, alpha: Share | None = None, weight: Weights = None
    ) -> None:
        super().__init__(ignore_index)
        self.gamma = gamma
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
