"""A run resumed with a changed config keeps its progress, and compares only scores that can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from base.runs import LATEST
from tests.base.test_trainer import Killed, ToyLoader, _stop_at, make_trainer
from utils import checkpoint
from utils.errors import UserError
from utils.lr_scheduler import poly
from utils.predict.network import AMP_DTYPES


def stopped(folder: Path, iteration: int, **options: Any) -> None:
    """Train the toy network, 4 batches of 2 images per epoch, and stop after an iteration that was saved."""
    trainer = make_trainer(folder, save_every_iters=1, **options)
    _stop_at(trainer, iteration)
    with pytest.raises(Killed):
        trainer.train()


@pytest.mark.parametrize(
    ("change", "batch", "step", "total"),
    [
        ({"loader": ToyLoader(8, 1)}, 4, 12, 24),
        ({"loader": ToyLoader(8, 4)}, 1, 3, 6),
        ({"loader": ToyLoader(16, 2)}, 4, 12, 24),
        ({"accumulate": 2}, 2, 3, 6),
        ({"limit_batches": 2}, 1, 3, 6),
        ({"loader": ToyLoader(8, 1), "accumulate": 8}, 0, 1, 3),
        ({"epochs": 6}, 2, 6, 24),
    ],
)
def test_the_schedule_and_the_epoch_keep_their_progress(change, batch, step, total, tmp_path, capsys) -> None:
    """Half of the second of three epochs is done, however long an epoch is now."""
    stopped(tmp_path, 6)
    resumed = make_trainer(tmp_path, resume=LATEST, **change)
    assert (resumed.epoch, resumed.batch) == (1, batch)
    assert (resumed.scheduler.last_step, resumed.scheduler.total_steps) == (step, total)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * poly(step, total))
    said = capsys.readouterr().err
    assert ("The run continues at the same progress" in said) == ("epochs" not in change)
    resumed.train()
    assert resumed.scheduler.last_step == total
    assert resumed.epoch == resumed.settings.epochs
    assert resumed.iteration > 6


def test_a_finished_epoch_stays_finished(tmp_path) -> None:
    stopped(tmp_path, 8)  # the last batch of the epoch is done, but not its validation
    resumed = make_trainer(tmp_path, resume=LATEST, loader=ToyLoader(8, 1))
    assert (resumed.epoch, resumed.batch, resumed.scheduler.last_step) == (1, 8, 16)


def test_a_checkpoint_of_an_earlier_version_keeps_its_progress(tmp_path) -> None:
    stopped(tmp_path, 6)
    path = tmp_path / "run" / LATEST
    state = checkpoint.read(path)
    for name in ("plan", "names", "validation"):
        del state[name]
    checkpoint.save(state, path)
    assert make_trainer(tmp_path, resume=LATEST).batch == 2
    assert make_trainer(tmp_path, resume=LATEST, loader=ToyLoader(8, 1)).batch == 4


def overridden(folder: Path, **sections: Any) -> tuple[float, int, str]:
    """Resume with a changed config; return the score that the monitor starts from."""
    resumed = make_trainer(folder, resume=LATEST, **sections)
    return resumed.monitor.best, resumed.monitor.not_improved, resumed.monitor.name


def test_a_score_that_cannot_be_compared_starts_afresh(tmp_path, capsys) -> None:
    trainer = make_trainer(tmp_path, epochs=2)
    trainer.train()
    best = trainer.monitor.best
    assert overridden(tmp_path, epochs=5, early_stop=3)[0] == best
    assert "cannot be compared" not in capsys.readouterr().err
    for change in ({"monitor": "min val_loss"}, {"monitor": "max Mean_IoU"}, {"limit_batches": 1}):
        found, not_improved, name = overridden(tmp_path, **change)
        assert (abs(found), not_improved) == (float("inf"), 0)
        said = capsys.readouterr().err
        assert f"the best {name} so far" in said
        assert f"trainer.{next(iter(change))}: " in said


def test_other_validation_images_are_noticed(tmp_path, capsys) -> None:
    make_trainer(tmp_path, epochs=2).train()
    path = tmp_path / "run" / LATEST
    checkpoint.save(checkpoint.read(path) | {"validation": "of other images"}, path)
    assert overridden(tmp_path)[0] == -float("inf")
    assert "the validation images have changed" in capsys.readouterr().err


def test_a_class_that_never_occurs_cannot_be_monitored(tmp_path) -> None:
    trainer = make_trainer(tmp_path, monitor="max Class_Dice/car")
    trainer.data.val.labels[trainer.data.val.labels == 2] = 255
    with pytest.raises(UserError, match="no validation image has the class 'car'.*Monitor another score"):
        trainer.train()
    assert trainer.epoch == 0, "it is said at the first validation"
    trainer = make_trainer(tmp_path, monitor="max Class_Dice/road")
    trainer.data.val.labels[trainer.data.val.labels == 2] = 255
    trainer.train()


@pytest.mark.parametrize("monitor", ["max Mean_Dice", "max Dataset_mIoU", "min val_loss"])
def test_without_a_labeled_pixel_nothing_can_be_monitored(tmp_path, monitor) -> None:
    trainer = make_trainer(tmp_path, monitor=monitor)
    trainer.data.val.labels[:] = 255
    with pytest.raises(UserError, match="no validation image has pixels of .* class.*Monitor another score"):
        trainer.train()


def test_mixed_precision_may_begin_later(tmp_path) -> None:
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.train()
    for epochs, amp, scale in ((2, "fp16", 65536), (3, "fp16", 512), (4, "bf16", 1), (5, "fp16", 65536)):
        best = trainer.monitor.best
        trainer = make_trainer(tmp_path, resume=LATEST, epochs=epochs, amp=amp)
        assert trainer.monitor.best == best
        assert (trainer.amp, trainer.scaler.get_scale()) == (AMP_DTYPES[amp], scale)
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 512})
        trainer.train()
        assert trainer.epoch == epochs


def test_an_average_that_begins_later_begins_with_the_weights_of_the_run(tmp_path) -> None:
    stopped(tmp_path, 8)  # what comes next is the validation of an epoch, without another step before it
    resumed = make_trainer(tmp_path, resume=LATEST, ema=0.9)
    averaged = resumed.deployed_model.state_dict()
    assert all(torch.equal(averaged[name], value) for name, value in resumed.model.state_dict().items())
