"""Published checkpoints: names, structure, and what to do when weights do not fit.

**The convention.** A model lists in its class attribute ``published_names`` how the names recorded in
published checkpoints become ours: a tuple of rules ``(pattern, replacement)``. Wrappers' prefixes
(``module.``) are taken off first. A key that is already one of ours is never changed, so both spellings
load. Otherwise rules are tried in order; a rule applies if its regular expression matches *at the
beginning* of the key and

* its replacement, put in place of the match (``re.sub`` syntax, so ``\\1`` works) with the rest of the key
  kept, gives a name that the model has; or
* its replacement is ``None``: the entry is dropped. Such rules come last and mark what a model may do without
  (an auxiliary head that was not built, parameters that the published code never used).

If no rule applies, the first that matches gives the name to complain about. Several recorded names may
become one of ours (shared tensors); the first one counts. Patterns should end at a dot
(``r"master_branch\\.0\\."``), so that no rule catches a longer name by accident.

:func:`infer` finds the constructor's arguments for a checkpoint that carries none of ours;
:func:`load_weights` loads it and explains what does not fit.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from base.base_model import BaseModel
from models import MODELS
from utils.errors import UserError

Rules = tuple[tuple[str, str | None], ...]

RESNET_NAMES: Rules = (
    (r"backbone\.(?:initial|layer0)\.0\.", "backbone.conv1."),
    (r"backbone\.(?:initial|layer0)\.1\.", "backbone.bn1."),
)
XCEPTION_NAMES: Rules = (
    (r"backbone\.(block\d+)\.skip\.", r"backbone.\1.shortcut.0."),
    (r"backbone\.(block\d+)\.skipbn\.", r"backbone.\1.shortcut.1."),
    (r"backbone\.(block\d+)\.rep\.(\d)\.conv1\.", r"backbone.\1.body.\2.depthwise."),
    (r"backbone\.(block\d+)\.rep\.", r"backbone.\1.body."),
    (r"backbone\.(conv[345])\.conv1\.", r"backbone.\1.depthwise."),
)
ASPP_NAMES: Rules = (
    *((rf"ASSP\.aspp{i + 1}\.", f"aspp.branches.{i}.") for i in range(6)),
    (r"ASSP\.avg_pool\.1\.", "aspp.image_pooling.1.0."),
    (r"ASSP\.avg_pool\.2\.", "aspp.image_pooling.1.1."),
    (r"ASSP\.conv1\.", "aspp.fuse.0."),
    (r"ASSP\.bn1\.", "aspp.fuse.1."),
)
SKIP_DECODER_NAMES: Rules = (
    (r"decoder\.conv1\.", "decoder.reduce_low.0."),
    (r"decoder\.bn1\.", "decoder.reduce_low.1."),
    (r"decoder\.output\.([01])\.", r"decoder.refine.0.\1."),
    (r"decoder\.output\.3\.", "decoder.refine.1.0."),
    (r"decoder\.output\.4\.", "decoder.refine.1.1."),
    (r"decoder\.output\.7\.", "decoder.classifier."),
)


def pyramid_names(recorded: str, ours: str) -> Rules:
    """Return the rules for a :class:`models.blocks.PyramidPooling`, given both prefixes without the last dot."""
    prefix = re.escape(recorded)
    return (
        (prefix + r"\.stages\.(\d)\.1\.", ours + r".branches.\1.1.0."),
        (prefix + r"\.stages\.(\d)\.2\.", ours + r".branches.\1.1.1."),
        (prefix + r"\.bottleneck\.", ours + ".fuse."),
    )


@dataclass(frozen=True)
class Recorded:
    """Where a published checkpoint of a model shows what it is.

    Attributes:
        classifier: the weight whose ``axis`` is the number of classes.
        mark: an entry that no other model's checkpoints have.
    """

    classifier: str
    mark: str
    axis: int = 0


RECORDED: dict[str, Recorded] = {
    "PSPNet": Recorded("master_branch.1.weight", "initial.1.weight"),
    "PSPDenseNet": Recorded("master_branch.1.weight", "block0.0.weight"),
    "DeepLab_DUC_HDC": Recorded("decoder.output.7.weight", "DUC_out.conv.weight"),
    "DeepLab": Recorded("decoder.output.7.weight", "ASSP.aspp1.0.weight"),
    "UperNet": Recorded("head.weight", "PPN.bottleneck.0.weight"),
    "GCN": Recorded("final_conv.weight", "gcn1.conv11.weight"),
    "UNet": Recorded("final_conv.weight", "start_conv.0.weight"),
    "UNetResnet": Recorded("conv7.weight", "upconv5.weight"),
    "SegNet": Recorded("stage5_decoder.6.weight", "stage1_encoder.0.weight"),
    "SegResNet": Recorded("last_conv.1.weight", "first_conv.0.weight"),
    "FCN8": Recorded("output.6.weight", "adj_pool3.weight"),
    "ENet": Recorded("fullconv.weight", "bottleneck10.conv1.weight", axis=1),
}

#: (blocks of stage 1, blocks of stage 3, bottlenecks?) -> name.
_RESNETS = {
    (2, 2, False): "resnet18",
    (3, 6, False): "resnet34",
    (3, 6, True): "resnet50",
    (3, 23, True): "resnet101",
    (3, 36, True): "resnet152",
}
#: Layers of block 3 -> name.
_DENSENETS = {24: "densenet121", 36: "densenet161", 32: "densenet169", 48: "densenet201"}


def strip_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the prefixes of DataParallel and torch.compile."""
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): tensor for key, tensor in state_dict.items()}


