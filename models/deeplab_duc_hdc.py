"""Hybrid dilated convolution and dense upsampling: Wang, Chen, Yuan, Liu, Huang, Hou, Cottrell,
"Understanding Convolution for Semantic Segmentation", WACV 2018 (https://arxiv.org/abs/1702.08502).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel
from models.backbones.resnet import RESNETS, ResNet
from models.blocks import ASPP, SkipDecoder, init_weights
from models.upstream import names

#: Atrous rates of the paper's pyramid, and of the published one.
RATES, PUBLISHED_RATES = (6, 12, 18, 24), (6, 12, 18, 24, 36)


def hybrid_dilations(backbone: str) -> tuple[tuple[int, ...], ...]:
    """Return the dilations for every block of a ResNet: those that the paper calls "Dilation-RF".

    Stage 3 repeats 1, 2, 3, so that the holes of one dilation are filled by the others; blocks left over
    have 2. Stage 4 goes on with 3, 4, 5. The published code has the same. The paper's best variant, "Dilation-bigger",
    repeats 1, 2, 5, 9 and goes on with 5, 9, 17.
    """
    (n1, n2, n3, n4), _ = RESNETS[backbone]
    return (1,) * n1, (1,) * n2, (1, 2, 3) * (n3 // 3) + (2,) * (n3 % 3), tuple(range(3, 3 + n4))


class DUC(nn.Sequential):
    """The published dense upsampling: 1x1 convolution to ``factor ** 2`` times the channels, BatchNorm, ReLU, and
    pixel shuffle.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels * factor**2, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels * factor**2),
            nn.ReLU(inplace=True),
            nn.PixelShuffle(factor),
        )


def start_smooth(conv: nn.Module, factor: int) -> None:
    """Give the fine positions of a coarse one equal weights: no checkerboard at first (Aitken et al. 2017)."""
    assert isinstance(conv, nn.Conv2d)
    conv.weight.data = conv.weight.data[:: factor**2].repeat_interleave(factor**2, dim=0)


class DeepLab_DUC_HDC(BaseModel):  # noqa: N801 (the name that configs use)
    """DeepLabv2 with hybrid dilations and dense upsampling; any input size; logits (B, num_classes, H, W)::

        image -> ResNet (HDC, stride 8) -> 3x3 convs with dilations 6, 12, 18, 24, added up -> pixel shuffle x8

    Each 3x3 convolution predicts the 64 pixels of its position for all classes, so its width grows with the classes.
    Maps of rounded-up sizes are cropped at the bottom and right, never resized. Departures from the authors' program:
    the dilations (:func:`hybrid_dilations`), and torchvision's stem, one 7x7 convolution instead of three 3x3.

    ``published=True`` gives the published code's function, another network, which has ASPP and decoder of DeepLabv3+::

        image -> ResNet (HDC, stride 8) -> ASPP -> DUC x2 -> [low, ASPP] -> two 3x3 convs -> classifier -> DUC x4
                  `-> features (stride 4) -> 1x1 conv, 48 ----^

    Its last DUC ends in a ReLU, so that logits are never negative, and has the factor 4 at every output stride.

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152.
        output_stride: of the features: 8, or 4 (the stem keeps the resolution, about four times the work).
    """

    align_corners = True
    published_mark = "DUC_out.conv.weight"
    published_classifier = ("decoder.output.7.weight", 0)
    published_names = (
        (r"DUC_out\.conv\.", "upsample.0."),
        (r"DUC_out\.bn\.", "upsample.1."),
        (r"decoder\.DUC\.conv\.", "duc.0."),
        (r"decoder\.DUC\.bn\.", "duc.1."),
        *names.RESNET_NAMES,
        *names.ASPP_NAMES,
        *names.SKIP_DECODER_NAMES,
    )
    backbone: ResNet

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet101",
        pretrained: bool | str = False,
        output_stride: Literal[8, 4] = 8,
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        self.output_stride = output_stride
        dilations, stem_stride = hybrid_dilations(backbone), output_stride // 4
        self.backbone = ResNet(backbone, in_channels, pretrained, 8, dilations, stem_stride=stem_stride)
        low, *_, high = self.backbone.channels
        if published:
            self.aspp = ASPP(high, PUBLISHED_RATES)
            self.duc = DUC(256, 256, factor=2)
            self.decoder = SkipDecoder(low, 256, num_classes)
            self.upsample = DUC(num_classes, num_classes, factor=4)
            init_weights(self.aspp, self.duc, self.decoder, self.upsample)
            start_smooth(self.duc[0], 2)
            start_smooth(self.upsample[0], 4)
        else:
            outputs = num_classes * output_stride**2
            self.dense = nn.ModuleList(nn.Conv2d(high, outputs, 3, padding=r, dilation=r) for r in RATES)
            init_weights(self.dense)
            for conv in self.dense:
                start_smooth(conv, output_stride)
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits at the input's size (twice that, in published form at output stride 4)."""
        low, *_, features = self.backbone(x)
        if not self.published:
            scores = sum(conv(features) for conv in self.dense)
            return F.pixel_shuffle(scores, self.output_stride)[..., : x.shape[-2], : x.shape[-1]]
        fine = self.duc(self.aspp(features))[..., : low.shape[-2], : low.shape[-1]]
        logits = self.upsample(self.decoder(low, fine))
        scale = 4 // self.backbone.strides[0]
        return logits[..., : x.shape[-2] * scale, : x.shape[-1] * scale]
