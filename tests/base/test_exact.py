"""A run that is killed and resumed gives exactly the result of one that was never stopped, with any options.

``python -m tests.base.test_exact KILLS`` tries this number of random runs and prints how many were equal.
"""

from __future__ import annotations

import random
import sys
import tempfile
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base.base_trainer import Data
from base.rng import seed_everything
from base.runs import LATEST
from dataloaders import build
from tests.base.test_trainer import Killed, ToyNet, make_config
from trainer import Trainer
from utils import checkpoint, losses
from utils.config import resolve
from utils.facts import Facts

BATCHES, EPOCHS = 5, 3


def make(folder: Path, dropout: float, workers: int, resume: bool = False, **trainer: Any) -> Trainer:
    """Return a trainer over the real loader, with its worker processes."""
    schedule = trainer.pop("schedule", "Poly")
    raw = make_config(folder, epochs=EPOCHS, log_per_iter=2, **trainer).model_dump()
    config = resolve(raw | {"lr_scheduler": {"type": schedule}})
    seed_everything(config.seed, config.deterministic)
    loader = {"size": 32, "batch_size": 2, "num_workers": workers}
    train = build("Shapes", **loader, length=2 * BATCHES, crop_size=24, augment=True, shuffle=True)
    val = build("Shapes", **loader, length=3, split="val")
    facts = Facts.of(train.dataset)
    net = ToyNet(dropout=dropout)
    net.head = torch.nn.Conv2d(6, facts.num_classes, 1)
    loss = losses.build("CrossEntropyLoss2d", facts.ignore_index)
    made = Trainer(config, net, loss, Data(train, val, facts), torch.device("cpu"), folder / "run")
    if resume:
        made.restore(checkpoint.read(folder / "run" / LATEST))
    return made


def train(folder: Path, kills: list[int], **options: Any) -> dict[str, Any]:
    """Train to the end, with a crash after each of the given iterations; return the last checkpoint."""
    others = set(active_children())
    for kill in [*kills, None]:
        trainer = make(folder, resume=(folder / "run" / LATEST).exists(), **options)
        if kill is not None:
            _die_after(trainer, kill)
        try:
            trainer.train()
        except Killed:
            trainer.log.close()
        assert set(active_children()) <= others, "the loaders' processes end with the run"
    return checkpoint.read(folder / "run" / LATEST)


def _die_after(trainer: Trainer, iteration: int) -> None:
    """Crash in the middle of an epoch, or after its last iteration, between validation and checkpoint."""
    at_end = iteration % BATCHES == 0
    name = "_finish_epoch" if at_end else "_after_batch"
    method = getattr(trainer, name)

    def dying(*arguments: Any) -> Any:
        result = None if at_end and trainer.iteration >= iteration else method(*arguments)
        if trainer.iteration >= iteration:
            raise Killed
        return result

    setattr(trainer, name, dying)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return where two checkpoints are not bit-identical."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
    return [] if same else [path]


def compare(folder: Path, kills: list[int], **options: Any) -> list[str]:
    """Return the differences after a run that was killed."""
    torch.set_num_threads(1)
    whole, parted = (train(folder / name, k, **options) for name, k in (("whole", []), ("parted", kills)))
    for state in (whole, parted):
        for name in ("save_dir", "log_dir"):
            state["config"]["trainer"].pop(name)
    logs = [(folder / name / "run/log.csv").read_text() for name in ("whole", "parted")]
    return differences(whole, parted) + ([] if logs[0] == logs[1] else ["log.csv"])


MATRIX = [
    {"dropout": 0.3, "workers": 0, "kills": [7]},
    {"dropout": 0.3, "workers": 1, "kills": [3, 11], "save_every_iters": 1},
    {"dropout": 0.3, "workers": 2, "kills": [5, 13], "ema": 0.9, "schedule": "OneCycle"},
    {"dropout": 0.3, "workers": 0, "kills": [8], "amp": "bf16", "accumulate": 2},
    {"dropout": 0.3, "workers": 0, "kills": [10], "early_stop": 1, "val_per_epochs": 2},
    {"dropout": 0.0, "workers": 1, "kills": [4, 9], "accumulate": 3, "ema": 0.5, "amp": "bf16"},
]


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: "-".join(f"{k}{v}" for k, v in case.items()))
def test_killed_and_resumed_is_never_stopped(case, tmp_path) -> None:
    assert compare(tmp_path, **{"save_every_iters": 2} | case) == []


def drawn(rng: random.Random) -> dict[str, Any]:
    """Return random options of a run."""
    options: dict[str, Any] = {
        "dropout": rng.choice([0.0, 0.3, 0.5]),
        "workers": rng.choice([0, 1, 2]),
        "save_every_iters": rng.choice([1, 2, 3]),
        "accumulate": rng.choice([1, 1, 2, 3]),
        "amp": rng.choice(["off", "bf16"]),
        "schedule": rng.choice(["Poly", "OneCycle", "CosineAnnealingLR"]),
        "ema": rng.choice([None, 0.9]),
        "early_stop": rng.choice([0, 2]),
    }
    return options | {"kills": sorted(rng.sample(range(1, BATCHES * EPOCHS + 1), rng.choice([1, 2, 3])))}


def main(kills: int) -> None:
    rng, tried, equal, with_dropout = random.Random(0), 0, 0, 0
    while tried < kills:
        options = drawn(rng)
        with tempfile.TemporaryDirectory() as folder:
            found = compare(Path(folder), **options)
        tried += len(options["kills"])
        equal += 0 if found else len(options["kills"])
        with_dropout += len(options["kills"]) if options["dropout"] else 0
        if found:
            print(options, found[:5])
    print(f"{tried} kills, {with_dropout} of them with dropout; bit-identical after {equal}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
