"""The random number generators of a process: seeding them, and their state in a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from utils import distributed


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed all generators, differently in each process; choose deterministic algorithms if asked."""
    own = seed + distributed.rank()
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def state(gpus: Sequence[int] = ()) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators, those of ``gpus`` included, as plain data."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "gpus": [torch.cuda.get_rng_state(gpu) for gpu in gpus],
    }


def set_state(saved: Mapping[str, Any], gpus: Sequence[int] = ()) -> None:
    """Set the generators to what :func:`state` returned."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"])
    # Checkpoints of earlier versions contain the state of one GPU, as "cuda".
    for gpu, own in zip(gpus, saved.get("gpus", [saved["cuda"]] if "cuda" in saved else []), strict=False):
        torch.cuda.set_rng_state(own, gpu)
