"""U-Net.

Paper: O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015, https://arxiv.org/abs/1505.04597.

    x  --start_conv-->  64 at 1/1 ------------------------------------- up4 --> 64 at 1/1 --> final_conv
            down1   -> 128 at 1/2 ------------------------------ up3 --> 128
                down2   -> 256 at 1/4 ------------------- up2 --> 256
                    down3   -> 512 at 1/8 -------- up1 --> 512
                        down4   -> 1024 at 1/16
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from base.base_model import BaseModel
from models.blocks import ConvBNReLU, init_weights, resize_to
from utils.bounds import Width


def double_conv(in_channels: int, out_channels: int, half_first: bool = False) -> nn.Sequential:
    """Return two 3x3 convolutions, each with BatchNorm and ReLU; the first may have half the output's width."""
    middle = out_channels // 2 if half_first else out_channels
    return nn.Sequential(*ConvBNReLU(in_channels, middle, 3), *ConvBNReLU(middle, out_channels, 3))


class Down(nn.Module):
    """Contracting step: halve the map, then two convolutions: (B,C,H,W) -> (B,out,ceil(H/2),ceil(W/2)).

    ``published`` convolves first, and halves the result.
    """

    def __init__(self, in_channels: int, out_channels: int, published: bool) -> None:
        super().__init__()
        self.down_conv = double_conv(in_channels, out_channels, published)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.published = published

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next level."""
        return self.pool(self.down_conv(x)) if self.published else self.down_conv(self.pool(x))


class Up(nn.Module):
    """Expanding step: double the map, join it with the skip connection, two convolutions."""

    def __init__(self, in_channels: int, out_channels: int, published: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.up_conv = double_conv(in_channels, out_channels, published)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return features at the size of ``skip``, which has half as many channels as ``x``."""
        x = resize_to(self.up(x), skip, align_corners=True)
        return self.up_conv(torch.cat([skip, x], dim=1))


class UNet(BaseModel):
    """U-Net with BatchNorm and padded convolutions.

    Args:
        width: channels at full resolution, doubled with each level; 64 is the paper's, 16 trains on a CPU.
        published: as in the predecessors' code, the skips are the *pooled* outputs of the contracting steps, so that
            the contracting path is one pair of convolutions deeper, and the first convolution of a pair has half the
            pair's width.

    Shapes: (B,in_channels,H,W) -> (B,num_classes,H,W) for every H, W >= 1; in training a batch of one needs an
    input larger than 16 x 16, because BatchNorm needs more than one value per channel. Output stride 16.

    Deviations from the paper: convolutions are padded, so that the logits have the input's size and skips are
    not cropped; every convolution is followed by BatchNorm; no dropout. An odd map is pooled to the larger half, and
    where doubling then overshoots the skip by one pixel it is resized bilinearly.
    """

    output_stride = 16
    published_mark = "start_conv.0.weight"
    published_classifier = ("final_conv.weight", 0)
    published_entry = "middle_conv.0.weight"

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: Width = 64,
        published: bool = False,
        freeze_bn: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        if width < 2 or width % 2:
            raise ValueError(f"width must be an even number of channels, got {width}")
        w1, w2, w3, w4, w5 = (width * 2**level for level in range(5))
        self.start_conv = double_conv(in_channels, w1, published)
        self.down1 = Down(w1, w2, published)
        self.down2 = Down(w2, w3, published)
        self.down3 = Down(w3, w4, published)
        self.down4 = Down(w4, w5, published)
        if published:
            self.middle_conv = double_conv(w5, w5, published)
        self.up1 = Up(w5, w4, published)
        self.up2 = Up(w4, w3, published)
        self.up3 = Up(w3, w2, published)
        self.up4 = Up(w2, w1, published)
        self.final_conv = nn.Conv2d(w1, num_classes, kernel_size=1)
        init_weights(self)
        self.freeze(bn=freeze_bn)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B,num_classes,H,W) for images (B,in_channels,H,W)."""
        x1 = self.start_conv(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x5 = self.down4(x4)
        if self.published:
            x5 = self.middle_conv(x5)
        y = self.up1(x5, x4)
        y = self.up2(y, x3)
        y = self.up3(y, x2)
        y = self.up4(y, x1)
        return self.final_conv(y)
