"""The command ``python -m utils.config``: check a config, or print the JSON Schema of configs."""

from __future__ import annotations

import argparse
import warnings

import torch

import dataloaders
import models
from utils import checkpoint
from utils.cli import add_overrides
from utils.config import data_checks, dump, editor, load
from utils.config.schema import Config
from utils.errors import run
from utils.facts import Facts


def rehearse(config: Config) -> None:
    """Build everything that a run builds, without counting labels, caching images or initializing weights.

    Raises:
        UserError: train.py or test.py would refuse the config; one message per part that cannot be built.
    """
    light = config.model_copy(deep=True)
    for component in (light.train_loader, light.val_loader, light.test_loader):
        if component is not None:
            component.args |= {"num_workers": 0}
            if dataloaders.LOADERS[component.type].layout:  # files, which these arguments would read at once
                component.args |= {"cache": None} | ({"sampler": None} if component.args.get("shuffle") else {})
    train = data_checks.build_loader(dataloaders.build, light, "train")
    others = {}
    for stage in ("val", "test"):
        if light.loader(stage) is not None:
            others[f"{stage}_loader"] = Facts.of(data_checks.build_loader(dataloaders.build, light, stage).dataset)
    facts = Facts.of(train.dataset)
    data_checks.check_facts(config, facts, others)
    arguments = checkpoint.arch_arguments(config, facts)
    if arguments.get("pretrained") is True:
        arguments["pretrained"] = False  # nothing is downloaded
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta parameter")  # pretrained weights have no effect there
        data_checks.built("arch.args", models.build, config.arch.type, facts.num_classes, **arguments)
    data_checks.warn_about_loss(config, [config.predict.train, config.predict.val])
    data_checks.warn_about_schedule(config, len(train))


def main() -> int:
    """Check a config, or print the JSON Schema."""
    parser = argparse.ArgumentParser(prog="python -m utils.config", description="Check a config, or print its schema.")
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="check a config as train.py does, and print it with all defaults")
    checker.add_argument("config")
    add_overrides(checker)
    commands.add_parser("schema", help="print the JSON Schema of configs")
    args = parser.parse_args()

    if args.command == "schema":
        print(editor.text(models.MODELS, dataloaders.LOADERS), end="")
        return 0
    config = load(args.config, args.set, models=models.MODELS, loaders=dataloaders.LOADERS)
    text = dump(config)
    rehearse(config)
    print(text, end="")
    return 0


if __name__ == "__main__":
    run(main)
