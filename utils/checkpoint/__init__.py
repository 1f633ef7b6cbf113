"""Write, read and understand checkpoints.

A checkpoint of ours is one file with plain tensors, numbers, strings, lists and dicts::

    format      2
    arch        the model's name in the config
    epoch       epochs finished; batch: batches done in the next one; iteration: batches since the start
    state_dict  the model's weights, without any wrapper's prefix
    ema         averaged weights, where the run keeps them: those are validated, tested and deployed
    optimizer, scheduler, scaler, monitor_best, not_improved_count: the state of the run
    processes   per process: states of the random generators, scores of the epoch so far
    config      the resolved config
    facts       what is needed to use the model without its data set: classes, palette, mean, std, ignore index

Files are written to a temporary name, synced and renamed: a checkpoint is there whole or not at all. Everything
is read with ``weights_only=True``, so a file cannot run code.
"""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils import config as configs
from utils.config.checks import dead_arguments
from utils.config.schema import Config
from utils.errors import UserError
from utils.facts import Facts
from utils.predict import Activation
from utils.signatures import parameters

FORMAT = 2


@dataclass
class LoadedModel:
    """A model ready for use: in evaluation mode, on its device, with what its outputs mean."""

    model: nn.Module
    facts: Facts
    config: Config
    activation: Activation
    path: Path
    epoch: int


# ---------------------------------------------------------------------------------------------------
# Files


def save(state: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that ``path`` holds either the old file or the whole new one, whatever happens.

    Raises:
        UserError: the disk is full or the folder cannot be written; an earlier file at ``path`` is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        kept = "; the earlier file there is untouched" if path.exists() else ""
        raise UserError(f"{path}: the checkpoint could not be written: {_write_failure(error)}{kept}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of a run that was killed while it saved."""
    for path in folder.glob(".*.pth.*"):
        with suppress(OSError):
            path.unlink()


def _write_failure(error: BaseException) -> str:
    """Return why writing failed; torch's zip writer buries the reason under an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return "the disk is full" if cause.errno == errno.ENOSPC else cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return f"{error} (is the disk full?)"


def link(source: Path, path: Path) -> None:
    """Make ``path`` another name of ``source``, replacing what it named; a copy where links are not possible."""
    temporary = path.with_name(f".{path.name}.link")
    with suppress(OSError):
        temporary.unlink()
    try:
        os.link(source, temporary)
        os.replace(temporary, path)
    except OSError:
        save(read(source), path)
    finally:
        # Still there where both names are of one file already: then a rename does nothing.
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint file holds, tensors on the CPU, without running any code of the file.

    A bare state dict (the weights alone) is returned as ``{"state_dict": ...}``.

    Raises:
        UserError: no such file, not a checkpoint, cut short, or one that would need to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {_what_is_there(path)}")
    _check_container(path)
    try:
        with torch.serialization.safe_globals(_numpy_scalars()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what torch warns of ends in an error of ours
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, error)) from None
    except Exception as error:  # bytes gone wrong end in nearly any exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        size = f"{path.stat().st_size:,} bytes"
        raise UserError(f"{path}: not a checkpoint, or cut short ({size}): {reason}; copy or train it again") from None
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: expected a checkpoint (a dict with 'state_dict'), found {type(state).__name__}")
    if "state_dict" not in state:
        if not _are_weights(state):
            keys = ", ".join(map(str, list(state)[:5])) or "none"
            raise UserError(f"{path}: expected 'state_dict' or the weights alone, found the keys {keys}")
        state = {"state_dict": state}
    if not _are_weights(state["state_dict"]):
        raise UserError(f"{path}: expected tensors by name in 'state_dict', found {type(state['state_dict']).__name__}")
    return dict(state)


def _what_is_there(path: Path) -> str:
    """Return why a path is no checkpoint file, with the checkpoints that are near it."""
    folder = path if path.is_dir() else path.parent
    found = sorted(p.name for p in folder.glob("*.pth")) if folder.is_dir() else []
    there = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    if path.is_dir():
        return f"is a folder; in it: {there}; give one of them" if found else "is a folder, and no checkpoint is in it"
    if "..." in path.parts:
        return 'there is no such checkpoint file: "..." stands for the folder of a run, which training prints as "run"'
    return "there is no such checkpoint file" + (f"; in that folder: {there}" if found else "")


def _are_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())


def _check_container(path: Path) -> None:
    """Raise UserError unless the file begins as torch writes files: a zip archive, or a pickle of old versions."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return
    what = f"it begins with {start[:24]!r}" if start else "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        what = "this is a Git LFS pointer; fetch the file itself with git lfs pull"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what = "this is a web page; the download went wrong"
    raise UserError(f"{path}: not a checkpoint: {what}")


def _refusal(path: Path, error: Exception) -> str:
    text = str(error)
    if "GLOBAL " not in text:
        return (
            f"{path}: refused: it is not made of tensors, numbers, text, lists and dicts as torch.save writes them, "
            "and anything else in such a file may run code; copy or train it again"
        )
    named = text.split("GLOBAL ")[1].split(" ")[0]
    return (
        f"{path}: refused: reading it would run code ({named}). A checkpoint may hold tensors, numbers, text, "
        "lists and dicts only. If you trust where it comes from, load it once with "
        "torch.load(..., weights_only=False) and save its 'state_dict' alone"
    )


def _numpy_scalars() -> list[Any]:
    """Return what published checkpoints need beside tensors: a numpy scalar (the best score), as numpy 1 named it."""
    scalar = np.float64(0).__reduce__()[0]
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)),
    ]


