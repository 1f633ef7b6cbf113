"""A checkpoint of a small untrained network, for tests of its outputs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from utils import checkpoint, export
from utils.config import resolve
from utils.facts import Facts
from utils.images import voc_colormap

needs_new_torch = pytest.mark.skipif(
    export.DEFERRED not in inspect.signature(torch.export.export).parameters, reason="exporting needs torch 2.9"
)

NAMES = ("background", "dog / cat", "car", "tree", "sky", "road")


def write_checkpoint(path: Path, num_classes: int = 4, in_channels: int = 3, crop: int = 48, **predict: Any) -> Path:
    """Write the checkpoint of a UNet with seeded weights whose outputs are confident at some pixels."""
    args: dict[str, Any] = {"width": 4}
    if in_channels != 3:
        args["in_channels"] = in_channels
    torch.manual_seed(0)
    model = models.build("UNet", num_classes, **args).eval()
    final = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        final.weight.mul_(12)
        final.bias.zero_()
    raw = {
        "name": "small",
        "arch": {"type": "UNet", "args": args},
        "train_loader": {"type": "VOC", "args": {"data_dir": "moved/away", "split": "train", "crop_size": crop}},
        "trainer": {"val": False, "monitor": "off"},
        "predict": {"test": "rankdice", **predict},
    }
    facts = Facts(
        num_classes=num_classes,
        class_names=NAMES[1:2] if num_classes == 1 else NAMES[:num_classes],
        palette=voc_colormap(2)[1:] if num_classes == 1 else voc_colormap(num_classes),
        mean=(0.45,) * in_channels,
        std=(0.25,) * in_channels,
        ignore_index=255,
        in_channels=in_channels,
    )
    state = {
        "format": checkpoint.FORMAT,
        "arch": "UNet",
        "epoch": 1,
        "state_dict": model.state_dict(),
        "config": resolve(raw).model_dump(),
        "facts": facts.to_dict(),
    }
    checkpoint.save(state, path)
    return path


def everything_fitted(classes: int = 4) -> dict[str, Any]:
    """Return fields of ``predict``, each of which changes the result."""
    presence_fit: dict[str, Any] = {
        "images": 50,
        "classes": list(range(classes)),
        "metric": "dice",
        "class_bias": [0.4 * (-1) ** c for c in range(classes)],
        "mask_class": [0.01 * c for c in range(classes)],
        "spread": 1.5,
        "mean_score": 0.6,
    }
    names = ("weight", "center", "bias", "score_shift", "score_slope", "mask_shift", "mask_slope")
    presence_fit |= dict(zip(names, (0.9, 0.5, -0.4, 0.02, 0.1, 0.01, -0.05), strict=True))
    bias = [0.3 * (c % 3 - 1) for c in range(classes)]
    return {"temperature": 1.4, "bias": bias, "threshold": 0.42, "presence_fit": presence_fit}


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return an image of blurred noise, uint8 ``(H, W, channels)``."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 6 + 2, width // 6 + 2, channels))
    return np.kron(coarse, np.ones((6, 6, 1)))[3 : height + 3, 3 : width + 3].astype(np.uint8)
