"""Hybrid dilated convolution and dense upsampling: Wang, Chen, Yuan, Liu, Huang, Hou, Cottrell,
"Understanding Convolution for Semantic Segmentation", WACV 2018 (https://arxiv.org/abs/1702.08502).
"""

from __future__ import annotations

from torch import Tensor, nn

from base.base_model import BaseModel
from models.backbones import resnet
from models.backbones.resnet import RESNETS, ResNet
from models.blocks import ASPP, SkipDecoder, init_weights
from models.upstream import names

RATES = (6, 12, 18, 24, 36)


def hybrid_dilations(backbone: str) -> tuple[tuple[int, ...], ...]:
    """Return the paper's dilations for every block of a ResNet (section 3.2, "Dilation-bigger").

    Stage 3 repeats 1, 2, 3, so that the holes of one dilation are filled by the others; blocks left over
    have 2. Stage 4 goes on with 3, 4, 5.
    """
    if backbone not in RESNETS:
        raise ValueError(f"backbone must be one of {', '.join(RESNETS)}, got {backbone!r}")
    (n1, n2, n3, n4), _ = RESNETS[backbone]
    return (1,) * n1, (1,) * n2, (1, 2, 3) * (n3 // 3) + (2,) * (n3 % 3), tuple(range(3, 3 + n4))


class DUC(nn.Sequential):
    """Dense upsampling convolution: each coarse position predicts its factor x factor fine ones.

    1x1 convolution to ``factor ** 2`` times the channels, BatchNorm, ReLU (unless ``relu=False``), pixel
    shuffle.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int, relu: bool = True) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels * factor**2, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels * factor**2),
            nn.ReLU(inplace=True) if relu else nn.Identity(),
            nn.PixelShuffle(factor),
        )
        self.factor = factor

    def start_smooth(self) -> None:
        """Give the fine positions of a coarse one equal weights: no checkerboard at first (Aitken et al. 2017)."""
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        conv.weight.data = conv.weight.data[:: self.factor**2].repeat_interleave(self.factor**2, dim=0)


class DeepLab_DUC_HDC(BaseModel):  # noqa: N801 (the name that configs use)
    """DeepLab with hybrid dilations and dense upsampling; any input size; logits (B, num_classes, H, W)::

        image -> ResNet (HDC, stride 8) -> ASPP -> DUC x2 -> [low, ASPP] -> two 3x3 convs -> classifier ->
        DUC x4
                    `-> low-level features (stride 4) -> 1x1 conv, 48 --^

    The paper's own network is DeepLabv2 with one DUC; as in the published code, ASPP and decoder are those of
    DeepLabv3+. Maps of rounded-up sizes are cropped at the bottom and right, never resized.

    ``published=True`` gives the published code's function: a ReLU after the last DUC, so that logits are
    never negative (its larger output is cropped to the input), and a last DUC of factor 4 at every output
    stride.

    Args:
        num_classes: output channels.
        in_channels: channels of the images.
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152.
        pretrained: ImageNet weights for the backbone: true (torchvision's), false, or a file's path.
        output_stride: of the features: 8, or 4 (the stem keeps the resolution, about four times the work).
        published: see above.
        freeze_bn: BatchNorm keeps its running statistics.
        freeze_backbone: only the decoder is trained.
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
        backbone: str = "resnet101",
        pretrained: bool | str = False,
        output_stride: int = 8,
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        if output_stride not in (4, 8):
            raise ValueError(f"output_stride must be 8 or 4, got {output_stride}")
        self.output_stride = output_stride
        self.backbone = resnet(
            backbone,
            in_channels,
            pretrained,
            output_stride=8,
            dilations=hybrid_dilations(backbone),
            stem_stride=output_stride // 4,
        )
        low, *_, high = self.backbone.channels
        self.aspp = ASPP(high, RATES)
        self.duc = DUC(256, 256, factor=2)
        self.decoder = SkipDecoder(low, 256, num_classes)
        factor = 4 if published else self.backbone.strides[0]
        self.upsample = DUC(num_classes, num_classes, factor, relu=published)
        init_weights(self.aspp, self.duc, self.decoder, self.upsample)
        self.duc.start_smooth()
        self.upsample.start_smooth()
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits at the input's size (twice that, in published form at output stride 4)."""
        low, *_, features = self.backbone(x)
        fine = self.duc(self.aspp(features))[..., : low.shape[-2], : low.shape[-1]]
        logits = self.upsample(self.decoder(low, fine))
        scale = self.upsample.factor // self.backbone.strides[0]
        return logits[..., : x.shape[-2] * scale, : x.shape[-1] * scale]
