"""Error messages for configs: the path of the field, what was found, what is allowed, and the nearest name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from utils.config.schema import Component, Config
from utils.errors import UserError, did_you_mean, listed
from utils.registry import Problem, expected, found

# Stands in for a required value that is missing or wrong while the rest of the config is checked.
PLACEHOLDER = "?"

_DEEPEST = 50  # sections inside sections
_LONGEST_PATH = 100
_DIGITS = 30

# Parts of a location that pydantic adds for its own use: which member of a union it tried.
_TAGS = ("literal[", "list[", "function-", "nullable", "constrained-", "union")


def report(source: str, problems: Sequence[Problem]) -> str:
    """Return one message for all problems of a config."""
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return f"{source} has {len(problems)} problems:\n" + "\n".join(f"  {p}" for p in problems)


def refuse_foreign(raw: Mapping[str, Any], source: str) -> None:
    """Raise UserError for values that JSON cannot express, and texts that cannot be printed or name a file."""
    problems = [Problem(path, text) for path, value in _values(raw) if (text := _foreign(value)) is not None]
    if problems:
        raise UserError(report(source, problems))


def _values(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key and every value that is not a section or a list, by its path."""
    waiting: list[tuple[str, Any, int]] = [("", raw, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if depth > _DEEPEST:
            yield path[:_LONGEST_PATH], RecursionError
        elif isinstance(value, Mapping):
            yield from ((f"{path}.{key!r}".lstrip("."), key) for key in value if _foreign(key) or type(key) is not str)
            waiting += [(f"{path}.{key}".lstrip("."), inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{path}.{i}", inner, depth + 1) for i, inner in enumerate(value)]
        else:
            yield path, value


def _foreign(value: Any) -> str | None:
    """Return why a value is not allowed in a config; None if it is allowed."""
    if value is RecursionError:
        return f"more than {_DEEPEST} levels of brackets; a config needs only a few"
    if isinstance(value, int) and abs(value) >= 10**_DIGITS:
        return f"found a whole number of more than {_DIGITS} digits"
    if value is None or isinstance(value, bool | int | float):
        return None
    if not isinstance(value, str):
        return f"found a value of type {type(value).__name__}; expected what a JSON file can contain"
    if "\0" in value:
        return f"found {found(value)}; text must not contain the character NUL"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"found {found(value)}; text must be valid Unicode (lone surrogates are not)"
    return None


def explain(error: ValidationError, raw: Mapping[str, Any] = {}) -> list[Problem]:  # noqa: B006
    """Return one problem per wrong value of the config ``raw``."""
    by_path: dict[str, list[Any]] = {}
    for detail in error.errors():
        by_path.setdefault(".".join(_keys(detail)), []).append(detail)
    problems = []
    for path, details in by_path.items():
        # A list is not a literal either, but the member of the list that another message names is what is wrong.
        member_named = any(other.startswith(f"{path}.") for other in by_path)
        if not (member_named and all(d["type"] == "literal_error" for d in details)):
            problems.append(Problem(path, _text(path, details, raw)))
    return problems


def _keys(detail: Any) -> list[str]:
    return [str(key) for key in detail["loc"] if not str(key).startswith(_TAGS)]


def _text(path: str, details: Sequence[Any], raw: Mapping[str, Any]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        *above, key = path.split(".")
        section = _section_at(above)
        known = [] if section is None else list(section.model_fields)
        elsewhere = listed(_elsewhere(path, raw), 4)
        hint = f"; did you mean {elsewhere}?" if elsewhere else did_you_mean(key, known)
        return f"unknown key{hint} Allowed: {', '.join(known)}"
    if first["type"] == "missing":
        return "required, but missing in the config"
    # Several, where a value may be of several kinds.
    wanted = " or ".join(dict.fromkeys(_expected(path, detail) for detail in details))
    hint = ""
    if first["type"] == "literal_error":
        names = first["ctx"]["expected"].replace(" or ", ",").split(",")
        hint = did_you_mean(first["input"], [name.strip("' ") for name in names]).rstrip(".")
    return f"found {found(first['input'])}; {wanted}{hint}"


def _elsewhere(path: str, raw: Mapping[str, Any]) -> list[str]:
    """Return the fields in other sections, and the arguments in the config ``raw``, with the last name of ``path``."""
    fields = [*_fields(Config), *(other for other, _ in _values(raw) if ".args." in other)]
    key = path.rpartition(".")[2]
    return sorted({other for other in fields if other != path and other.rpartition(".")[2] == key})


def _fields(section: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[str]:
    for name in section.model_fields:
        yield ".".join((*above, name))
        inner = _section_at((*above, name))
        if inner is not None:
            yield from _fields(inner, (*above, name))


def _expected(path: str, detail: Any) -> str:
    if detail["type"] in ("model_type", "model_attributes_type"):
        section = _section_at(path.split("."))
        if section is not None and issubclass(section, Component):
            return 'expected a section such as {"type": "NAME", "args": {}}'
        return "expected a section, {...}"
    text = expected(detail)
    return text.removeprefix("should be ") if detail["type"] == "list_type" else text


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


def usable_part(raw: Mapping[str, Any], error: ValidationError) -> Config | None:
    """Return the config with defaults for its wrong values, to look for further problems; None if that fails.

    A wrong value without a default becomes :data:`PLACEHOLDER`.
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
