"""The content of a checkpoint, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import models
from models import MODELS
from utils import checkpoint
from utils import config as configs
from utils.facts import Facts

FACTS = Facts(
    num_classes=3,
    class_names=("background", "cat", "dog"),
    palette=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    ignore_index=255,
)
RAW: dict[str, Any] = {
    "name": "run",
    "arch": {"type": "UNet", "args": {"width": 4}},
    "train_loader": {"type": "VOC", "args": {"data_dir": "moved/away", "classes": ["background", "cat", "dog"]}},
    "trainer": {"val": False, "monitor": "off"},
}
LEGACY = {"_use_new_zipfile_serialization": False}  # of torch.save: the format before torch 1.6


def state(**changes: Any) -> dict[str, Any]:
    """Return what a run saves, without the parts that only continuing the run needs."""
    torch.manual_seed(0)
    model = models.build("UNet", 3, width=4)
    content = {
        "format": checkpoint.FORMAT,
        "arch": "UNet",
        "epoch": 7,
        "state_dict": model.state_dict(),
        "config": configs.resolve(RAW, models=MODELS).model_dump(),
        "facts": FACTS.to_dict(),
        "monitor_best": 0.5,
    }
    return content | changes


def written(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
