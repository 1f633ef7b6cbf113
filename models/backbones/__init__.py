"""Backbones with one interface: ``forward(images) -> [features, ...]``, fine to coarse.

Every backbone has ``channels`` and ``strides``, one entry per feature map, from which decoders are built. Dilation,
stem and output stride are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.backbones.common import Backbone
from models.backbones.densenet import DenseNet
from models.backbones.from_timm import PREFIX, TimmEncoder
from models.backbones.resnet import WHOLE_STAGES, ResNet
from models.backbones.vgg import VGG, vgg
from models.backbones.xception import Xception

__all__ = ["VGG", "Backbone", "DenseNet", "Needs", "ResNet", "TimmEncoder", "Xception", "encoder", "vgg"]


@dataclass(frozen=True)
class Needs:
    """What a decoder needs of its encoder.

    ``whole_stages``: a dilated stage of a ResNet uses its dilation from the first block on; otherwise the first block
    keeps the dilation of the stage before, as in torchvision.
    """

    stride: int = 32  # wanted stride of the deepest features, where the encoder can be dilated
    must: bool = False  # the stride is the user's, so an encoder that cannot have it is refused
    finest: int = 4  # the smallest stride of the features that the decoder looks at
    whole_stages: bool = False
    stem: str = "torchvision"  # of a ResNet; or "deep"
    published: bool = False  # the published structure, which only our own backbones have


def encoder(name: str, in_channels: int, pretrained: bool | str, needs: Needs) -> Backbone:
    """Build the encoder ``name``: one of our ResNets (``resnet50``), or one of timm's models (``timm:convnext_tiny``).

    Raises:
        ValueError: there is no such encoder, or it does not have what the decoder needs.
        UserError: timm is not installed, or the weights cannot be loaded.
    """
    if not name.startswith(PREFIX):
        dilations = WHOLE_STAGES.get(needs.stride) if needs.whole_stages else None
        return ResNet(name, in_channels, pretrained, needs.stride, dilations, needs.stem)
    if needs.published:
        raise ValueError(f"published: true is a structure on ResNets; leave it out with {name}")
    if needs.stem != "torchvision":
        raise ValueError(f"stem: {name} has its own stem; leave it out")
    network = TimmEncoder(name, in_channels, pretrained, needs.stride, needs.finest)
    if needs.must and network.strides[-1] != needs.stride:
        raise ValueError(
            f"output_stride: {name} cannot have {needs.stride}, because timm cannot dilate it; its stride is "
            f"{network.strides[-1]}. Leave output_stride out"
        )
    return network
