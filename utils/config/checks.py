"""What a config's schema cannot see: the classes it names, their arguments, and fields that must agree."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config.schema import Component, Config
from utils.errors import UserError, did_you_mean
from utils.registry import Registry
from utils.signatures import check_arguments, parameters

# Values a run logs once per validation; ``trainer.monitor`` follows one of them.
VALIDATION_SCORES = (
    "Mean_Dice",
    "Mean_IoU",
    "Pixel_Accuracy",
    "Multiclass_Accuracy",
    "Dataset_mDice",
    "Dataset_mIoU",
    "Expected_Dice",
    "Expected_IoU",
    "val_loss",
)
TRAINING_SCORES = ("train_loss", "train_Mean_Dice", "train_Mean_IoU", "train_Pixel_Accuracy")
# Arguments with which the training loader holds samples out for validation.
HOLDS_OUT = ("val_split", "val_fold", "val_fraction")
PER_CLASS_SCORES = ("Class_Dice/", "Class_IoU/")
# Scores that only one procedure has: label maps know right and wrong pixels, rankdice what it expects.
SCORES_OF_ONE_PROCEDURE = {"Multiclass_Accuracy": "max", "Expected_Dice": "rankdice", "Expected_IoU": "rankdice"}

STAGES = ("train", "val", "test")

# Published configs give FCN8 a backbone that its constructor, always VGG-16, never looked at.
BACKBONES_WITHOUT_EFFECT = {"FCN8": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")}

# What the program itself passes to the constructors beside a config's arguments.
PROVIDED_TO_MODEL = ("num_classes",)
PROVIDED_TO_LOADER = ("seed", "ignore_index", "dataset")
PROVIDED_TO_LOSS = ("ignore_index",)
PROVIDED_TO_SCHEDULER = ("optimizer", "total_steps", "last_epoch")
PROVIDED_TO_OPTIMIZER = ("params",)

_NAMED = 30  # classes in a message


def check(
    config: Config,
    models: Registry | None = None,
    loaders: Registry | None = None,
    stages: Sequence[str] = STAGES,
) -> list[str]:
    """Return every problem that the schema alone cannot see, each beginning with the path of a field.

    Args:
        config: what the schema let through.
        models, loaders: the tables behind ``arch`` and the loaders; without them their arguments are not checked.
        stages: the loaders that will be built; what only training needs is checked only with "train" among them.
    """
    from utils.losses import LOSSES
    from utils.lr_scheduler import SCHEDULERS
    from utils.optim import OPTIMIZERS

    optimizer = _check_component("optimizer", config.optimizer, OPTIMIZERS, PROVIDED_TO_OPTIMIZER)
    loss = _check_component("loss", config.loss, LOSSES, PROVIDED_TO_LOSS)
    schedule = _check_component("lr_scheduler", config.lr_scheduler, SCHEDULERS, PROVIDED_TO_SCHEDULER)
    problems = optimizer + loss + schedule
    if not optimizer + schedule:
        problems += _check_momentum(config)
    if models is not None:
        _forget_dead_arguments(config, models)
        problems += _check_component("arch", config.arch, models, PROVIDED_TO_MODEL)
    facts = None
    if loaders is not None:
        wrong, facts = _check_loaders(config, loaders, stages)
        problems += wrong
    if not loss:
        problems += _check_loss(config, facts)
    problems += _check_classes_of_interest(config, facts)
    if "train" in stages:
        problems += _check_monitor(config, facts) + _check_val(config) + _check_folders(config)
    return problems


def _check_component(path: str, component: Component, table: Mapping[str, Any], provided: Sequence[str]) -> list[str]:
    if component.type not in table:
        return [_unknown(path, component.type, table)]
    return check_arguments(f"{path}.args", component.type, [table[component.type]], component.args, provided)


def _unknown(path: str, name: str, table: Mapping[str, Any]) -> str:
    why = ""
    try:
        table[name]
    except UserError as error:
        # Some classes exist but are of no use here; the table says why, and what to take instead.
        why = str(error) if "cannot be used here" in str(error) else ""
    except KeyError:
        pass
    hint = f"; {why}." if why else did_you_mean(name, table)
    return f"{path}.type: found {name!r}{hint} Allowed: {', '.join(table)}"


def dead_arguments(type: str, args: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    """Return the arguments of a network that published configs give and that never had an effect."""
    name = args.get("backbone")
    if type not in models or not isinstance(name, str):
        return []
    unknown = "backbone" not in parameters(models[type])
    return ["backbone"] if unknown or name in BACKBONES_WITHOUT_EFFECT.get(type, ()) else []


def _forget_dead_arguments(config: Config, models: Registry) -> None:
    """Drop what has no effect, which published constructors swallowed; say so, once."""
    for name in dead_arguments(config.arch.type, config.arch.args, models):
        value = config.arch.args.pop(name)
        print(
            f"warning: arch.args.{name}: {value!r} has no effect on {config.arch.type}, here as where such configs "
            "were published; remove it",
            file=sys.stderr,
        )


# -- loaders and classes ---------------------------------------------------------------------------------------


def _check_loaders(config: Config, loaders: Registry, stages: Sequence[str]) -> tuple[list[str], Any | None]:
    """Return the problems of the loaders behind the stages, and the facts of the first one, where they are clear."""
    problems: list[str] = []
    facts = None
    for path, component in _loaders_of(config, stages).items():
        wrong = _check_loader(path, component, loaders)
        if not wrong:
            wrong, found = _facts_of(path, component, loaders)
            facts = facts or found
        problems += wrong
    return problems, facts


def _loaders_of(config: Config, stages: Sequence[str]) -> dict[str, Component]:
    """Return the loaders behind the stages by the name of their field; test falls back on val."""
    found = {}
    for stage in stages:
        component = config.loader(stage)
        if component is not None:
            name = "val_loader" if stage == "test" and config.test_loader is None else f"{stage}_loader"
            found[name] = component
    return found


def _check_loader(path: str, component: Component, loaders: Registry) -> list[str]:
    if component.type not in loaders:
        return [_unknown(path, component.type, loaders)]
    dataset = loaders[component.type]
    targets = loaders.constructors(component.type)
    problems = check_arguments(f"{path}.args", component.type, targets, component.args, PROVIDED_TO_LOADER)
    folder = component.args.get("data_dir")
    if isinstance(folder, str) and not Path(folder).expanduser().is_dir():
        problems.append(
            f"{path}.args.data_dir: found {folder!r}, which is not a folder (looked in {Path.cwd()}); "
            f"mend the path, or give it with --set {path}.args.data_dir=FOLDER"
        )
    if folder is None and getattr(dataset, "layout", None):
        problems.append(
            f"{path}.args.data_dir: {component.type} reads files and the config does not say where they are"
        )
    return problems


def _facts_of(path: str, component: Component, loaders: Registry) -> tuple[list[str], Any | None]:
    """Return the class facts of a data set as its arguments make them, without looking at the data."""
    facts_for = loaders[component.type].facts_for
    names = inspect.signature(facts_for).parameters
    try:
        return [], facts_for(**{name: value for name, value in component.args.items() if name in names})
    except (ValueError, TypeError, UserError) as error:
        return [f"{path}.args: {error}"], None


def _check_classes_of_interest(config: Config, facts: Any | None) -> list[str]:
    if facts is None or config.predict.CoI == "all":
        return []
    outside = [c for c in config.predict.CoI if c >= facts.num_classes]
    if not outside:
        return []
    one = " (with one channel, the class itself is number 0)" if facts.num_classes == 1 else ""
    return [f"predict.CoI: found {outside}; the data has the classes 0 to {facts.num_classes - 1}{one}"]


def names_hint(config: Config, path: str, loaders: Registry | None) -> str:
    """Return, for a wrong value at ``path`` among the classes of interest, which id each class has; else nothing."""
    if not path.startswith("predict.CoI.") or loaders is None or config.train_loader.type not in loaders:
        return ""
    facts = _facts_of("train_loader", config.train_loader, loaders)[1]
    if facts is None:
        return ""
    ids = [f"{name} is {i}" for i, name in enumerate(facts.class_names[:_NAMED])]
    return f"; class ids, not names: {', '.join(ids)}{', ...' if facts.num_classes > _NAMED else ''}"


# -- loss and schedule -----------------------------------------------------------------------------------------


def _check_loss(config: Config, facts: Any | None) -> list[str]:
    """Try the loss on as many channels as the network will have: its values, and class weights that must fit."""
    import torch

    from utils import losses

    channels = facts.num_classes if facts is not None else None
    args = dict(config.loss.args)
    if args.get("weight") == "balanced":
        args["weight"] = [1.0] * max(channels or 2, 2)  # one channel: background and class
    try:
        loss = losses.build(config.loss.type, 255, **args)
        if channels is not None:
            loss(torch.zeros(1, channels, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))
    except (ValueError, TypeError) as error:
        return [f"loss.args: {config.loss.type}: {error}"]
    return []


def _check_momentum(config: Config) -> list[str]:
    from utils.lr_scheduler import needs_momentum
    from utils.optim import signature_of

    schedule, optimizer = config.lr_scheduler, config.optimizer
    if not needs_momentum(schedule.type, schedule.args):
        return []
    known = signature_of(optimizer.type).parameters
    if "betas" in known:
        return []
    if "momentum" not in known:
        how = "take an optimizer that has one"
    elif not optimizer.args.get("momentum", known["momentum"].default):
        how = "give optimizer.args.momentum"
    else:
        return []
    off = "momentums to null" if schedule.type == "OneCycle" else "cycle_momentum to false"
    return [
        f"lr_scheduler: {schedule.type} moves the momentum, and {optimizer.type} runs without any; {how}, "
        f"or set lr_scheduler.args.{off}"
    ]


# -- the run ---------------------------------------------------------------------------------------------------


def _check_monitor(config: Config, facts: Any | None) -> list[str]:
    monitor = config.trainer.monitor
    if monitor == "off":
        return []
    mode, _, name = monitor.partition(" ")
    known = (*VALIDATION_SCORES, *TRAINING_SCORES)
    if mode not in ("min", "max") or not name:
        return [
            f"trainer.monitor: found {monitor!r}; expected 'off', or 'min' or 'max' and a value, as 'max Mean_Dice'"
        ]
    if name not in known and not name.startswith(PER_CLASS_SCORES):
        return [
            f"trainer.monitor: {name!r} cannot be monitored{did_you_mean(name, known)} "
            f"Possible: {', '.join(known)}, Class_Dice/NAME, Class_IoU/NAME"
        ]
    if not config.trainer.val and name not in TRAINING_SCORES:
        return [
            f"trainer.monitor: {name} is measured in validation, and trainer.val is false; "
            "set trainer.val, or monitor 'off' or 'min train_loss'"
        ]
    return _check_monitored_score(config, mode, name, facts)


def _check_monitored_score(config: Config, mode: str, name: str, facts: Any | None) -> list[str]:
    best = "min" if name.endswith("loss") else "max"
    if mode != best:
        return [f"trainer.monitor: '{mode} {name}' would keep the worst model; expected '{best} {name}'"]
    procedure = SCORES_OF_ONE_PROCEDURE.get(name, config.predict.val)
    if procedure != config.predict.val:
        return [
            f"trainer.monitor: {name} is known with predict.val {procedure!r} only, and predict.val is "
            f"{config.predict.val!r}"
        ]
    metric = config.predict.rankdice.metric
    expected = {"dice": "Expected_Dice", "iou": "Expected_IoU"}[metric]
    if name.startswith("Expected_") and name != expected:
        return [f"trainer.monitor: found {name}; with predict.rankdice.metric {metric!r} rankdice states {expected}"]
    if facts is not None and name.startswith(PER_CLASS_SCORES):
        wanted = name.partition("/")[2]
        if wanted not in facts.class_names:
            return [
                f"trainer.monitor: there is no class {wanted!r}{did_you_mean(wanted, facts.class_names)} "
                f"Classes: {', '.join(facts.class_names)}"
            ]
    return []


def _check_val(config: Config) -> list[str]:
    held_out = any(config.train_loader.args.get(name) for name in HOLDS_OUT)
    if config.trainer.val and config.val_loader is None and not held_out:
        return [
            "val_loader: absent, and train_loader.args.val_split is not given; add one, or set trainer.val to false"
        ]
    return []


def _check_folders(config: Config) -> list[str]:
    folders = {"trainer.save_dir": config.trainer.save_dir}
    if config.trainer.tensorboard:
        folders["trainer.log_dir"] = config.trainer.log_dir
    return [f"{path}: found {folder!r}; {why}" for path, folder in folders.items() if (why := unwritable(folder))]


def unwritable(folder: str) -> str | None:
    """Return why a folder could not be made and written to; None if it could. Nothing is made."""
    if not folder:
        return "expected a folder"
    path = Path(folder).absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not nearest.is_dir():
        return f"{nearest} is a file, not a folder"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{nearest} cannot be written to ({error.strerror})"