# ---------------------------------------------------------------------------------------------------
# Meaning


def config_of(
    state: Mapping[str, Any],
    path: str | Path,
    given: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    stages: Sequence[str] = (),
) -> Config:
    """Return the config a checkpoint is used with: its own, replaced by ``given`` except ``arch``, then overridden.

    Args:
        state: what :func:`read` returned.
        path: its file, for messages.
        given: another config file.
        overrides: ``path=value`` items, applied last.
        stages: the loaders that will be built, whose arguments and folders are checked ("train", "val", "test").

    Raises:
        UserError: no config anywhere, another ``arch`` in the given config, or any problem of the config.
    """
    models, loaders = import_module("models").MODELS, import_module("dataloaders").LOADERS
    stored = state.get("config")
    if stored is not None and not isinstance(stored, Mapping):
        raise UserError(f"{path}: its config is no section but {type(stored).__name__}; give one with --config")
    if given is not None:
        # A run may have been started with an override of its arch, which then is given again.
        raw = configs.override(configs.read(given), [item for item in overrides if item.startswith(("arch.", "arch="))])
        source = str(given)
        own = (stored or {}).get("arch")
        if "arch" in raw and own is not None and not _same_arch(own, raw["arch"], models):
            raise UserError(
                f"{given}: its arch is {raw['arch']}, the checkpoint {path} has {own}; "
                "the model of a checkpoint cannot be changed: give the config of that run, repeat the --set that "
                "changed its arch, or name the checkpoint and leave -c out"
            )
        if own is not None:
            raw["arch"] = own
    elif stored is not None:
        raw, source = dict(stored), f"the config in {path}" + (" with what --set changes" if overrides else "")
    else:
        raise UserError(f"{path}: holds weights alone and no config; give the config of its run with --config")
    if "facts" not in state:
        raw["arch"] = _without_ignored(raw.get("arch"), models)
    return configs.resolve(raw, overrides, source=source, models=models, loaders=loaders, stages=stages)


def _without_ignored(arch: Any, models: Mapping[str, Any]) -> Any:
    """Return a published ``arch`` without the arguments that the published constructors ignored."""
    if not isinstance(arch, Mapping) or arch.get("type") not in models:
        return arch
    upstream = import_module("models.upstream")
    return {**arch, "args": upstream.known_args(arch["type"], arch.get("args"))}


