"""Read, override, check and write configs.

``python -m utils.config check config.json`` checks a file; ``python -m utils.config schema`` prints the
JSON Schema that editors use (kept in ``configs/schema.json``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import json5
from pydantic import BaseModel, ValidationError

from utils.errors import UserError, did_you_mean, run
from utils.registry import Registry
from utils.schema import Component, Config
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
    "val_loss",
)
TRAINING_SCORES = ("train_loss", "train_Mean_Dice", "train_Mean_IoU", "train_Pixel_Accuracy")
PER_CLASS_SCORES = ("Class_Dice/", "Class_IoU/")

STAGES = ("train", "val", "test")

# What the program itself passes to the constructors beside a config's arguments.
PROVIDED_TO_MODEL = ("num_classes",)
PROVIDED_TO_LOADER = ("seed", "ignore_index", "dataset")
PROVIDED_TO_LOSS = ("ignore_index",)
PROVIDED_TO_SCHEDULER = ("optimizer", "total_steps", "last_epoch")
PROVIDED_TO_OPTIMIZER = ("params",)


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    models: Registry | None = None,
    loaders: Registry | None = None,
    stages: Sequence[str] = STAGES,
) -> Config:
    """Read a config file, apply ``path=value`` overrides, validate everything, and return the config.

    Args:
        path: a JSON file; ``//`` comments and trailing commas are allowed.
        overrides: such as ``"trainer.epochs=3"``; the value is read as JSON, else taken as a string.
        models, loaders: the tables behind ``arch`` and the loaders; without them their arguments are not checked.
        stages: the loaders that will be built, whose arguments and folders must be right.

    Raises:
        UserError: for a missing or unreadable file, or with every problem of the config in one message.
    """
    return resolve(read(path), overrides, source=str(path), models=models, loaders=loaders, stages=stages)


def resolve(
    raw: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str = "config",
    models: Registry | None = None,
    loaders: Registry | None = None,
    stages: Sequence[str] = STAGES,
) -> Config:
    """Turn the content of a config file into a checked :class:`Config`; see :func:`load`."""
    raw = override(raw, overrides)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_report(source, [_explain(e) for e in error.errors()])) from None
    problems = check(config, models, loaders, stages)
    if problems:
        raise UserError(_report(source, problems))
    return config


def read(path: str | Path) -> dict[str, Any]:
    """Return the content of a config file as plain dicts and lists."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config: {error}") from None
    try:
        raw = json5.loads(text, allow_duplicate_keys=False)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON (comments and trailing commas are fine): {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected one JSON object, found {type(raw).__name__}")
    return raw


def override(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``raw`` with each ``path=value`` set; sections on the way are made where absent."""
    result = json.loads(json.dumps(raw))
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise UserError(f"--set {item}: expected path=value, such as trainer.epochs=3")
        section = result
        for depth, key in enumerate(keys[:-1]):
            inner = section.setdefault(key, {})
            if isinstance(inner, str) and key == "loss":
                inner = section[key] = {"type": inner}
            if inner is None:
                inner = section[key] = {}
            if not isinstance(inner, dict):
                where = ".".join(keys[: depth + 1])
                raise UserError(
                    f"--set {item}: {where} is {inner!r}, not a section that could hold {keys[depth + 1]!r}"
                )
            section = inner
        section[keys[-1]] = _value(text)
    return result


def _value(text: str) -> Any:
    try:
        return json5.loads(text)
    except ValueError:
        return text


def dump(config: Config) -> str:
    """Return the resolved config as JSON text, defaults included."""
    return json.dumps(config.model_dump(), indent=4) + "\n"


def _report(source: str, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return f"{source} has {len(problems)} problems:\n" + "\n".join(f"  {p}" for p in problems)


def _explain(error: Any) -> str:
    """Say one pydantic error as: path, what was found, what is allowed, the nearest name."""
    keys = [str(k) for k in error["loc"] if not str(k).startswith(("literal[", "list[", "function-"))]
    path = ".".join(keys)
    if error["type"] == "extra_forbidden":
        known = _fields_at(keys[:-1])
        return f"{path}: unknown key{did_you_mean(keys[-1], known)} Allowed: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{path}: required, and the config does not give it"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    hint = ""
    if error["type"] == "literal_error":
        hint = did_you_mean(
            error["input"], [w.strip("' ") for w in error["ctx"]["expected"].replace(" or ", ",").split(",")]
        )
    return f"{path}: found {json.dumps(error['input'], default=str)}; {message}{hint}"


def _fields_at(keys: Sequence[str]) -> list[str]:
    """Return the field names of the section that ``keys`` lead to."""
    section: type[BaseModel] = Config
    for key in keys:
        annotation = section.model_fields[key].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)


# ---------------------------------------------------------------------------------------------------
# Checks that need the classes a config names


def check(
    config: Config,
    models: Registry | None = None,
    loaders: Registry | None = None,
    stages: Sequence[str] = STAGES,
) -> list[str]:
    """Return every problem that the schema alone cannot see: names, arguments, and fields that must agree."""
    from utils.losses import LOSSES
    from utils.lr_scheduler import SCHEDULERS
    from utils.optim import OPTIMIZERS

    problems = _check_component("optimizer", config.optimizer, OPTIMIZERS, PROVIDED_TO_OPTIMIZER)
    problems += _check_component("loss", config.loss, LOSSES, PROVIDED_TO_LOSS)
    problems += _check_component("lr_scheduler", config.lr_scheduler, SCHEDULERS, PROVIDED_TO_SCHEDULER)
    if models is not None:
        _forget_dead_arguments(config, models)
        problems += _check_component("arch", config.arch, models, PROVIDED_TO_MODEL)
    for path, component in _loaders_of(config, stages).items():
        if loaders is not None:
            problems += _check_loader(path, component, loaders)
    return problems + _check_monitor(config) + _check_val(config)


def _loaders_of(config: Config, stages: Sequence[str]) -> dict[str, Component]:
    """Return the loaders behind the stages by the name of their field; test falls back on val."""
    found = {}
    for stage in stages:
        component = config.loader(stage)
        if component is not None:
            name = "val_loader" if stage == "test" and config.test_loader is None else f"{stage}_loader"
            found[name] = component
    return found


def _check_component(path: str, component: Component, table: Mapping[str, Any], provided: Sequence[str]) -> list[str]:
    if component.type not in table:
        return [
            f"{path}.type: found {component.type!r}{did_you_mean(component.type, table)} Allowed: {', '.join(table)}"
        ]
    return check_arguments(f"{path}.args", component.type, [table[component.type]], component.args, provided)


def _forget_dead_arguments(config: Config, models: Registry) -> None:
    """Drop ``arch.args.backbone`` where the network has none, as published configs for FCN8 give one.

    The published constructors swallowed it without effect; here it is said, once.
    """
    if config.arch.type not in models or "backbone" not in config.arch.args:
        return
    if "backbone" not in parameters(models[config.arch.type]):
        name = config.arch.args.pop("backbone")
        print(
            f"warning: arch.args.backbone: {config.arch.type} has one fixed encoder; {name!r} has no effect",
            file=sys.stderr,
        )


def _check_loader(path: str, component: Component, loaders: Registry) -> list[str]:
    if component.type not in loaders:
        return [
            f"{path}.type: found {component.type!r}{did_you_mean(component.type, loaders)} "
            f"Allowed: {', '.join(loaders)}"
        ]
    dataset = loaders[component.type]
    problems = check_arguments(
        f"{path}.args",
        component.type,
        dataset.loader_targets(),
        component.args,
        PROVIDED_TO_LOADER,
    )
    folder = component.args.get("data_dir")
    if isinstance(folder, str) and not Path(folder).is_dir():
        problems.append(
            f"{path}.args.data_dir: found {folder!r}, which is not a folder (looked in {Path.cwd()}); "
            f"mend the path, or give it with --set {path}.args.data_dir=FOLDER"
        )
    return problems


def _check_monitor(config: Config) -> list[str]:
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
            f"trainer.monitor: {name!r} is never logged{did_you_mean(name, known)} "
            f"Logged: {', '.join(known)}, Class_Dice/NAME, Class_IoU/NAME"
        ]
    if not config.trainer.val and name not in TRAINING_SCORES:
        return [
            f"trainer.monitor: {name} is measured in validation, and trainer.val is false; "
            "set trainer.val, or monitor 'off' or 'min train_loss'"
        ]
    return []


def _check_val(config: Config) -> list[str]:
    split_off = config.train_loader.args.get("val_split")
    if config.trainer.val and config.val_loader is None and not split_off:
        return [
            "val_loader: absent, and train_loader.args.val_split is not given; add one, or set trainer.val to false"
        ]
    return []


# ---------------------------------------------------------------------------------------------------
# Command line


def json_schema(models: Registry, loaders: Registry) -> dict[str, Any]:
    """Return the JSON Schema of a config, with the names of all registered classes."""
    from utils.losses import LOSSES
    from utils.lr_scheduler import SCHEDULERS
    from utils.optim import OPTIMIZERS

    schema = Config.model_json_schema()
    fields = schema["properties"]
    component = {"$ref": "#/$defs/Component"}
    named = {
        "arch": models,
        "train_loader": loaders,
        "val_loader": loaders,
        "test_loader": loaders,
        "lr_scheduler": SCHEDULERS,
        "optimizer": OPTIMIZERS,
    }
    for field, table in named.items():
        reference = {"$ref": "#/$defs/Optimizer"} if field == "optimizer" else component
        description = fields[field].get("description", "")
        fields[field] = {
            "description": description,
            "allOf": [reference, {"properties": {"type": {"enum": list(table)}}}],
        }
    by_name = {"enum": list(LOSSES)}
    fields["loss"] = {
        "description": "a name, or {type, args}",
        "anyOf": [by_name, {"allOf": [component, {"properties": {"type": by_name}}]}],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def main() -> int:
    """Check a config, or print the JSON Schema."""
    parser = argparse.ArgumentParser(prog="python -m utils.config", description="Check a config, or print its schema.")
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="check a config file and print it with all defaults")
    checker.add_argument("config")
    checker.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field")
    commands.add_parser("schema", help="print the JSON Schema of configs")
    args = parser.parse_args()

    from dataloaders import LOADERS
    from models import MODELS

    if args.command == "schema":
        print(json.dumps(json_schema(MODELS, LOADERS), indent=2))
    else:
        print(dump(load(args.config, args.set, models=MODELS, loaders=LOADERS)), end="")
    return 0


if __name__ == "__main__":
    run(main)
