"""The command ``python -m utils.config``: check a config, or print the JSON Schema of configs."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

import dataloaders
import models
from utils import checkpoint
from utils.cli import Parser, add_overrides
from utils.config import building, data_checks, dump, editor, override, read, resolve
from utils.config.schema import Config
from utils.errors import run, warn
from utils.facts import Facts


def rehearse(config: Config) -> None:
    """Build what a run builds, without counting labels, caching images or initializing weights; else UserError."""
    light = config.model_copy(deep=True)
    for component in (light.train_loader, light.val_loader, light.test_loader):
        if component is not None:
            component.args = dataloaders.list_only(component.type, component.args)
    train = building.build_loader(dataloaders.build, light, "train")
    others = {}
    for stage in ("val", "test"):
        if light.loader(stage) is not None:
            others[f"{stage}_loader"] = Facts.of(building.build_loader(dataloaders.build, light, stage).dataset)
    facts = Facts.of(train.dataset)
    data_checks.check_facts(config, facts, others)
    arguments = checkpoint.arch_arguments(config, facts)
    if "pretrained" in arguments and not isinstance(arguments["pretrained"], str):
        arguments["pretrained"] = False  # nothing is downloaded
    in_file = arguments.get("file") is not None  # a network for test.py, whose weights cannot be left out
    with torch.device("cpu" if in_file else "meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta parameter")  # pretrained weights have no effect there
        model = building.build_section("arch.args", models.build, config.arch.type, facts.num_classes, **arguments)
        if in_file:
            warn("arch.args.file: train.py cannot train a network in a file; test.py and inference.py can use it")
        else:
            building.build_optimizer(config, model)
    data_checks.warn_about_loss(config, [config.predict.train, config.predict.val])
    data_checks.warn_about_schedule(config, len(train))


def main() -> int:
    """Check a config, or print the JSON Schema."""
    parser = Parser(prog="python -m utils.config", description="Check a config, or print its schema.")
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="check a config as train.py does, and print it with all defaults")
    checker.add_argument("config")
    checker.add_argument(
        "--no-data", action="store_true", help="check only the config; its data may be on another machine"
    )
    add_overrides(checker)
    commands.add_parser("schema", help="print the JSON Schema of configs")
    args = parser.parse_args()

    if args.command == "schema":
        print(editor.text(models.MODELS, dataloaders.LOADERS), end="")
        return 0
    raw = override(read(args.config), args.set, args.config)
    folders = _take_folders(raw) if args.no_data else {}
    config = resolve(raw, source=args.config, models=models.MODELS, loaders=dataloaders.LOADERS)
    for name, folder in folders.items():
        getattr(config, name).args["data_dir"] = folder
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    text = dump(config)
    if not args.no_data:
        rehearse(config)
    print(text, end="")
    return 0


def _take_folders(raw: dict[str, Any]) -> dict[str, str]:
    """Let the loaders of a config look in this folder, which exists; return where they would look."""
    found = {}
    for name in ("train_loader", "val_loader", "test_loader"):
        args = raw[name].get("args") if isinstance(raw.get(name), dict) else None
        if isinstance(args, dict) and isinstance(args.get("data_dir"), str):
            found[name], args["data_dir"] = args["data_dir"], "."
    return found


if __name__ == "__main__":
    run(main)
