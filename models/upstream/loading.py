"""Load weights under our names or other names: a whole checkpoint, or the matching weights (fine-tuning)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from base.base_model import BaseModel
from models import MODELS
from models.backbones.common import adapt_first_conv, misfits
from models.upstream.identify import backbone_of, has_published_names, identify, image_channels, number_of_classes
from models.upstream.names import strip_wrappers, translate
from utils.errors import UserError, listed, warn

#: Where our networks keep what other programs have alone, or under a prefix of theirs.
OUR_PREFIXES = ("", "backbone.", "network.", "backbone.network.")
#: A transfer that uses less than this share of the file's tensors, and of the model's, is refused.
LEAST_SHARE = 0.2


def load_weights(model: BaseModel, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights under our names or the published ones, with or without ``module.``, into ``model``.

    Raises:
        UserError: entries are missing, unknown or of another shape; the message names them and the probable reason.
    """
    own = model.state_dict()
    weights = translate(model, state_dict)
    missing, unexpected, reshaped = misfits(own, weights)
    if missing or unexpected or reshaped:
        shapes = [f"{k}: found {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}" for k in reshaped]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        facts = "; ".join(f"{len(found)} {what} ({listed(found, 3)})" for what, found in kinds.items() if found)
        why = "; ".join(reasons(model, strip_wrappers(state_dict)))
        raise UserError(
            f"the weights do not fit {type(model).__name__}: {facts}" + (f". Probably: {why}" if why else "")
        )
    model.load_state_dict(weights, strict=False)  # strict but for num_batches_tracked, see above


def reasons(model: BaseModel, weights: Mapping[str, Tensor]) -> list[str]:
    """Return what may explain that ``weights`` do not fit ``model``, most telling first."""
    kind = type(model).__name__
    if "fc.weight" in weights or "classifier.6.weight" in weights:
        return ["these are an ImageNet classifier's weights: name the file in arch.args.pretrained"]
    other = identify(weights)
    if other is not None and other != kind:
        return [f"these are the weights of a published {other} (arch.type)"]
    found = []
    ours, theirs = backbone_of(model.state_dict()), backbone_of(weights)
    if theirs is not None and ours is not None and ours != theirs:
        found.append(f"the weights have the backbone {theirs}, the model has {ours} (arch.args.backbone)")
    classes = number_of_classes(kind, weights, model.published_names)
    if classes is not None and classes != model.num_classes:
        found.append(f"the weights are for {classes} classes, the model has {model.num_classes}")
    channels = image_channels(weights)
    if channels is not None and channels != model.in_channels and not found:
        found.append(f"the weights are for images with {channels} channels, the model for {model.in_channels}")
    is_published = has_published_names(weights, model.published_names) or model.published_entry in weights
    if is_published and not model.published and "published" in MODELS.arguments(kind).model_fields:
        found.append("they have the published form: build the model with published: true")
    return found


# -- fine-tuning -----------------------------------------------------------------------------------------------


class Transfer(NamedTuple):
    """What :func:`transfer` did with each tensor, by name."""

    taken: tuple[str, ...]  # loaded as they are
    adapted: tuple[str, ...]  # first convolutions, fitted to another number of image channels
    by_class: tuple[str, ...]  # heads for other classes, of which those with the same name are loaded
    reshaped: tuple[str, ...]  # with another shape in the file; they stay random
    missing: tuple[str, ...]  # not in the file; they stay random
    unused: tuple[str, ...]  # in the file only

    def text(self) -> str:
        """Return one line per kind, names grouped by the part of the network."""
        kinds = (
            *("taken", "first layer, adapted to the image channels", "classes with the same name in both"),
            *("random: another shape in the file", "random: not in the file", "in the file, not used"),
        )
        return "\n".join(f"    {what}: {_grouped(names)}" for what, names in zip(kinds, self, strict=True) if names)


def transfer(
    model: BaseModel, state_dict: Mapping[str, Tensor], classes: Sequence[str] = (), theirs: Sequence[str] = ()
) -> Transfer:
    """Load the matching weights into ``model``; classes, channels and parameter names may differ.

    Tries our names, the published ones, and names without a prefix that many of them share (``model.``, ``encoder.``),
    so that encoders of torchvision, timm and segmentation_models_pytorch match ours. A first convolution for another
    number of channels is adapted (:func:`models.backbones.common.adapt_first_conv`). Of a head for other classes, or
    for the same in another order, those that both know by name are loaded. Whatever does not fit keeps its values.

    ``classes``, ``theirs``: the names of the model's classes, and of those that the weights were trained on.

    Raises:
        UserError: too few weights fit; the message says what the weights may be.
    """
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    weights = strip_wrappers(state_dict)

    def fitting(names: Mapping[str, str]) -> int:
        return sum(key in own and weights[source].shape == own[key].shape for key, source in names.items())

    names = max(_renamings(model, own, weights), key=fitting)
    taken = [key for key in own if key in names and weights[names[key]].shape == own[key].shape]
    if len(taken) < max(1, LEAST_SHARE * min(len(own), len(weights))):
        why = "; ".join(reasons(model, weights))
        raise UserError(
            f"only {len(taken)} of {len(weights)} tensors fit {type(model).__name__}; the file begins with "
            f"{listed(weights, 3)}" + (f". Probably: {why}" if why else "")
        )
    by_class: dict[str, Tensor] = {}
    for key, axis in class_axes(model) if _moved(classes, theirs) else ():
        if key in names and key not in by_class:
            new = _by_class(weights[names[key]], own[key], classes, theirs, axis)
            by_class |= {} if new is None else {key: new}
    taken = [key for key in taken if key not in by_class]
    state = {key: weights[names[key]] for key in taken} | by_class
    adapted: list[str] = []
    for key in [key for key in own if key in names and key not in state]:
        new = _adapted(weights[names[key]], own[key], model.in_channels)
        if new is not None:
            state[key] = new
            adapted.append(key)
    model.load_state_dict(state, strict=False)
    known = {names[key] for key in own if key in names}
    other = [key for key in own if key in names and key not in state]
    return Transfer(
        taken=tuple(taken),
        adapted=tuple(adapted),
        by_class=tuple(f"{key} ({len(set(classes) & set(theirs))} of {len(classes)})" for key in by_class),
        reshaped=tuple(f"{key} ({_size(weights[names[key]])} in the file, {_size(own[key])} here)" for key in other),
        missing=tuple(key for key in own if key not in names),
        unused=tuple(key for key in weights if key not in known and not key.endswith("num_batches_tracked")),
    )


