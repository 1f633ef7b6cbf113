"""The JSON Schema for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from dataloaders import LOADERS
from models import MODELS
from tests.config.running import BASE, resolve
from tests.config.test_configs import our_configs
from tests.config.test_mistakes import MISTAKES
from tests.predecessors import PUBLISHED, RANKSEG
from utils import config as configs
from utils.config import editor as editors
from utils.losses import LOSSES

pytestmark = pytest.mark.usefixtures("data")


def without_torch(rules: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without the arguments of torch's classes, which depend on its version."""
    theirs = ("optimizer", "lr_scheduler")
    kept = {name: rule for name, rule in rules["$defs"].items() if not name.startswith(theirs)}
    return rules | {"$comment": "", "$defs": kept}


def test_the_schema_for_editors_is_up_to_date(root) -> None:
    kept = json.loads((root / "configs" / "schema.json").read_text(encoding="utf-8"))
    expected = json.loads(editors.text(MODELS, LOADERS))
    if kept["$comment"] != expected["$comment"]:  # written with another version of torch
        kept, expected = without_torch(kept), without_torch(expected)
    assert kept == expected, "update it: python -m utils.config schema > configs/schema.json"


def test_the_schema_knows_the_arguments_of_every_constructor(editor) -> None:
    for field, table in (("arch", MODELS), ("train_loader", LOADERS), ("loss", LOSSES)):
        for name in table:
            wrong = BASE | {field: {"type": name, "args": {"no_such_argument": 1}}}
            assert not editor.is_valid(wrong), name
    for wrong in ({"optimizer": {"type": "SGD", "args": {"lr": "fast"}}}, {"loss": {"type": "FocalLoss", "args": [1]}}):
        assert not editor.is_valid(BASE | wrong)
    for good in (
        {"optimizer": {"type": "OfTomorrow", "args": {"x": 1}}},
        {"lr_scheduler": {"type": "Poly", "args": {}}},
    ):
        assert editor.is_valid(BASE | good)
    assert not editor.is_valid(BASE | {"train_loader": {"type": "VOC", "args": {"crop_size": 0}}})


@pytest.fixture(scope="module")
def editor() -> Draft202012Validator:
    """Return the problems that an editor finds with the schema in configs/."""
    root = Path(__file__).resolve().parents[2]
    rules = json.loads((root / "configs" / "schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(rules)
    return Draft202012Validator(rules)


@pytest.mark.parametrize("file", our_configs())
def test_the_schema_accepts_our_configs(file, root, editor) -> None:
    editor.validate(configs.read(root / file))


def test_the_schema_accepts_resolved_and_published_configs_and_refuses_mistakes(editor) -> None:
    for raw in (BASE, PUBLISHED, RANKSEG, json.loads(configs.dump(resolve())), {"$schema": "x", **BASE}):
        editor.validate(raw)
    for wrong in ("unknown section", "unknown field", "text for a number", "word for another", "unknown model"):
        assert not editor.is_valid(BASE | MISTAKES[wrong][0]), wrong
    assert not editor.is_valid({"name": "a"})
