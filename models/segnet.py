"""SegNet: Badrinarayanan, Kendall, Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", PAMI 2017 (https://arxiv.org/abs/1511.00561).
"""

from __future__ import annotations

from torch import Tensor, nn

from base.base_model import BaseModel
from models.backbones import vgg
from models.backbones.vgg import VGG
from models.blocks import init_weights, untie_norms
from models.pooling import pool_with_indices, unpool


def mirror(stage: nn.Module, out_channels: int, share: bool = False) -> nn.Sequential:
    """Build the decoder stage of an encoder stage: as many convolutions, each with BatchNorm and ReLU.

    It leads back to the ``out_channels`` of the stage before. With ``share``, as in the predecessors' code, a layer of
    the decoder whose shape agrees with that of its mirror image in the encoder *is* that layer.
    """
    convs = [layer for layer in stage.children() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in stage.children() if isinstance(layer, nn.BatchNorm2d)]
    width = convs[-1].out_channels
    layers: list[nn.Module] = []
    for conv, norm in zip(reversed(convs), reversed(norms), strict=True):
        channels = out_channels if conv is convs[0] else width
        own_conv = nn.Conv2d(width, channels, kernel_size=3, padding=1)
        own_norm = nn.BatchNorm2d(channels)
        init_weights(own_conv, own_norm)
        layers += [
            conv if share and conv.weight.shape == own_conv.weight.shape else own_conv,
            norm if share and norm.weight.shape == own_norm.weight.shape else own_norm,
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class SegNet(BaseModel):
    """SegNet on VGG-16 with BatchNorm; output stride 32 (encoder); logits (B, num_classes, H, W)::

        image -> stage 1 -> pool -> ... -> stage 5 -> pool
                              |  indices              |
        logits <- classifier <- mirror 1 <- unpool <- ... <- mirror 5 <- unpool

    Takes images of any size: pooling rounds up, unpooling restores the recorded size. In training a batch
    of one needs more than 16 x 16 pixels. In the published form pooling rounds down and takes at least 32 x 32.

    Args:
        published: as in the predecessors' code, 9 convolutions and 10 BatchNorms of the decoder are the encoder's own,
            which ties their weights and mixes the running statistics of both uses.
        freeze_backbone: only the decoder is trained (in the published form: what of it is not the encoder's).

    Deviation from the paper, in both forms: the first encoder convolution, too, is mirrored by one with
    BatchNorm and ReLU (64 to 64 channels), and a further 3x3 convolution classifies.
    """

    published_mark = "stage1_encoder.0.weight"
    published_classifier = ("stage5_decoder.6.weight", 0)
    published_names = (
        *((rf"stage{i}_encoder\.", f"backbone.stages.{i - 1}.") for i in range(1, 6)),
        (r"stage5_decoder\.6\.", "classifier."),
        *((rf"stage{i}_decoder\.", f"decoder.{i - 1}.") for i in range(1, 6)),
    )
    backbone: VGG

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        pretrained: bool | str = False,
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        self.backbone = vgg("vgg16_bn", in_channels, pretrained)
        self.output_stride = self.backbone.strides[-1]
        channels = self.backbone.channels
        outputs = (channels[0], *channels[:-1])
        stages = [mirror(s, c, share=published) for s, c in zip(self.backbone.stages, outputs, strict=True)]
        self.decoder = nn.ModuleList(reversed(stages))
        self.classifier = nn.Conv2d(outputs[0], num_classes, kernel_size=3, padding=1)
        init_weights(self.classifier)
        if published:
            self.register_load_state_dict_pre_hook(untie_norms)
        self.freeze(freeze_bn, freeze_backbone)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W)."""
        if self.published and min(x.shape[-2:]) < self.output_stride:
            raise ValueError(
                f"SegNet's published form needs images of at least {self.output_stride} x {self.output_stride}, got "
                f"{x.shape[-2]} x {x.shape[-1]}"
            )
        pooled = []
        for stage in self.backbone.stages:
            x = stage(x)
            size = (x.shape[-2], x.shape[-1])
            x, indices = pool_with_indices(x, ceil_mode=not self.published)
            pooled.append((indices, size))
        for stage in self.decoder:
            indices, size = pooled.pop()
            x = stage(unpool(x, indices, size))
        return self.classifier(x)
