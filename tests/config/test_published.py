"""Configs written for the predecessors load unchanged: all of their keys, for each network and data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataloaders import LOADERS
from models import MODELS
from tests.predecessors import PUBLISHED
from utils import config as configs
from utils.config.schema import Config
from utils.errors import UserError

# The arguments of the predecessors' loaders and networks. Each network accepted all network arguments.
LOADER: dict[str, Any] = {
    "data_dir": "data",
    "batch_size": 8,
    "split": "train",
    "crop_size": 380,
    "base_size": 400,
    "scale": True,
    "num_workers": 1,
    "val": False,
    "shuffle": True,
    "flip": False,
    "rotate": False,
    "blur": False,
    "augment": True,
    "val_split": None,
    "return_id": False,
}
NETWORK: dict[str, Any] = {
    "pretrained": False,
    "in_channels": 3,
    "freeze_bn": False,
    "freeze_backbone": False,
    "use_aux": True,
    "use_resnet_gcn": True,
    "num_filters": 7,
}
HERE = {"num_filters": "kernel_size"}  # GCN's


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)


def old(**changes: Any) -> dict[str, Any]:
    loaders = {
        "train_loader": {"type": "VOC", "args": LOADER},
        "val_loader": {"type": "VOC", "args": LOADER | {"split": "val", "val": True, "augment": False}},
    }
    return json.loads(json.dumps(PUBLISHED | loaders | changes))


def resolve(**changes: Any) -> Config:
    return configs.resolve(old(**changes), models=MODELS, loaders=LOADERS)


@pytest.mark.parametrize("type", [name for name in MODELS if name != "External"])
def test_every_network_takes_the_keys_of_all(type: str) -> None:
    config = resolve(arch={"type": type, "args": NETWORK})
    known = MODELS.arguments(type).model_fields
    names = {name: HERE.get(name, name) for name in NETWORK}
    assert config.arch.args == {here: NETWORK[name] for name, here in names.items() if here in known}
    ignored = [name for name, here in names.items() if here not in known]
    (note,) = config.notes
    assert note.startswith("ignored, because they have no effect: ")
    assert all(f"arch.args.{name} ({type} has no such choice)" in note for name in ignored)
    assert "train_loader.args.return_id, val_loader.args.shuffle, val_loader.args.return_id" in note


@pytest.mark.parametrize("type", ["VOC", "CityScapes", "ADE20K", "COCO", "DeepScene", "kvasirSEG"])
def test_every_data_set_takes_the_keys_of_all(type: str) -> None:
    split = {"ADE20K": "training", "COCO": "train2017", "DeepScene": "train"}.get(type, "train")
    loader = {"type": type, "args": LOADER | {"split": split}}
    config = resolve(train_loader=loader, val_loader={"type": type, "args": loader["args"] | {"val": True}})
    assert config.train_loader.args == {name: value for name, value in loader["args"].items() if name != "return_id"}


def test_unknown_arguments_are_still_refused() -> None:
    with pytest.raises(UserError, match="arch.args.bakbone: UNet takes no such argument"):
        resolve(arch={"type": "UNet", "args": {"bakbone": "resnet50"}})


def test_a_monitor_without_validation_is_off() -> None:
    config = resolve(trainer={"val": False, "monitor": "max Mean_IoU", "early_stop": 10})
    assert config.trainer.monitor == "off"
    assert 'trainer.monitor "max Mean_IoU" (trainer.val is false)' in config.notes[0]
    assert "trainer.early_stop (trainer.monitor is off)" in config.notes[0]
    assert resolve(trainer={"val": False, "monitor": "min train_loss"}).trainer.monitor == "min train_loss"


def test_val_without_crop_size_and_arguments_of_schedules_that_had_no_effect() -> None:
    whole = {name: value for name, value in LOADER.items() if name not in ("crop_size", "return_id")}
    config = resolve(
        val_loader={"type": "VOC", "args": whole | {"val": True, "augment": False, "split": "val"}},
        lr_scheduler={"type": "Poly", "args": {"warmup_epochs": 5}},
    )
    assert config.lr_scheduler.args == {}
    assert "lr_scheduler.args.warmup_epochs" in config.notes[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "flip, rotate, scale (around each image's own size)"),
        ({"flip": True, "rotate": False, "base_size": 400}, None),
        ({"flip": True, "rotate": True, "scale": True}, "scale (around each image's own size)"),
        ({"flip": True, "rotate": True, "scale": False}, None),
        ({"flip": True, "rotate": True, "scale": [0.5, 2.0]}, None),
    ],
)
def test_augmentations_that_were_off_are_reported(args: dict[str, Any], message: str | None) -> None:
    loader = {"type": "VOC", "args": {"data_dir": "data", "augment": True, "crop_size": 380, **args}}
    notes = resolve(train_loader=loader, val_loader=loader | {"args": {"data_dir": "data"}}).notes
    end = "; in pytorch-segmentation, these are off unless the config sets them"
    assert notes == ([] if message is None else [f"train_loader: augment turns on {message}{end}"])
