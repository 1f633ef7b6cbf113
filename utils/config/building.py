"""Build what a config names: loaders, loss, optimizer, schedule. Errors about arguments name the field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.optim import Optimizer

from utils import losses, lr_scheduler, optim
from utils.config.checks import HOLDS_OUT
from utils.config.schema import Config
from utils.errors import DataFolderError, UserError
from utils.losses.base import SegmentationLoss

T = TypeVar("T")


def build_section(path: str, builder: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Build what a field names, such as ``optimizer.args``; errors about values become messages with its path.

    Raises:
        UserError: the builder raised ValueError, TypeError or ArithmeticError (a number out of range).
    """
    try:
        return builder(*args, **kwargs)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: {error}") from error


def build_loader(build: Callable[..., T], config: Config, stage: str) -> T:
    """Build the loader of a stage ("train", "val", "test") with ``build`` (:func:`dataloaders.build`).

    Without val_loader (and test_loader), "val" and "test" are the samples that train_loader holds out, as whole images.

    Raises:
        UserError: the config has no such loader, or an argument or the data are wrong.
    """
    component = config.loader(stage)
    if component is None and any(config.train_loader.args.get(name) for name in HOLDS_OUT):
        train: Any = build_loader(build, config, "train")
        held_out: T | None = train.get_val_loader(whole=True)
        if held_out is not None:
            return held_out
    if component is None:
        also = "so is val_loader, and " if stage == "test" else ""
        raise UserError(
            f"{stage}_loader: missing, and {also}train_loader holds out no images (val_split); add one to the "
            f"config, or use --set {stage}_loader.type=NAME --set {stage}_loader.args.data_dir=FOLDER"
        )
    with loader_errors(config.loader_field(stage)):
        return build(component.type, seed=config.seed, ignore_index=config.ignore_index, **component.args)


@contextmanager
def loader_errors(field: str) -> Iterator[None]:
    """Turn the errors of a loader that is built into messages that name its field, such as ``val_loader``."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{field}.args: {error}") from error
    except OSError as error:
        raise UserError(f"{field}.args: cannot read {error.filename}: {error.strerror}") from None
    except DataFolderError as error:
        raise UserError(f"{field}.args.data_dir: {error}") from None
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(field) else f"{field}: {text}") from None


def build_loss(config: Config, dataset: Any, ignore_index: int) -> SegmentationLoss:
    """Build the loss; the class weights of "balanced" are the data set's.

    Raises:
        UserError: the loss does not accept its arguments.
    """
    args = dict(config.loss.args)
    if args.get("weight") == "balanced":
        args["weight"] = dataset.class_weights().tolist()
    return build_section("loss.args", losses.build, config.loss.type, ignore_index, **args)


def build_optimizer(config: Config, model: Any) -> Optimizer:
    """Build the optimizer of a model's trainable parameters.

    Raises:
        UserError: the optimizer does not accept its arguments.
    """
    section = config.optimizer
    groups = (section.differential_lr, section.backbone_lr_factor, section.no_decay_on_norm_and_bias)
    return build_section("optimizer.args", optim.build, section.type, model, *groups, **section.args)


def build_schedule(
    config: Config, optimizer: Optimizer, steps_per_epoch: int, epochs: int | None = None
) -> lr_scheduler.Schedule:
    """Build the learning-rate schedule of a run; ``epochs``: None for those of the config.

    Raises:
        UserError: the schedule does not accept its arguments.
    """
    section = config.lr_scheduler
    args = (section.type, optimizer, steps_per_epoch * (epochs or config.trainer.epochs))
    unit = {"steps_per_epoch": steps_per_epoch if section.step == "epoch" else None}
    return build_section("lr_scheduler.args", lr_scheduler.build, *args, **unit, **section.args)


def schedule_alone(config: Config, batches: int, epochs: int | None = None) -> lr_scheduler.Schedule:
    """Build the schedule of a run with ``batches`` batches per epoch, for two parameters instead of a network."""
    steps = lr_scheduler.optimizer_steps(1, batches, config.trainer.accumulate)
    return build_schedule(config, build_optimizer(config, optim.stand_in()), steps, epochs)
