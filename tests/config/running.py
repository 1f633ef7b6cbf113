"""A valid config for tests to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataloaders import LOADERS
from models import MODELS
from utils import config as configs
from utils.config.schema import Config
from utils.errors import UserError

BASE: dict[str, Any] = {
    "name": "run",
    "arch": {"type": "PSPNet", "args": {"backbone": "resnet18"}},
    "train_loader": {"type": "VOC", "args": {"data_dir": "data", "batch_size": 2}},
    "val_loader": {"type": "VOC", "args": {"data_dir": "data", "split": "val"}},
}


def resolve(overrides: tuple[str, ...] = (), stages: tuple[str, ...] = configs.STAGES, **changes: Any) -> Config:
    """Resolve the config above with some of its sections changed."""
    raw = json.loads(json.dumps(BASE)) | changes
    return configs.resolve(raw, overrides, source="config.json", models=MODELS, loaders=LOADERS, stages=stages)


def message(overrides: tuple[str, ...] = (), stages: tuple[str, ...] = configs.STAGES, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        resolve(overrides, stages, **changes)
    return str(error.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
