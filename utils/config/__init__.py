"""Read, override, check and write configs.

``python -m utils.config check config.json`` checks a file; ``python -m utils.config schema`` prints the JSON Schema for
editors (``configs/schema.json``).
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
from utils.config.schema import EDITORS_KEY, Config
from utils.errors import UserError, did_you_mean
from utils.files import expand, looked_in
from utils.registry import Problem, Registry, found


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    models: Registry | None = None,
    loaders: Registry | None = None,
    stages: Sequence[str] = STAGES,
) -> Config:
    """Read a config file, apply ``path=value`` overrides, check everything, and return the config.

    Args:
        path: a JSON file; ``//`` comments and trailing commas are allowed.
        overrides: such as ``"trainer.epochs=3"``; a value that is not JSON is a string.
        models, loaders: the tables behind ``arch`` and the loaders; without them their arguments are not checked.
        stages: the loaders that will be built ("train", "val", "test"); the others are not checked.

    Raises:
        UserError: the file is missing or unreadable, or the config has problems; one message names all of them.
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
    raw = override(raw, overrides, source)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems = config_errors.explain(error, raw)
        # Check the rest too, so that one message names everything.
        rest = config_errors.usable_part(raw, error)
        if rest is not None:
            wrong = [problem.path for problem in problems]
            problems = [Problem(path, text + names_hint(rest, path, loaders)) for path, text in problems]
            problems += [p for p in check(rest, models, loaders, stages) if not p.is_under(wrong)]
        raise UserError(config_errors.report(source, problems)) from None
    problems = check(config, models, loaders, stages)
    if problems:
        raise UserError(config_errors.report(source, problems))
    return config


def read(path: str | Path) -> dict[str, Any]:
    """Return the content of a config file as plain dicts and lists."""
    path = expand(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin files with a mark
    except FileNotFoundError:
        near = did_you_mean(path.name, (other.name for other in path.parent.glob("*.json"))).rstrip(".")
        raise UserError(f"{path}: there is no such config file{looked_in(path)}{near}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise UserError(f"{path}: cannot be read as a config: {error}") from None
    try:
        raw = json5.loads(text, allow_duplicate_keys=False)
    except ValueError as error:
        match = re.fullmatch(r"<string>:(\d+) (.*) at column (\d+)", str(error), re.DOTALL)
        where, reason = (f", line {match[1]}, column {match[3]}", match[2]) if match else ("", str(error))
        message = f"{path}{where}: not valid JSON (comments and trailing commas are fine): {reason}"
        raise UserError(message) from None
    except RecursionError:
        raise UserError(f"{path}: not a config: brackets are nested too deeply") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected one JSON object, found {type(raw).__name__}")
    raw.pop(EDITORS_KEY, None)
    return raw


def override(raw: Mapping[str, Any], overrides: Sequence[str], source: str = "config") -> dict[str, Any]:
    """Return a copy of ``raw`` with each ``path=value`` set; missing sections on the way are added.

    Raises:
        UserError: an override is not ``path=value``, or JSON cannot express a value.
    """
    config_errors.refuse_foreign(raw, source)
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
                    f"--set {item}: {where} is {inner!r}, not a section that could contain {keys[depth + 1]!r}"
                )
            section = inner
        section[keys[-1]] = _value(text)
    config_errors.refuse_foreign(result, source)
    return result


def for_scored_data(raw: Any, overrides: Sequence[str]) -> list[str]:
    """Return overrides in which ``test_loader.args...`` change the val_loader if there is no test_loader.

    ``test.py`` scores the val_loader then.

    Args:
        raw: the content of the config, if it is one.
        overrides: of the command line.
    """
    first = next((i for i, item in enumerate(overrides) if item.startswith("test_loader.args.")), None)
    whole = any(item.startswith(("test_loader=", "test_loader.type=")) for item in overrides)
    if first is None or whole or not isinstance(raw, Mapping) or raw.get("test_loader") is not None:
        return list(overrides)
    scored = override(raw, overrides[:first]).get("val_loader")
    if scored is None:
        return list(overrides)
    return [*overrides[:first], f"test_loader={json.dumps(scored)}", *overrides[first:]]


def _value(text: str) -> Any:
    try:
        return json5.loads(text, allow_duplicate_keys=False)
    except (ValueError, RecursionError):
        return text


def dump(config: Config) -> str:
    """Return the resolved config as JSON text, defaults included."""
    return json.dumps(config.model_dump(), indent=4) + "\n"


def differences(before: Mapping[str, Any], config: Config) -> list[str]:
    """Return ``field: before -> now`` for each field whose value differs from an earlier config's dump."""
    old, new = _flat(before), _flat(json.loads(dump(config)))
    changed = []
    for path in dict.fromkeys([*old, *new]):
        values = [found(fields[path]) if path in fields else "absent" for fields in (old, new)]
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
