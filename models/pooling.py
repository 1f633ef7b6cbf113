"""Max-pooling that remembers where the maxima were, and its inverse (SegNet, SegResNet, ENet)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pool_with_indices(x: Tensor, ceil_mode: bool = False) -> tuple[Tensor, Tensor]:
    """Pool 2x2 windows of ``x`` (B, C, H, W) to their maxima.

    Args:
        x: feature maps.
        ceil_mode: an odd last row or column forms smaller windows; otherwise it is dropped.

    Returns:
        the maxima (B, C, h, w) and the position of each, int64 in [0, H * W), counted in rows of ``x``.
    """
    return F.max_pool2d(x, kernel_size=2, stride=2, ceil_mode=ceil_mode, return_indices=True)


def unpool(x: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Put the values of ``x`` (B, C, h, w) where ``indices`` (B, C, h, w) say; zero elsewhere.

    A scatter rather than ``max_unpool2d``: it also has an ONNX form, and where no index repeats (windows that
    do not overlap) it is deterministic on every device.

    Args:
        x: values.
        indices: positions in rows of the result, in [0, H * W), as :func:`pool_with_indices` gives them.
        size: (H, W) of the map that was pooled.

    Returns:
        the sparse map (B, C, H, W).
    """
    batch, channels = x.shape[:2]
    flat = x.new_zeros(batch, channels, size[0] * size[1])
    return flat.scatter(2, indices.flatten(2), x.flatten(2)).view(batch, channels, *size)
