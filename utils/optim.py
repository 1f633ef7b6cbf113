"""Optimizers: any class of torch.optim by name, on the model's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from utils.errors import UserError, out_of_memory
from utils.registry import Registry


def subclasses_in(module: Any, parent: type) -> dict[str, type]:
    """Return the public proper subclasses of ``parent`` that ``module`` offers, by name."""
    found = {name: getattr(module, name) for name in sorted(dir(module)) if not name.startswith("_")}
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, type) and issubclass(entry, parent) and entry is not parent
    }


OPTIMIZERS = Registry(
    "optimizer",
    subclasses_in(torch.optim, Optimizer),
    refused={
        "LBFGS": "it evaluates the loss several times per step; use SGD or AdamW",
        "SparseAdam": "it needs sparse gradients, but convolutions have dense ones; use Adam or AdamW",
    },
    provided=("params", "differentiable", "capturable"),  # the last two do not work in an ordinary training loop
)


def build(
    type: str,
    model: nn.Module,
    differential_lr: bool = False,
    backbone_lr_factor: float = 0.1,
    no_decay_on_norm_and_bias: bool = False,
    **args: Any,
) -> Optimizer:
    """Return the optimizer ``torch.optim.<type>`` for the trainable parameters of ``model``.

    Args:
        type: name of a class of torch.optim.
        model: with ``differential_lr``, it has ``get_decoder_params()`` and ``get_backbone_params()``, disjoint
            and complete.
        differential_lr: two groups, "decoder" and then "backbone" (the order of published checkpoints), the
            backbone at ``backbone_lr_factor`` times the learning rate. Else one group, "all".
        backbone_lr_factor: >= 0.
        no_decay_on_norm_and_bias: parameters with at most one axis (biases, the scales and shifts of
            normalization layers, slopes of PReLU) form separate groups, "<name>_no_decay", with weight
            decay 0, each after its own group.
        args: of the optimizer's constructor; lists become tuples.

    Every group has a ``"name"``. Parameters with ``requires_grad`` False and empty groups are left out.

    Raises:
        UserError: there is no such optimizer.
        ValueError: an argument it does not take, or a value out of range; no trainable parameter;
            parameter groups that overlap or leave out a trainable parameter.
    """
    OPTIMIZERS.check(type, args)
    fields = OPTIMIZERS.arguments(type).model_fields
    # JSON knows no tuples; torch asks for them (betas, etas, eps of Adafactor).
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    groups = _groups(model, differential_lr)
    if no_decay_on_norm_and_bias:
        if "weight_decay" not in fields:
            raise ValueError(f"no_decay_on_norm_and_bias: {type} has no weight decay")
        groups = _split_decay(groups)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameter")
    if differential_lr:
        lr = args.get("lr", fields["lr"].default)
        for group in groups:
            group["lr"] = lr * backbone_lr_factor if group["name"].startswith("backbone") else lr
    return OPTIMIZERS[type](groups, **args)


def stand_in() -> Any:
    """Return an object that :func:`build` takes for a network: one small parameter in each part."""
    # Matrices: some optimizers take nothing else.
    decoder, backbone = (torch.nn.Parameter(torch.zeros(1, 1)) for _ in range(2))
    return SimpleNamespace(
        parameters=lambda: [decoder, backbone],
        get_decoder_params=lambda: [decoder],
        get_backbone_params=lambda: [backbone],
    )


def restore(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the saved state of an optimizer of the same type, but keep the arguments that ``optimizer`` has.

    Raises:
        UserError: the saved parameter groups differ, or the optimizer cannot take a step from the saved state.
    """
    groups = optimizer.param_groups
    mine, theirs = ([(g.get("name"), len(g["params"])) for g in side] for side in (groups, state["param_groups"]))
    if mine != theirs:
        raise UserError(
            f"optimizer: the parameter groups are {_named(mine)}; in the checkpoint they are {_named(theirs)}. "
            "A resumed run keeps its differential_lr and no_decay_on_norm_and_bias. To change them, start a new run "
            "from the weights (train.py --config CONFIG --weights CHECKPOINT)"
        )
    arguments = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    optimizer.load_state_dict(dict(state))
    for group, own in zip(optimizer.param_groups, arguments, strict=True):
        group.update(own)
    try:
        _rehearse(optimizer)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"optimizer: {optimizer.__class__.__name__} with the arguments of the config cannot continue from the "
            f"state in the checkpoint ({error.__class__.__name__}: {str(error)[:200]}). A resumed run keeps arguments "
            "that the state depends on, such as amsgrad or centered. If they are unchanged, the file is malformed. "
            "To start a new run from its weights: train.py --config CONFIG --weights CHECKPOINT"
        ) from None


def _rehearse(optimizer: Optimizer) -> None:
    """Take a step with a copy of each parameter and its state, one at a time: the optimizer itself checks neither."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                continue
            copy = nn.Parameter(torch.zeros_like(parameter))
            copy.grad = torch.zeros_like(parameter)
            trial = optimizer.__class__([group | {"params": [copy]}])  # type: ignore[call-arg]  # all take the groups
            trial.state[copy] = deepcopy(optimizer.state[parameter])
            trial.step()


def _named(groups: Iterable[tuple[str | None, int]]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in groups)


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the current learning rate of each group by its name, for logs."""
    return {
        group.get("name", f"group{index}"): float(group["lr"]) for index, group in enumerate(optimizer.param_groups)
    }


def _groups(model: Any, differential_lr: bool) -> list[dict[str, Any]]:
    """Return the parameter groups; raise ValueError unless they contain each trainable parameter exactly once."""
    everything = [p for p in model.parameters() if p.requires_grad]
    if not differential_lr:
        return [{"params": everything, "name": "all"}]
    groups = [
        {"params": [p for p in params() if p.requires_grad], "name": name}
        for name, params in (("decoder", model.get_decoder_params), ("backbone", model.get_backbone_params))
    ]
    covered = [id(p) for group in groups for p in group["params"]]
    if len(set(covered)) < len(covered):
        raise ValueError(f"{model.__class__.__name__}'s parameter groups contain a parameter twice")
    left_out = {id(p) for p in everything} - set(covered)
    if left_out:
        names = [name for name, p in model.named_parameters() if id(p) in left_out]
        raise ValueError(f"{model.__class__.__name__}'s parameter groups leave out {', '.join(names)}")
    return groups


def _split_decay(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``groups``, each split into matrices and filters, and what has at most one axis."""
    split = []
    for group in groups:
        split.append({**group, "params": [p for p in group["params"] if p.ndim > 1]})
        flat = [p for p in group["params"] if p.ndim <= 1]
        split.append({"params": flat, "name": f"{group['name']}_no_decay", "weight_decay": 0.0})
    return split
