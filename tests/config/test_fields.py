"""Each config field has a description and is read somewhere in the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from pydantic import BaseModel

from utils.config import schema

pytestmark = pytest.mark.usefixtures("data")


# The names that the code gives to sections: `config.trainer`, `self.settings`, ...
HOLDERS = {
    "Config": {"config", "self", "loaded"},
    "Component": {"component", "arch", "loss", "lr_scheduler", "schedule", "train_loader", "loader"},
    "Optimizer": {"optimizer", "section"},
    "Schedule": {"lr_scheduler", "section"},
    "RankDiceOptions": {"rankdice", "chosen"},
    "PresenceFit": {"fit"},
    "Predict": {"predict"},
    "Trainer": {"trainer", "settings"},
    "Tester": {"tester"},
}


# Free text for readers of the file.
FOR_PEOPLE = {("Config", "about"), ("PresenceFit", "images")}


def sections() -> list[type[BaseModel]]:
    found = [getattr(schema, name) for name in HOLDERS]
    known = {c for c in vars(schema).values() if isinstance(c, type) and issubclass(c, schema.Section)}
    assert known - set(found) == {schema.Section}
    return found


def reads(root: Path) -> set[tuple[str, str]]:
    """Return every (holder, attribute) that the code reads, as in ``holder.attribute`` or ``x.holder.attribute``."""
    found = set()
    code = [
        *root.glob("*.py"),
        *(p for d in ("base", "utils", "models", "dataloaders") for p in root.glob(f"{d}/**/*.py")),
    ]
    for path in code:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = node.value
                name = getattr(holder, "attr", None) or getattr(holder, "id", None)
                found.add((name, node.attr))
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):  # a fit is a dictionary
                found.add((getattr(node.value, "attr", None) or getattr(node.value, "id", None), node.slice.value))
    return found


@pytest.fixture(scope="module")
def reads_of_the_code() -> set[tuple[str, str]]:
    return reads(Path(__file__).resolve().parents[2])


@pytest.mark.parametrize(
    ("section", "field"),
    [(s.__name__, f) for s in sections() for f in s.model_fields if (s.__name__, f) not in FOR_PEOPLE],
)
def test_a_field_that_is_accepted_is_read_by_someone(section, field, reads_of_the_code) -> None:
    assert any((holder, field) in reads_of_the_code for holder in HOLDERS[section])


def test_every_field_says_what_it_means() -> None:
    for section in sections():
        for name, field in section.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
                assert field.description, f"{section.__name__}.{name}"
