"""UperNet: Xiao, Liu, Zhou, Jiang, Sun, "Unified Perceptual Parsing for Scene Understanding", ECCV 2018
(https://arxiv.org/abs/1807.10221): its semantic segmentation head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from base.base_model import BaseModel
from models.backbones import Needs, encoder
from models.blocks import ConvBNReLU, PyramidPooling, init_weights, resize_to
from models.upstream import names
from utils.bounds import Width


class FPN(nn.Module):
    """Feature pyramid network (Lin et al., CVPR 2017), its levels fused at the finest resolution.

    Lateral 1x1 convolutions; from coarse to fine, each level is added to the next; 3x3 smoothing of all
    levels but the coarsest; concatenation and a 3x3 convolution. Each convolution has BatchNorm and ReLU, as in the
    authors' program.

    Args:
        channels: of the levels, fine to coarse. The coarsest has no lateral convolution; it has ``width`` already, or
            ``published``.
        width: channels of every level and of the result.
        published: as in the published code, add the coarser *lateral* map only (nothing accumulates), share
            one smoothing convolution, have no lateral convolution at the finest level, have neither BatchNorm nor
            ReLU but at the end, and resize with aligned corners.
    """

    def __init__(self, channels: tuple[int, ...], width: int, published: bool = False) -> None:
        super().__init__()
        self.published = published
        count = len(channels) - 1
        if published:
            laterals = [nn.Identity(), *(nn.Conv2d(c, width, kernel_size=1) for c in channels[1:])]
            smooth: list[nn.Module] = [nn.Conv2d(width, width, kernel_size=3, padding=1)] * count
        else:
            laterals = [ConvBNReLU(c, width, kernel_size=1) for c in channels[:-1]]
            smooth = [ConvBNReLU(width, width) for _ in range(count)]
        if channels[-1] == width:
            laterals = [*laterals[:count], nn.Identity()]
        self.laterals, self.smooth = nn.ModuleList(laterals), nn.ModuleList(smooth)
        self.fuse = ConvBNReLU(len(channels) * width, width)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Map features, fine to coarse, to (B, width, h, w) at the finest one's size."""
        laterals = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        top = laterals[-1]
        levels = [top]
        for lateral, smooth in zip(laterals[-2::-1], reversed(self.smooth), strict=True):
            total = lateral + resize_to(top, lateral, self.published)
            levels.insert(0, smooth(total))
            top = lateral if self.published else total
        return self.fuse(torch.cat([resize_to(x, levels[0], self.published) for x in levels], dim=1))


class UperNet(BaseModel):
    """Figure 4 of the paper; any input size; logits (B, num_classes, H, W)::

        image -> backbone -> c1, c2, c3, c4 -> pyramid pooling on c4 -> FPN -> fused (stride 4) -> 1x1 conv -> x4

    The stem is torchvision's, one 7x7 convolution instead of the three 3x3 of the authors' program.

    ``published=True`` gives the published code's function: features at stride 16 by default, pyramid bins
    1, 2, 4, 6 fused to 2048 channels, an FPN of 256 channels without accumulation (see :class:`FPN`), and a 3x3
    convolution as classifier. (There, every backbone was a resnet101.)

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101, resnet152, or timm:NAME.
        output_stride: of the deepest features: 32 (the paper's and the default), 16 (default if published)
            or 8.
        fpn_out: channels of the FPN: 512 (the paper's and the default), or for instance 256, which takes a third of
            the work (default if published).
    """

    align_corners = False
    published_mark = "PPN.bottleneck.0.weight"
    published_classifier = ("head.weight", 0)
    published_names = (
        *names.RESNET_NAMES,
        *names.pyramid_names("PPN"),
        *((rf"FPN\.conv1x1\.{i}\.", f"fpn.laterals.{i + 1}.") for i in range(3)),
        (r"FPN\.smooth_conv\.", "fpn.smooth."),
        (r"FPN\.conv_fusion\.", "fpn.fuse."),
        (r"head\.", "classifier."),
    )

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: str = "resnet101",
        pretrained: bool | str = False,
        output_stride: Literal[32, 16, 8] | None = None,
        fpn_out: Width | None = None,
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        fpn_out = fpn_out or (256 if published else 512)
        stride = output_stride or (16 if published else 32)
        needs = Needs(stride, must=output_stride is not None, whole_stages=True, published=published)
        self.backbone = encoder(backbone, in_channels, pretrained, needs)
        self.output_stride = self.backbone.strides[-1]
        *channels, last = self.backbone.channels
        if published and channels[0] != fpn_out:
            raise ValueError(
                f"published: true needs fpn_out equal to the first stage's channels ({channels[0]} for {backbone}), "
                f"got {fpn_out}"
            )
        bins, pyramid_out = ((1, 2, 4, 6), last) if published else ((1, 2, 3, 6), fpn_out)
        self.pyramid = PyramidPooling(last, bins, pyramid_out, align_corners=published)
        self.fpn = FPN((*channels, pyramid_out), fpn_out, published)
        self.classifier = nn.Conv2d(fpn_out, num_classes, *((3, 1, 1) if published else (1,)))
        init_weights(self.pyramid, self.fpn, self.classifier)
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits at stride 4."""
        *features, last = self.backbone(x)
        return self.classifier(self.fpn([*features, self.pyramid(last)]))
