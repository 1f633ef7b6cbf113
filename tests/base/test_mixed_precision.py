"""Training in float16 with a scaled loss, on the CPU: resume, overflows, clipping, accumulation, schedules."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.base.test_trainer import Killed, ToyLoader, ToyNet, _records, _stop_at, make_trainer, same_weights
from trainer import Trainer
from utils import checkpoint, lr_scheduler

HUGE = 2.0**60  # a scale at which every gradient of float16 overflows


def half(folder: Path, scale: float | None = None, growth_interval: int = 2000, **options: Any) -> Trainer:
    """Return a trainer in float16 with another initial scale."""
    trainer = make_trainer(folder, amp="fp16", **options)
    assert trainer.scaler.is_enabled()
    if scale is not None:
        state = trainer.scaler.state_dict()
        trainer.scaler.load_state_dict(state | {"scale": scale, "growth_interval": growth_interval})
    return trainer


def one_batch() -> dict[str, Any]:
    return {"epochs": 1, "limit_batches": 1, "val": False, "monitor": "off"}


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_it_trains_and_computes_in_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    trainer = half(tmp_path, epochs=4)
    trainer.model.head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    assert trainer.train()["train_loss"] < 1.1
    assert seen == {torch.float16}
    assert "on a CPU it is many times slower" in capsys.readouterr().err
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stop_after", [5, 6, 7, 8])
def test_resume_equals_never_stopped_bit_for_bit(tmp_path: Path, stop_after: int, accumulate: int) -> None:
    """With overflows at the start and a growing scale: a scale that starts anew would skip other steps."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    options = {"save_every_iters": 1, "ema": 0.9, "accumulate": accumulate, "clip_grad_norm": 1.0, "epochs": 4}
    uninterrupted = half(whole, 2.0**24, 2, **options)
    uninterrupted.train()

    killed = half(parted, 2.0**24, 2, **options)
    _stop_at(killed, stop_after)
    with pytest.raises(Killed):
        killed.train()
    resumed = half(parted, resume="latest.pth", **options)
    # A checkpoint contains no gradients, so with several batches per step it is written at the end of a step.
    assert resumed.iteration == (stop_after if accumulate == 1 else {5: 4, 6: 4, 7: 7, 8: 8}[stop_after])
    assert resumed.scaler.state_dict() != make_trainer(tmp_path / "new", amp="fp16").scaler.state_dict()
    resumed.train()

    assert same_weights(uninterrupted.model, resumed.model)
    assert same_weights(uninterrupted.ema, resumed.ema)
    assert uninterrupted.scaler.state_dict() == resumed.scaler.state_dict()
    assert uninterrupted.scaler.get_scale() != 2.0**24
    assert (whole / "run/log.csv").read_text() == (parted / "run/log.csv").read_text()
    assert _records(whole) == _records(parted)


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path: Path) -> None:
    trainer = half(tmp_path, HUGE, **one_batch())
    before = weights(trainer)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert not trainer.optimizer.state
    assert trainer.scaler.get_scale() == HUGE / 2
    assert checkpoint.read(tmp_path / "run/latest.pth")["scaler"]["scale"] == HUGE / 2
    assert trainer.scheduler.last_step == 1  # the schedule also counts the steps that were skipped


def test_gradients_are_clipped_at_their_true_size(tmp_path: Path) -> None:
    trainer = half(tmp_path, 1024.0, clip_grad_norm=0.01, **one_batch())
    before = weights(trainer)
    rate = trainer.optimizer.param_groups[0]["lr"]
    trainer.train()
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, trainer.model.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(rate * 0.01, rel=1e-3)


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    def run(folder: str, batch_size: int, accumulate: int) -> nn.Module:
        torch.manual_seed(0)
        loader = ToyLoader(8, batch_size)
        loader.labels = loader.images.argmax(dim=1).to(torch.uint8)  # each image has the same number of counted pixels
        trainer = half(
            tmp_path / folder, 1024.0, net=ToyNet(norm=False, dropout=0.0), loader=loader, accumulate=accumulate
        )
        trainer.train()
        return trainer.model

    large, small = run("large", 4, 1).state_dict(), run("small", 2, 2).state_dict()
    for key, value in large.items():
        torch.testing.assert_close(small[key], value, rtol=2e-2, atol=2e-3)


def test_an_overflow_in_one_batch_skips_the_whole_step(tmp_path: Path) -> None:
    trainer = half(tmp_path, 1024.0, accumulate=2, epochs=1, limit_batches=4, val=False, monitor="off")
    batch, steps, scales = [0], [], []

    def overflow(gradient: Tensor) -> Tensor:
        batch[0] += 1
        return gradient * float("inf") if batch[0] == 1 else gradient

    trainer.model.head.bias.register_hook(overflow)
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.batch))
    after = trainer._after_batch
    trainer._after_batch = lambda: (scales.append(trainer.scaler.get_scale()), after())
    trainer.train()
    assert scales == [1024.0, 512.0, 512.0, 512.0]  # checked once per step
    assert steps == [3]  # while the fourth batch is being counted
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("name", ["Poly", "OneCycle", "CosineAnnealingLR", "StepLR", "SequentialLR"])
def test_schedules_do_not_warn_of_skipped_steps(tmp_path: Path, name: str) -> None:
    parts = [{"type": "LinearLR"}, {"type": "CosineAnnealingLR"}]
    args = {"StepLR": {"step_size": 2}, "SequentialLR": {"schedulers": parts, "milestones": [2]}}.get(name, {})
    trainer = half(tmp_path, 2.0**26, epochs=3)
    trainer.scheduler = lr_scheduler.build(name, trainer.optimizer, 12, **args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    assert trainer.scaler.get_scale() < 2.0**26
    assert trainer.scheduler.last_step == 12
