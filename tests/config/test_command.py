"""python -m utils.config check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.config.running import BASE, write
from utils import config as configs
from utils.config import __main__ as command
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("data")


SHAPES: dict[str, Any] = BASE | {
    "train_loader": {"type": "Shapes", "args": {"batch_size": 2, "length": 8, "size": 32}},
    "val_loader": {"type": "Shapes", "args": {"split": "val", "length": 2, "size": 32}},
}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_optimizer_that_the_network_cannot_use(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"optimizer.args: Muon only supports 2D parameters"):
        run_check(tmp_path, monkeypatch, SHAPES, 'optimizer={"type": "Muon"}')


def run_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any], *overrides: str) -> None:
    path = write(tmp_path / "good.json", json.dumps(raw))
    items = [part for item in overrides for part in ("--set", item)]
    monkeypatch.setattr(sys, "argv", ["config.py", "check", str(path), *items])
    assert command.main() == 0


def test_the_command_line_checks_and_prints(tmp_path, monkeypatch, capsys) -> None:
    run_check(tmp_path, monkeypatch, SHAPES, "trainer.epochs=3")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(configs.dump(configs.resolve(SHAPES, ["trainer.epochs=3"])))
    with pytest.raises(UserError, match="did you mean UNet"):
        run_check(tmp_path, monkeypatch, SHAPES, "arch.type=UNett")
    moved = {"type": "VOC", "args": {"data_dir": "/not/here", "augment": True, "crop_size": 32}}
    path = write(tmp_path / "moved.json", json.dumps(SHAPES | {"train_loader": moved}))
    monkeypatch.setattr(sys, "argv", ["config.py", "check", "--no-data", str(path)])
    assert command.main() == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["train_loader"]["args"]["data_dir"] == "/not/here"
    assert "note: train_loader: augment turns on flip, rotate" in shown.err
    monkeypatch.setattr(sys, "argv", ["config.py", "schema"])
    assert command.main() == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["name", "arch", "train_loader"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arch.args.backbone=resnet19", "backbone must be one of resnet18"),
        ("arch.args.stem=round", "stem"),
        ("train_loader.args.sampler=weighted", "sampler"),
        ("train_loader.args.val_split=0.01", "val_split"),
        ("train_loader.args.in_channels=2", "in_channels"),
        ("val_loader.args.in_channels=1", "val_loader: its images have 1 channels"),
        ("train_loader.args.classes=3", "classes"),
        ("train_loader.args.mean=[0.5]", "mean must have one number per channel"),
        ("lr_scheduler.args.warmup=1000", "warmup is 1000; expected >= 0 and less than the run's 320 steps"),
        ('lr_scheduler={"type": "ExponentialLR", "args": {"gamma": 1e300}}', "the learning rate would be inf"),
        ('lr_scheduler={"type": "PolynomialLR", "args": {"power": -1}}', "lr_scheduler.args"),
    ],
)
def test_the_command_line_refuses_what_train_py_refuses(override, message, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(UserError) as error:
        run_check(tmp_path, monkeypatch, SHAPES, override)
    assert message in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "x",\n "arch": {},\n  "loss" {}}', ", line 3, column 10: not valid JSON"),
        ('{"seed": 1, "seed": 2}', ': not valid JSON (comments and trailing commas are fine): Duplicate key "seed"'),
        ("", ": not valid JSON"),
    ],
)
def test_invalid_json_is_reported_with_file_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        configs.read(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "<string>" not in str(error.value)
