"""Read, override, check and write configs.

``python -m utils.config check config.json`` checks a file; ``python -m utils.config schema`` prints the
JSON Schema that editors use (kept in ``configs/schema.json``), ``reference`` the tables of docs/configuration.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import json5
from pydantic import ValidationError

from utils.config import errors as config_errors
from utils.config.checks import PER_CLASS_SCORES as PER_CLASS_SCORES
from utils.config.checks import STAGES, check, names_hint
from utils.config.schema import Config
from utils.errors import UserError
from utils.registry import Registry

# A config may say where its schema is, for the editor it is written in.
EDITORS_KEY = "$schema"


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
        problems = config_errors.explain(error)
        # One round of mending is enough: what the rest of the config has wrong is said in the same message.
        rest = config_errors.usable_part(raw, error)
        further = [] if rest is None else check(rest, models, loaders, stages)
        messages = [
            message + (names_hint(rest, path, loaders) if rest is not None else "")
            for path, message in problems.items()
        ]
        messages += [p for p in further if not config_errors.under(p.partition(": ")[0], problems)]
        raise UserError(config_errors.report(source, messages)) from None
    found = check(config, models, loaders, stages)
    if found:
        raise UserError(config_errors.report(source, found))
    return config


def read(path: str | Path) -> dict[str, Any]:
    """Return the content of a config file as plain dicts and lists."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin files with a mark
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config: {error}") from None
    try:
        raw = json5.loads(text, allow_duplicate_keys=False)
    except ValueError as error:
        raise UserError(_invalid(path, str(error))) from None
    except RecursionError:
        raise UserError(f"{path}: not a config: its brackets are nested too deeply") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected one JSON object, found {type(raw).__name__}")
    raw.pop(EDITORS_KEY, None)
    return raw


def _invalid(path: Path, reason: str) -> str:
    """Return what is wrong with a file's JSON, and where, as editors and compilers say it."""
    told = re.fullmatch(r"<string>:(\d+) (.*) at column (\d+)", reason, re.DOTALL)
    where = f", line {told[1]}, column {told[3]}" if told else ""
    return f"{path}{where}: not valid JSON (comments and trailing commas are fine): {told[2] if told else reason}"


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


def differences(before: Mapping[str, Any], config: Config) -> list[str]:
    """Return ``field: before -> now`` for each field in which a config differs from an earlier one's dump."""
    old, new = _flat(before), _flat(json.loads(dump(config)))
    shown = config_errors.found
    changed = []
    for path in dict.fromkeys([*old, *new]):
        values = [shown(fields[path]) if path in fields else "absent" for fields in (old, new)]
        if path not in old or path not in new or old[path] != new[path]:
            changed.append(f"{path}: {values[0]} -> {values[1]}")
    return changed


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return all values of nested sections by their paths."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= _flat(inner, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = json.loads(json.dumps(inner))
    return flat


# ---------------------------------------------------------------------------------------------------
# Command line


def json_schema(models: Registry, loaders: Registry) -> dict[str, Any]:
    """Return the JSON Schema of a config, for editors: names, types, meanings, and the registered classes.

    Optimizers and schedules are torch's, whatever its version has: they are not listed.
    """
    from utils.losses import LOSSES

    schema = _without_titles(Config.model_json_schema())
    fields = schema["properties"]
    for field, table in {
        "arch": models,
        "train_loader": loaders,
        "val_loader": loaders,
        "test_loader": loaders,
    }.items():
        named = {"allOf": [{"$ref": "#/$defs/Component"}, {"properties": {"type": {"enum": list(table)}}}]}
        optional = "default" in fields[field]
        kinds = {"anyOf": [named, {"type": "null"}], "default": None} if optional else named
        fields[field] = {"description": fields[field]["description"], **kinds}
    by_name = {"enum": list(LOSSES)}
    fields["loss"] = {
        "description": "a name, or {type, args}",
        "anyOf": [by_name, {"allOf": [{"$ref": "#/$defs/Component"}, {"properties": {"type": by_name}}]}],
    }
    fields[EDITORS_KEY] = {"description": "where editors find this schema", "type": "string"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _without_titles(value: Any) -> Any:
    # Pydantic adds every name once more as a title.
    if isinstance(value, dict):
        return {key: _without_titles(v) for key, v in value.items() if not (key == "title" and isinstance(v, str))}
    return [_without_titles(v) for v in value] if isinstance(value, list) else value
