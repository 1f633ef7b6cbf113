"""A checkpoint of a small network for Shapes, whose validation and test data differ, for tests of test.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import models
from dataloaders.shapes.dataset import Shapes
from utils import checkpoint
from utils.config import resolve
from utils.facts import Facts


def loader(split: str, length: int = 7, **args: Any) -> dict[str, Any]:
    return {
        "type": "Shapes",
        "args": {"split": split, "length": length, "size": 32, "batch_size": 3, "num_workers": 0, **args},
    }


def raw_config(**changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "n_gpu": 0,
        "arch": {"type": "UNet", "args": {"width": 4}},
        "train_loader": loader("train", 12, shuffle=True),
        "val_loader": loader("val", 6),
        "test_loader": loader("test"),
        "trainer": {"monitor": "off"},
    } | changes


def write_checkpoint(path: Path, **changes: Any) -> Path:
    """Write the checkpoint of a UNet with seeded weights, which is overconfident and almost always wrong."""
    torch.manual_seed(0)
    model = models.build("UNet", Shapes.num_classes, width=4).eval()
    final = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        final.weight.mul_(8)
        final.bias.zero_()
    checkpoint.save(
        {
            "format": checkpoint.FORMAT,
            "arch": "UNet",
            "epoch": 3,
            "state_dict": model.state_dict(),
            "optimizer": {"state": {}},
            "config": resolve(raw_config(**changes)).model_dump(),
            "facts": Facts.of(Shapes).to_dict(),
        },
        path,
    )
    return path
