"""VGG for dense prediction: its five stages, with or without their pooling."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from models.backbones.common import Backbone, ImageNetWeights, load_pretrained

#: torchvision's letter for each network's list of widths.
VGGS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}


class VGG(Backbone):
    """A VGG without its classifier: features after each of the five 2x2 max-poolings.

    Paper: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
    ICLR 2015. ``stages[i]`` are the convolutions before pooling i (so that SegNet can pool with indices by
    itself); ``forward`` pools after each. The height of feature map i is ``floor(H / 2^(i+1))`` as in torchvision, or
    rounded up with ``ceil_mode``.

    Args:
        name: vgg11, vgg13, vgg16 or vgg19, each also with "_bn".
        ceil_mode: pooling keeps a last odd row and column.
        first_padding: padding of the first convolution (100 in FCN).
    """

    channels = (64, 128, 256, 512, 512)
    strides = (2, 4, 8, 16, 32)

    def __init__(self, name: str, in_channels: int = 3, ceil_mode: bool = False, first_padding: int = 1) -> None:
        super().__init__()
        plain = name.removesuffix("_bn")
        layers = list(make_layers(cfgs[VGGS[plain]], batch_norm=name != plain))
        layers[0] = nn.Conv2d(in_channels, 64, kernel_size=3, padding=first_padding)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=ceil_mode)
        self.stages = nn.ModuleList()
        stage = nn.Sequential()
        for layer in layers:
            if isinstance(layer, nn.MaxPool2d):
                self.stages.append(stage)
                stage = nn.Sequential()
            else:
                stage.append(layer)
        for module in self.modules():  # as torchvision: He et al. 2015, fan out, bias 0
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features after each of the five poolings."""
        features = []
        for stage in self.stages:
            x = self.pool(stage(x))
            features.append(x)
        return features

    def from_torchvision(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return torchvision's weights (``features.0.weight`` ...) under the names here."""
        places = [
            f"stages.{s}.{i}." for s, stage in enumerate(self.stages) for i in range(len(list(stage.children())) + 1)
        ]
        return {re.sub(r"^features\.(\d+)\.", lambda m: places[int(m[1])], k): v for k, v in weights.items()}


def vgg(name: str, in_channels: int = 3, pretrained: bool | str = False) -> VGG:
    """Build a VGG backbone; ``pretrained`` as in :func:`models.backbones.common.load_pretrained`."""
    backbone = VGG(name, in_channels)
    rename = backbone.from_torchvision
    load_pretrained(backbone, pretrained, ImageNetWeights(name, "stages.0.0.weight", ("classifier.",), rename=rename))
    return backbone
