"""The reference of the config in Markdown, made from the schema and from the constructors that a config can name.

``python -m utils.config reference`` prints it; with ``--write docs/configuration.md`` it replaces what stands between
the two marks of that file.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticOmit

from utils.config.checks import PROVIDED_TO_LOADER, PROVIDED_TO_LOSS, PROVIDED_TO_MODEL, PROVIDED_TO_SCHEDULER
from utils.config.schema import Component, Config, Optimizer
from utils.errors import UserError
from utils.files import write_text
from utils.registry import Registry

BEGIN = "<!-- reference: begin (python -m utils.config reference --write docs/configuration.md) -->"
END = "<!-- reference: end -->"

_BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}
_WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def reference(models: Registry, loaders: Registry) -> str:
    """Return the fields of a config with their types, defaults and meanings, and the arguments of what it names."""
    return "\n".join([*_fields(), *_models(models), *_loaders(loaders), *_losses(), *_schedules()])


def write(path: str | Path, text: str) -> None:
    """Put ``text`` between the marks of a Markdown file.

    Raises:
        UserError: the file is not there, or has no such marks.
    """
    path = Path(path)
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: expected the lines {BEGIN} and {END}, between which the reference goes")
    write_text(path, f"{head}{BEGIN}\n\n{text}\n{END}{tail}")


# -- fields ----------------------------------------------------------------------------------------------------


def _fields() -> list[str]:
    """Return one table per section of the schema, outermost first."""
    return [line for name, section in _sections("", Config) for line in _section(name, section)]


def _sections(path: str, section: type[BaseModel]) -> Iterable[tuple[str, type[BaseModel]]]:
    yield path, section
    for name, field in section.model_fields.items():
        inner = _inner(field)
        if inner is not None:
            yield from _sections(f"{path}.{name}".lstrip("."), inner)


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section a field holds; a plain component is none, the tables of classes tell about it."""
    kind = field.annotation
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) and kind is not Component else None


def _section(path: str, section: type[BaseModel]) -> list[str]:
    title = f"### `{path}`" if path else "### The file"
    lines = [
        title,
        "",
        (section.__doc__ or "").strip(),
        "",
        "| field | type | default | meaning |",
        "| - | - | - | - |",
    ]
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        inner = _inner(field)
        if inner is not None:
            anchor = f"{path}{name}".replace(".", "").lower()
            lines.append(f"| `{name}` | section | | [see there](#{anchor}) |")
            continue
        kind, default = _kind(schema["properties"][name]), _field_default(section, name, field)
        kind = f"a name, or {kind}" if section is Config and name == "loss" else kind
        lines.append(f"| `{name}` | {kind} | {default} | {_cell(field.description or '')} |")
    return [*lines, ""]


def _field_default(section: type[BaseModel], name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if section is Optimizer and name == "args":
        return f"of SGD: `{json.dumps(Optimizer().args)}`"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Component):
        value = value.type
    return f"`{json.dumps(value)}`"


# -- types -----------------------------------------------------------------------------------------------------


class _Leniently(GenerateJsonSchema):
    """JSON Schema of annotations that also allow what JSON has not (tensors): that alternative is left out."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Any:
        raise PydanticOmit


def _kind(schema: Mapping[str, Any]) -> str:
    """Return what a JSON Schema allows, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "`{type, args}`" if name == "Component" else name
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = [_kind(s) for s in schema[key]]
            return " or ".join(dict.fromkeys(kinds))
    for key in ("enum", "const"):
        if key in schema:
            values = schema[key] if key == "enum" else [schema[key]]
            return ", ".join(f"`{json.dumps(v)}`" for v in values)
    kind = schema.get("type")
    if kind == "array":
        return _list(schema)
    if kind == "object":
        return "section"
    bounds = [text.format(f"{schema[key]:g}") for key, text in _BOUNDS.items() if key in schema]
    return " ".join([_WORDS.get(str(kind), "any"), " and ".join(bounds)]).strip()


def _list(schema: Mapping[str, Any]) -> str:
    items = schema.get("prefixItems")
    if items:
        kinds = [_kind(s) for s in items]
        return "`[" + ", ".join(kinds) + "]`"
    item = _kind(schema.get("items", {}))
    return "list of " + re.sub("^(integer|number)", r"\1s", item)


def _annotation_kind(parameter: inspect.Parameter) -> str:
    if parameter.annotation is parameter.empty or isinstance(parameter.annotation, str):
        return "any"
    config = ConfigDict(arbitrary_types_allowed=True)
    try:
        schema = TypeAdapter(parameter.annotation, config=config).json_schema(schema_generator=_Leniently)
    except pydantic.PydanticUserError:  # a type that brings its own config
        schema = TypeAdapter(parameter.annotation).json_schema(schema_generator=_Leniently)
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema, PydanticOmit):
        return "any"
    return _kind(schema)