def _candidates(key: str, rules: Rules) -> list[str | None]:
    """Return what each matching rule makes of ``key``, in order."""
    found: list[str | None] = []
    for pattern, replacement in rules:
        match = re.match(pattern, key)
        if match:
            found.append(None if replacement is None else match.expand(replacement) + key[match.end() :])
    return found


def translate(model: BaseModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state_dict`` under our names, by ``model.published_names`` (see the module's docstring)."""
    own = model.state_dict().keys()
    translated: dict[str, Tensor] = {}
    for key, tensor in strip_wrappers(state_dict).items():
        name: str | None = key
        if key not in own:
            candidates = _candidates(key, model.published_names)
            fitting = (c for c in candidates if c is None or c in own)
            name = next(fitting, candidates[0] if candidates else key)
        if name is not None:
            translated.setdefault(name, tensor)
    return translated


# -- loading -------------------------------------------------------------------------------------------------


def load_weights(model: BaseModel, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights under our names or the published ones, with or without ``module.``, into ``model``.

    Where the model uses one BatchNorm at two places and the weights hold different values for them
    (checkpoints of synchronised BatchNorm, which converted each use by itself), the second place gets a
    BatchNorm of its own.

    Raises:
        UserError: entries are missing, unknown or of another shape; says which, and what probably went wrong.
    """
    own = model.state_dict()
    weights = translate(model, state_dict)
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in own]
    reshaped = [k for k in weights if k in own and weights[k].shape != own[k].shape]
    if missing or unexpected or reshaped:
        shapes = [f"{k}: found {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}" for k in reshaped]
        parts = (
            (missing, "missing", missing),
            (unexpected, "unexpected", unexpected),
            (reshaped, "of another shape", shapes),
        )
        facts = "; ".join(f"{len(keys)} {what} ({_some(shown)})" for keys, what, shown in parts if keys)
        reasons = "; ".join(_reasons(model, strip_wrappers(state_dict)))
        raise UserError(
            f"the weights do not fit {type(model).__name__}: {facts}" + (f". Probably: {reasons}" if reasons else "")
        )
    _untie_norms(model, weights)
    model.load_state_dict(weights, strict=False)  # strict but for num_batches_tracked, see above


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _untie_norms(model: BaseModel, weights: Mapping[str, Tensor]) -> None:
    first_name: dict[nn.Module, str] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, _BatchNorm):
            continue
        first = first_name.setdefault(module, name)
        pairs = ((weights.get(f"{first}.{k}"), weights.get(f"{name}.{k}")) for k in module.state_dict())
        if any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, copy.deepcopy(module))


def _reasons(model: BaseModel, weights: Mapping[str, Tensor]) -> list[str]:
    """Return what may explain that ``weights`` do not fit ``model``, most telling first."""
    kind = type(model).__name__
    if "fc.weight" in weights or "classifier.6.weight" in weights:
        return ["these are an ImageNet classifier's weights: name the file in arch.args.pretrained"]
    other = identify(weights)
    if other is not None and other != kind:
        return [f"these are the weights of a published {other} (arch.type)"]
    reasons = []
    ours, theirs = backbone_of(model.state_dict()), backbone_of(weights)
    if theirs is not None and ours is not None and ours != theirs:
        reasons.append(f"the weights have the backbone {theirs}, the model has {ours} (arch.args.backbone)")
    classes = number_of_classes(kind, weights, model.published_names)
    if classes is not None and classes != model.num_classes:
        reasons.append(f"the weights are for {classes} classes, the model has {model.num_classes}")
    channels = _image_channels(weights)
    if channels is not None and channels != model.in_channels and not reasons:
        reasons.append(f"the weights are for images with {channels} channels, the model for {model.in_channels}")
    is_published = has_published_names(weights, model.published_names)
    if is_published and not model.published and "published" in _parameters(type(model)):
        reasons.append("this is a published checkpoint: build the model with published: true")
    return reasons


# -- what a checkpoint is --------------------------------------------------------------------------------------


def identify(weights: Mapping[str, Tensor]) -> str | None:
    """Return the model whose published checkpoints have these (unwrapped) names, if any."""
    for name, recorded in RECORDED.items():
        if recorded.mark in weights and recorded.classifier in weights:
            return name
    return None


def has_published_names(weights: Mapping[str, Tensor], rules: Rules) -> bool:
    """Tell whether the (unwrapped) names are recorded ones that differ from ours."""
    return any(c is not None for key in weights for c in _candidates(key, rules))


def number_of_classes(kind: str, weights: Mapping[str, Tensor], rules: Rules) -> int | None:
    """Return the number of classes that weights under recorded or our names are for."""
    recorded = RECORDED.get(kind)
    if recorded is None:  # a model of this project alone
        return None
    for key in (recorded.classifier, *_candidates(recorded.classifier, rules)):
        if key is not None and key in weights:
            return weights[key].shape[recorded.axis]
    return None


def backbone_of(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the backbone whose (unwrapped) weights these are, if it is one that shows."""
    if any(re.match(r"backbone\.block20\.", key) for key in weights):
        return "xception"
    if "adj_pool3.weight" in weights:  # FCN8, whose published configs name a ResNet
        return "vgg16"
    for prefix in (r"(?:backbone\.)?layer{}\.", r"encoder\.{}\."):
        shift = 0 if "layer" in prefix else -1  # SegResNet's published stages count from 0
        first, third = (prefix.format(stage + shift) + r"(\d+)\." for stage in (1, 3))
        bottlenecks = any(re.match(third + "conv3", key) for key in weights)
        name = _RESNETS.get((_count(weights, first), _count(weights, third), bottlenecks))
        if name is not None:
            return name
    return _DENSENETS.get(_count(weights, r"(?:block|backbone\.denseblock)3\.denselayer(\d+)\.", start=1))


def _count(weights: Mapping[str, Tensor], pattern: str, start: int = 0) -> int:
    numbers = (int(match[1]) for key in weights if (match := re.match(pattern, key)))
    return max(numbers, default=start - 1) + 1 - start


def _image_channels(weights: Mapping[str, Tensor]) -> int | None:
    """Return the input channels of the first convolution (state dicts begin with it)."""
    return next((w.shape[1] for w in weights.values() if w.dim() == 4), None)


def _parameters(model: type[BaseModel]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.__init__).parameters


def known_args(type: str, args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return those of ``arch.args`` that the model takes: the published constructors ignored all others."""
    parameters = _parameters(MODELS[type])
    return {key: value for key, value in (args or {}).items() if key in parameters}


def infer(
    state_dict: Mapping[str, Tensor], type: str, args: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any], int]:
    """Find out how to build the model of a checkpoint that has no facts of ours: a published one, or bare
    weights.

    Args:
        state_dict: its weights.
        type: ``arch.type`` of its config.
        args: ``arch.args`` of its config. What the model here does not take is left out (the published
            constructors ignored unknown arguments), and where the weights tell another backbone, stem or
            up-sampling than the config, the weights are believed.

    Returns:
        the model's name, the constructor's arguments, the number of classes. For published weights,
        ``published`` is True where the model knows it.

    Raises:
        UserError: the weights are not those of ``type``.
    """
    kind = MODELS.canonical(type)
    weights, rules, parameters = strip_wrappers(state_dict), MODELS[kind].published_names, _parameters(MODELS[kind])
    classes = number_of_classes(kind, weights, rules)
    other = identify(weights)
    if classes is None or (other is not None and other != kind):
        found = f"they look like a published {other}" if other else f"they begin with {_some(list(weights))}"
        raise UserError(f"the weights are not those of {kind} (arch.type): {found}")
    told: dict[str, Any] = {
        "backbone": backbone_of(weights),
        "in_channels": _image_channels(weights),
        "published": has_published_names(weights, rules) or None,
        "pretrained": False,
        "use_deconv": "decon1.weight" in weights or None,
        "stem": "unpadded" if "block0.3.weight" in weights else None,
    }
    told = {key: value for key, value in told.items() if value is not None and key in parameters}
    return kind, known_args(kind, args) | told, classes
