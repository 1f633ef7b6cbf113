"""DeepLabv3+: Chen, Zhu, Papandreou, Schroff, Adam, "Encoder-Decoder with Atrous Separable Convolution for
Semantic Image Segmentation", ECCV 2018 (https://arxiv.org/abs/1802.02611).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from base.base_model import BaseModel
from models.backbones import Needs, Xception, encoder
from models.blocks import ASPP, SkipDecoder, init_weights
from models.upstream import names

#: Atrous rates of the pyramid per output stride; 32 is for encoders that cannot be dilated.
RATES = {32: (3, 6, 9), 16: (6, 12, 18), 8: (12, 24, 36)}


class DeepLab(BaseModel):
    """Figure 2 of the paper; any input size; logits (B, num_classes, H, W)::

        image -> backbone -> features (stride 16 or 8) -> ASPP -> x4 -> [low, ASPP] -> two 3x3 convs -> classifier -> x4
                     `-> low-level features (stride 4) -> 1x1 conv, 48 --^

    Args:
        backbone: xception, resnet18, resnet34, resnet50, resnet101, resnet152, or timm:NAME.
        pretrained: ImageNet weights for the backbone: true (torchvision's or timm's; there are none for
            xception), false, or a file's path.
        output_stride: of the features: 16 (default; 32 with an encoder that cannot be dilated), 8 (finer, about
            three times the work) or 32.
        published: as in the predecessors' code (only with xception), no separable convolutions in ASPP and decoder, no
            ReLU after depthwise convolutions, shortcuts that receive rectified inputs, and no ReLU after the second
            convolution. (There, every ResNet was a resnet101.)
    """

    align_corners = True
    published_mark = "ASSP.aspp1.0.weight"
    published_classifier = ("decoder.output.7.weight", 0)
    published_names = (*names.RESNET_NAMES, *names.XCEPTION_NAMES, *names.ASPP_NAMES, *names.SKIP_DECODER_NAMES)

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: str = "xception",
        pretrained: bool | str = False,
        output_stride: Literal[32, 16, 8] | None = None,
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        stride = output_stride or 16
        if backbone == "xception":
            self.backbone = Xception(in_channels, pretrained, stride, published)
        else:
            needs = Needs(stride, must=output_stride is not None, whole_stages=True)
            self.backbone = encoder(backbone, in_channels, pretrained, needs)
        self.output_stride = self.backbone.strides[-1]
        low, *_, high = self.backbone.channels
        separable = backbone == "xception" and not published
        self.aspp = ASPP(high, RATES[self.output_stride], separable)
        self.decoder = SkipDecoder(low, 256, num_classes, separable)
        init_weights(self.aspp, self.decoder)
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits at stride 4."""
        low, *_, features = self.backbone(x)
        return self.decoder(low, self.aspp(features))
