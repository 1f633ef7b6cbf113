"""The trainer with a toy network: steps, accumulation, resume, early stop, signals, losses that are not finite."""

from __future__ import annotations

import csv
import gc
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from base.banner import banner
from base.base_trainer import Data, Interrupted
from base.rng import seed_everything
from base.runs import BEST, LATEST
from base.signals import StopSignals
from trainer import Trainer
from utils import checkpoint, losses
from utils.batch import Batch
from utils.config import resolve
from utils.errors import UserError
from utils.facts import Facts

CLASSES = 3
FACTS = Facts(
    num_classes=CLASSES,
    class_names=("sky", "road", "car"),
    palette=((0, 0, 0), (0, 0, 255), (255, 0, 0)),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    ignore_index=255,
)


class ToyNet(nn.Module):
    """Two convolutions, and layers with a state: batch norm, dropout."""

    def __init__(self, aux: bool = False, norm: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout2d(dropout),
        )
        self.head = nn.Conv2d(6, CLASSES, 1)
        self.aux_head = nn.Conv2d(6, CLASSES, 1) if aux else None
        self.forwards = 0

    def get_backbone_params(self) -> list[nn.Parameter]:
        return list(self.body.parameters())

    def get_decoder_params(self) -> list[nn.Parameter]:
        return [p for n, p in self.named_parameters() if not n.startswith("body.")]

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        self.forwards += 1
        features = self.body(x)
        if self.training and self.aux_head is not None:
            return {"out": self.head(features), "aux": self.aux_head(features)}
        return self.head(features)


class ToyLoader:
    """A loader of fixed images whose color determines the label; the order depends only on the epoch."""

    def __init__(
        self, images: int = 8, batch_size: int = 2, size: int = 12, seed: int = 0, shuffle: bool = True
    ) -> None:
        rng = np.random.default_rng(seed)
        self.images = torch.from_numpy(rng.integers(0, 256, (images, 3, 12, 12), dtype=np.uint8))
        self.labels = self.images.argmax(dim=1).to(torch.uint8)
        self.labels[:, :2] = 255
        self.batches = SimpleNamespace(batch_size=batch_size)
        self.dataset = list(range(images))
        self.shuffle = shuffle
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.images) // self.batches.batch_size

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def __iter__(self) -> Any:
        order = np.arange(len(self.images))
        if self.shuffle:
            order = np.random.default_rng(self.epoch).permutation(order)
        size = self.batches.batch_size
        for start in range(self.start * size, len(order), size):
            chosen = order[start : start + size]
            yield Batch(self.images[chosen], self.labels[chosen], [f"image{i:02}" for i in chosen])


def make_config(folder: Path, **trainer: Any) -> Any:
    settings = {
        "epochs": 3,
        "save_dir": str(folder / "saved"),
        "log_dir": str(folder / "saved/runs"),
        "save_period": 1,
        "val_per_epochs": 1,
        "log_per_iter": 3,
        "tensorboard": False,
    }
    raw = {
        "name": "toy",
        "deterministic": True,
        "arch": {"type": "UNet"},
        "train_loader": {"type": "Shapes"},
        "val_loader": {"type": "Shapes"},
        "optimizer": {"type": "SGD", "args": {"lr": 0.1, "momentum": 0.9}},
        "predict": {"train": "max", "val": "max"},
        "trainer": settings | trainer,
    }
    return resolve(raw)


def make_trainer(folder: Path, resume: str | None = None, net: nn.Module | None = None, **kwargs: Any) -> Trainer:
    loader = kwargs.pop("loader", None) or ToyLoader()
    aux = kwargs.pop("aux", False)
    loss_name = kwargs.pop("loss", "CrossEntropyLoss2d")
    config = make_config(folder, **kwargs)
    seed_everything(config.seed, config.deterministic)
    state = checkpoint.read(folder / "run" / resume) if resume else None
    data = Data(loader, ToyLoader(6, 3, seed=1, shuffle=False), FACTS)
    net = net if net is not None else ToyNet(aux=aux)
    trainer = Trainer(config, net, losses.build(loss_name, 255), data, torch.device("cpu"), folder / "run")
    if state is not None:
        trainer.restore(state)
    return trainer


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in a.state_dict().items())


def test_loss_falls_and_the_run_leaves_its_files(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=8, tensorboard=True)
    trainer.train()
    folder = tmp_path / "run"
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert len(rows) == 8
    assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"])
    assert float(rows[-1]["Mean_Dice"]) > float(rows[0]["Mean_Dice"])
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.json", BEST, LATEST, "log.csv", "log.jsonl", "checkpoint-epoch8.pth"}
    assert not [n for n in names if n.startswith(".")]
    assert list((tmp_path / "saved/runs/toy/run").glob("events*"))


