"""What every segmentation network here shares: sizes, auxiliary outputs, freezing, parameter groups."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.errors import UserError

#: What :meth:`BaseModel.logits` may return: the logits, or in training also those of an auxiliary head.
Outputs = Tensor | dict[str, Tensor]


def resize_to(x: Tensor, like: Tensor | tuple[int, int], align_corners: bool = False) -> Tensor:
    """Resize ``x`` (B, C, h, w) bilinearly to the height and width of ``like`` (a tensor, or (H, W)).

    A map that already has this size is returned as it is.
    """
    size = tuple(like.shape[-2:]) if isinstance(like, Tensor) else tuple(like)
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


class BaseModel(nn.Module):
    """Base of all segmentation networks.

    A subclass builds its parts in ``__init__``, calls :meth:`freeze` last, and implements :meth:`logits`. Everything
    with pretrained weights is in ``self.backbone``; the rest is the "decoder".

    Args (subclasses describe only what differs; the last three are arguments of most of them):
        num_classes: output channels; 1 means one sigmoid channel.
        in_channels: channels of the images.
        published: whether to reproduce the predecessors' code where it differs from the paper (see each model).
        pretrained: ImageNet weights for the backbone: true (torchvision's or timm's), false, or a file's path.
        freeze_bn: BatchNorm keeps its running statistics.
        freeze_backbone: only the decoder is trained.
    """

    #: How the logits are resized to the input (``torch.nn.functional.interpolate``).
    align_corners: ClassVar[bool] = False
    #: Rules from the names of published checkpoints to ours, see :mod:`models.upstream`.
    published_names: ClassVar[tuple[tuple[str, str | None], ...]] = ()
    #: An entry of published checkpoints that shows which model they are of ("": there are none).
    published_mark: ClassVar[str] = ""
    #: The entry of published checkpoints with one row per class, and the axis of the classes.
    published_classifier: ClassVar[tuple[str, int]] = ("", 0)
    #: Stride of the deepest features; subclasses with a choice set it on the instance.
    output_stride: int = 32
    #: Height and width must be multiples of this (1: any size).
    size_divisor: int = 1
    #: The backbone's name among the modules.
    backbone_name: str = "backbone"

    #: An entry of the state dict that only ``published=True`` has ("": there is none, or no such form).
    published_entry: ClassVar[str] = ""
    #: Where the weights came from, for the banner; "": they are random, or the backbone has this information.
    weights_from: str = ""

    backbone: nn.Module

    def __init__(self, num_classes: int, in_channels: int = 3, published: bool = False) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.published = published
        self.bn_is_frozen = False
        self.backbone_is_frozen = False

    def logits(self, x: Tensor) -> Outputs:
        """Map images (B, in_channels, H, W) to logits (B, num_classes, h, w) of any resolution.

        With an auxiliary head, in training: ``{"out": logits, "aux": logits}``.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Outputs:
        """Map images (B, in_channels, H, W) to logits (B, num_classes, H, W).

        In training, networks with an auxiliary head return ``{"out": logits, "aux": logits}`` of that shape.

        Raises:
            ValueError: the images have a wrong number of channels.
            UserError: the network does not support the size of the images, or a batch of one image is too small for
                training with BatchNorm.
        """
        self._check_input(x)
        try:
            outputs = self.logits(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"{type(self).__name__} cannot be trained on one image of {x.shape[2]} x {x.shape[3]} at a time: "
                "its deepest feature map has one value per channel, which BatchNorm cannot normalize. Use larger "
                "images (crop_size), a larger batch_size, or freeze_bn"
            ) from error
        if isinstance(outputs, dict):
            return {name: resize_to(y, x, self.align_corners) for name, y in outputs.items()}
        return resize_to(outputs, x, self.align_corners)

    def _check_input(self, x: Tensor) -> None:
        name = type(self).__name__
        if x.dim() != 4:
            raise ValueError(f"{name} takes a batch (B, C, H, W), got a tensor of shape {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"{name} was built for images with {self.in_channels} channels (in_channels), got {x.shape[1]} in a "
                f"batch of shape {tuple(x.shape)}"
            )
        divisor = self.size_divisor
        if divisor > 1 and (x.shape[2] % divisor or x.shape[3] % divisor):
            raise UserError(
                f"{name} needs heights and widths that are multiples of {divisor}, got {x.shape[2]} x {x.shape[3]}: "
                "set crop_size to such a size"
            )

    # -- freezing ----------------------------------------------------------------------------------------

    def freeze(self, bn: bool = False, backbone: bool = False) -> None:
        """Freeze parts for good: later calls of :meth:`train` leave them frozen.

        Args:
            bn: every BatchNorm keeps its running statistics and normalizes by them. Its scale and shift
                remain trainable.
            backbone: the backbone's parameters get no gradient, and its BatchNorms and dropouts stay in
                evaluation mode, so that the backbone is one fixed function.
        """
        self.bn_is_frozen = self.bn_is_frozen or bn
        self.backbone_is_frozen = self.backbone_is_frozen or backbone
        if backbone:
            for parameter in self.get_backbone_params():
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> BaseModel:
        """Set training or evaluation mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.bn_is_frozen:
            for module in self.modules():
                # The common base: SyncBatchNorm is no subclass of BatchNorm2d.
                if isinstance(module, _BatchNorm):
                    module.eval()
        if self.backbone_is_frozen and hasattr(self, "backbone"):
            self.backbone.eval()
        return self

    # -- parameters --------------------------------------------------------------------------------------

    def get_backbone_params(self) -> list[nn.Parameter]:
        """Return the parameters of ``self.backbone`` (none for networks without one)."""
        ids = self._backbone_ids()
        return [p for p in self.parameters() if id(p) in ids]

    def get_decoder_params(self) -> list[nn.Parameter]:
        """Return all parameters outside ``self.backbone``."""
        ids = self._backbone_ids()
        return [p for p in self.parameters() if id(p) not in ids]

    def _backbone_ids(self) -> set[int]:
        """Return the identities of the backbone's parameters, also of those that other parts share."""
        return {id(p) for p in self.backbone.parameters()} if hasattr(self, "backbone") else set()

    def count_parameters(self, trainable_only: bool = False) -> int:
        """Return the number of parameter elements, shared ones counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)
