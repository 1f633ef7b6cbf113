"""Configs written for yassouali/pytorch-segmentation or its RankSEG fork: other names, and keys without effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.config.schema import Config
from utils.errors import listed
from utils.registry import Registry, found

# The predecessors' networks and loaders accepted every one of these, and ignored those they did not know.
NETWORK_ARGUMENTS = {
    *("backbone", "pretrained", "in_channels", "freeze_bn", "freeze_backbone"),
    *("use_aux", "use_deconv", "use_resnet_gcn", "num_filters", "output_stride", "fpn_out"),
}
LOADER_ARGUMENTS = {"return_id"}
SCHEDULE_ARGUMENTS = {"warmup_epochs", "iters_per_epoch", "num_epochs"}

# Their FCN8 accepted a backbone and always used VGG-16.
BACKBONES_WITHOUT_EFFECT = {"FCN8": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")}


def dead_arguments(type: str, args: Mapping[str, Any], models: Registry) -> list[str]:
    """Return the arguments in an old config's ``arch`` that never had an effect on the network ``type``."""
    if type not in models:
        return []
    known = models.arguments(type).model_fields
    dead = [name for name in args if name in NETWORK_ARGUMENTS and name not in known]
    if args.get("backbone") in BACKBONES_WITHOUT_EFFECT.get(type, ()) and "backbone" not in dead:
        dead.append("backbone")
    return dead


def adapt(config: Config, models: Registry | None, stages: Sequence[str]) -> None:
    """Rename the keys of ``config`` that have another name here; take out those without effect and note them."""
    ignored: list[str] = []
    if config.arch.type == "GCN" and "num_filters" in config.arch.args:
        config.arch.args.setdefault("kernel_size", config.arch.args.pop("num_filters"))
    if models is not None:
        for name in dead_arguments(config.arch.type, config.arch.args, models):
            ignored.append(f"arch.args.{name} ({config.arch.type} has no such choice)")
            del config.arch.args[name]
    for path in ("train_loader", "val_loader", "test_loader", "lr_scheduler"):
        section = getattr(config, path)
        args = {} if section is None else section.args
        names = SCHEDULE_ARGUMENTS if path == "lr_scheduler" else LOADER_ARGUMENTS
        if path in ("val_loader", "test_loader") and args.get("shuffle"):
            names = names | {"shuffle"}  # the order of the images changes no score
        for name in [name for name in args if name in names]:
            ignored.append(f"{path}.args.{name}")
            del args[name]
    ignored += _ignored_of_trainer(config)
    if ignored:
        config.notes.append(f"ignored, because they have no effect: {', '.join(ignored)}")
    if "train" in stages:
        _note_defaults(config)


def _ignored_of_trainer(config: Config) -> list[str]:
    """Return the fields of ``trainer`` that have no effect; a monitor that nothing computes is turned off."""
    ignored, trainer = [], config.trainer
    monitored = trainer.monitor.partition(" ")[2]
    if not trainer.val and monitored and not monitored.startswith("train_"):
        ignored.append(f"trainer.monitor {found(trainer.monitor)} (trainer.val is false)")
        trainer.monitor = "off"
    if trainer.monitor == "off" and trainer.early_stop:
        ignored.append("trainer.early_stop (trainer.monitor is off)")
    return ignored


def _note_defaults(config: Config) -> None:
    """Note which augmentations are on although the config does not name them: the predecessors had them off."""
    args = config.train_loader.args
    if args.get("augment") is not True or args.get("val") is True:
        return
    on = [name for name in ("flip", "rotate") if name not in args]
    if "base_size" not in args and args.get("scale", True) is True:  # they did not support a range
        on.append("scale (around each image's own size)")
    if on:
        config.notes.append(
            f"train_loader: augment turns on {listed(on, 3)}; in pytorch-segmentation, these are off unless the "
            "config sets them"
        )