# -- constructors ----------------------------------------------------------------------------------------------


def _models(models: Registry) -> list[str]:
    lines = ["### Models: `arch`", "", "The networks are described in [models.md](models.md).", ""]
    rows = {name: _arguments([models[name]], PROVIDED_TO_MODEL) for name in models}
    return [*lines, *_summary("`arch.type`", rows)]


def _losses() -> list[str]:
    from utils.losses import LOSSES

    lines = ["### Losses: `loss`", "", "A name alone, or `{type, args}`; described in [losses.md](losses.md).", ""]
    rows = {name: _arguments([loss], PROVIDED_TO_LOSS) for name, loss in LOSSES.items()}
    return [*lines, *_summary("`loss.type`", rows)]


def _schedules() -> list[str]:
    from utils.lr_scheduler import SCHEDULERS

    lines = [
        "### Schedules: `lr_scheduler`",
        "",
        "Besides these two, any class of `torch.optim.lr_scheduler` with its own arguments. All are stepped once per "
        "optimizer step, so numbers that torch counts in epochs (`step_size`, `T_max`, `milestones`) count steps.",
        "",
    ]
    for name in ("Poly", "OneCycle"):
        arguments = _arguments([SCHEDULERS[name]], PROVIDED_TO_SCHEDULER)
        lines += [f"`{name}`", "", *_table(arguments)]
    return lines


def _loaders(loaders: Registry) -> list[str]:
    lines = [
        "### Data: `train_loader`, `val_loader`, `test_loader`",
        "",
        "The data sets are described in [datasets.md](datasets.md). Arguments that all of them take:",
        "",
    ]
    every = {name: _arguments(loaders.constructors(name), PROVIDED_TO_LOADER) for name in loaders}
    shared = set.intersection(*(set(arguments) for arguments in every.values()))
    lines += _table({name: a for name, a in every["Folder"].items() if name in shared})
    for loader, arguments in every.items():
        own = {name: a for name, a in arguments.items() if name not in shared}
        splits = ", ".join(f"`{split}`" for split in loaders[loader].splits)
        lines += [f"`{loader}`: splits {splits}" + (", and the arguments" if own else ""), ""]
        lines += _table(own) if own else []
    return lines


def _arguments(
    targets: Iterable[Callable[..., Any]], provided: Iterable[str]
) -> dict[str, tuple[inspect.Parameter, str]]:
    """Return the named arguments of constructors, each with what its docstring says; the first target decides."""
    found: dict[str, tuple[inspect.Parameter, str]] = {}
    for target in targets:
        meanings = documented(target)
        for name, parameter in inspect.signature(target, eval_str=True).parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and name not in provided:
                found.setdefault(name, (parameter, meanings.get(name, "")))
    return found


def documented(target: Callable[..., Any]) -> dict[str, str]:
    """Return what the ``Args:`` part of a docstring says about each argument (``a, b: text`` is about both)."""
    text = inspect.getdoc(target) or ""
    match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, re.MULTILINE)
    if match is None:
        return {}
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(match[1]).splitlines():
        start = re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): ", line)
        if start:
            names = start[1].split(", ")
            line = line[start.end() :]
        for name in names:
            meanings[name] = f"{meanings.get(name, '')} {line.strip()}".strip()
    return meanings


def _table(arguments: Mapping[str, tuple[inspect.Parameter, str]]) -> list[str]:
    lines = ["| argument | type | default | meaning |", "| - | - | - | - |"]
    for name, (parameter, meaning) in arguments.items():
        lines.append(f"| `{name}` | {_annotation_kind(parameter)} | {_default(parameter)} | {_cell(meaning)} |")
    return [*lines, ""]


def _summary(kind: str, rows: Mapping[str, Mapping[str, tuple[inspect.Parameter, str]]]) -> list[str]:
    lines = [f"| {kind} | arguments and their defaults |", "| - | - |"]
    for name, arguments in rows.items():
        listing = ", ".join(f"`{a}` {_default(parameter)}".rstrip() for a, (parameter, _) in arguments.items())
        lines.append(f"| `{name}` | {listing or 'none'} |")
    return [*lines, ""]


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    return f"`{json.dumps(parameter.default)}`"


def _cell(text: str) -> str:
    """Return what a docstring says as a cell of a Markdown table, in JSON's words."""
    text = re.sub(r":[a-z]+:`~?([^`]*)`", r"`\1`", text.replace("``", "`"))
    text = re.sub(r"\bNone\b", "null", text)
    return text.replace("|", "\\|").removesuffix(".")
