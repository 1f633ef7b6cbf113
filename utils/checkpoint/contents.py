"""Which contents of a checkpoint file can be used, and what they replace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from utils.errors import warn
from utils.files import expand

_LOADERS = ("test_loader", "val_loader", "train_loader")  # each stands in for those before it


def section(raw: Any, *keys: str) -> Mapping[str, Any]:
    """Return the section that ``keys`` lead to; an empty one if there is none, or something else."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    return raw if isinstance(raw, Mapping) else {}


def fit_not_used(state: Mapping[str, Any], predict: Mapping[str, Any]) -> list[str]:
    """Return the fields that were fitted for a checkpoint and have other values in the config's ``predict``."""
    return [name for name, value in section(state, "calibration", "found").items() if predict.get(name) != value]


def malformed(state: Mapping[str, Any]) -> str | None:
    """Return what is malformed in a checkpoint, or None; its contents are used without further checks."""
    for name in ("state_dict", "ema"):
        if state.get(name) is None and name == "ema":
            continue
        weights = state[name]
        if not are_weights(weights):
            return f"expected tensors by name in '{name}', found {type(weights).__name__}{_odd_one(weights)}"
        for key, tensor in weights.items():
            odd = _unusable(tensor)
            if odd:
                return f"'{name}' contains {odd} as {key}, expected dense numbers; it is not a checkpoint of a network"
    for name in ("epoch", "batch", "iteration"):
        number = state.get(name, 0)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**53:
            return f"expected a whole number as '{name}', found {str(number)[:40]!r}"
    for name in ("config", "facts", "calibration"):
        odd = _not_plain(state.get(name), name)
        if odd:
            return odd
    return None


def _odd_one(weights: Any) -> str:
    if not isinstance(weights, Mapping):
        return ""
    odd = next(((k, v) for k, v in weights.items() if not isinstance(v, torch.Tensor) or not isinstance(k, str)), None)
    return f" with {type(odd[1]).__name__} as {str(odd[0])[:60]!r}" if odd else " without any"


def _unusable(tensor: torch.Tensor) -> str | None:
    """Return why a tensor cannot be weights."""
    if tensor.is_meta:
        return "a tensor without numbers (on the meta device)"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return f"a tensor of layout {tensor.layout} and type {tensor.dtype}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"a tensor of {tensor.numel():,} numbers, of which the file contains fewer,"
    return None


def _not_plain(value: Any, where: str, depth: int = 0) -> str | None:
    """Return where something is not plain data (numbers, text, lists and dicts), or is nested too deeply."""
    if depth > 40:
        return f"'{where[:60]}...' is nested too deeply"
    if value is None or isinstance(value, bool | int | float | str):
        return None
    if isinstance(value, Mapping):
        inner = [(f"{where}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(f"{where}[{index}]", item) for index, item in enumerate(value)]
    else:
        kind = "a tensor" if isinstance(value, torch.Tensor) else type(value).__name__
        return f"expected numbers, text, lists and dicts in '{where.partition('.')[0]}', found {kind} as {where}"
    return next((odd for name, item in inner if (odd := _not_plain(item, name, depth + 1))), None)


def are_weights(value: Any) -> bool:
    """Return whether something is tensors by name, and at least one."""
    tensors = isinstance(value, Mapping) and all(isinstance(v, torch.Tensor) for v in value.values())
    return tensors and bool(value) and all(isinstance(name, str) for name in value)


def missing_class_files(state: Mapping[str, Any], raw: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    """Return overrides that give loaders the class names of the checkpoint where the file with the names is missing.

    Only for the file that the run itself used: another one that is missing is a mistake.

    Args:
        state: content of the checkpoint.
        raw: content of the config that the checkpoint is used with.
        stages: which loaders are built ("train", "val", "test").
    """
    names = section(state, "facts").get("class_names")
    if not isinstance(names, list | tuple):
        return []
    used = {_class_file(state.get("config"), field)[0] for field in _LOADERS}
    overrides = []
    for field in sorted({_loader(raw, stage) for stage in stages}):
        file, folder = _class_file(raw, field)
        if file is None or file not in used or expand(file).is_file() or (expand(folder) / file).is_file():
            continue
        warn(f"{field}: there is no {file} in {folder}; using the class names in the checkpoint")
        overrides.append(f"{field}.args.classes={json.dumps(list(names))}")
    return overrides


def _loader(raw: Mapping[str, Any], stage: str) -> str:
    """Return the field of the loader that is built for a stage, as ``Config.loader_field``."""
    fields = _LOADERS[_LOADERS.index(f"{stage}_loader") :]
    return next((field for field in fields if raw.get(field)), fields[-1])


def _class_file(raw: Any, field: str) -> tuple[str | None, str]:
    """Return the class file that a loader's arguments name, if they do, and its data folder."""
    args = section(raw, field, "args")
    file, folder = args.get("classes"), args.get("data_dir")
    return (file if isinstance(file, str) else None), (folder if isinstance(folder, str) else ".")
