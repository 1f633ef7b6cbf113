"""Checks that a config's schema cannot make: the classes it names, their arguments, and fields that must agree."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from utils import lr_scheduler, optim
from utils.bounds import LARGEST
from utils.config.published import adapt
from utils.config.schema import Component, Config
from utils.errors import UserError, did_you_mean
from utils.files import expand, looked_in, unwritable
from utils.losses import LOSSES
from utils.losses import build as build_loss
from utils.rankdice import METRICS
from utils.registry import Problem, Registry, found

# Values a run logs once per validation; ``trainer.monitor`` follows one of them.
VALIDATION_SCORES = (
    *("Mean_Dice", "Mean_IoU", "Pixel_Accuracy", "Multiclass_Accuracy", "Dataset_mDice", "Dataset_mIoU"),
    *(f"Expected_{score.title}" for score in METRICS.values()),
    "val_loss",
)
TRAINING_SCORES = ("train_loss", "train_Mean_Dice", "train_Mean_IoU", "train_Pixel_Accuracy")
# Arguments with which the training loader holds samples out for validation.
HOLDS_OUT = ("val_split", "val_fold", "val_fraction")
PER_CLASS_SCORES = ("Class_Dice/", "Class_IoU/")
# Arguments of training data that change which images are scored, or what they show.
ONLY_FOR_TRAINING = {
    "sampler": "some images would be scored several times, and others never",
    "drop_last": "the images of an incomplete batch would not be scored",
    "val_split": "the images that it holds out would not be scored",
    "val_fold": "the images that it holds out would not be scored",
    "augment": "the scores would be for randomly changed images",
}
# Scores of one procedure only: label maps have right and wrong pixels, rankdice has expected scores.
SCORES_OF_ONE_PROCEDURE = {"Multiclass_Accuracy": "max"}
SCORES_OF_ONE_PROCEDURE |= {f"Expected_{score.title}": "rankdice" for score in METRICS.values()}

STAGES = ("train", "val", "test")

_NAMED = 30  # classes in a message


def check(
    config: Config, models: Registry | None = None, loaders: Registry | None = None, stages: Sequence[str] = STAGES
) -> list[Problem]:
    """Return every problem that the schema alone cannot see.

    Keys that only the predecessors' configs have are renamed or taken out first (:mod:`utils.config.published`). What
    only training needs is checked only with "train" among the stages. For the arguments see :func:`utils.config.load`.
    """
    adapt(config, models, stages)
    optimizer, schedule = config.optimizer, config.lr_scheduler
    problems = optim.OPTIMIZERS.problems("optimizer", optimizer.type, optimizer.args)
    problems += lr_scheduler.SCHEDULERS.problems("lr_scheduler", schedule.type, schedule.args)
    problems = problems or _check_momentum(config) or _try_optimizer_and_schedule(config)
    loss = LOSSES.problems("loss", config.loss.type, config.loss.args)
    if models is not None:
        problems += models.problems("arch", config.arch.type, config.arch.args)
    facts = None
    if loaders is not None:
        wrong, facts = _check_loaders(config, loaders, stages)
        problems += wrong
    problems += loss or _check_loss(config, facts)
    bias = config.predict.bias
    problems += check_classes_of_interest(config, facts)
    if facts is not None and bias is not None and len(bias) != facts.num_classes:
        text = f"expected {facts.num_classes} numbers, one per class, found {len(bias)}"
        problems.append(Problem("predict.bias", text))
    if "train" in stages:
        problems += [*_check_monitor(config, facts), *_check_validation_and_folders(config)]
    return problems


# -- loaders and classes ---------------------------------------------------------------------------------------


def _check_loaders(config: Config, loaders: Registry, stages: Sequence[str]) -> tuple[list[Problem], Any | None]:
    """Return the problems of the loaders of the stages, and the facts of the first valid loader."""
    problems: list[Problem] = []
    facts = None
    for path in dict.fromkeys(map(config.loader_field, stages)):
        component = getattr(config, path)
        if component is None:
            continue
        wrong = list(_check_loader(path, component, loaders))
        if path != "train_loader" and component.type in loaders:
            wrong += _check_scored(path, component, config.train_loader.args, loaders.constructors(component.type))
        if not wrong:
            wrong, known = _facts_of(path, component, loaders)
            facts = facts or known
        problems += wrong
    return problems, facts


def _check_loader(path: str, component: Component, loaders: Registry) -> Iterator[Problem]:
    yield from loaders.problems(path, component.type, component.args)
    if component.type not in loaders:
        return
    dataset = loaders[component.type]
    folder, split = (component.args.get(name) for name in ("data_dir", "split"))
    if isinstance(folder, str) and (why := not_a_folder(folder)):
        advice = f"fix the path, or pass it with --set {path}.args.data_dir=FOLDER"
        yield Problem(f"{path}.args.data_dir", f"found {found(folder)}, {why}; {advice}")
    if folder is None and getattr(dataset, "layout", None):
        yield Problem(f"{path}.args.data_dir", f"missing; {component.type} reads its files from there")
    splits = getattr(dataset, "splits", ())
    if isinstance(split, str) and splits and split not in splits:
        text = f"found {found(split)}{did_you_mean(split, splits)} {component.type} has {', '.join(splits)}"
        yield Problem(f"{path}.args.split", text)


def _check_scored(
    path: str, component: Component, of_train: Mapping[str, Any], constructors: Sequence[Callable[..., Any]]
) -> Iterator[Problem]:
    """Yield the arguments of a loader for scores that belong to training, or that do nothing there.

    Args:
        path: of the loader.
        component: the loader.
        of_train: the arguments of train_loader.
        constructors: that share the loader's arguments; the last one is :class:`base.base_dataloader.BaseDataLoader`.
    """
    args = component.args
    own = {name for constructor in constructors[:-1] for name in inspect.signature(constructor).parameters}
    for name, effect in ONLY_FOR_TRAINING.items():
        # A data set's own val_fold chooses the images of a split; with "val", "augment" changes nothing.
        harmless = (name == "val_fold" and name in own) or (name == "augment" and args.get("val") is True)
        if args.get(name) and not harmless:
            text = f"found {found(args[name])}, which is for train_loader: {effect}. Remove it"
            yield Problem(f"{path}.args.{name}", text)
    for name in ("mean", "std"):
        if args.get(name) not in (None, of_train.get(name)):
            text = (
                f"found {found(args[name])}, but all images are normalized as in training, with those of "
                "train_loader. Remove it, or set it there"
            )
            yield Problem(f"{path}.args.{name}", text)


def not_a_folder(folder: str) -> str | None:
    """Return why a path does not lead to a folder, None if it does."""
    try:
        is_folder = os.path.isdir(expand(folder))
    except UserError as error:  # a variable that is not set
        return str(error)
    return None if is_folder else f"which is not a folder{looked_in(expand(folder))}"


def _facts_of(path: str, component: Component, loaders: Registry) -> tuple[list[Problem], Any | None]:
    """Return the class facts of a data set as its arguments make them, without reading the data."""
    try:
        facts = loaders[component.type].facts_for(**component.args)
    except (ValueError, TypeError, OSError, UserError) as error:
        return [Problem(f"{path}.args", str(error))], None
    if not facts.num_classes:
        text = f"{component.type} needs the names of your classes, in the order of their ids"
        return [Problem(f"{path}.args.classes", text)], None
    return [], facts


def check_classes_of_interest(config: Config, facts: Any | None) -> list[Problem]:
    """Return the classes of interest that the data does not have."""
    if facts is None or config.predict.CoI == "all":
        return []
    outside = [c for c in config.predict.CoI if c >= facts.num_classes]
    one = " (with one channel, the class itself is number 0)" if facts.num_classes == 1 else ""
    text = f"found {outside}; the data has the classes 0 to {facts.num_classes - 1}{one}"
    return [Problem("predict.CoI", text)] if outside else []


def names_hint(config: Config, path: str, loaders: Registry | None) -> str:
    """Return the id of each class, where the value at ``path`` should be one; otherwise an empty text."""
    if not path.startswith("predict.CoI.") or loaders is None or config.train_loader.type not in loaders:
        return ""
    facts = _facts_of("train_loader", config.train_loader, loaders)[1]
    if facts is None:
        return ""
    ids = [f"{name} is {i}" for i, name in enumerate(facts.class_names[:_NAMED])]
    return f"; use class ids instead of names: {', '.join(ids)}{', ...' if facts.num_classes > _NAMED else ''}"


# -- loss, optimizer and schedule ------------------------------------------------------------------------------


def _check_loss(config: Config, facts: Any | None) -> list[Problem]:
    """Try the loss on as many channels as the network will have: its values, and the number of class weights."""
    channels = facts.num_classes if facts is not None else None
    args = dict(config.loss.args)
    if args.get("weight") == "balanced":
        args["weight"] = [1.0] * max(channels or 2, 2)  # one channel: background and class
    try:
        loss = build_loss(config.loss.type, **args)
        if channels is not None:
            loss(torch.zeros(1, channels, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))
    except (ValueError, TypeError) as error:
        return [Problem("loss.args", f"{config.loss.type}: {error}")]
    return []


def _try_optimizer_and_schedule(config: Config) -> list[Problem]:
    """Build both for a single parameter: torch's classes check their values themselves, each in its own way."""
    chosen, section = config.optimizer, config.lr_scheduler
    path, name = "optimizer.args", chosen.type
    try:
        optimizer = optim.build(name, optim.stand_in(), False, 1.0, chosen.no_decay_on_norm_and_bias, **chosen.args)
        path, name = "lr_scheduler.args", section.type
        schedule = lr_scheduler.build(name, optimizer, LARGEST, **section.args)
        next(lr_scheduler.walk(schedule, 2))
        schedule.step()
    except Exception as error:  # torch raises many kinds of errors; these arguments are the cause
        text = str(error) or type(error).__name__
        args = chosen.args if path == "optimizer.args" else section.args
        named = [arg for arg in args if re.search(rf"\b{arg}\b", text.replace("learning rate", "lr"))]
        return [Problem(f"{path}.{named[0]}" if len(named) == 1 else path, f"{name}: {text}")]
    return []


