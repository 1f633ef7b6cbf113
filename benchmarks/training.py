"""Time an iteration of training, and compare it with a loop without the framework.

``python -m benchmarks.training [--arch UNet --width 16 --size 128 --batch-size 8] [--device cuda] [--quick]``

Three ways to train the same network on the same batches, interleaved in one process, medians over rounds:

* ``ours``: the trainer, with metrics, logging and the check of the loss;
* ``bare``: model, loss, backward, step and nothing else;
* ``predecessor``: a second forward pass for the training scores and a loop over classes for them, as the
  published trainers do.

With ``--device cuda`` the same, plus bf16, channels_last and torch.compile switched on one by one: images per
second and the share of the peak arithmetic (``--peak-tflops``).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from base.base_trainer import Data
from trainer import Trainer
from utils import losses
from utils.batch import Batch
from utils.config import resolve
from utils.facts import Facts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description="Time a training iteration.")
    parser.add_argument("--arch", default="UNet")
    parser.add_argument("--arch-args", default='{"width": 16}', help="JSON, the model's arguments")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="rounds per candidate")
    parser.add_argument("--iterations", type=int, default=6, help="iterations per round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device, to compute the utilization")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.iterations = 5, 4
    return args


def main() -> None:
    args = parse_arguments()
    logging.disable(logging.INFO)
    arch_args = json.loads(args.arch_args)
    table = compare(args, arch_args)
    details = "".join(f" {name} {value}" for name, value in arch_args.items())
    title = f"{args.arch}{details}, {args.batch_size} x {args.size} x {args.size}, {args.device}"
    print_table(title, table)
    result: dict[str, Any] = {"title": title, "iteration": table}
    if args.device != "cpu":
        result["throughput"] = throughput(args, arch_args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2))


# -- contestants -----------------------------------------------------------------------------------------------


class FixedLoader:
    """Batches made once, so that the comparison does not include reading data (see benchmarks/data.py)."""

    def __init__(self, count: int, batch_size: int, size: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, 3, size, size)
        self.made = [
            Batch(
                torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
                torch.randint(0, classes, (batch_size, size, size), generator=generator, dtype=torch.uint8),
                [f"image{i}" for i in range(batch_size)],
            )
            for _ in range(2)
        ]
        self.count = count
        self.batches = SimpleNamespace(batch_size=batch_size)
        self.dataset = range(count * batch_size)

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        pass

    def __iter__(self) -> Any:
        for index in range(self.count):
            yield self.made[index % len(self.made)]


def make_trainer(args: argparse.Namespace, arch_args: dict[str, Any], folder: Path, **settings: Any) -> Any:
    base = {
        "epochs": 100_000,
        "save_dir": str(folder),
        "log_dir": str(folder / "runs"),
        "monitor": "off",
        "val": False,
        "save_period": 100_000,
        "log_per_iter": 20,
    }
    config = resolve(
        {
            "name": "benchmark",
            "arch": {"type": args.arch, "args": arch_args},
            "train_loader": {"type": "Shapes"},
            "val_loader": {"type": "Shapes"},
            "n_gpu": 0 if args.device == "cpu" else 1,
            "trainer": base | settings,
        }
    )
    palette = tuple((i, i, i) for i in range(args.classes))
    names = tuple(f"class{i}" for i in range(args.classes))
    facts = Facts(args.classes, names, palette, (0.45, 0.45, 0.45), (0.25, 0.25, 0.25), 255)
    torch.manual_seed(0)
    model = models.build(args.arch, args.classes, **arch_args)
    loader = FixedLoader(args.iterations, args.batch_size, args.size, args.classes)
    loss = losses.build("CrossEntropyLoss2d", 255)
    trainer = Trainer(config, model, loss, Data(loader, None, facts), torch.device(args.device), folder)
    with _silence():
        trainer._begin()
    return trainer


def bare_step(trainer: Any) -> Callable[[Any], Any]:
    """Return a step of model, loss, backward and optimizer, on a copy of the trainer's network."""
    model = copy.deepcopy(trainer.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    criterion = torch.nn.CrossEntropyLoss(ignore_index=255)

    def step(batch: Any) -> Any:
        images = trainer.normalize(batch.images.to(trainer.device))
        target = batch.labels.to(trainer.device).long()
        output = model(images)
        loss = criterion(output["out"] if isinstance(output, dict) else output, target)
        if isinstance(output, dict):
            loss = loss + 0.4 * criterion(output["aux"], target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return model, images, target

    return step


def predecessor_step(trainer: Any, classes: int) -> Callable[[Any], None]:
    """Return a step as the published trainers make it: bare, then a second forward pass and scores class by class."""
    train = bare_step(trainer)

    def step(batch: Any) -> None:
        model, images, target = train(batch)
        with torch.no_grad():
            output = model(images)
            predicted = (output["out"] if isinstance(output, dict) else output).argmax(dim=1)
            valid = target != 255
            for c in range(classes):
                p, y = (predicted == c) & valid, (target == c) & valid
                both, total = (p & y).sum().item(), (p.sum() + y.sum()).item()
                _ = (both / max(total - both, 1), 2 * both / max(total, 1))

    return step


# -- measuring -------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, arch_args: dict[str, Any]) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        trainer = make_trainer(args, arch_args, Path(name), tensorboard=True)
        loader = trainer.data.train
        epoch = [0]

        def ours() -> None:
            epoch[0] += 1
            trainer.batch = 0
            trainer.meter.reset()
            trainer._train_epoch(epoch[0])

        def loop(step: Callable[[Any], Any]) -> Callable[[], None]:
            def run() -> None:
                for batch in loader:
                    step(batch)

            return run

        contestants = {
            "ours": ours,
            "bare": loop(bare_step(trainer)),
            "predecessor": loop(predecessor_step(trainer, args.classes)),
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        with _silence():
            for round_ in range(args.rounds + 1):
                for contestant, run in contestants.items():
                    start = time.perf_counter()
                    run()
                    if torch.device(args.device).type == "cuda":
                        torch.cuda.synchronize()
                    if round_:  # the first warms up
                        times[contestant].append((time.perf_counter() - start) / args.iterations)
        trainer.log.close()
    # Machines are noisy: each round's ratio is taken against the bare loop of the same round.
    return {
        contestant: {
            "milliseconds": 1000 * statistics.median(values),
            "ratio_to_bare": statistics.median(v / b for v, b in zip(values, times["bare"], strict=True)),
            "ratio_to_ours": statistics.median(v / o for v, o in zip(values, times["ours"], strict=True)),
        }
        for contestant, values in times.items()
    }


class _silence:  # noqa: N801
    """Hide progress bars, as in a run under a scheduler."""

    def __enter__(self) -> None:
        self.stack = contextlib.ExitStack()
        nowhere = self.stack.enter_context(open(os.devnull, "w"))
        self.stack.enter_context(contextlib.redirect_stderr(nowhere))
        self.stack.enter_context(contextlib.redirect_stdout(nowhere))

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def throughput(args: argparse.Namespace, arch_args: dict[str, Any]) -> list[dict[str, Any]]:
    """Time bf16, channels_last and compile, switched on one after the other (CUDA)."""
    rows = []
    steps: list[dict[str, Any]] = [{}, {"amp": "bf16"}, {"channels_last": True}, {"compile": True}]
    settings: dict[str, Any] = {}
    for step in steps:
        settings |= step
        with tempfile.TemporaryDirectory() as name, _silence():
            trainer = make_trainer(args, arch_args, Path(name), **settings)
            batch = trainer.data.train.made[0]
            images = trainer.normalize(batch.images.to(args.device))
            with FlopCounterMode(display=False) as flops:
                loss, _ = trainer._forward(images, batch.labels.to(args.device))
                loss.backward()
            seconds = []
            for epoch in range(1, args.rounds + 3):
                start = time.perf_counter()
                trainer.batch = 0
                trainer.meter.reset()
                trainer._train_epoch(epoch)
                torch.cuda.synchronize()
                seconds.append((time.perf_counter() - start) / args.iterations)
            trainer.log.close()
        median = statistics.median(seconds[2:])
        row = {"settings": dict(settings) or "float32", "images_per_second": args.batch_size / median}
        if args.peak_tflops:
            row["share_of_peak"] = flops.get_total_flops() / median / (args.peak_tflops * 1e12)
        rows.append(row)
        print(row)
    return rows


def print_table(title: str, table: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n")
    print(f"{'':<13}{'ms/iteration':>14}{'/ bare':>10}{'/ ours':>10}")
    for name, row in table.items():
        print(f"{name:<13}{row['milliseconds']:>14.1f}{row['ratio_to_bare']:>10.3f}{row['ratio_to_ours']:>10.3f}")


if __name__ == "__main__":
    main()