def test_one_forward_pass_per_training_batch(tmp_path: Path) -> None:
    net = ToyNet()
    make_trainer(tmp_path, net=net, epochs=1, val=False, monitor="off").train()
    assert net.forwards == len(ToyLoader())


def test_training_scores_are_those_of_the_forward_pass(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=1, net=ToyNet(dropout=0.0), limit_batches=1)
    loader = ToyLoader()
    loader.set_epoch(1)
    batch = next(iter(loader))
    with torch.no_grad():
        net = ToyNet(dropout=0.0)
        net.load_state_dict(trainer.model.state_dict())
        images = (batch.images.float() / 255 - 0.5) / 0.25
        logits = net.train()(images)
        expected = nn.functional.cross_entropy(logits, batch.labels.long(), ignore_index=255)
    scores = trainer.train()
    assert scores["train_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("stop_after", range(1, 12))
def test_resume_equals_never_stopped_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    options = {"save_every_iters": 1, "ema": 0.9, "accumulate": 1, "aux": True, "clip_grad_norm": 1.0}
    uninterrupted = make_trainer(whole, **options)
    uninterrupted.train()

    killed = make_trainer(parted, **options)
    _stop_at(killed, stop_after)
    with pytest.raises(Killed):
        killed.train()
    resumed = make_trainer(parted, resume=LATEST, **options)
    assert resumed.iteration == stop_after
    resumed.train()

    assert same_weights(uninterrupted.model, resumed.model)
    assert same_weights(uninterrupted.ema, resumed.ema)
    assert (whole / "run/log.csv").read_text() == (parted / "run/log.csv").read_text()
    assert _records(whole) == _records(parted)


class Killed(BaseException):
    """Ends a run like SIGKILL: nothing is saved."""


def _stop_at(trainer: Trainer, iteration: int) -> None:
    """Stop right after the checkpoint of an iteration, like SIGKILL."""

    def after() -> None:
        Trainer._after_batch(trainer)
        if trainer.iteration == iteration:
            raise Killed

    trainer._after_batch = after


def _records(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "timing"} for record in records]


def test_resume_from_an_epoch_checkpoint(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    make_trainer(tmp_path / "parted").train()
    resumed = make_trainer(tmp_path / "parted", resume="checkpoint-epoch1.pth")
    assert resumed.epoch == 1
    resumed.train()
    assert same_weights(whole.model, resumed.model)
    assert (tmp_path / "whole/run/log.csv").read_text() == (tmp_path / "parted/run/log.csv").read_text()


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    def run(folder: str, batch_size: int, accumulate: int) -> nn.Module:
        loader = ToyLoader(8, batch_size)
        loader.labels = loader.images.argmax(dim=1).to(torch.uint8)  # each image has the same number of counted pixels
        net = ToyNet(norm=False, dropout=0.0)
        trainer = make_trainer(tmp_path / folder, net=net, loader=loader, accumulate=accumulate)
        trainer.train()
        return trainer.model

    torch.manual_seed(0)
    large = run("large", 4, 1).state_dict()
    torch.manual_seed(0)
    small = run("small", 2, 2).state_dict()
    for key, value in large.items():
        torch.testing.assert_close(small[key], value, rtol=1e-4, atol=1e-6)


def test_the_last_step_of_an_epoch_averages_over_the_batches_it_has(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, accumulate=3, epochs=1)  # 4 batches: a step of 3 and a step of 1
    assert trainer.plan.steps == 2
    steps = []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.batch))
    trainer.train()
    assert len(steps) == 2
    assert trainer.scheduler.last_step == 2


def test_the_best_model_is_saved_for_any_save_period(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=2, save_period=50)
    trainer.train()
    assert (tmp_path / "run" / BEST).is_file()
    assert not list((tmp_path / "run").glob("checkpoint-epoch*"))
    assert checkpoint.read(tmp_path / "run" / BEST)["monitor_best"] == pytest.approx(trainer.monitor.best)


def test_early_stop_counts_validations_without_improvement(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=20, early_stop=2)
    values = iter([0.5, 0.6, 0.6, float("nan")] + [0.0] * 20)
    trainer._validate = lambda epoch: {"Mean_Dice": next(values)}
    trainer.train()
    assert trainer.epoch == 4
    assert trainer.monitor.best == 0.6


def test_keep_last_prunes_numbered_checkpoints_only(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=5, keep_last=2).train()
    kept = sorted(p.name for p in (tmp_path / "run").glob("*.pth"))
    assert kept == [BEST, "checkpoint-epoch4.pth", "checkpoint-epoch5.pth", LATEST]


