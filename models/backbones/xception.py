"""The Xception of DeepLabv3+, which torchvision does not have."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.common import Backbone, ImageNetWeights, load_pretrained

MIDDLE_BLOCKS = range(4, 20)


class SeparableConv(nn.Module):
    """Depthwise 3x3 convolution, BatchNorm, ReLU (unless ``relu=False``), 1x1 convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, padding=dilation, dilation=dilation, groups=in_channels, bias=False
        )
        self.bn = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h / stride, w / stride)."""
        return self.pointwise(self.relu(self.bn(self.depthwise(x))))


class XceptionBlock(nn.Module):
    """Three times [ReLU, separable convolution, BatchNorm], the last with the stride, and a shortcut around them.

    Args:
        leading_relu: whether the first separable convolution has its ReLU.
        widen_first: whether the first separable convolution changes the channels, or the second.
        published: as in the predecessors' code, no ReLU after depthwise convolutions, and a leading ReLU that works in
            place, so that the shortcut also receives the rectified input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        leading_relu: bool = True,
        widen_first: bool = True,
        published: bool = False,
    ) -> None:
        super().__init__()
        separable = partial(SeparableConv, dilation=dilation, relu=not published)
        middle = out_channels if widen_first else in_channels
        self.body = nn.Sequential(
            *([nn.ReLU()] if leading_relu else []),  # not in place: the shortcut reads the same tensor
            separable(in_channels, middle),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            separable(middle, out_channels),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            separable(out_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        self.relu_before_shortcut = published and leading_relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h / stride, w / stride)."""
        if self.relu_before_shortcut:
            x = F.relu(x)
        return self.body(x) + self.shortcut(x)


class Xception(Backbone):
    """The "aligned" Xception: strided separable convolutions instead of pooling, BatchNorm and ReLU after each
    depthwise one.

    Papers: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017; Chen et al.,
    "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018, figure 4.
    ``pretrained`` takes a file only (see :func:`models.backbones.common.load_pretrained`).
    Features: the first block's (128 channels, stride 4) and the last convolution's (2048, the output stride).

    ``published=True`` computes the same as the predecessors' code: no ReLU after depthwise convolutions, shortcuts
    receive rectified inputs (except that of block1), and the second convolution has no ReLU.
    """

    channels = (128, 2048)

    def __init__(
        self, in_channels: int = 3, pretrained: bool | str = False, output_stride: int = 16, published: bool = False
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise ValueError(f"output_stride must be 16 or 8 for xception, got {output_stride}")
        self.strides = (4, output_stride)
        stride3, dilation, exit_dilation = (2, 1, 2) if output_stride == 16 else (1, 2, 4)
        self.published = published

        block = partial(XceptionBlock, published=published)
        separable = partial(SeparableConv, dilation=exit_dilation, relu=not published)

        self.conv1 = nn.Conv2d(in_channels, 32, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.block1 = block(64, 128, stride=2, leading_relu=False)
        self.block2 = block(128, 256, stride=2)
        self.block3 = block(256, 728, stride=stride3)
        for i in MIDDLE_BLOCKS:
            self.add_module(f"block{i}", block(728, 728, dilation=dilation))
        self.block20 = block(728, 1024, dilation=dilation, widen_first=False)
        self.conv3 = separable(1024, 1536)
        self.bn3 = nn.BatchNorm2d(1536)
        self.conv4 = separable(1536, 1536)
        self.bn4 = nn.BatchNorm2d(1536)
        self.conv5 = separable(1536, 2048)
        self.bn5 = nn.BatchNorm2d(2048)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        load_pretrained(self, pretrained, ImageNetWeights("xception", "conv1.weight", in_torchvision=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return [low-level features (B, 128, H / 4, W / 4), features (B, 2048, H / os, W / os)]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        low = self.block1(x if self.published else F.relu(x))
        x = self.block3(self.block2(low))
        for i in MIDDLE_BLOCKS:
            x = getattr(self, f"block{i}")(x)
        x = F.relu(self.block20(x))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        return [low, F.relu(self.bn5(self.conv5(x)))]
