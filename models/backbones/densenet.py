"""DenseNets for dense prediction: torchvision's networks with dilation, stem and last norm as arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.common import Backbone, ImageNetWeights, load_pretrained
from models.blocks import untie_norms

#: Growth rate, layers per block, channels of the stem.
DENSENETS: dict[str, tuple[int, tuple[int, int, int, int], int]] = {
    "densenet121": (32, (6, 12, 24, 16), 64),
    "densenet161": (48, (6, 12, 36, 24), 96),
    "densenet169": (32, (6, 12, 32, 32), 64),
    "densenet201": (32, (6, 12, 48, 32), 64),
}
BOTTLENECK = 4  # a layer's 1x1 convolution makes this many times the growth rate
POOLS = {32: (True, True, True), 16: (True, True, False), 8: (True, False, False)}


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution, BatchNorm, ReLU, 3x3 convolution; its output joins its input."""

    def __init__(self, in_channels: int, growth: int, dilation: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, BOTTLENECK * growth, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=dilation, dilation=dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C + growth, h, w)."""
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return torch.cat([x, y], dim=1)


class DenseBlock(nn.Sequential):
    """Dense layers, each seeing the outputs of all before."""

    def __init__(self, in_channels: int, layers: int, growth: int, dilation: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(in_channels + i * growth, growth, dilation))


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution to half the channels, 2x2 average pooling (unless dilation replaces it)."""

    def __init__(self, in_channels: int, out_channels: int, pool: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C / 2, h / 2, w / 2), sizes rounded down, or (B, C / 2, h, w)."""
        return self.pool(self.conv(F.relu(self.norm(x))))


class DenseNet(Backbone):
    """A DenseNet without its classifier: features after transition1 to transition3 and after the last block.

    Paper: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017. Names are torchvision's,
    without its outer ``features.``.

    Args:
        name: densenet121, densenet161, densenet169 or densenet201.
        in_channels: channels of the images.
        pretrained: see :func:`models.backbones.common.load_pretrained`.
        output_stride: 32, 16 or 8: the last one or two transitions do not pool, and the 3x3 convolutions of
            the blocks after them are dilated instead.
        stem: "torchvision" (7x7), or "unpadded", the published code's stem for networks without ImageNet
            weights: a 3x3 convolution with stride 2, then one 3x3 convolution *used twice with the same
            weights*, all without padding and each with BatchNorm and ReLU; images must be at least 15 x 15.
        last_norm: whether the last block's features pass the network's last BatchNorm and ReLU.
    """

    denseblock4: DenseBlock

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        pretrained: bool | str = False,
        output_stride: int = 32,
        stem: str = "torchvision",
        last_norm: bool = True,
    ) -> None:
        super().__init__()
        growth, layers, width = DENSENETS[name]
        self.stem = _stem(stem, in_channels, width)
        channels, strides, stride, dilation = [], [], 4, 1
        for i, (count, pool) in enumerate(zip(layers, (*POOLS[output_stride], None), strict=True), start=1):
            self.add_module(f"denseblock{i}", DenseBlock(width, count, growth, dilation))
            width += count * growth
            if pool is not None:
                self.add_module(f"transition{i}", Transition(width, width // 2, pool))
                width //= 2
                stride, dilation = (stride * 2, dilation) if pool else (stride, dilation * 2)
            channels.append(width)
            strides.append(stride)
        self.norm5 = nn.BatchNorm2d(width) if last_norm else None
        self.channels, self.strides = tuple(channels), tuple(strides)
        for module in self.modules():  # as torchvision
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        unpadded = stem == "unpadded"
        if unpadded:
            self.register_load_state_dict_pre_hook(untie_norms)
        weights = ImageNetWeights(
            name + (" with the unpadded stem" if unpadded else ""),
            first_conv="stem.0.weight",
            ignore=("classifier.",) if last_norm else ("classifier.", "norm5."),
            in_torchvision=not unpadded,
            rename=_from_torchvision_names,
        )
        load_pretrained(self, pretrained, weights)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features after transition1, 2, 3 and after the last block (sizes rounded down)."""
        x, features = self.stem(x), []
        for i in (1, 2, 3):
            x = getattr(self, f"denseblock{i}")(x)
            x = getattr(self, f"transition{i}")(x)
            features.append(x)
        x = self.denseblock4(x)
        if self.norm5 is not None:
            x = F.relu(self.norm5(x))
        return [*features, x]


def _stem(kind: str, in_channels: int, width: int) -> nn.Sequential:
    pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    if kind == "torchvision":
        conv = nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True), pool)
    conv = nn.Conv2d(in_channels, width, kernel_size=3, stride=2, bias=False)
    first = (conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    shared = nn.Conv2d(width, width, kernel_size=3, bias=False)
    again = (shared, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return nn.Sequential(*first, *again, *again, pool)  # the same three modules twice


def _from_torchvision_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate torchvision's names: no ``features.``, the stem's numbers, and ``norm1`` for old ``norm.1``."""
    renamed = {}
    for key, tensor in weights.items():
        key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key.removeprefix("features."))
        renamed[re.sub(r"^norm0\.", "stem.1.", re.sub(r"^conv0\.", "stem.0.", key))] = tensor
    return renamed
