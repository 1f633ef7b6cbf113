"""SegResNet: SegNet's decoder, which undoes the encoder's pooling, with a ResNet for encoder.

Papers: Badrinarayanan, Kendall, Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", PAMI 2017 (https://arxiv.org/abs/1511.00561); He, Zhang, Ren, Sun, "Deep Residual Learning for Image
Recognition", CVPR 2016.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel
from models.backbones.resnet import RESNETS, ResNet
from models.blocks import init_weights
from models.pooling import pool_with_indices, unpool


class Bottleneck(nn.Module):
    """A residual bottleneck, (B, in, h, w) -> (B, out, h, w), or (B, out, 2h, 2w) with ``upsample``.

    The inner width is a quarter of ``in_channels``. With ``upsample`` the middle convolution is a transposed 2x2
    one, and so is the shortcut. A shortcut that only changes the channels is a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, upsample: bool = False) -> None:
        super().__init__()
        width = in_channels // 4
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2: nn.Module
        shortcut: nn.Module
        if upsample:
            self.conv2 = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2, bias=False)
            shortcut = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2, bias=False)
        else:
            self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
            shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        same = in_channels == out_channels and not upsample
        self.downsample = None if same else nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + three convolutions of x)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def decoder_stage(blocks: int, in_channels: int, out_channels: int, upsample: bool) -> nn.Sequential:
    """Return the mirror image of an encoder stage: ``blocks - 1`` bottlenecks, then one to ``out_channels``."""
    same = [Bottleneck(in_channels, in_channels) for _ in range(blocks - 1)]
    return nn.Sequential(*same, Bottleneck(in_channels, out_channels, upsample))


class StemPooling(nn.Module):
    """The ResNet's overlapping 3x3 pooling, together with positions for an unpooling by 2.

    Args:
        overlapping: as in the predecessors' code, the positions are those of the maxima of 3x3 windows. A position may
            then occur up to four times, and the map must have even height and width. Otherwise, they are those of the
            maxima of 2x2 windows, which are all different.
    """

    def __init__(self, overlapping: bool) -> None:
        super().__init__()
        self.overlapping = overlapping

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return maxima (B, C, ceil(H / 2), ceil(W / 2)), as many positions, and the size (h, w) to unpool to."""
        pooled, indices = F.max_pool2d(x, kernel_size=3, stride=2, padding=1, return_indices=True)
        if self.overlapping:
            return pooled, indices, (2 * pooled.shape[-2], 2 * pooled.shape[-1])
        _, indices = pool_with_indices(x, ceil_mode=True)
        return pooled, indices, (x.shape[-2], x.shape[-1])


class SegResNet(BaseModel):
    """SegNet with ResNet bottlenecks; output stride 32 (encoder); any size; logits (B, num_classes, H, W)::

        image -> stem (1/2) -> pool -> layer1 (1/4) -> layer2 (1/8) -> layer3 (1/16) -> layer4 (1/32)
                                 |                                                          |
                                 indices    stage 4 (1/4) <- 3, up <-   2, up   <-   1, up <-
                                 |             |
        logits <- 3x3 <- up <- unpool (1/2) <--

    The decoder mirrors the encoder block by block. Every map is cut to the size of the encoder's map at that stride,
    at its bottom and right, where halving had rounded up. In training a batch of one needs more than 32 x 32 pixels.

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152 (the decoder has bottlenecks for all).
        published: as in the predecessors' code, unpooling uses the maxima of the ResNet's overlapping 3x3 windows,
            where indices repeat: which value stays is defined on the CPU only. (By default the positions come from a
            2x2 pooling of the stem beside the ResNet's own.) The decoder's maps are cut once, in the middle, before
            unpooling; that shifts features by up to 4 pixels of the stem. A stem map of odd width (input width 1 or 2
            modulo 4) is unpooled to an even width, which shears it.

    The published form returns logits at input size for every size, too, where the published code gave one pixel
    more or less, or failed.
    """

    output_stride = 32
    published_mark = "first_conv.0.weight"
    published_classifier = ("last_conv.1.weight", 0)
    published_names = (
        (r"first_conv\.0\.", "backbone.conv1."),
        (r"first_conv\.1\.", "backbone.bn1."),
        *((rf"encoder\.{i}\.", f"backbone.layer{i + 1}.") for i in range(4)),
        (r"last_conv\.0\.", "up."),
        (r"last_conv\.1\.", "classifier."),
    )
    backbone: ResNet

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
        self.backbone = ResNet(backbone, in_channels, pretrained)
        self.pool = StemPooling(overlapping=published)
        blocks, _ = RESNETS[backbone]
        stem = self.backbone.stem_channels
        c1, c2, c3, c4 = self.backbone.channels
        self.decoder = nn.Sequential(
            decoder_stage(blocks[3], c4, c3, upsample=True),
            decoder_stage(blocks[2], c3, c2, upsample=True),
            decoder_stage(blocks[1], c2, c1, upsample=True),
            decoder_stage(blocks[0], c1, stem, upsample=False),
        )
        self.up = nn.ConvTranspose2d(stem, stem, kernel_size=2, stride=2, bias=False)
        self.classifier = nn.Conv2d(stem, num_classes, kernel_size=3, padding=1)
        init_weights(self.decoder, self.up, self.classifier)
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W)."""
        stem = self.backbone.stem(x)
        pooled, indices, size = self.pool(stem)
        f1, f2, f3, f4 = self.backbone.stages(pooled)
        y = f4
        for stage, like in zip(self.decoder, (f3, f2, f1, f1), strict=True):
            y = stage(y)
            if not self.published:
                y = cut(y, like)
        y = cut(y, f1, centered=self.published, round_up=True)
        y = self.up(unpool(y, indices, size))
        return cut(self.classifier(y), x, centered=self.published)


def cut(x: Tensor, like: Tensor, centered: bool = False, round_up: bool = False) -> Tensor:
    """Cut ``x`` to the height and width of ``like``: at its end or, ``centered``, at both sides.

    With ``round_up``, the larger part of an odd surplus is cut at the beginning.
    """
    height, width = like.shape[-2:]
    top = (x.shape[-2] - height + round_up) // 2 if centered else 0
    left = (x.shape[-1] - width + round_up) // 2 if centered else 0
    return x[..., top : top + height, left : left + width]
