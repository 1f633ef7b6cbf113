"""Write, read and understand checkpoints.

A checkpoint is one file with plain tensors, numbers, strings, lists and dicts::

    format      2
    arch        the model's name in the config
    epoch       epochs finished; batch: batches done in the next one; iteration: batches since the start
    state_dict  the model's weights, without any wrapper's prefix
    ema         averaged weights, where the run keeps them: those are validated, tested and deployed
    optimizer, scheduler, scaler, monitor_best, not_improved_count: the state of the run
    processes   per process: states of the random generators, scores of the epoch so far
    config      the resolved config
    facts       what is needed to use the model without its data set: classes, palette, mean, std, ignore index

Files are written under a temporary name, synced and renamed, so there are no incomplete checkpoints. All files are
read with ``weights_only=True``, so they cannot run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import config as configs
from utils import finite
from utils.checkpoint.contents import fit_not_used, missing_class_files, section
from utils.checkpoint.files import link, read, remove_leftovers, save
from utils.config.data_checks import first_difference
from utils.config.published import dead_arguments
from utils.config.schema import Config
from utils.errors import UserError, listed, warn
from utils.facts import Facts
from utils.images import ValueRange
from utils.losses import LOSSES
from utils.predict import Activation
from utils.predict.network import Ensemble, Network
from utils.registry import Registry

__all__ = ["EXTERNAL", "FORMAT", "LoadedModel", "build_model", "config_of", "fit_not_used", "link"]
__all__ += ["load_model", "load_weights", "network_of", "read", "remove_leftovers", "save", "start_from"]

FORMAT = 2
#: The type of ``arch`` that builds networks by code, or from files, outside this project.
EXTERNAL = "External"


@dataclass
class LoadedModel:
    """A model ready for use: in evaluation mode, on its device, with its class facts.

    ``others`` are further members of an ensemble; the first member gives classes, config and options.
    """

    model: nn.Module
    facts: Facts
    config: Config
    activation: Activation
    path: Path
    epoch: int
    others: Sequence[LoadedModel] = ()

    @property
    def paths(self) -> list[Path]:
        """The files of all members."""
        return [self.path, *(other.path for other in self.others)]

    def network(self, device: str | torch.device | None = None, **changes: Any) -> Network | Ensemble:
        """Return the function from images to probabilities, of all members; arguments as :meth:`single`."""
        own = self.single(device, **changes)
        return Ensemble((own, *(other.single(device, **changes) for other in self.others))) if self.others else own

    def single(self, device: str | torch.device | None = None, **changes: Any) -> Network:
        """Return the function from images to probabilities of this model alone, set up as the config says.

        Args:
            device: where the model is moved to; None: it stays where it is.
            changes: other values for fields of :class:`utils.predict.network.Network`.
        """
        channels_last = changes.get("channels_last", self.config.trainer.channels_last)
        layout = torch.channels_last if channels_last else torch.preserve_format
        model = self.model.to(device).to(memory_format=layout)
        where = torch.device(device) if device is not None else next(model.parameters()).device
        return Network.from_config(model, self.facts, self.activation, self.config, device=where, **changes)


def config_of(
    state: Mapping[str, Any],
    path: str | Path,
    given: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    stages: Sequence[str] = (),
    trust_code: bool = False,
) -> Config:
    """Return the config a checkpoint is used with: its own, replaced by ``given`` except ``arch``, then overridden.

    Args:
        state: what :func:`read` returned.
        path: its file, for messages.
        given: another config file.
        overrides: ``path=value`` items, applied last.
        stages: the loaders that will be built, whose arguments and folders are checked ("train", "val", "test").
        trust_code: whether a network of the type External may come from the checkpoint's config alone: building it
            runs the code that the config names.

    Raises:
        UserError: no config anywhere, a network that runs code, another ``arch`` in the given config, or any problem
            of the config.
    """
    models, loaders = import_module("models").MODELS, import_module("dataloaders").LOADERS
    stored = state.get("config")
    if stored is not None and not isinstance(stored, Mapping):
        raise UserError(
            f"{path}: expected its config to be an object, found {type(stored).__name__}; pass a config with --config"
        )
    if given is not None:
        # A run may have been started with an override of its arch, which is then repeated.
        raw = configs.override(configs.read(given), [item for item in overrides if item.startswith(("arch.", "arch="))])
        source = str(given)
        own = _network_in(state, raw) or (stored or {}).get("arch")
        trust_code = trust_code or "arch" in raw or "network" in state
        if "arch" in raw and own is not None and "network" not in state and not _same_arch(own, raw["arch"], models):
            raise UserError(
                f"{given}: its arch is {raw['arch']}, but the checkpoint {path} has {own}. The model of a "
                "checkpoint cannot be changed: pass the config of that run, repeat the --set that changed its "
                "arch, or leave -c out"
            )
        if own is not None:
            raw["arch"] = own
    elif stored is not None:
        raw, source = dict(stored), f"the config in {path}" + (" with what --set changes" if overrides else "")
    else:
        what = "a network" if "network" in state else "weights alone"
        raise UserError(f"{path} contains {what} but no config; pass the config of its run with --config")
    _refuse_code(raw.get("arch"), path, trust_code)
    if "facts" not in state:
        raw["arch"] = _without_ignored(raw.get("arch"), models)
    if stages:
        overrides = [*overrides, *missing_class_files(state, configs.override(raw, overrides), stages)]
    return configs.resolve(raw, overrides, source=source, models=models, loaders=loaders, stages=stages)


def _network_in(state: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the ``arch`` of a file that contains a whole network, with the arguments that the config gives for it."""
    if "network" not in state:
        return None
    args = section(raw, "arch", "args") if section(raw, "arch").get("type") == EXTERNAL else {}
    kept = {name: args[name] for name in ("in_channels", "outputs", "size_divisor", "resize") if name in args}
    return {"type": EXTERNAL, "args": {**kept, "file": state["network"]}}


