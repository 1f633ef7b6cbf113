"""Write the config reference in Markdown, from the schema and from the constructors that a config can name.

``python -m docs.reference`` replaces the text between the two markers in ``docs/configuration.md``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dataloaders import LOADERS
from models import MODELS
from utils.config.schema import Component, Config, Optimizer
from utils.errors import UserError, run
from utils.files import write_text
from utils.losses import LOSSES
from utils.lr_scheduler import SCHEDULERS
from utils.registry import Registry, json_schema

PAGE = "docs/configuration.md"
BEGIN = "<!-- reference: begin (python -m docs.reference) -->"
END = "<!-- reference: end -->"

_BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}
_WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_SHOWN_LIMIT = 1000  # larger limits only catch typing errors, so the tables do not show them


def reference() -> str:
    """Return all fields of a config, and the arguments of all classes it can name, with types and defaults."""
    models = ["### Models: `arch`", "", "[models.md](models.md) describes the networks.", ""]
    losses = ["### Losses: `loss`", "", "A name or `{type, args}`. [losses.md](losses.md) describes the losses.", ""]
    models += _summary("`arch.type`", MODELS)
    losses += _summary("`loss.type`", LOSSES)
    return "\n".join([*_fields(), *models, *_loaders(), *losses, *_schedules()])


def write(path: str | Path, text: str) -> None:
    """Write ``text`` between the markers of a Markdown file.

    Raises:
        UserError: the file has no markers.
    """
    head, begin, rest = Path(path).read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: the reference goes between the lines {BEGIN} and {END}, which are missing; add them")
    write_text(path, f"{head}{BEGIN}\n\n{text}\n{END}{tail}")


# -- fields ----------------------------------------------------------------------------------------------------


def _fields() -> list[str]:
    """Return one table per section of the schema, the outermost first."""
    return [line for name, section in _sections("", Config) for line in _section(name, section)]


def _sections(path: str, section: type[BaseModel]) -> Iterable[tuple[str, type[BaseModel]]]:
    yield path, section
    for name, field in section.model_fields.items():
        inner = _inner(field)
        if inner is not None:
            yield from _sections(f"{path}.{name}".lstrip("."), inner)


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section in a field; None for a plain component, which the tables of classes describe."""
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
    for name, row in _rows(section).items():
        anchor = f"{path}{name}".replace(".", "").lower()
        inner = _inner(section.model_fields[name]) is not None
        lines.append(f"| `{name}` | section | | [see below](#{anchor}) |" if inner else row)
    return [*lines, ""]


# -- types -----------------------------------------------------------------------------------------------------


def _kind(schema: Mapping[str, Any]) -> str:
    """Return the values that a JSON Schema allows, in words."""
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
    bounds = [
        text.format(f"{schema[key]:g}")
        for key, text in _BOUNDS.items()
        if key in schema and abs(schema[key]) <= _SHOWN_LIMIT
    ]
    return " ".join([_WORDS.get(str(kind), "any"), " and ".join(bounds)]).strip()


def _list(schema: Mapping[str, Any]) -> str:
    items = schema.get("prefixItems")
    if items:
        kinds = [_kind(s) for s in items]
        return "`[" + ", ".join(kinds) + "]`"
    item = _kind(schema.get("items", {}))
    return "list of " + re.sub("^(integer|number)", r"\1s", item)


# -- constructors ----------------------------------------------------------------------------------------------


def _schedules() -> list[str]:
    lines = [
        "### Schedules: `lr_scheduler.args`",
        "",
        "`Poly`, `OneCycle`, or any class of `torch.optim.lr_scheduler` with its own arguments. By default a schedule "
        "advances once per optimizer step. Arguments that torch counts in epochs (`step_size`, `T_max`, `milestones`) "
        'then count optimizer steps. With `"step": "epoch"`, the schedule advances once per epoch, and they count '
        "epochs.",
        "",
    ]
    for name in ("Poly", "OneCycle"):
        lines += [f"`{name}`", "", *_table(_rows(SCHEDULERS.arguments(name)))]
    return lines


def _loaders() -> list[str]:
    lines = [
        "### Data: `train_loader`, `val_loader`, `test_loader`",
        "",
        "[datasets.md](datasets.md) describes the data sets. All of them accept these arguments:",
        "",
    ]
    every = {name: _rows(LOADERS.arguments(name)) for name in LOADERS}
    shared = set.intersection(*(set(rows) for rows in every.values()))
    lines += _table({name: row for name, row in every["Folder"].items() if name in shared})
    for name, rows in every.items():
        own = {argument: row for argument, row in rows.items() if argument not in shared}
        splits = ", ".join(f"`{split}`" for split in LOADERS[name].splits)
        lines += [f"`{name}`: splits {splits}" + (". Its own arguments:" if own else ""), ""]
        lines += _table(own) if own else []
    return lines


def _rows(model: type[BaseModel]) -> dict[str, str]:
    """Return the row of a table for each field or argument."""
    kinds = {name: _kind(schema) for name, schema in json_schema(model)["properties"].items()}
    defaults = {name: _default(field) for name, field in model.model_fields.items()}
    if model is Config:
        kinds["loss"] = f"name or {kinds['loss']}"
    if model is Optimizer:
        defaults["args"] = f"for SGD: `{json.dumps(Optimizer().args)}`"
    return {
        name: f"| `{name}` | {kinds.get(name, 'any')} | {defaults[name]} | {_cell(field.description or '')} |"
        for name, field in model.model_fields.items()
    }


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| argument | type | default | meaning |", "| - | - | - | - |", *rows.values(), ""]


def _summary(kind: str, table: Registry) -> list[str]:
    lines = [f"| {kind} | arguments and their defaults |", "| - | - |"]
    for name in table:
        fields = table.arguments(name).model_fields.items()
        listing = ", ".join(f"`{argument}` {_default(field)}".rstrip() for argument, field in fields)
        lines.append(f"| `{name}` | {listing or 'none'} |")
    return [*lines, ""]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={"type": ""})
    return f"`{json.dumps(value.type if isinstance(value, Component) else value, default=str)}`"


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return text.replace("|", "\\|").removesuffix(".")


def main() -> None:
    """Write the reference into the page."""
    parser = argparse.ArgumentParser(prog="python -m docs.reference", description="Write the config reference.")
    parser.add_argument("page", nargs="?", default=PAGE, help="Markdown file with the markers (default: %(default)s)")
    write(parser.parse_args().page, reference())


if __name__ == "__main__":
    run(main)
