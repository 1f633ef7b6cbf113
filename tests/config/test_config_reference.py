"""The config reference in the documentation is generated from the schema and is up to date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from dataloaders import LOADERS
from docs import reference as config_reference
from models import MODELS
from utils.config.schema import Config
from utils.errors import UserError
from utils.losses import LOSSES
from utils.registry import argument_model, documented


@pytest.fixture(scope="module")
def text() -> str:
    return config_reference.reference()


def test_the_page_contains_the_generated_reference(root: Path, text: str, tmp_path: Path) -> None:
    page = root / "docs" / "configuration.md"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    config_reference.write(copy, text)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), "update it: python -m docs.reference"


def test_every_field_and_every_class_is_there(text: str) -> None:
    def fields(section: Any) -> set[str]:
        inner = [config_reference._inner(f) for f in section.model_fields.values()]
        return set(section.model_fields).union(*(fields(s) for s in inner if s is not None))

    for name in fields(Config) | {*MODELS, *LOADERS, *LOSSES}:
        assert f"`{name}`" in text, name


def test_rows_say_type_default_and_meaning(text: str) -> None:
    lines = text.splitlines()
    for line in (
        "| `epochs` | integer >= 1 | `80` | number of training epochs |",
        '| `amp` | `"off"`, `"bf16"`, `"fp16"` | `"off"` | mixed precision; fp16 uses gradient scaling |',
        "| `name` | text | required | name of the run, part of the save path |",
        "| `flip` | true or false | `true` | flip half of the images horizontally |",
        "| `mask_values` | list of integers or null | `null` | the value of each class in the masks: [0, 255] for "
        "masks with the values 0 and 255 |",
        "| `UNet` | `in_channels` `3`, `width` `64`, `published` `false`, `freeze_bn` `false` |",
    ):
        assert line in lines
    for line in lines:
        if line.startswith("|"):
            assert line.count("|") - line.count("\\|") in (3, 5), line
    assert "None" not in text


def test_every_argument_of_a_data_set_says_what_it_means(text: str) -> None:
    rows = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 5]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


def test_docstrings_are_read_with_their_continued_lines() -> None:
    def function(a: int, b: int, c: int) -> None:
        """Do it.

        Args:
            a, b: two
                things, None: off.
            c: one; see :func:`f` | ``g``.

        Raises:
            ValueError: never.
        """

    assert documented(function) == {
        "a": "two things, null: off",
        "b": "two things, null: off",
        "c": "one; see `f` | `g`",
    }
    assert config_reference._cell("one | see `f`.") == "one \\| see `f`"


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (bool | float, "true or false or number"),
        (list[float] | Literal["balanced"] | None, 'list of numbers or `"balanced"` or null'),
        (tuple[float, float], "`[number, number]`"),
        (object, "any"),
    ],
)
def test_kinds(annotation: Any, expected: str) -> None:
    def function(x=1) -> None: ...

    function.__annotations__["x"] = annotation
    assert config_reference._rows(argument_model("f", [function]))["x"].split(" | ")[1] == expected


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(UserError, match="which are missing; add them"):
        config_reference.write(page, "x")
    assert page.read_text() == "no marks"


def test_the_command_writes(tmp_path: Path, monkeypatch, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{config_reference.BEGIN}\nold\n{config_reference.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["reference", str(page)])
    config_reference.main()
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n")
    assert written.endswith("\nafter\n")
    assert text in written
    assert "\nold\n" not in written