def _same_arch(a: Any, b: Any, models: Mapping[str, Any]) -> bool:
    """Return whether two ``arch`` sections build the same network, whether or not they spell out defaults."""

    def essence(arch: Any) -> Any:
        if not isinstance(arch, Mapping) or arch.get("type") not in models:
            return arch
        args = dict(arch.get("args") or {})
        for name in dead_arguments(arch["type"], args, models):
            del args[name]
        defaults = {name: p.default for name, p in parameters(models[arch["type"]]).items()}
        # Where the weights came from before training does not change the model.
        return arch["type"], {name: value for name, value in (defaults | args).items() if name != "pretrained"}

    return essence(a) == essence(b)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    config: Config | None = None,
) -> LoadedModel:
    """Build the model of a checkpoint, ours or a published one, and load its weights.

    Args:
        path: the checkpoint.
        device: where the model goes.
        config: used in place of the checkpoint's own (see :func:`config_of`); needed for a file of bare weights.

    Raises:
        UserError: an unusable file, or weights that do not fit, saying which and probably why.
    """
    state = read(path)
    if config is None:
        config = config_of(state, path)
    return build_model(state, path, config, device)


def build_model(
    state: Mapping[str, Any], path: str | Path, config: Config, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Do what :func:`load_model` does for a checkpoint that was read already."""
    # The one way from utils into the rooms above it: a checkpoint names a model, and models are looked up there.
    models = import_module("models")
    upstream = import_module("models.upstream")
    from utils.losses import LOSSES

    weights = state.get("ema") or state["state_dict"]
    try:
        if "facts" in state:
            facts = _stored_facts(state["facts"])
            arch, args, num_classes = config.arch.type, arch_arguments(config, facts), facts.num_classes
        else:
            arch, args, num_classes = upstream.infer(weights, config.arch.type, config.arch.args)
            facts = _facts_of_config(config, num_classes)
        if "pretrained" in args:
            args["pretrained"] = False  # the checkpoint's weights replace them anyway
        model = models.build(arch, num_classes, **args)
        models.load_weights(model, weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return LoadedModel(
        model=model.to(device).eval(),
        facts=facts,
        config=config,
        activation=LOSSES[config.loss.type].activation,
        path=Path(path),
        epoch=int(state.get("epoch", 0)),
    )


def arch_arguments(config: Config, facts: Facts) -> dict[str, Any]:
    """Return the model's arguments, with the images' channels where the config leaves them to the data."""
    args = dict(config.arch.args)
    channels = args.get("in_channels", facts.in_channels)
    if channels != facts.in_channels:
        raise UserError(
            f"arch.args.in_channels: found {channels}, the images have {facts.in_channels} channels "
            "(train_loader.args.in_channels); give both the same"
        )
    return args if facts.in_channels == 3 else args | {"in_channels": channels}


def _stored_facts(values: Any) -> Facts:
    try:
        return Facts.from_dict(values)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"its 'facts' (classes, palette, mean, std) are not as they were written: {error}") from None


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights of a checkpoint, ours or a published one, into a model of the same architecture.

    Raises:
        UserError: an unusable file, or weights that do not fit, saying which and probably why.
    """
    state = read(path)
    fill(model, state.get("ema") or state["state_dict"], path)


def fill(model: nn.Module, weights: Mapping[str, Any], source: str | Path) -> None:
    """Load weights into a model; ``source`` is where they come from, for the message of the :class:`UserError`."""
    try:
        import_module("models").load_weights(model, weights)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _facts_of_config(config: Config, num_classes: int) -> Facts:
    """Return the facts for a checkpoint that carries none: those of the data set its config names."""
    dataset = import_module("dataloaders").LOADERS[config.train_loader.type]
    known = signature(dataset.facts_for).parameters
    args = {name: value for name, value in config.train_loader.args.items() if name in known}
    try:
        facts = Facts.of(dataset.facts_for(**args | {"ignore_index": config.ignore_index}))
    except (TypeError, ValueError) as error:
        raise UserError(f"train_loader.args: {error}") from None
    if facts.num_classes != num_classes:
        raise UserError(
            f"its weights have {num_classes} classes, its data set {config.train_loader.type} has "
            f"{facts.num_classes}; give the config it was trained with (--config)"
        )
    return facts