def _check_momentum(config: Config) -> list[Problem]:
    schedule, optimizer = config.lr_scheduler, config.optimizer
    if not lr_scheduler.needs_momentum(schedule.type, schedule.args):
        return []
    known = optim.OPTIMIZERS.arguments(optimizer.type).model_fields
    if "betas" in known or ("momentum" in known and optimizer.args.get("momentum", known["momentum"].default)):
        return []
    how = "give optimizer.args.momentum" if "momentum" in known else "choose an optimizer that has one"
    off = "momentums to null" if schedule.type == "OneCycle" else "cycle_momentum to false"
    text = f"{schedule.type} changes the momentum, but {optimizer.type} has none; {how}, or set lr_scheduler.args.{off}"
    return [Problem("lr_scheduler", text)]


# -- the run ---------------------------------------------------------------------------------------------------


def _check_monitor(config: Config, facts: Any | None) -> list[Problem]:
    monitor = config.trainer.monitor
    if monitor == "off":
        return []
    mode, _, name = monitor.partition(" ")
    known = (*VALIDATION_SCORES, *TRAINING_SCORES)
    if mode not in ("min", "max") or not name:
        text = f"found {found(monitor)}; expected 'off', or 'min' or 'max' and a value, such as 'max Mean_Dice'"
    elif name not in known and not name.startswith(PER_CLASS_SCORES):
        text = (
            f"{name!r} cannot be monitored{did_you_mean(name, known)} "
            f"Possible: {', '.join(known)}, Class_Dice/NAME, Class_IoU/NAME"
        )
    else:
        text = _check_monitored_score(config, mode, name, facts) or ""
    return [Problem("trainer.monitor", text)] if text else []


