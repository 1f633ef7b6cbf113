"""What each process of test_distributed.py runs: ``distributed_worker.py compare FOLDER``, or ``die FOLDER``."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from base.base_trainer import Data
from base.rng import seed_everything
from tests.base.test_trainer import FACTS, ToyLoader, ToyNet, make_config
from trainer import Trainer
from utils import checkpoint, distributed, losses
from utils.batch import Batch
from utils.evaluation import Decision, evaluate

STEPS = 10


class ShardedLoader(ToyLoader):
    """The toy loader, divided among the processes like the real one: batches interleaved, nothing counted twice."""

    def __init__(self, images: int, batch_size: int, shuffle: bool) -> None:
        super().__init__(images, batch_size, seed=images, shuffle=shuffle)
        self.labels = self.images.argmax(dim=1).to(torch.uint8)  # each image has the same number of counted pixels
        share = range(distributed.rank(), images, distributed.world_size())
        self.share = np.array(share)
        self.batches = SimpleNamespace(batch_size=batch_size)

    def __len__(self) -> int:
        return -(-len(self.share) // self.batches.batch_size)

    def __iter__(self) -> Any:
        size = self.batches.batch_size
        for start in range(0, len(self.share), size):
            chosen = self.share[start : start + size]
            yield Batch(self.images[chosen], self.labels[chosen], [f"image{i:02}" for i in chosen])


def frozen_net() -> ToyNet:
    """Return the toy network without batch statistics and dropout, which depend on how a batch is divided."""
    net = ToyNet(dropout=0.0)
    norm = net.body[1].eval()
    norm.train = lambda mode=True: norm
    return net


def train(folder: Path, batch_size: int, accumulate: int) -> None:
    config = make_config(folder, epochs=STEPS, accumulate=accumulate, val=False, monitor="off", save_period=100)
    seed_everything(0, True)
    net = frozen_net()
    # Four images per epoch: one optimizer step for any batch size.
    data = Data(ShardedLoader(4, batch_size, False), None, FACTS)
    loss = losses.build("CrossEntropyLoss2d", 255)
    trainer = Trainer(config, net, loss, data, distributed.choose_device(0), folder / "run")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        scores = trainer.train()
    outcome = evaluate(trainer.evaluator(), ShardedLoader(7, 3, False), {"max": Decision("max")})
    banners = sum(distributed.gather(int("schedule" in printed.getvalue())))
    if distributed.is_main():
        evaluated = {k: v for k, v in outcome.metrics["max"].compute().items() if k != "Multiclass_Accuracy"}
        result = {
            "weights": trainer.model.state_dict(),
            "train_scores": scores,
            "evaluated": evaluated | {"loss": round(outcome.loss, 6)},
            "images": outcome.images,
            "banners": banners,
            "log_lines": len((folder / "run/log.csv").read_text().splitlines()),
        }
        torch.save(result, folder / "result.pth")


def validate(folder: Path) -> None:
    """Train with batch norm and an auxiliary head whose loss has no weight; validate, and score what was saved."""
    config = make_config(folder, epochs=3, save_period=100, ema=0.5).model_copy(update={"aux_weight": 0.0})
    seed_everything(0, True)
    loader = ShardedLoader(8, 2, True)
    loader.images[1::2] //= 8  # the images of the other process are dark
    loss = losses.build("CrossEntropyLoss2d", 255)
    data = Data(loader, ShardedLoader(7, 3, False), FACTS)
    trainer = Trainer(config, ToyNet(aux=True), loss, data, distributed.choose_device(0), folder / "run")
    scores = trainer.train()
    distributed.gather(None)  # until the main process has written it
    saved = checkpoint.read(folder / "run/latest.pth")["ema"]
    trainer.ema.module.load_state_dict(saved)
    again = evaluate(trainer.evaluator(), ShardedLoader(7, 3, False), {"max": Decision("max")})
    if distributed.is_main():
        torch.save({"val_loss": scores["val_loss"], "again": again.loss}, folder / "result.pth")


def die() -> None:
    if distributed.rank() == 1:
        raise RuntimeError("the cause of it all")
    distributed.gather("never answered")


def main(mode: str, folder: Path) -> None:
    with distributed.process_group(distributed.choose_device(0)):
        if mode == "die":
            die()
        else:
            train(folder / "trained", 2, 1)
            validate(folder / "validated")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
