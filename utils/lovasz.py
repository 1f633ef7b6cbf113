"""The Lovász extension of the Jaccard loss, the part that LovaszSoftmax and LovaszHinge share.

Source: Berman, Rannen Triki & Blaschko, *The Lovász-Softmax loss*, CVPR 2018 (arXiv 1705.08790), Section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def jaccard_gradient(errors: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the gradient of the Lovász extension of the Jaccard loss with respect to ``errors``.

    Args:
        errors: floating point ``(R, N)``: R rows of N pixels; finite, larger is worse.
        truth: bool ``(R, N)``, the pixels of the class.
        valid: bool ``(R, N)``; the other pixels take no part.

    Returns:
        ``(R, N)`` of the dtype of ``errors``, >= 0, 0 where invalid. The extension is piecewise linear, so its
        value is ``(errors * gradient).sum(-1)`` for errors >= 0, and no sorting has to be remembered for the
        backward pass.

    Going through the pixels from the largest error down and making each of them wrong in turn, the Jaccard
    index falls from 1 to 0 as intersection / union changes (equation 9). The falls are computed in closed form:
    as differences of neighbouring indices, which are about 1 / N, they would lose their digits in float32 once
    a row has a million pixels.
    """
    order = errors.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True)
    foreground = (truth & valid).gather(-1, order)  # (R, N), invalid pixels are at the end
    size = foreground.sum(-1, keepdim=True)  # (R, 1) pixels of the class
    hits = foreground.cumsum(-1)
    rank = torch.arange(1, errors.shape[-1] + 1, device=errors.device)
    intersection = (size - hits).to(errors.dtype)
    union = (size + rank - hits).to(errors.dtype)
    # A missed pixel of the class takes one from the intersection; a false alarm adds one to the union.
    fall = torch.where(foreground, 1.0 / union, intersection / (union * (union - 1).clamp_min(1.0)))
    # A row without the class: the first false alarm takes the index from 1 (by convention) to 0.
    fall = torch.where(size == 0, (rank == 1).to(errors.dtype), fall)
    return torch.zeros_like(errors).scatter_(-1, order, fall).masked_fill_(~valid, 0.0)


def lovasz_extension(errors: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the Lovász extension of the Jaccard loss, ``(R,)``, for non-negative ``errors`` ``(R, N)``.

    For errors in {0, 1} it is 1 - intersection / union of the class's pixels and the predicted ones.
    """
    return (errors * jaccard_gradient(errors.detach(), truth, valid)).sum(-1)
