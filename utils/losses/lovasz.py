"""The Lovász extension of the Jaccard loss, and the two losses made of it.

Source: Berman, Rannen Triki & Blaschko, *The Lovász-Softmax loss*, CVPR 2018 (arXiv 1705.08790), Section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.losses.base import Classes, Weights, one_hot
from utils.losses.region import RegionLoss


@torch.no_grad()
def jaccard_gradient(errors: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the gradient of the Lovász extension of the Jaccard loss with respect to ``errors``.

    Args:
        errors: floating point ``(R, N)``: R rows of N pixels; finite, larger is worse.
        truth: bool ``(R, N)``, the pixels of the class.
        valid: bool ``(R, N)``; the other pixels take no part.

    Returns:
        ``(R, N)`` of the dtype of ``errors``, >= 0, 0 where invalid. The extension is piecewise linear, so its value is
        ``(errors * gradient).sum(-1)`` for errors >= 0, and the backward pass does not need the order.

    Pixels become wrong one after another, from the largest error down, and the Jaccard index falls from 1 to 0 as
    intersection / union changes (equation 9). The falls are computed in closed form. As differences of neighboring
    indices, which are about 1 / N, they would lose their digits in float32 for rows of a million pixels.
    """
    order = errors.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True)
    foreground = (truth & valid).gather(-1, order)  # (R, N), invalid pixels are at the end
    size = foreground.sum(-1, keepdim=True)  # (R, 1) pixels of the class
    hits = foreground.cumsum(-1)
    rank = torch.arange(1, errors.shape[-1] + 1, device=errors.device)
    intersection = (size - hits).to(errors.dtype)
    union = (size + rank - hits).to(errors.dtype)
    # A false negative removes a pixel from the intersection; a false positive adds one to the union.
    fall = torch.where(foreground, 1.0 / union, intersection / (union * (union - 1).clamp_min(1.0)))
    # A row without the class: the first false positive takes the index from 1 (by convention) to 0.
    fall = torch.where(size == 0, (rank == 1).to(errors.dtype), fall)
    return torch.zeros_like(errors).scatter_(-1, order, fall).masked_fill_(~valid, 0.0)


def lovasz_extension(errors: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the Lovász extension of the Jaccard loss, ``(R,)``, for non-negative ``errors`` ``(R, N)``.

    For errors in {0, 1} it is 1 - intersection / union of the class's pixels and the predicted ones.
    """
    return (errors * jaccard_gradient(errors.detach(), truth, valid)).sum(-1)


class _LovaszLoss(RegionLoss):
    """Mean over classes (and images) of the Lovász extension of the Jaccard loss of :meth:`errors`.

    Args:
        classes: mean over "all" classes or those "present" in the labels of the region (C > 1).
        per_image: one term per image, then their mean; else all pixels of the batch together.
        weight: per class, in the mean (C > 1).
    """

    def __init__(
        self,
        ignore_index: int = 255,
        classes: Classes = "present",
        per_image: bool = False,
        weight: Weights = None,
    ) -> None:
        super().__init__(ignore_index, classes, weight)
        self.per_image = per_image

    def errors(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the errors >= 0 of the pixels, of the shape ``(B, C, N)`` of both arguments."""
        raise NotImplementedError

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`SegmentationLoss.compute`."""
        truth = one_hot(logits, target, valid)
        errors = self.errors(logits, truth)
        channels = logits.shape[1]
        rows = (lambda x: x) if self.per_image else (lambda x: x.reshape(1, -1))
        counted = rows(valid)
        # One class at a time: sorting costs the same, and needs the memory of one class only.
        terms = [lovasz_extension(rows(errors[:, c]), rows(truth[:, c]) > 0, counted) for c in range(channels)]
        present = torch.stack([rows(truth[:, c]).any(1) for c in range(channels)], dim=1)
        return self.mean_of_regions(torch.stack(terms, dim=1), present, counted.any(1, keepdim=True), channels)


class LovaszSoftmax(_LovaszLoss):
    """Lovász-Softmax: the Lovász extension of the Jaccard loss of the errors |t - p|, mean over classes.

    Source: Berman et al., CVPR 2018, equation 11. Not proper: it optimizes IoU, and its minimum is a hard mask.
    """

    def errors(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return |t - p|."""
        return (truth - self.probabilities(logits)).abs()


class LovaszHinge(_LovaszLoss):
    """Lovász hinge: the Lovász extension of the Jaccard loss of the hinge errors max(0, 1 - (2 t - 1) z).

    Source: Yu & Blaschko, ICML 2015; Berman et al., CVPR 2018, Section 3.1. Made for one channel; several channels are
    treated one-vs-rest. Not proper: the logits are margins; their sigmoid is not a probability. ``per_image`` is the
    authors' default.
    """

    activation = "sigmoid"

    def __init__(
        self,
        ignore_index: int = 255,
        classes: Classes = "present",
        per_image: bool = True,
        weight: Weights = None,
    ) -> None:
        super().__init__(ignore_index, classes, per_image, weight)

    def errors(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return max(0, 1 - margin)."""
        return (1 - (2 * truth - 1) * logits).relu()
