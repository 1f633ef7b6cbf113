"""DenseNets for dense prediction: torchvision's blocks with dilation, stem and last norm as arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock, _Transition

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


class DenseNet(Backbone):
    """A DenseNet without its classifier: features after transition1 to transition3 and after the last block.

    Paper: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017. Names are torchvision's,
    without its outer ``features.``.

    Args:
        name: densenet121, densenet161, densenet169 or densenet201.
        output_stride: 32, 16 or 8: the last one or two transitions do not pool, and the 3x3 convolutions of
            the blocks after them are dilated instead.
        stem: "torchvision" (7x7), or "unpadded", the published code's stem for networks without ImageNet
            weights: a 3x3 convolution with stride 2, then one 3x3 convolution *used twice with the same
            weights*, all without padding and each with BatchNorm and ReLU; images must be at least 15 x 15.
        last_norm: whether the last block's features pass the network's last BatchNorm and ReLU.
    """

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
        if name not in DENSENETS:
            raise ValueError(f"backbone must be one of {', '.join(DENSENETS)}, got {name!r}")
        if output_stride not in POOLS:
            raise ValueError(f"output_stride must be 32, 16 or 8, got {output_stride}")
        growth, layers, width = DENSENETS[name]
        self.stem = _stem(stem, in_channels, width)
        channels, strides, stride, dilation = [], [], 4, 1
        for i, (count, pool) in enumerate(zip(layers, (*POOLS[output_stride], None), strict=True), start=1):
            block = _DenseBlock(count, width, BOTTLENECK, growth, drop_rate=0)
            for layer in block.values():
                layer.conv2.padding = layer.conv2.dilation = (dilation, dilation)
            self.add_module(f"denseblock{i}", block)
            width += count * growth
            if pool is not None:
                transition = _Transition(width, width // 2)
                transition.pool = transition.pool if pool else nn.Identity()
                self.add_module(f"transition{i}", transition)
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
        x = self.get_submodule("denseblock4")(x)
        if self.norm5 is not None:
            x = F.relu(self.norm5(x))
        return [*features, x]


def _stem(kind: str, in_channels: int, width: int) -> nn.Sequential:
    pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    if kind == "torchvision":
        conv = nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True), pool)
    if kind == "unpadded":
        conv = nn.Conv2d(in_channels, width, kernel_size=3, stride=2, bias=False)
        first = (conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        shared = nn.Conv2d(width, width, kernel_size=3, bias=False)
        again = (shared, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        return nn.Sequential(*first, *again, *again, pool)  # the same three modules twice
    raise ValueError(f'stem must be "torchvision" or "unpadded", got {kind!r}')


def _from_torchvision_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate torchvision's names: no ``features.``, the stem's numbers, and ``norm1`` for old ``norm.1``."""
    renamed = {}
    for key, tensor in weights.items():
        key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key.removeprefix("features."))
        renamed[re.sub(r"^norm0\.", "stem.1.", re.sub(r"^conv0\.", "stem.0.", key))] = tensor
    return renamed
