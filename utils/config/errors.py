"""What is wrong with a config, said so that it can be mended: path, what was found, what is allowed, nearest name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from utils.config.schema import Component, Config
from utils.errors import did_you_mean

# In place of a required value that is missing or wrong, so that the rest of the config can be looked at too.
PLACEHOLDER = "?"

# Parts of a location that pydantic adds for its own use: which member of a union it tried.
_TAGS = ("literal[", "list[", "function-", "nullable", "constrained-", "union")


def report(source: str, problems: Sequence[str]) -> str:
    """Return one message for all problems of a config."""
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return f"{source} has {len(problems)} problems:\n" + "\n".join(f"  {p}" for p in problems)


def explain(error: ValidationError) -> dict[str, str]:
    """Return one message per wrong value, by the value's path."""
    by_path: dict[str, list[Any]] = {}
    for detail in error.errors():
        by_path.setdefault(".".join(_keys(detail)), []).append(detail)
    messages = {}
    for path, details in by_path.items():
        # A list is no literal either, but what is wrong is the member of it that another message names.
        member_named = any(other.startswith(f"{path}.") for other in by_path)
        if not (member_named and all(d["type"] == "literal_error" for d in details)):
            messages[path] = _message(path, details)
    return messages


def _keys(detail: Any) -> list[str]:
    return [str(key) for key in detail["loc"] if not str(key).startswith(_TAGS)]


def _message(path: str, details: Sequence[Any]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        keys = path.split(".")
        known = _fields_at(keys[:-1])
        return f"{path}: unknown key{did_you_mean(keys[-1], known)} Allowed: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{path}: required, and the config does not give it"
    # Several, where a value may be of several kinds.
    expected = " or ".join(dict.fromkeys(_expected(path, detail) for detail in details))
    hint = ""
    if first["type"] == "literal_error":
        names = first["ctx"]["expected"].replace(" or ", ",").split(",")
        hint = did_you_mean(first["input"], [name.strip("' ") for name in names]).rstrip(".")
    return f"{path}: found {found(first['input'])}; {expected}{hint}"


def _expected(path: str, detail: Any) -> str:
    if detail["type"] in ("model_type", "model_attributes_type"):
        section = _section_at(path.split("."))
        if section is not None and issubclass(section, Component):
            return 'expected a section such as {"type": "NAME", "args": {}}'
        return "expected a section, {...}"
    text = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    return text.removeprefix("should be ") if detail["type"] == "list_type" else text


def found(value: Any) -> str:
    """Return a value of a config as it stands there, cut short where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _section_at(keys: Iterable[str]) -> type[BaseModel] | None:
    """Return the section that ``keys`` lead to, None where they lead to a value."""
    section: type[BaseModel] | None = Config
    for key in keys:
        if section is None or key not in section.model_fields:
            return None
        annotation = section.model_fields[key].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return section


def _fields_at(keys: Sequence[str]) -> list[str]:
    section = _section_at(keys)
    return [] if section is None else list(section.model_fields)


def usable_part(raw: Mapping[str, Any], error: ValidationError) -> Config | None:
    """Return the config without its wrong values, to look for further problems; None where too little is left.

    Wrong values give way to their defaults, and to :data:`PLACEHOLDER` where there is none.
    """
    rest = json.loads(json.dumps(raw, default=str))
    for detail in error.errors():
        _remove(rest, _keys(detail), detail["type"] == "missing")
    try:
        return Config.model_validate(rest)
    except ValidationError:
        return None


def _remove(section: dict[str, Any], keys: Sequence[str], missing: bool) -> None:
    inside: type[BaseModel] = Config
    for depth, key in enumerate(keys):
        field = inside.model_fields.get(key)
        deeper = _section_at(keys[: depth + 1])
        if depth == len(keys) - 1 or deeper is None or not isinstance(section.get(key), dict):
            section.pop(key, None)
            if field is not None and field.is_required():
                section[key] = {"type": PLACEHOLDER} if deeper is not None else PLACEHOLDER
            return
        section, inside = section[key], deeper


def under(path: str, paths: Iterable[str]) -> bool:
    """Return whether ``path`` is one of ``paths`` or lies below one."""
    return any(path == other or path.startswith(f"{other}.") for other in paths)