def _refuse_code(arch: Any, path: str | Path, trusted: bool) -> None:
    if trusted or section(arch).get("type") != EXTERNAL:
        return
    args = section(arch, "args")
    raise UserError(
        f"{path}: its network is built by code outside this project ({args.get('factory') or args.get('file')}). A "
        "checkpoint alone must not run code. If you trust it, add --trust-code, or pass the config of its run with "
        "--config (in Python: Predictor(load_model(path, trust_code=True)))"
    )


def network_of(config: str | Path | None) -> str:
    """Return the file with a network that a config names in ``arch.args.file``.

    Raises:
        UserError: there is no config, or it does not name one.
    """
    file = None if config is None else section(configs.read(config), "arch", "args").get("file")
    if not isinstance(file, str):
        raise UserError("pass a checkpoint, or a --config with arch.args.file, the file of a network")
    return file


def _without_ignored(arch: Any, models: Mapping[str, Any]) -> Any:
    """Return a published ``arch`` without the arguments that the published constructors ignored."""
    if not isinstance(arch, Mapping) or arch.get("type") not in models:
        return arch
    upstream = import_module("models.upstream")
    return {**arch, "args": upstream.known_args(arch["type"], arch.get("args"))}


def _same_arch(a: Any, b: Any, models: Registry) -> bool:
    """Return whether two ``arch`` sections build the same network, whether or not they spell out defaults."""

    def essence(arch: Any) -> Any:
        if not isinstance(arch, Mapping) or arch.get("type") not in models:
            return arch
        args = dict(arch.get("args") or {})
        for name in dead_arguments(arch["type"], args, models):
            del args[name]
        defaults = {name: field.default for name, field in models.arguments(arch["type"]).model_fields.items()}
        # Where the weights came from before training does not change the model.
        return arch["type"], {name: value for name, value in (defaults | args).items() if name != "pretrained"}

    return essence(a) == essence(b)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    config: Config | str | Path | None = None,
    trust_code: bool = False,
    overrides: Sequence[str] = (),
) -> LoadedModel:
    """Build the model of a checkpoint of this project or its predecessors, and load its weights.

    Args:
        path: the checkpoint.
        device: where the model goes.
        config: used instead of the checkpoint's own; needed for a file of bare weights. The ``arch`` of a config file
            is not used (see :func:`config_of`).
        trust_code, overrides: see :func:`config_of`.

    Raises:
        UserError: an unusable file, or weights that do not fit; the message says which, and the probable reason.
    """
    state = read(path)
    if isinstance(config, Config):
        return build_model(state, path, config, device)
    used = config_of(state, path, config, overrides, trust_code=trust_code)
    lost = fit_not_used(state, used.predict.model_dump()) if config is not None else []
    if lost:
        warn(
            f"{path}: predict.{', predict.'.join(lost)} were fitted on validation data, but {config} has other values. "
            "Leave --config out to use the fit"
        )
    return build_model(state, path, used, device)


