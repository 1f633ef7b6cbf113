"""FCN-8s: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015 and PAMI
2017 (https://arxiv.org/abs/1605.06211), trained at once rather than in stages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from base.base_model import BaseModel
from models.backbones.common import Backbone, ImageNetWeights, load_pretrained
from models.backbones.vgg import VGG

VGG_16 = ("vgg16", "vgg16_bn")

#: What the published form multiplies pool3 and pool4 by before they are scored: the authors' "at once" net (PAMI
#: version, section 4.3), whose VGG-16 takes images in [0, 255] and has activations to match.
PUBLISHED_SCALES = (0.0001, 0.01)

#: Padding of the first convolution: enough that fc6 (7x7, unpadded, at stride 32) has a window for any image.
PADDING = 100

# How far each map begins before the one it is added to, or the image. Count pixels of a map from its origin; an
# unpadded bilinear enlargement by f begins f / 2 pixels early.
# - fc6 eats 3 pixels of pool5, 6 of pool4; doubling begins 1 early:            6 - 1 = 5 in pool4
# - 5 of pool4 are 10 of pool3; doubling begins 1 early:                       10 - 1 = 9 in pool3
# - 9 of pool3 are 72 pixels; enlarging by 8 begins 4 early: 68 in an image that was padded by 99 more than a
#   3x3 convolution's 1, so the image begins                                    99 - 68 = 31 after
POOL4_OFFSET, POOL3_OFFSET, IMAGE_OFFSET = 5, 9, 31


class ConvolutionalVGG16(Backbone):
    """VGG-16 made convolutional: images padded by 100 -> [pool3, pool4, fc7].

    ImageNet weights include fc6 and fc7, whose matrices are the 7x7 and 1x1 kernels.
    """

    channels = (256, 512, 4096)
    strides = (8, 16, 32)

    def __init__(self, name: str, in_channels: int = 3, pretrained: bool | str = False) -> None:
        super().__init__()
        self.vgg = VGG(name, in_channels, ceil_mode=True, first_padding=PADDING)
        _, pool5, width = self.channels
        self.fc6 = nn.Conv2d(pool5, width, kernel_size=7)
        self.fc7 = nn.Conv2d(width, width, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        for fc in (self.fc6, self.fc7):
            _init_classifier(fc)
        rename = self._from_torchvision
        weights = ImageNetWeights(name, "vgg.stages.0.0.weight", ignore=("classifier.6.",), rename=rename)
        load_pretrained(self, pretrained, weights)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return pool3, pool4 and fc7."""
        *_, pool3, pool4, pool5 = self.vgg(x)
        fc6 = self.dropout(self.relu(self.fc6(pool5)))
        fc7 = self.dropout(self.relu(self.fc7(fc6)))
        return [pool3, pool4, fc7]

    def _from_torchvision(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return torchvision's weights under the names here; the matrices of fc6 and fc7 become kernels."""
        own, renamed = self.state_dict(), {}
        for key, value in self.vgg.from_torchvision(weights).items():
            name = (
                re.sub(r"^stages\.", "vgg.stages.", key)
                .replace("classifier.0.", "fc6.")
                .replace("classifier.3.", "fc7.")
            )
            fits = name in own and own[name].numel() == value.numel()
            renamed[name] = value.view_as(own[name]) if fits else value
        return renamed


class FCN8(BaseModel):
    """FCN-8s on VGG-16; output stride 32, fused down to 8; any input size; logits (B, num_classes, H, W)::

        image -> pool3 -----------------> score -.
                    `-> pool4 -> score -.        |
                           `-> fc7 -> score -> x2 + -> x2 + -> x8 -> crop to the image

    Args:
        backbone: vgg16 (the paper's) or vgg16_bn.
        pretrained: ImageNet weights for VGG-16, fc6 and fc7 included: true (torchvision's), false, or a path.
        published: as in the predecessors' code, pool3 and pool4 are multiplied by 0.0001 and 0.01 before they are
            scored, as in the authors' "at once" net. These factors fit Caffe's VGG-16, which takes images in [0, 255].
            With torchvision's images and weights, all three streams have the same order of magnitude, and the factors
            would suppress the finer two and their gradients. The default therefore has no factors.
        freeze_bn: BatchNorm (of vgg16_bn) keeps its running statistics.
        freeze_backbone: only the scoring convolutions are trained.

    The enlargements are transposed convolutions with fixed bilinear kernels (the learning rate of the authors'
    "at once" net is 0 there); they are entries of the state dict. About 134 million parameters, 103 of them in
    fc6. Backbone: VGG-16 with fc6 and fc7.

    Deviation from the paper: the scoring convolutions begin with small random weights instead of zeros, so that
    gradients reach the backbone from the first step on.
    """

    output_stride = 32
    published_mark = "adj_pool3.weight"
    published_classifier = ("output.6.weight", 0)
    published_names = (
        *(
            (rf"pool3\.{n}\.", f"backbone.vgg.stages.{s}.{i}.")
            for n, s, i in ((0, 0, 0), (2, 0, 2), (5, 1, 0), (7, 1, 2), (10, 2, 0), (12, 2, 2), (14, 2, 4))
        ),
        (r"pool4\.", "backbone.vgg.stages.3."),
        (r"pool5\.", "backbone.vgg.stages.4."),
        (r"output\.0\.", "backbone.fc6."),
        (r"output\.3\.", "backbone.fc7."),
        (r"output\.6\.", "score_fc7."),
        (r"adj_pool", "score_pool"),
        (r"up_output\.", "up_fc7."),
        (r"up_pool4_out\.", "up_pool4."),
        (r"up_final\.", "up_pool3."),
    )

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: str = "vgg16",
        pretrained: bool | str = False,
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        if backbone not in VGG_16:
            raise ValueError(
                f"backbone must be one of {', '.join(VGG_16)} for FCN8, got {backbone!r}. (Published configs name "
                'resnet101, but the network was always VGG-16: write "vgg16")'
            )
        self.backbone = ConvolutionalVGG16(backbone, in_channels, pretrained)
        pool3, pool4, fc7 = self.backbone.channels
        self.score_pool3 = nn.Conv2d(pool3, num_classes, kernel_size=1)
        self.score_pool4 = nn.Conv2d(pool4, num_classes, kernel_size=1)
        self.score_fc7 = nn.Conv2d(fc7, num_classes, kernel_size=1)
        for score in (self.score_pool3, self.score_pool4, self.score_fc7):
            _init_classifier(score)
        self.up_fc7 = bilinear_enlargement(num_classes, 2)
        self.up_pool4 = bilinear_enlargement(num_classes, 2)
        self.up_pool3 = bilinear_enlargement(num_classes, 8)
        self.pool3_scale, self.pool4_scale = PUBLISHED_SCALES if published else (1.0, 1.0)
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W)."""
        pool3, pool4, fc7 = self.backbone(x)
        score = self.up_fc7(self.score_fc7(fc7))
        score = score + crop(self.score_pool4(self.pool4_scale * pool4), score, POOL4_OFFSET)
        score = self.up_pool4(score)
        score = score + crop(self.score_pool3(self.pool3_scale * pool3), score, POOL3_OFFSET)
        return crop(self.up_pool3(score), x, IMAGE_OFFSET)


def crop(x: Tensor, like: Tensor, offset: int) -> Tensor:
    """Cut a window of the height and width of ``like`` out of ``x``, ``offset`` pixels from the top and left."""
    height, width = like.shape[-2:]
    return x[..., offset : offset + height, offset : offset + width]


def bilinear_enlargement(channels: int, factor: int) -> nn.ConvTranspose2d:
    """Return a frozen transposed convolution that enlarges each channel by itself, bilinearly, without padding.

    The result begins ``factor / 2`` pixels before the map and ends as much after it.
    """
    size = 2 * factor
    distance = (torch.arange(size) - (size - 1) / 2).abs()
    weights = 1 - distance / factor
    up = nn.ConvTranspose2d(channels, channels, kernel_size=size, stride=factor, bias=False)
    kernel = torch.zeros_like(up.weight.data)
    kernel[range(channels), range(channels)] = weights[:, None] * weights[None, :]
    up.weight = nn.Parameter(kernel, requires_grad=False)
    return up


def _init_classifier(conv: nn.Conv2d) -> None:
    """Initialize as torchvision does VGG's classifier."""
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
