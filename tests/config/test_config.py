"""Defaults, a written config that is read again, published configs, and the configs of this project."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataloaders import LOADERS
from models import MODELS
from tests.config.running import resolve, write
from tests.config.test_configs import our_configs
from tests.predecessors import PUBLISHED, RANKSEG
from utils import config as configs

pytestmark = pytest.mark.usefixtures("data")


def test_defaults() -> None:
    config = resolve()
    assert config.n_gpu == 1
    assert config.loss.type == "CrossEntropyLoss2d"
    assert config.lr_scheduler.type == "Poly"
    assert config.optimizer.type == "SGD"
    assert config.optimizer.args == {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    assert config.optimizer.backbone_lr_factor == 0.1
    assert config.aux_weight == 0.4
    assert config.ignore_index is None
    assert (config.predict.CoI, config.predict.threshold, config.predict.temperature) == ("all", 0.5, 1.0)
    assert config.predict.rankdice.model_dump() == {"solver": "exact", "metric": "dice", "smooth": 0.0, "prune": 0.5}
    assert config.loader("test") == config.val_loader
    assert resolve(optimizer={"type": "Adam"}).optimizer.args == {}
    assert resolve(optimizer={"args": {"lr": 0.1}}).optimizer.args == {"lr": 0.1}


def test_defaults_are_not_shared_between_configs() -> None:
    first = resolve()
    first.optimizer.args["lr"] = 5.0
    first.loss.args["weight"] = "balanced"
    assert resolve().optimizer.args["lr"] == 0.01
    assert resolve().loss.args == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "DiceLoss"},
        {"loss": {"type": "FocalLoss", "args": {"gamma": 1.5}}},
        {"predict": {"CoI": [1, 2], "rankdice": {"prune": None}}, "about": 'ünï\n"quotes"'},
        {"optimizer": {"type": "Adam", "args": {"betas": [0.8, 0.99]}}},
    ],
)
def test_a_written_config_reads_as_the_same(changes, tmp_path) -> None:
    config = resolve(**changes)
    text = configs.dump(config)
    again = configs.load(write(tmp_path / "config.json", text), models=MODELS, loaders=LOADERS)
    assert again == config
    assert configs.dump(again) == text
    # A checkpoint contains the same, without JSON in between.
    assert configs.resolve(config.model_dump(), models=MODELS, loaders=LOADERS) == config


@pytest.mark.parametrize("raw", [PUBLISHED, RANKSEG], ids=["yassouali", "rankseg"])
def test_published_configs_load_unchanged(raw, tmp_path, capsys) -> None:
    path = write(tmp_path / "config.json", json.dumps(raw))
    config = configs.load(path, models=MODELS, loaders=LOADERS)
    for key in ("name", "n_gpu", "use_synch_bn", "ignore_index"):
        assert getattr(config, key) == raw[key]
    assert config.loss.type == raw["loss"]
    assert config.arch.type == raw["arch"]["type"]
    assert config.train_loader.args == raw["train_loader"]["args"]
    assert config.trainer.model_dump() | raw["trainer"] == config.trainer.model_dump()
    assert capsys.readouterr().err == ""
    if raw is RANKSEG:
        # The published FCN8 accepted a backbone without using it: there is a note, and it is removed.
        assert config.notes == ["ignored, because they have no effect: arch.args.backbone (FCN8 has no such choice)"]
        assert "backbone" not in config.arch.args
        assert config.predict.CoI == [0, 11, 13]
    else:
        assert config.notes == []


@pytest.mark.parametrize("type", ["KvasirSEG", "kvasirSEG"])
def test_published_names_of_loaders(type) -> None:
    loader = {"type": type, "args": {"data_dir": "data", "batch_size": 1}}
    assert resolve(train_loader=loader, val_loader=loader, predict={"CoI": [1]})


def folders_of(raw: dict[str, Any]) -> Iterator[Path]:
    for stage in ("train_loader", "val_loader", "test_loader"):
        folder = (raw.get(stage) or {}).get("args", {}).get("data_dir")
        if folder:
            yield Path(folder)


@pytest.mark.parametrize("file", our_configs())
def test_every_shipped_config_is_valid_and_describes_itself(file, root) -> None:
    raw = configs.read(root / file)
    for folder in folders_of(raw):
        assert not folder.is_absolute()
        folder.mkdir(parents=True, exist_ok=True)
    config = configs.load(root / file, models=MODELS, loaders=LOADERS)
    assert config.about, "a config says in `about` what it is and what it costs"
