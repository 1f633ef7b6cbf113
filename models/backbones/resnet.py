"""ResNets for dense prediction: torchvision's blocks; stem, output stride and dilations are arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3

from models.backbones.common import Backbone, ImageNetWeights, load_pretrained

#: Blocks per stage, and whether they are bottlenecks.
RESNETS: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
STRIDES = {32: (1, 2, 2, 2), 16: (1, 2, 2, 1), 8: (1, 2, 1, 1)}
WIDTHS = (64, 128, 256, 512)
#: Dilations per output stride where all blocks of a stage share theirs (DeepLab, UperNet).
WHOLE_STAGES = {32: (1, 1, 1, 1), 16: (1, 1, 1, 2), 8: (1, 1, 2, 4)}

#: Per stage: one dilation for all its blocks, or one per block.
Dilations = Sequence[int | Sequence[int]]


class DilatedBasicBlock(BasicBlock):
    """torchvision's basic block with dilations, which the original refuses."""

    def __init__(
        self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, first: int, dilation: int
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample)
        self.conv1 = conv3x3(inplanes, planes, stride, dilation=first)
        self.conv2 = conv3x3(planes, planes, dilation=dilation)


class ResNet(Backbone):
    """A ResNet without its classifier: features of the four stages. Names are torchvision's.

    Paper: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (with torchvision's stride
    on the 3x3 convolution of a bottleneck).

    Args:
        name: resnet18, resnet34, resnet50, resnet101 or resnet152.
        output_stride: 32, 16 or 8: the last one or two stages keep their resolution.
        dilations: per stage one number for all its 3x3 convolutions, or one per block. By default each
            stage that lost its stride doubles the dilation, and (as in torchvision's
            ``replace_stride_with_dilation``) the first 3x3 of its first block keeps the dilation of the
            stage before.
        stem: "torchvision" (7x7), or "deep": three 3x3 convolutions, as in PSPNet.
        stem_stride: 2, or 1 to double the resolution of all features.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        pretrained: bool | str = False,
        output_stride: int = 32,
        dilations: Dilations | None = None,
        stem: str = "torchvision",
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"backbone must be one of {', '.join(RESNETS)}, or timm:NAME, got {name!r}")
        blocks, bottleneck = RESNETS[name]
        expansion = Bottleneck.expansion if bottleneck else BasicBlock.expansion
        self.bottleneck = bottleneck
        self.channels = tuple(width * expansion for width in WIDTHS)
        strides = STRIDES[output_stride]

        self.conv1, width = _stem(stem, in_channels, stem_stride)
        self.stem_channels = width
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        stage_strides, stride = [], 2 * stem_stride
        for i, schedule in enumerate(_schedules(blocks, strides, dilations)):
            self.add_module(f"layer{i + 1}", self._stage(width, WIDTHS[i], strides[i], schedule))
            width, stride = self.channels[i], stride * strides[i]
            stage_strides.append(stride)
        self.strides = tuple(stage_strides)
        for module in self.modules():  # as torchvision: He et al. 2015, fan out
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        deep = stem == "deep"
        kind, first_conv = (f"{name} with the deep stem", "conv1.0.weight") if deep else (name, "conv1.weight")
        load_pretrained(self, pretrained, ImageNetWeights(kind, first_conv, ("fc.",), in_torchvision=not deep))

    def _stage(self, inplanes: int, planes: int, stride: int, schedule: list[tuple[int, int]]) -> nn.Sequential:
        """Build one stage; ``schedule`` contains (dilation of the first 3x3, of the others) per block."""
        outplanes = planes * (Bottleneck.expansion if self.bottleneck else BasicBlock.expansion)
        blocks: list[nn.Module] = []
        for first, dilation in schedule:
            downsample = None
            if stride != 1 or inplanes != outplanes:
                downsample = nn.Sequential(conv1x1(inplanes, outplanes, stride), nn.BatchNorm2d(outplanes))
            if self.bottleneck:
                blocks.append(Bottleneck(inplanes, planes, stride, downsample, dilation=first))
            else:
                blocks.append(DilatedBasicBlock(inplanes, planes, stride, downsample, first, dilation))
            inplanes, stride = outplanes, 1
        return nn.Sequential(*blocks)

    def stem(self, x: Tensor) -> Tensor:
        """Return the features (B, stem_channels, H / 2, W / 2) that the max-pooling would take."""
        return self.relu(self.bn1(self.conv1(x)))

    def stages(self, x: Tensor) -> list[Tensor]:
        """Return the four stages' features from the pooled stem."""
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of layer1 to layer4."""
        return self.stages(self.maxpool(self.stem(x)))


def _stem(kind: str, in_channels: int, stride: int) -> tuple[nn.Module, int]:
    if kind == "torchvision":
        return nn.Conv2d(in_channels, 64, kernel_size=7, stride=stride, padding=3, bias=False), 64
    first = (conv3x3(in_channels, 64, stride), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    second = (conv3x3(64, 64), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    return nn.Sequential(*first, *second, conv3x3(64, 128)), 128


def _schedules(
    blocks: Sequence[int], strides: Sequence[int], dilations: Dilations | None
) -> list[list[tuple[int, int]]]:
    """Return, per stage and block, the dilations of the first 3x3 convolution and of the others."""
    if dilations is None:
        schedules, dilation = [], 1
        for i, count in enumerate(blocks):
            before = dilation
            if i > 0 and strides[i] == 1:  # this stage lost its stride
                dilation *= 2
            schedules.append([(before, dilation)] + [(dilation, dilation)] * (count - 1))
        return schedules
    per_stage = zip(blocks, dilations, strict=True)
    return [[(d, d) for d in ([given] * count if isinstance(given, int) else given)] for count, given in per_stage]
