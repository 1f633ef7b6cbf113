"""After an error, the run is saved first; the resumed run equals one that never failed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from base.runs import LATEST
from tests.base import test_exact as exact
from tests.base.test_trainer import ToyLoader, make_trainer
from trainer import Trainer
from utils import checkpoint
from utils.batch import Batch
from utils.errors import UserError

OPTIONS: dict[str, Any] = {"epochs": 3, "ema": 0.9}


def fail_at(iteration: int, error: Exception) -> Callable[[Trainer], None]:
    """Return a function that lets a trainer's data fail before an iteration."""

    class Failing(ToyLoader):
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(super().__iter__(), start=(self.epoch - 1) * 4 + self.start + 1):
                if number == iteration:
                    raise error
                yield batch

    def spoil(trainer: Trainer) -> None:
        trainer.data.train.__class__ = Failing

    return spoil


def loss_is_nan(iteration: int) -> Callable[[Trainer], None]:
    def spoil(trainer: Trainer) -> None:
        forward = trainer._forward

        def poisoned(images: torch.Tensor, target: torch.Tensor) -> Any:
            if trainer.iteration + 1 == iteration:
                images = images * float("nan")  # the statistics of batch norm also become nan
            return forward(images, target)

        trainer._forward = poisoned

    return spoil


def validation_fails(trainer: Trainer) -> None:
    def fail(*_: object) -> None:
        torch.rand(3)  # the random numbers it draws are undone
        raise UserError("val7.png cannot be read")

    trainer.data.val.__class__ = type("Failing", (ToyLoader,), {"__iter__": fail})


def the_disk_is_full(trainer: Trainer) -> None:
    def fail(*_: object) -> None:
        if trainer.iteration == 7:
            raise OSError(28, "No space left on device")

    begin = trainer._begin

    def and_fill() -> None:
        begin()
        trainer.log.writer.add_scalar = fail

    trainer._begin = and_fill


CASES: dict[str, tuple[Callable[[Trainer], None], int, str, dict[str, Any]]] = {
    "a file is damaged": (fail_at(6, UserError("im6.png is damaged")), 5, "im6.png is damaged", {}),
    "in the first batch of an epoch": (fail_at(5, UserError("im6.png is damaged")), 4, "im6.png is damaged", {}),
    "within a step": (fail_at(8, UserError("im6.png is damaged")), 6, "im6.png", {"accumulate": 2}),
    "a file was deleted": (fail_at(7, FileNotFoundError(2, "No such file", "a.png")), 6, "a.png: No such file", {}),
    "a loss of nan": (loss_is_nan(6), 5, r"became nan in iteration 6 \(epoch 2\), learning rates all 0", {}),
    "a loss of nan within a step": (loss_is_nan(8), 6, "became nan in iteration 8", {"accumulate": 2}),
    "in validation": (validation_fails, 4, "val7.png cannot be read", {}),
    "a worker's death": (
        fail_at(6, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")),
        5,
        "a process that loads the data was killed .* lower num_workers",
        {},
    ),
    "no memory": (fail_at(6, torch.OutOfMemoryError("CUDA out of memory.")), 5, "out of memory: .*batch_size", {}),
    "a full disk of TensorBoard": (the_disk_is_full, 7, "logs cannot be written: the disk is full", {
        "tensorboard": True, "log_per_iter": 1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_error_saves_the_run_first(case, tmp_path) -> None:
    spoil, saved, said, options = CASES[case]
    whole = make_trainer(tmp_path / "whole", **OPTIONS | options)
    whole.train()
    failing = make_trainer(tmp_path / "parted", **OPTIONS | options)
    spoil(failing)
    with pytest.raises(UserError, match=said) as message:
        failing.train()
    assert str(message.value).endswith(f"continue with: python train.py -r {tmp_path / 'parted/run' / LATEST}")
    resumed = make_trainer(tmp_path / "parted", resume=LATEST, **OPTIONS | options)
    assert resumed.iteration == saved
    resumed.train()
    a, b = (checkpoint.read(tmp_path / name / "run" / LATEST) for name in ("whole", "parted"))
    for state in (a, b):
        state.pop("config")
    assert exact.differences(a, b) == []
    logs = [(tmp_path / name / "run/log.csv").read_text() for name in ("whole", "parted")]
    assert logs[0] == logs[1]


def test_a_program_error_saves_too_and_keeps_its_traceback(tmp_path, capsys) -> None:
    trainer = make_trainer(tmp_path)
    fail_at(6, TypeError("a bug"))(trainer)
    with pytest.raises(TypeError, match="a bug"):
        trainer.train()
    assert checkpoint.read(tmp_path / "run" / LATEST)["iteration"] == 5
    assert "the run is saved up to iteration 5" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_saved(tmp_path) -> None:
    trainer = make_trainer(tmp_path, save_every_iters=1)
    step = trainer._step

    def explode() -> None:
        step()
        if trainer.iteration == 5:
            with torch.no_grad():
                trainer.model.head.bias[1] = float("inf")

    trainer._step = explode
    with pytest.raises(UserError, match=r"after iteration 6 \(learning rates all 0.*the weights head.bias are not fin"):
        trainer.train()
    assert checkpoint.read(tmp_path / "run" / LATEST)["iteration"] == 5


def test_validation_names_the_layer_whose_weights_are_not_finite(tmp_path) -> None:
    trainer = make_trainer(tmp_path)
    train_epoch = trainer._train_epoch

    def explode(epoch: int) -> dict[str, float]:
        scores = train_epoch(epoch)
        trainer.model.body[0].weight.data[0] = float("nan")
        return scores

    trainer._train_epoch = explode
    with pytest.raises(UserError, match=r"after iteration 4 \(learning rates .* body.0.weight are not"):
        trainer.train()


def test_a_loader_process_that_the_system_kills(tmp_path) -> None:
    """Send SIGKILL to a worker process, as the kernel does when the memory is full."""
    torch.set_num_threads(1)
    options = {"dropout": 0.3, "workers": 1}
    whole = exact.train(tmp_path / "whole", [], **options)
    trainer = exact.make(tmp_path / "parted", **options)
    after = trainer._after_batch

    def kill() -> None:
        after()
        if trainer.iteration == 6:
            os.kill(trainer.data.train._iterator._workers[0].pid, signal.SIGKILL)

    trainer._after_batch = kill
    with pytest.raises(UserError, match="a process that loads the data was killed"):
        trainer.train()
    assert checkpoint.read(tmp_path / "parted/run" / LATEST)["iteration"] >= 6
    parted = exact.train(tmp_path / "parted", [], **options)
    for state in (whole, parted):
        state.pop("config")
    assert exact.differences(whole, parted) == []


def test_a_missing_batch_is_reported(tmp_path) -> None:
    class Short(ToyLoader):
        def __iter__(self) -> Iterator[Batch]:
            yield from list(super().__iter__())[:2]

    with pytest.raises(UserError, match="the training data ended after 2 of 4 batches of the epoch"):
        make_trainer(tmp_path, loader=Short()).train()