def _renamings(model: BaseModel, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterable[dict[str, str]]:
    """Yield candidate maps from our names to those in the file."""
    by_identity = {id(tensor): key for key, tensor in weights.items()}
    yield {key: by_identity[id(tensor)] for key, tensor in translate(model, weights).items()}
    # timm writes stages_0 for stages.0 where it returns features.
    plain = {key.replace(".", "_"): key for key in own}
    starts = Counter(".".join(key.split(".")[:depth]) + "." for key in weights for depth in (1, 2, 3))
    for theirs in ("", *(prefix for prefix, count in starts.items() if count >= LEAST_SHARE * len(weights))):
        for ours in dict.fromkeys((*OUR_PREFIXES, f"{model.backbone_name}.")):
            renamed = {}
            for key in weights:
                name = plain.get((ours + key.removeprefix(theirs)).replace(".", "_"))
                if key.startswith(theirs) and name is not None:
                    renamed[name] = key
            yield renamed


def _adapted(weight: Tensor, like: Tensor, in_channels: int) -> Tensor | None:
    """Return a convolution's weights for the model's image channels, if only these differ."""
    if not weight.dim() == like.dim() == 4 or like.shape[1] != in_channels:
        return None
    adapted = adapt_first_conv(weight, in_channels)
    return adapted if adapted.shape == like.shape else None


def _moved(classes: Sequence[str], theirs: Sequence[str]) -> bool:
    """Return whether there are classes that both know, and other numbers for them or another number of classes."""
    places = [(i, theirs.index(name)) for i, name in enumerate(classes) if name in theirs]
    return bool(places) and (len(classes) != len(theirs) or any(i != j for i, j in places))


def class_axes(model: BaseModel) -> list[tuple[str, int]]:
    """Return the parameters of a network's heads, each with the axis of its classes.

    Found by trying: a class's part of a head changes the logits of this class only. Parameters without any effect
    belong to heads that only training uses, if they have an axis of this length. For one class, all parameters with an
    effect are returned, with each axis. The result is empty, with a warning, if the network cannot be run on a small
    image.
    """
    count, training = model.num_classes, model.training
    side = -(-64 // model.size_divisor) * model.size_divisor
    images = torch.linspace(-1, 1, model.in_channels * side * side).view(1, model.in_channels, side, side)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        with torch.enable_grad():
            logits = model.eval()(images.to(next(model.parameters())))
            gradients = torch.autograd.grad(logits[:, 0].sum(), list(parameters.values()), allow_unused=True)
    except UserError as error:
        warn(f"the weights of the head are not put into the order of the classes: {error}")
        return []
    finally:
        model.train(training)
    found: list[tuple[str, int]] = []
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        for axis, length in enumerate(parameter.shape[:2]):
            parts = [] if gradient is None or length % count else gradient.movedim(axis, 0).chunk(count)
            is_head = parts[0].any() and not any(part.any() for part in parts[1:]) if parts else length == count
            if is_head and (parts or gradient is None):
                found.append((name, axis))
    return found


def _by_class(weight: Tensor, like: Tensor, classes: Sequence[str], theirs: Sequence[str], axis: int) -> Tensor | None:
    """Return ``like`` with the parts of the classes that both know; None if the parts have other shapes."""
    new = like.clone()
    parts = new.movedim(axis, 0).unflatten(0, (len(classes), -1))
    if weight.dim() != like.dim() or weight.shape[axis] % len(theirs):
        return None
    their_parts = weight.movedim(axis, 0).unflatten(0, (len(theirs), -1))
    if parts.shape[1:] != their_parts.shape[1:]:
        return None
    for name in set(classes) & set(theirs):
        parts[classes.index(name)] = their_parts[theirs.index(name)].to(new)
    return new


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _grouped(names: tuple[str, ...]) -> str:
    """Return the count and the names; if there are many, the parts of the network with their counts."""
    if len(names) <= 6:
        return f"{len(names)}: {', '.join(names)}"
    parts = Counter(name.partition(".")[0] for name in names)
    return f"{len(names)}: " + ", ".join(f"{part} ({count})" for part, count in parts.items())