def _check_monitored_score(config: Config, mode: str, name: str, facts: Any | None) -> str | None:
    best = "min" if name.endswith("loss") else "max"
    if mode != best:
        return f"'{mode} {name}' would keep the worst model; expected '{best} {name}'"
    procedure = SCORES_OF_ONE_PROCEDURE.get(name, config.predict.val)
    if procedure != config.predict.val:
        return f"{name} needs predict.val {procedure!r}, and predict.val is {config.predict.val!r}"
    metric = config.predict.rankdice.metric
    stated = f"Expected_{METRICS[metric].title}"
    if name.startswith("Expected_") and name != stated:
        return f"found {name}; with predict.rankdice.metric {metric!r} rankdice computes {stated}"
    if facts is not None and facts.num_classes == 1 and name == "Multiclass_Accuracy":
        return f"{name} is not computed for one class; use Pixel_Accuracy"
    if facts is None or not name.startswith(PER_CLASS_SCORES):
        return None
    of, interest = name.partition("/")[2], config.predict.CoI
    wrong = unknown_class(of, facts.class_names)
    if wrong or interest == "all" or config.predict.val != "rankdice" or facts.class_names.index(of) in interest:
        return wrong
    return f"rankdice makes no mask of {of!r}, which is not in predict.CoI {interest}; add it, or use another score"


def unknown_class(name: str, known: Sequence[str]) -> str | None:
    """Return what to say about a class name that the data does not have, None if it has it."""
    if name in known:
        return None
    return f"there is no class {name!r}{did_you_mean(name, known)} Classes: {', '.join(known)}"


def _check_validation_and_folders(config: Config) -> Iterator[Problem]:
    held_out = any(config.train_loader.args.get(name) for name in HOLDS_OUT)
    if config.trainer.val and config.val_loader is None and not held_out:
        text = "missing, and train_loader.args.val_split is not set; add one of them, or set trainer.val to false"
        yield Problem("val_loader", text)
    for name in ("save_dir", "log_dir") if config.trainer.tensorboard else ("save_dir",):
        folder = getattr(config.trainer, name)
        if why := unwritable(folder):
            yield Problem(f"trainer.{name}", f"found {found(folder)}; {why}")
