"""The JSON Schema of configs for editors: fields, registered names, and the arguments of each of them."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

from utils.config.schema import EDITORS_KEY, Config
from utils.losses import LOSSES
from utils.lr_scheduler import SCHEDULERS
from utils.optim import OPTIMIZERS
from utils.registry import Registry, json_schema

# Their entries are torch's, so another version of torch has others: editors accept names that are not listed.
OPEN = ("optimizer", "lr_scheduler")


def schema(models: Registry, loaders: Registry) -> dict[str, Any]:
    """Return the JSON Schema of a config; the same for every version of pydantic.

    ``$defs`` has one entry per registered class, named ``field.Class``, with its arguments. Those of optimizers and
    schedules depend on the version of torch, which ``$comment`` names.
    """
    result = json_schema(Config)
    tables = {"arch": models, "loader": loaders, "loss": LOSSES, "optimizer": OPTIMIZERS, "lr_scheduler": SCHEDULERS}
    fields, definitions = result["properties"], result["$defs"]
    for kind, table in tables.items():
        section = {"optimizer": "Optimizer", "lr_scheduler": "Schedule"}.get(kind, "Component")
        for name in table:
            definitions[f"{kind}.{name}"] = arguments = json_schema(table.arguments(name))
            if kind in OPEN:
                del arguments["additionalProperties"]
        definitions[kind] = {
            "allOf": [
                {"$ref": f"#/$defs/{section}"},
                {} if kind in OPEN else {"properties": {"type": {"enum": [*table, *table.aliases]}}},
                *(_when(name, f"{kind}.{table.canonical(name)}") for name in [*table, *table.aliases]),
            ]
        }
    for field in ("arch", "train_loader", "val_loader", "test_loader", "loss", "optimizer", "lr_scheduler"):
        described = {"description": fields[field]["description"]} if "description" in fields[field] else {}
        choice: dict[str, Any] = {"$ref": f"#/$defs/{'loader' if field.endswith('_loader') else field}"}
        if field in ("val_loader", "test_loader"):
            choice = {"anyOf": [choice, {"type": "null"}], "default": None}
        elif field == "loss":  # a name alone is enough
            choice = {"anyOf": [{"enum": list(LOSSES)}, choice]}
        fields[field] = described | choice
    fields[EDITORS_KEY] = {"description": "the path or address of this schema, for editors", "type": "string"}
    torch = ".".join(importlib.metadata.version("torch").split(".")[:2])
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, "$comment": f"optimizers and schedules of torch {torch}", **result}


def _when(name: str, definition: str) -> dict[str, Any]:
    """Return the rule: if ``type`` is ``name``, ``args`` are those of ``definition``."""
    return {
        "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
        "then": {"properties": {"args": {"$ref": f"#/$defs/{definition}"}}},
    }


def text(models: Registry, loaders: Registry) -> str:
    """Return :func:`schema` as JSON, with one line for each field and each definition."""
    lines = []
    for key, value in schema(models, loaders).items():
        if key in ("$defs", "properties"):
            entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{entries}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
