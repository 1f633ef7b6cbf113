"""Max-pooling that remembers where the maxima were, and its inverse (SegNet, SegResNet, ENet)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pool_with_indices(x: Tensor, ceil_mode: bool = False) -> tuple[Tensor, Tensor]:
    """Return the maxima (B, C, h, w) of the 2x2 windows of ``x`` (B, C, H, W), and the position of each.

    Positions are int64 in [0, H * W), row by row. An odd last row or column is dropped, or with ``ceil_mode`` forms
    smaller windows.
    """
    return F.max_pool2d(x, kernel_size=2, stride=2, ceil_mode=ceil_mode, return_indices=True)


def unpool(x: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (B, C, *size) with the values of ``x`` (B, C, h, w) at the positions ``indices``, and zero elsewhere.

    Unlike ``max_unpool2d``, a scatter has an ONNX form, and is deterministic on every device if no index repeats
    (windows that do not overlap).
    """
    batch, channels = x.shape[:2]
    flat = x.new_zeros(batch, channels, size[0] * size[1])
    return flat.scatter(2, indices.flatten(2), x.flatten(2)).view(batch, channels, *size)
