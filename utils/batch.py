"""Batches of images and labels, and the normalization of the images on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """One batch as the loaders yield it.

    ``images``: uint8 ``(B, C, H, W)``, or float32 in [0, 1] for data with more than 8 bits.
    ``labels``: integers ``(B, H, W)``: class ids, or the ignore index.
    ``names``: one name per image (its file's stem). If the sizes in a batch differ, ``images`` and ``labels`` are lists
        of ``(C, H, W)`` and ``(H, W)``.
    """

    images: Tensor | list[Tensor]
    labels: Tensor | list[Tensor]
    names: list[str]


def equal_sizes(batch: Batch) -> Iterator[Batch]:
    """Yield ``batch`` as sub-batches of equal image size, so that no image is ever padded or resized."""
    if isinstance(batch.images, Tensor):
        yield batch
        return
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(batch.images):
        by_size.setdefault(tuple(image.shape), []).append(index)
    for members in by_size.values():
        yield Batch(
            torch.stack([batch.images[i] for i in members]),
            torch.stack([batch.labels[i] for i in members]),
            [batch.names[i] for i in members],
        )


class Normalize(nn.Module):
    """Normalize the images of a batch: ``(x - mean) / std`` in float32.

    Args:
        mean, std: per channel, for intensities in [0, 1].

    Accepts uint8 ``(B, C, H, W)`` in [0, 255] or floating point in [0, 1]; works on the input's device.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 ``(B, C, H, W)``."""
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        # One fused multiply-add per pixel: x / scale / std - mean / std.
        return torch.addcmul(-self.mean / self.std, images.float(), 1.0 / (scale * self.std))
