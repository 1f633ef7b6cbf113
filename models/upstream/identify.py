"""Identify a checkpoint that has no facts: its model, its backbone, the number of classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models import MODELS
from models.upstream.names import Rules, candidates, strip_wrappers
from utils.errors import UserError, listed

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


def identify(weights: Mapping[str, Tensor]) -> str | None:
    """Return the model whose published checkpoints have these (unwrapped) names, if any."""
    found = None
    for name in MODELS:
        mark, (classifier, _) = MODELS[name].published_mark, MODELS[name].published_classifier
        if mark in weights and classifier in weights:
            found = name  # the last one: DeepLab_DUC_HDC has all that DeepLab has
    return found


def has_published_names(weights: Mapping[str, Tensor], rules: Rules) -> bool:
    """Return whether the (unwrapped) names are published ones that differ from ours."""
    return any(c is not None for key in weights for c in candidates(key, rules))


def number_of_classes(kind: str, weights: Mapping[str, Tensor], rules: Rules) -> int | None:
    """Return the number of classes that weights under recorded or our names are for."""
    classifier, axis = MODELS[kind].published_classifier
    for key in (classifier, *candidates(classifier, rules)):
        if key is not None and key in weights:
            return weights[key].shape[axis]
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


def image_channels(weights: Mapping[str, Tensor]) -> int | None:
    """Return the input channels of the first convolution (state dicts begin with it)."""
    return next((w.shape[1] for w in weights.values() if w.dim() == 4), None)


def known_args(type: str, args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return those of ``arch.args`` that the model takes: the published constructors ignored all others."""
    known = MODELS.arguments(type).model_fields
    return {key: value for key, value in (args or {}).items() if key in known}


def infer(
    state_dict: Mapping[str, Tensor], type: str, args: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any], int]:
    """Find out how to build the model of a checkpoint that has no facts: a published checkpoint, or bare weights.

    Entries of ``arch.args`` that the model here does not accept are left out (the published constructors ignored
    unknown arguments). If the weights show another backbone, stem or up-sampling than the config, the weights decide.

    Returns:
        the model's name, the constructor's arguments, the number of classes. For published weights,
        ``published`` is True where the model knows it.

    Raises:
        UserError: the weights are not those of ``type``.
    """
    kind = MODELS.canonical(type)
    weights, rules = strip_wrappers(state_dict), MODELS[kind].published_names
    classes = number_of_classes(kind, weights, rules)
    other = identify(weights)
    if classes is None or (other is not None and other != kind):
        found = f"they look like a published {other}" if other else f"their names begin with {listed(weights, 3)}"
        raise UserError(f"the weights are not those of {kind} (arch.type): {found}")
    in_weights: dict[str, Any] = {
        "backbone": backbone_of(weights),
        "in_channels": image_channels(weights),
        "published": has_published_names(weights, rules) or MODELS[kind].published_entry in weights or None,
        "pretrained": False,
        "use_deconv": "decon1.weight" in weights or None,
        "stem": "unpadded" if "block0.3.weight" in weights else None,
    }
    in_weights = {key: value for key, value in in_weights.items() if value is not None}
    return kind, known_args(kind, dict(args or {}) | in_weights), classes
