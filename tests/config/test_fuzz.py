"""Thousands of configs with wrong values in random fields: each is accepted, or refused with one message."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from dataloaders import LOADERS
from models import MODELS
from utils import config as configs
from utils.config.__main__ import rehearse
from utils.config.schema import Component, Config
from utils.errors import UserError
from utils.losses import LOSSES
from utils.lr_scheduler import SCHEDULERS
from utils.optim import OPTIMIZERS

CONFIGS, REHEARSED = 2500, 60
MEGABYTES = 600  # the most additional memory

TABLES = {
    "arch": MODELS,
    "train_loader": LOADERS,
    "val_loader": LOADERS,
    "optimizer": OPTIMIZERS,
    "loss": LOSSES,
    "lr_scheduler": SCHEDULERS,
}
NASTY: list[Any] = [
    *(None, True, False, True, False, 0, 1, -1, 2, 3, 255, 256, 65536, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30),
    *(10**5000, 0.0, -0.1, 0.5, 1.0, 1.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "0", "x", "auto", "all", "train", "val", "max", "max Mean_Dice", "min val_loss", "weighted", "balanced"),
    *("\0", "a\0b", "\ud800", "é\u202e", "=1+1", "a" * 300, "a/" * 3000, "~", "~nobody", "$HOME", "${X", "..", "."),
    *("(", "(?P<x>", "{split}", "class.txt", "resnet50", "timm:none", "no.pth", "T", "rankdice", "nan", "NaN"),
    *([], [0], [1, 1], [0.5, 0.5], [-1, 2], [None], ["a", "b"], ["a", "a"], [[0, 0, 0]], [[0, 0]], [[]], [2**63] * 3),
    *({}, {"type": "x"}, {"type": None}, {"args": []}, {"type": "StepLR", "args": {"step_size": 0}}, {"a": {"b": {}}}),
    [{"type": "StepLR"}],
    [{"type": "SequentialLR", "args": {"schedulers": [], "milestones": []}}],
    [{"type": "ReduceLROnPlateau"}, {"type": 5}],
    list(range(1000)),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small data set of pairs, and an incomplete one in VOC's layout."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "voc").mkdir()
    (folder / "class.txt").write_text("one\ntwo\n")
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (folder / "pairs" / kind).mkdir(parents=True)
        for i in range(6):
            values = np.full((40, 40, 3) if mode == "RGB" else (40, 40), i % 2, np.uint8)
            Image.fromarray(values).save(folder / "pairs" / kind / f"{i}.png")
    return folder


def bases() -> list[dict[str, Any]]:
    shapes = {"type": "Shapes", "args": {"batch_size": 2, "length": 4, "size": 32, "num_workers": 0}}
    pairs = {"type": "Folder", "args": {"data_dir": "pairs", "classes": ["a", "b"], "batch_size": 2, "val_split": 0.5}}
    voc = {"type": "VOC", "args": {"data_dir": "voc", "batch_size": 2}}
    small = {"name": "run", "arch": {"type": "UNet", "args": {"width": 4}}}
    return [
        small | {"train_loader": shapes, "val_loader": shapes},
        small | {"train_loader": pairs},
        {"name": "run", "arch": {"type": "PSPNet", "args": {"backbone": "resnet18"}}} | {"train_loader": voc},
    ]


def fields(section: type[BaseModel] = Config, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every field of the schema, sections included."""
    found = []
    for name, field in section.model_fields.items():
        found.append((*above, name))
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and not issubclass(kind, Component):
            found += fields(kind, (*above, name))
    return found


def put(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        inner = raw.get(key)
        raw[key] = inner if isinstance(inner, dict) else {}
        raw = raw[key]
    raw[path[-1]] = value


def draw(rng: random.Random, paths: list[tuple[str, ...]]) -> dict[str, Any]:
    """Return a valid config with one to three wrong values of any field, argument or type."""
    raw = json.loads(json.dumps(rng.choice(bases())))
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = rng.choice(NASTY)
        field = rng.choice(list(TABLES))
        choice = rng.random()
        if choice < 0.3:
            put(raw, rng.choice(paths), value)
        elif choice < 0.4:
            put(raw, (field,), {"type": rng.choice(list(TABLES[field])), "args": {}})
        else:
            section = raw.get(field)
            kind = section.get("type") if isinstance(section, dict) else None
            if kind not in TABLES[field]:
                kind = rng.choice(list(TABLES[field]))
                put(raw, (field,), {"type": kind, "args": {}})
            arguments = TABLES[field].arguments(kind).model_fields
            name = rng.choice(list(arguments) or ["x"])
            if rng.random() < 0.2 and name in arguments and not arguments[name].is_required():
                value = arguments[name].default
            put(raw, (field, "args", name), list(value) if isinstance(value, tuple) else value)
    return raw


def memory() -> float:
    """Return the most memory this process has used, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def outcome(raw: dict[str, Any], number: int) -> Config | str:
    """Return the config, or the message that refuses it."""
    try:
        config = configs.resolve(raw, source="fuzz.json", models=MODELS, loaders=LOADERS)
        configs.dump(config)
    except UserError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"config {number}: {ascii(raw)[:2000]}") from error
    return config


def test_any_config_is_accepted_or_refused_with_a_message(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    rng, paths = random.Random(1), fields()
    before, accepted = memory(), []
    for number in range(CONFIGS):
        found = outcome(draw(rng, paths), number)
        if isinstance(found, Config):
            accepted.append(found)
        else:
            assert found.startswith("fuzz.json"), number
            assert len(found) < 20_000, number
    assert memory() - before < MEGABYTES
    assert 100 < len(accepted) < CONFIGS - 500  # both happen
    for config in rng.sample(accepted, REHEARSED):
        try:
            rehearse(config)
        except UserError:
            pass
        except Exception as error:
            raise AssertionError(ascii(config)[:3000]) from error
    assert memory() - before < 2 * MEGABYTES
