"""U-Net on a classifier's encoder.

Papers: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015
(https://arxiv.org/abs/1505.04597); He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from base.base_model import BaseModel
from models.backbones import Needs, encoder
from models.blocks import init_weights, resize_to
from models.upstream import names

#: Channels of the decoder's convolutions, from the deepest on; the last is the classifier's input.
WIDTHS = (192, 128, 96, 64, 48, 32)


def conv(in_channels: int, out_channels: int, linear: bool = False) -> nn.Sequential:
    """Return a 3x3 convolution with BatchNorm and ReLU, or with neither (``linear``, the published form)."""
    return _activated(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=linear), linear)


def up_conv(in_channels: int, out_channels: int, linear: bool = False) -> nn.Sequential:
    """Return a transposed 4x4 convolution that doubles the map, with BatchNorm and ReLU unless ``linear``."""
    layer = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1, bias=False)
    return _activated(layer, linear)


class UNetResnet(BaseModel):
    """U-Net decoder on an encoder's features; any input size; logits (B, num_classes, H, W). On a ResNet (stride 32)::

        image -> stem -> layer1 (1/4) -> layer2 (1/8) -> layer3 (1/16) -> layer4 (1/32) -> conv1, upconv1
                            |               |               `- concatenate (1/16) -> conv2, upconv2
                            |               `----------------- concatenate (1/8)  -> conv3, upconv3
                            `--------------------------------- concatenate (1/4)  -> conv4, upconv4
                                                                            (1/2) -> conv5, upconv5
                                                                            (1/1) -> conv6 -> conv7

    An encoder of timm may also have features at strides 2 and 1, which are concatenated there. Its decoder has as many
    steps as the encoder's stride has doublings.

    A map that doubling makes larger than its skip, because that was rounded up, is resized bilinearly. In training
    a batch of one needs more than 32 x 32 pixels (published: 8 x 8).

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101, resnet152, or timm:NAME.
        published: as in the predecessors' code, a decoder without any BatchNorm or ReLU (and a classifier without
            bias), on the dilated ResNet with output stride 8 and (50, 101, 152) the deep stem, of which torchvision has
            no weights. layer2 to layer4 then have one size, so that the results of the first two up-convolutions are
            resized back.

    Deviations from U-Net's paper: a ResNet instead of plain convolutions, padded convolutions, one convolution
    per step instead of two, narrower steps (192, 128, 96, 64, 48, 32); on a ResNet no skips at strides 1 and 2.
    """

    published_mark = "upconv5.weight"
    published_classifier = ("conv7.weight", 0)
    published_names = (*names.RESNET_PARTS, (r"((?:up)?conv[1-6])\.(?=weight|bias)", r"\1.0."))

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: str = "resnet50",
        pretrained: bool | str = False,
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        deep = published and backbone not in ("resnet18", "resnet34")
        needs = Needs(8 if published else 32, finest=1, stem="deep" if deep else "torchvision", published=published)
        self.backbone = encoder(backbone, in_channels, pretrained, needs)
        self.output_stride = self.backbone.strides[-1]
        self.skips = _skips(self.backbone.strides, published)
        widths = WIDTHS[-len(self.skips) - 1 :]
        channels = self.backbone.channels[-1]
        for i, skip in enumerate(self.skips):
            self.add_module(f"conv{i + 1}", conv(channels, widths[i], linear=published))
            self.add_module(f"upconv{i + 1}", up_conv(widths[i], widths[i + 1], linear=published))
            channels = widths[i + 1] + (0 if skip is None else self.backbone.channels[skip])
        self.conv6 = conv(channels, WIDTHS[-1], linear=published)
        self.conv7 = nn.Conv2d(WIDTHS[-1], num_classes, kernel_size=1, bias=not published)
        init_weights(*(module for name, module in self.named_children() if name != "backbone"))
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W)."""
        features = self.backbone(x)
        y = features[-1]
        for i, skip in enumerate(self.skips, start=1):
            y = getattr(self, f"upconv{i}")(getattr(self, f"conv{i}")(y))
            if skip is not None:
                y = torch.cat([resize_to(y, features[skip], align_corners=True), features[skip]], dim=1)
        y = resize_to(y, x, align_corners=True)
        return self.conv7(self.conv6(y))


def _skips(strides: tuple[int, ...], published: bool) -> tuple[int | None, ...]:
    """Return, for each step that doubles the resolution, which feature map is concatenated after it."""
    if published:
        return (2, 1, 0, None, None)
    *finer, deepest = strides
    steps = math.ceil(math.log2(deepest))
    index = {stride: i for i, stride in enumerate(finer)}  # the last one of each stride
    return tuple(index.get(deepest / 2**step) for step in range(1, steps + 1))


def _activated(layer: nn.Conv2d | nn.ConvTranspose2d, linear: bool) -> nn.Sequential:
    if linear:
        return nn.Sequential(layer)
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True))
