"""The base of all losses: ignored pixels, dtype, class weights, one-hot labels. See :mod:`utils.losses`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from utils.bounds import NonNegative

Weights = list[NonNegative] | Literal["balanced"] | None
Classes = Literal["all", "present"]


class SegmentationLoss(nn.Module):
    """Base of all losses: removes ignored pixels, chooses the dtype, checks shapes.

    Subclasses implement :meth:`compute`, whose inputs are checked already.

    Args:
        ignore_index: pixels with this label are ignored.
    """

    proper: bool = False
    # Not proper, but outputs still increase with the probabilities, and a temperature corrects most of the difference.
    nearly_proper: bool = False
    activation: Literal["softmax", "sigmoid"] = "softmax"

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a float32 (float64 for float64 logits) scalar.

        Args:
            logits: floating point ``(B, C, H, W)``; any number of spatial axes.
            target: integers ``(B, H, W)`` in [0, max(C, 2)) or ``ignore_index``.

        Raises:
            ValueError: the shapes do not match, or ``target`` does not contain integers.
        """
        expected = (logits.shape[0], *logits.shape[2:])
        if target.shape != expected:
            raise ValueError(
                f"target has the shape {tuple(target.shape)}; logits {tuple(logits.shape)} need {expected}"
            )
        if target.is_floating_point():
            raise ValueError(f"target has the type {target.dtype}; expected integer class ids")
        target = target.flatten(1)
        valid = target != self.ignore_index  # (B, N)
        # Replace ignored logits instead of masking the result: 0 * nan would be nan in the backward pass.
        clean = logits.flatten(2).masked_fill(~valid.unsqueeze(1), 0.0)  # (B, C, N)
        clean = clean if clean.dtype == torch.float64 else clean.float()
        return self.compute(clean, target.long().masked_fill(~valid, 0), valid)

    def compute(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of float logits ``(B, C, N)``, int64 labels ``(B, N)``, bool ``valid`` ``(B, N)``.

        Logits and labels of invalid pixels are 0.
        """
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities for logits trained with this loss, of the shape of ``logits``."""
        if self.activation == "sigmoid" or logits.shape[1] == 1:
            return logits.sigmoid()
        return logits.softmax(1)


def weight_buffer(loss: nn.Module, name: str, weight: Weights) -> None:
    """Check class weights, and register them on ``loss`` as a buffer that is not saved."""
    if weight is None:
        loss.register_buffer(name, None)
        return
    if weight == "balanced":
        raise ValueError(f"{name} is 'balanced'; replace it with the data set's weights before building the loss")
    values = torch.as_tensor(weight, dtype=torch.float64)
    if not values.any():
        raise ValueError(f"{name} is {weight}: zero for every class")
    loss.register_buffer(name, values, persistent=False)


def weight_for(weight: Tensor, logits: Tensor, count: int, name: str = "weight") -> Tensor:
    """Return ``weight`` with the dtype and device of ``logits``; raise unless it has ``count`` entries."""
    if len(weight) != count:
        pair = " (background, class)" if logits.shape[1] == 1 and count == 2 else ""
        raise ValueError(f"{name} has {len(weight)} entries; logits with {logits.shape[1]} channels need {count}{pair}")
    return weight.to(logits)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean; 0 where all weights are 0."""
    return (values * weights).sum() / positive(weights.sum())


def positive(total: Tensor) -> Tensor:
    """Return a sum of non-negative numbers as a divisor for which 0 / 0 is 0."""
    return total.clamp_min(torch.finfo(total.dtype).tiny)


def one_hot(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return ``target`` as 0/1 of the dtype and shape ``(B, C, N)`` of ``logits``, 0 at invalid pixels.

    One channel: 1 where the label is 1. A label out of range raises an index error.
    """
    channels = logits.shape[1]
    code = logits.new_zeros(len(logits), max(channels, 2), logits.shape[2])
    code.scatter_(1, target.unsqueeze(1), valid.unsqueeze(1).to(code.dtype))
    return code if channels > 1 else code[:, 1:]
