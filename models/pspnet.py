"""PSPNet: Zhao, Shi, Qi, Wang, Jia, "Pyramid Scene Parsing Network", CVPR 2017 (https://arxiv.org/abs/1612.01105)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from base.base_model import BaseModel, Outputs
from models.backbones import Backbone, DenseNet, Needs, encoder
from models.blocks import FCNHead, PyramidPooling, init_weights
from models.upstream import names

BINS = (1, 2, 3, 6)


class PyramidSceneParsing(BaseModel):
    """Figure 3 of the paper, on any backbone::

    image -> backbone (stride 8) -> [features | bins 1, 2, 3, 6] -> 3x3 conv -> classifier -> x8
                  `-> stage before -> 3x3 conv -> classifier -> x8       (auxiliary)

    The auxiliary head works in training only.
    """

    published_names = (
        *names.pyramid_names("master_branch.0"),
        (r"master_branch\.1\.", "classifier."),
        (r"auxiliary_branch\.([01])\.", r"aux_head.0.\1."),
        (r"auxiliary_branch\.4\.", "aux_head.2."),
        (r"auxiliary_branch\.|aux_head\.", None),  # use_aux=False
    )

    def __init__(
        self, backbone: Backbone, num_classes: int, in_channels: int, use_aux: bool, published: bool = False
    ) -> None:
        super().__init__(num_classes, in_channels, published)
        self.align_corners = not published  # type: ignore[misc]  # the paper's program; the published one mixes both
        self.backbone = backbone
        self.output_stride = backbone.strides[-1]
        *_, before, last = backbone.channels
        self.pyramid = PyramidPooling(last, BINS, out_channels=last // len(BINS))
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(last // len(BINS), num_classes, kernel_size=1)
        self.aux_head = FCNHead(before, last // len(BINS), num_classes) if use_aux else None
        init_weights(*(module for name, module in self.named_children() if name != "backbone"))

    def logits(self, x: Tensor) -> Outputs:
        """Return logits at stride 8; in training, with the auxiliary head's."""
        *_, before, features = self.backbone(x)
        out = self.classifier(self.dropout(self.pyramid(features)))
        if self.training and self.aux_head is not None:
            return {"out": out, "aux": self.aux_head(before)}
        return out


class PSPNet(PyramidSceneParsing):
    """PSPNet at output stride 8; any input size; logits (B, num_classes, H, W).

    An encoder of timm that cannot be dilated keeps its own stride. resnet50, 101 and 152 have the paper's deep
    stem (three 3x3 convolutions) unless ``stem`` says otherwise; resnet18 and 34 have the usual one. torchvision
    has no ImageNet weights for the deep stem: train with ``stem: "torchvision"``, or give a file of the
    "resnet50s" family of PyTorch-Encoding.

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101, resnet152, or timm:NAME.
        use_aux: in training, also return the logits of the auxiliary head on the last stage but one.
        stem: "deep" or "torchvision" (7x7), of a ResNet; None: the published one of the backbone.
        published: as in the predecessors' code, the logits are resized without aligned corners, the pyramid with them.
    """

    published_mark = "initial.1.weight"
    published_classifier = ("master_branch.1.weight", 0)
    published_names = (*names.RESNET_PARTS, *PyramidSceneParsing.published_names)

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: str = "resnet152",
        pretrained: bool | str = False,
        use_aux: bool = True,
        stem: Literal["deep", "torchvision"] | None = None,
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        if stem is None:
            stem = "deep" if backbone in ("resnet50", "resnet101", "resnet152") else "torchvision"
        network = encoder(backbone, in_channels, pretrained, Needs(stride=8, stem=stem, published=published))
        super().__init__(network, num_classes, in_channels, use_aux, published)
        self.freeze(freeze_bn, freeze_backbone)


class PSPDenseNet(PyramidSceneParsing):
    """PSPNet on a DenseNet at output stride 8; any input size from 5 up; logits (B, num_classes, H, W).

    ``published=True`` gives the published code's function: DenseNet's last BatchNorm and ReLU are left out, so that
    the pyramid receives raw concatenations, and the logits are resized without aligned corners. (Its parameter groups
    also forgot the last block; here it belongs to the backbone always.)

    Args:
        backbone: densenet121, densenet161, densenet169 or densenet201.
        use_aux: in training, also return the logits of the auxiliary head on the last stage but one.
        stem: "torchvision", or "unpadded": the published code's stem for training from scratch or on images
            without three channels (input sizes from 15 up), for its checkpoints.
    """

    published_mark = "block0.0.weight"
    published_classifier = ("master_branch.1.weight", 0)
    published_names = (
        (r"block0\.", "backbone.stem."),
        (r"block(\d)\.", r"backbone.denseblock\1."),
        (r"transition([23])\.0\.", r"backbone.transition\1.norm."),
        (r"transition([23])\.2\.", r"backbone.transition\1.conv."),
        (r"transition", "backbone.transition"),
        *PyramidSceneParsing.published_names,
    )

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        backbone: Literal["densenet121", "densenet161", "densenet169", "densenet201"] = "densenet201",
        pretrained: bool | str = False,
        use_aux: bool = True,
        stem: Literal["torchvision", "unpadded"] = "torchvision",
        published: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        network = DenseNet(backbone, in_channels, pretrained, output_stride=8, stem=stem, last_norm=not published)
        super().__init__(network, num_classes, in_channels, use_aux, published)
        self.freeze(freeze_bn, freeze_backbone)