@pytest.mark.parametrize(("accumulate", "saved"), [(1, 5), (2, 6), (3, 7)])
def test_a_signal_saves_and_leaves(tmp_path: Path, accumulate: int, saved: int) -> None:
    """At the end of the optimizer step, because checkpoints do not contain the gradients of its first batches."""
    trainer = make_trainer(tmp_path, epochs=3, accumulate=accumulate)

    def after() -> None:
        if trainer.iteration == 5:
            trainer.stop.received = 15
        Trainer._after_batch(trainer)

    trainer._after_batch = after
    with pytest.raises(Interrupted):
        trainer.train()
    resumed = make_trainer(tmp_path, resume=LATEST, epochs=3, accumulate=accumulate)
    assert (resumed.iteration, resumed.epoch, resumed.batch) == (saved, 1, saved - 4)
    resumed.train()
    whole = make_trainer(tmp_path / "whole", epochs=3, accumulate=accumulate)
    whole.train()
    assert same_weights(whole.model, resumed.model)


def test_the_summary_of_a_run_is_grammatical_and_fits_a_screen(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.config.notes.append("a long note " * 20)
    lines = banner(trainer).splitlines()
    assert any(line.startswith("    schedule : 1 epoch of 4 iterations, ") for line in lines)
    notes = [line for line in lines if "a long note" in line]
    assert notes[0].startswith("    note     : a long note")
    assert len(notes) > 1
    assert max(map(len, notes)) <= 100


def test_a_signal_is_answered_at_once_and_a_second_one_interrupts(capfd) -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        assert capfd.readouterr().err == "\nstopping after this step, then saving; once more: stop at once\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_loss_that_is_not_finite_stops_and_explains(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.head.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"iteration 1 .*learning rates.*image\d\d.*bad-batch"):
        trainer.train()
    (snapshot,) = (tmp_path / "run").glob("bad-batch*.pth")
    saved = torch.load(snapshot, weights_only=True)
    assert saved["images"].shape == (2, 3, 12, 12)
    assert len(saved["names"]) == 2


def test_auxiliary_heads_count_with_their_weight(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, aux=True)
    images, target = torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    trainer.model.train()
    trainer.model.body[3].p = 0.0
    loss, logits = trainer._forward(images, target)
    output = trainer.model(images)
    torch.testing.assert_close(loss, trainer.loss(output["out"], target) + 0.4 * trainer.loss(output["aux"], target))
    torch.testing.assert_close(logits, output["out"])


@pytest.mark.parametrize("amp", ["bf16"])
def test_mixed_precision_trains(tmp_path: Path, amp: str) -> None:
    trainer = make_trainer(tmp_path, amp=amp, epochs=4, channels_last=True)
    scores = trainer.train()
    assert scores["train_loss"] < 1.1
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_compiled_training_gives_plain_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The eager backend traces without generating code, which takes minutes on a slow machine.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile_(network, backend="eager"))
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    compiled = make_trainer(tmp_path / "compiled", compile=True)
    compiled.train()
    assert not [n for n in checkpoint.read(tmp_path / "compiled/run" / LATEST)["state_dict"] if "_orig_mod" in n]
    assert same_weights(plain.model, compiled.model)


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.metrics.AT_ONCE", 40)  # as many images wait at both times
    trainer = make_trainer(tmp_path, epochs=1, val=False, monitor="off", log_per_iter=20, loader=ToyLoader(500))
    alive = {}
    after_batch = trainer._after_batch

    def watch() -> None:
        after_batch()
        if trainer.iteration in (40, 240):
            gc.collect()
            tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
            alive[trainer.iteration] = (len(tensors), sum(t.untyped_storage().nbytes() for t in tensors))

    trainer._after_batch = watch
    trainer.train()
    # No tensor is kept, not even a small one. benchmarks/memory.py watches the memory of the process, which here also
    # contains that of earlier tests.
    assert alive[240] == alive[40]


def test_the_averaged_weights_are_deployed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ema=0.5, epochs=1)
    trainer.train()
    assert not same_weights(trainer.model, trainer.deployed_model)
    saved = checkpoint.read(tmp_path / "run" / LATEST)
    for key, value in trainer.deployed_model.state_dict().items():
        assert torch.equal(saved["ema"][key], value)


def test_a_published_checkpoint_cannot_be_resumed_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"state_dict": ToyNet().state_dict(), "epoch": 3}, tmp_path / "run/old.pth")
    with pytest.raises(UserError, match="cannot be resumed"):
        make_trainer(tmp_path, resume="old.pth")
