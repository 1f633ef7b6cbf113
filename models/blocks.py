"""What two or more networks share. Shapes: (B, C, h, w), float."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from base.base_model import resize_to

__all__ = [
    "ASPP",
    "ConvBNReLU",
    "FCNHead",
    "PooledBatchNorm2d",
    "PyramidPooling",
    "SkipDecoder",
    "init_weights",
    "resize_to",
    "untie_norms",
]


class PooledBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm for globally pooled maps: one value per channel and image.

    In training with a single image there is one value per channel and no variance, so ``BatchNorm2d`` raises. Here the
    running statistics normalize such a batch, as in evaluation, and do not change.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, h, w)."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU; the padding keeps the size (divided by the stride, rounded up)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        norm: type[nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding=dilation * (kernel_size // 2),
                dilation=dilation,
                bias=False,
            ),
            norm(out_channels),
            nn.ReLU(inplace=True),
        )


class SeparableBNReLU(nn.Sequential):
    """Depthwise 3x3 and pointwise convolution, each with BatchNorm and ReLU; the size stays."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            *ConvBNReLU(in_channels, out_channels, kernel_size=1),
        )


class PyramidPooling(nn.Module):
    """Pyramid pooling module (Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, figure 3c).

    The features and their averages over b x b bins, each reduced to 1 / len(bins) of the channels and resized
    back, are concatenated and fused by a 3x3 convolution.

    Args:
        in_channels: C.
        bins: b of each branch.
        out_channels: channels after the fusion.
        align_corners: how the averages are resized back.
    """

    def __init__(self, in_channels: int, bins: Sequence[int], out_channels: int, align_corners: bool = True) -> None:
        super().__init__()
        self.align_corners = align_corners
        width = in_channels // len(bins)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(b), ConvBNReLU(in_channels, width, kernel_size=1, norm=PooledBatchNorm2d)
            )
            for b in bins
        )
        self.fuse = ConvBNReLU(in_channels + width * len(bins), out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h, w)."""
        pooled = [resize_to(branch(x), x, self.align_corners) for branch in self.branches]
        return self.fuse(torch.cat([x, *pooled], dim=1))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with image pooling (Chen et al., arXiv:1706.05587, figure 5).

    A 1x1 branch, one 3x3 branch per rate, and the image's average; concatenated in this order and fused by
    a 1x1 convolution. The 3x3 convolutions may be depthwise separable (arXiv:1802.02611, section 3.1).
    """

    def __init__(self, in_channels: int, rates: Sequence[int], separable: bool = False) -> None:
        super().__init__()
        out_channels = 256
        atrous = SeparableBNReLU if separable else ConvBNReLU
        self.branches = nn.ModuleList(
            [
                ConvBNReLU(in_channels, out_channels, kernel_size=1),
                *(atrous(in_channels, out_channels, dilation=rate) for rate in rates),
            ]
        )
        self.image_pooling = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            ConvBNReLU(in_channels, out_channels, kernel_size=1, norm=PooledBatchNorm2d),
        )
        self.fuse = ConvBNReLU((len(self.branches) + 1) * out_channels, out_channels, kernel_size=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, 256, h, w)."""
        image = resize_to(self.image_pooling(x), x, align_corners=True)
        branches = [branch(x) for branch in self.branches]
        return self.dropout(self.fuse(torch.cat([*branches, image], dim=1)))


class FCNHead(nn.Sequential):
    """A small classifier on one feature map: 3x3 convolution, BatchNorm, ReLU, dropout, 1x1 convolution."""

    def __init__(self, in_channels: int, hidden_channels: int, num_classes: int) -> None:
        super().__init__(
            ConvBNReLU(in_channels, hidden_channels),
            nn.Dropout2d(0.1),
            nn.Conv2d(hidden_channels, num_classes, kernel_size=1),
        )


class SkipDecoder(nn.Module):
    """DeepLabv3+'s decoder (Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018,
    figure 2).

    The low-level features, reduced to 48 channels, and the coarse ones at the same resolution are
    concatenated, refined by two 3x3 convolutions, which may be depthwise separable, and classified.
    """

    def __init__(self, low_channels: int, in_channels: int, num_classes: int, separable: bool = False) -> None:
        super().__init__()
        width, layer = 256, SeparableBNReLU if separable else ConvBNReLU
        self.reduce_low = ConvBNReLU(low_channels, 48, kernel_size=1)
        self.refine = nn.Sequential(layer(48 + in_channels, width), layer(width, width), nn.Dropout(0.1))
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, low: Tensor, x: Tensor) -> Tensor:
        """Map (B, low_channels, h, w) and (B, in_channels, h', w') to logits (B, num_classes, h, w)."""
        x = resize_to(x, low, align_corners=True)
        return self.classifier(self.refine(torch.cat([self.reduce_low(low), x], dim=1)))


def untie_norms(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before loading: where the model uses one BatchNorm at two places, and the weights contain different values for
    them, give the second place its own.

    Such checkpoints come from runs with synchronized BatchNorm, which converted each use separately.
    """
    first_name: dict[nn.Module, str] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, _BatchNorm):
            continue
        first = first_name.setdefault(module, name)
        pairs = [[state_dict.get(f"{prefix}{n}.{key}") for n in (first, name)] for key in module.state_dict()]
        if any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, copy.deepcopy(module))


def init_weights(*modules: nn.Module, nonlinearity: Literal["relu", "linear"] = "relu") -> None:
    """Initialize new layers (never a backbone): He et al. 2015 (normal, fan in) for convolutions, bias 0.

    BatchNorm begins as the identity. ``nonlinearity``: what follows the convolutions, "relu" or "linear".
    """
    for module in chain.from_iterable(m.modules() for m in modules):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity=nonlinearity)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _BatchNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
