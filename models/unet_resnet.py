"""U-Net on a ResNet encoder.

Papers: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015
(https://arxiv.org/abs/1505.04597); He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from base.base_model import BaseModel
from models.backbones import resnet
from models.blocks import init_weights, resize_to


def conv(in_channels: int, out_channels: int, linear: bool = False) -> nn.Sequential:
    """Return a 3x3 convolution with BatchNorm and ReLU, or with neither (``linear``, the published form)."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=linear)
    return _activated(layer, linear)


def up_conv(in_channels: int, out_channels: int, linear: bool = False) -> nn.Sequential:
    """Return a transposed 4x4 convolution that doubles the map, with BatchNorm and ReLU unless ``linear``."""
    layer = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1, bias=False)
    return _activated(layer, linear)


class UNetResnet(BaseModel):
    """U-Net decoder on ResNet features; output stride 32; any input size; logits (B, num_classes, H, W)::

    image -> stem -> layer1 (1/4) -> layer2 (1/8) -> layer3 (1/16) -> layer4 (1/32) -> conv1, upconv1
                        |               |               `- concatenate (1/16) -> conv2, upconv2
                        |               `----------------- concatenate (1/8)  -> conv3, upconv3
                        `--------------------------------- concatenate (1/4)  -> conv4, upconv4
                                                                        (1/2) -> conv5, upconv5
                                                                        (1/1) -> conv6 -> conv7

    A map that doubling makes larger than its skip, because that was rounded up, is resized bilinearly. In training
    a batch of one needs more than 32 x 32 pixels (published: 8 x 8).

    Args:
        num_classes: output channels.
        in_channels: channels of the images.
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152.
        pretrained: ImageNet weights for the backbone: true (torchvision's), false, or a file's path.
        freeze_bn: BatchNorm keeps its running statistics.
        freeze_backbone: only the decoder is trained.
        published: the published departures: a decoder without any BatchNorm or ReLU (and a classifier without
            bias), on the dilated ResNet with output stride 8 and (50, 101, 152) the deep stem, of which torchvision
            has no weights. layer2 to layer4 then have one size, so that the first two up-convolutions enlarge
            what is shrunk again at once.

    Deviations from U-Net's paper: a ResNet instead of plain convolutions, padded convolutions, one convolution
    per step instead of two, narrower steps (192, 128, 96, 64, 48, 32), no skips at strides 1 and 2.
    """

    published_names = (
        (r"initial\.0\.", "backbone.conv1."),
        (r"initial\.1\.", "backbone.bn1."),
        (r"layer", "backbone.layer"),
        (r"((?:up)?conv[1-6])\.(?=weight|bias)", r"\1.0."),
    )

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: str = "resnet50",
        pretrained: bool | str = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
        published: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        deep = published and backbone not in ("resnet18", "resnet34")
        self.backbone = resnet(
            backbone,
            in_channels,
            pretrained,
            output_stride=8 if published else 32,
            stem="deep" if deep else "torchvision",
        )
        self.output_stride = self.backbone.strides[-1]
        c1, c2, c3, c4 = self.backbone.channels
        self.conv1 = conv(c4, 192, linear=published)
        self.upconv1 = up_conv(192, 128, linear=published)
        self.conv2 = conv(128 + c3, 128, linear=published)
        self.upconv2 = up_conv(128, 96, linear=published)
        self.conv3 = conv(96 + c2, 96, linear=published)
        self.upconv3 = up_conv(96, 64, linear=published)
        self.conv4 = conv(64 + c1, 64, linear=published)
        self.upconv4 = up_conv(64, 48, linear=published)
        self.conv5 = conv(48, 48, linear=published)
        self.upconv5 = up_conv(48, 32, linear=published)
        self.conv6 = conv(32, 32, linear=published)
        self.conv7 = nn.Conv2d(32, num_classes, kernel_size=1, bias=not published)
        init_weights(*(module for name, module in self.named_children() if name != "backbone"))
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W)."""
        f1, f2, f3, f4 = self.backbone(x)
        y = _join(self.upconv1(self.conv1(f4)), f3)
        y = _join(self.upconv2(self.conv2(y)), f2)
        y = _join(self.upconv3(self.conv3(y)), f1)
        y = self.upconv4(self.conv4(y))
        y = self.upconv5(self.conv5(y))
        y = resize_to(y, x, align_corners=True)
        return self.conv7(self.conv6(y))


def _join(x: Tensor, skip: Tensor) -> Tensor:
    return torch.cat([resize_to(x, skip, align_corners=True), skip], dim=1)


def _activated(layer: nn.Conv2d | nn.ConvTranspose2d, linear: bool) -> nn.Sequential:
    if linear:
        return nn.Sequential(layer)
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True))
