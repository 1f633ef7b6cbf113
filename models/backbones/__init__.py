"""Backbones behind one contract: ``forward(images) -> [features, ...]``, fine to coarse.

Every backbone announces ``channels`` and ``strides``, one entry per feature map, so that decoders are derived
from them. Dilation, stem and output stride are arguments.
"""

from models.backbones.common import Backbone
from models.backbones.densenet import DenseNet, densenet
from models.backbones.resnet import ResNet, resnet
from models.backbones.vgg import VGG, vgg
from models.backbones.xception import Xception, xception

__all__ = ["VGG", "Backbone", "DenseNet", "ResNet", "Xception", "densenet", "resnet", "vgg", "xception"]