def build_model(
    state: Mapping[str, Any], path: str | Path, config: Config, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Build the model of a checkpoint that is already read, see :func:`load_model`."""
    # The only import from utils into another part of the project: a checkpoint names a model, which is looked up there.
    models, upstream = import_module("models"), import_module("models.upstream")
    weights = state.get("ema") or state["state_dict"]
    try:
        if "network" in state or ("facts" not in state and config.arch.type == EXTERNAL):
            facts = _facts_of_config(config)
            arch, args, num_classes = config.arch.type, arch_arguments(config, facts), facts.num_classes
        elif "facts" in state:
            try:
                facts = Facts.from_dict(state["facts"])
                ValueRange.of(facts.value_range, facts.nodata)  # is checked here, and used when images are read
            except (TypeError, ValueError, KeyError) as error:
                raise UserError(f"its 'facts' (classes, palette, mean, std) are malformed: {error}") from None
            arch, args, num_classes = config.arch.type, arch_arguments(config, facts), facts.num_classes
            if models.MODELS[arch].published_entry in weights:
                args["published"] = True  # written when this form was the default
        else:
            arch, args, num_classes = upstream.infer(weights, config.arch.type, config.arch.args)
            facts = _facts_of_config(config, num_classes)
        if "pretrained" in args:
            args["pretrained"] = False  # the checkpoint's weights replace them anyway
        if "network" not in state and arch != EXTERNAL:  # code from elsewhere may not run on the meta device
            _check_size(arch, num_classes, args, weights)
        model = models.build(arch, num_classes, **args)
        if "network" in state:
            _check_exported(model.network.facts, facts)
        else:
            upstream.load_weights(model, weights)
        bad = finite.bad_weights(model)
        if bad is not None:
            raise UserError(
                f"the weights {bad} are not finite (NaN or infinity), saved after iteration "
                f"{state.get('iteration', 'unknown')}: the training diverged; use an earlier checkpoint of the run"
            )
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from None
    return LoadedModel(
        model=model.to(device).eval(),
        facts=facts,
        config=config,
        activation=LOSSES[config.loss.type].activation,
        path=Path(path),
        epoch=int(state.get("epoch", 0)),
    )


def _check_exported(own: Mapping[str, str], facts: Facts) -> None:
    """Raise UserError unless a file of utils.export (``own`` is what it says) fits the facts of a config's data."""
    if own and (any(facts.mean) or any(value != 1 for value in facts.std)):
        raise UserError(
            "this file was written by utils.export and normalizes the images itself. In the config, set "
            f"train_loader.args.mean to {[0] * facts.in_channels} and std to {[1] * facts.in_channels}, or score the "
            "checkpoint that it was made of"
        )
    names = tuple(json.loads(own.get("class_names", "[]")))
    if own and (len(names) != facts.num_classes or first_difference(names, facts.class_names) is not None):
        raise UserError(
            f"this file was written by utils.export for the classes {listed(names, 6)}, but the data of the config has "
            f"{listed(facts.class_names, 6)} (train_loader.args.classes)"
        )


def _check_size(arch: str, num_classes: int, args: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError if the config's network is much larger than the weights, before it allocates memory."""
    try:
        with torch.device("meta"):  # shapes only
            skeleton = import_module("models").build(arch, num_classes, **args)
        wanted = sum(tensor.numel() for tensor in skeleton.state_dict().values())
    except (MemoryError, OverflowError, RuntimeError) as error:
        raise UserError(f"its network cannot be built: {str(error).strip().splitlines()[0][:200]}") from None
    held = sum(tensor.numel() for tensor in weights.values())
    if wanted > 4 * held + 10**6:
        raise UserError(f"its config describes a network with {wanted:,} parameters, but its weights have {held:,}")


def arch_arguments(config: Config, facts: Facts) -> dict[str, Any]:
    """Return the model's arguments, with the images' channels where the config leaves them to the data."""
    args = dict(config.arch.args)
    if config.arch.type == EXTERNAL:
        args["activation"] = LOSSES[config.loss.type].activation
    channels = args.get("in_channels", facts.in_channels)
    if channels != facts.in_channels:
        raise UserError(
            f"arch.args.in_channels: found {channels}, the images have {facts.in_channels} channels "
            "(train_loader.args.in_channels); set both to the same number"
        )
    return args if facts.in_channels == 3 else args | {"in_channels": channels}


def load_weights(model: nn.Module, weights: Mapping[str, Any], source: str | Path = "the weights") -> None:
    """Load all of a model's weights, under our names or the published ones.

    Args:
        model: one of :mod:`models`.
        weights: tensors by name.
        source: where they come from, for messages.

    Raises:
        UserError: the weights do not fit; the message says which, and the probable reason.
    """
    try:
        import_module("models.upstream").load_weights(model, weights)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def start_from(model: Any, path: str | Path, class_names: Sequence[str] = ()) -> str:
    """Start a model from the matching weights in a file (fine-tuning); return which weights were loaded and which not.

    The file may be a checkpoint of this project or its predecessors, or contain weights of another program. The number
    of classes and of image channels may differ. ``class_names``: the model's classes; a head keeps those that the
    checkpoint also has.

    Raises:
        UserError: an unusable file, or too few weights match.
    """
    state = read(path)
    if "network" in state:
        raise UserError(f"{path}: contains a whole network; expected a checkpoint or weights")
    ema = state.get("ema") if "facts" in state else None
    theirs = section(state, "facts").get("class_names", ())
    try:
        done = import_module("models.upstream").transfer(model, ema or state["state_dict"], class_names, theirs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tensors = len(done.taken) + len(done.adapted) + len(done.by_class)
    model.weights_from = f"{path} ({tensors} of {tensors + len(done.reshaped) + len(done.missing)} tensors)"
    return f"weights of {path}\n{done.text()}"


def _facts_of_config(config: Config, num_classes: int | None = None) -> Facts:
    """Return the facts for a checkpoint without any: those of the data set in its config."""
    dataset = import_module("dataloaders").LOADERS[config.train_loader.type]
    try:
        facts = Facts.of(dataset.facts_for(**config.train_loader.args | {"ignore_index": config.ignore_index}))
    except (TypeError, ValueError) as error:
        raise UserError(f"train_loader.args: {error}") from None
    if num_classes not in (None, facts.num_classes):
        loaders = [f for f in ("train_loader", "val_loader", "test_loader") if getattr(config, f) is not None]
        settings = " ".join(f"--set {field}.args.classes={num_classes}" for field in loaders)
        raise UserError(
            f"its weights have {num_classes} classes, its data set {config.train_loader.type} has "
            f"{facts.num_classes}; set the number, or a list of names: {settings}; or pass the config that it was "
            "trained with (--config)"
        )
    return facts
