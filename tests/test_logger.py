"""Logs of a run, also if it is killed and continued."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import logger
from utils.errors import UserError
from utils.logger import RunLog

NAN = float("nan")
EPOCHS, ITERATIONS, PER_LOG = 4, 6, 2


def run(folder: Path, start: tuple[int, int] = (0, 0), stop: tuple[int, int] = (EPOCHS, 0)) -> None:
    """Log as a trainer does, from one state (finished epochs, batches done in the next) to another."""
    log = RunLog(folder, None, epoch=start[0], iteration=start[0] * ITERATIONS + start[1])
    for epoch in range(start[0] + 1, EPOCHS + 1):
        for batch in range(1 + (start[1] if epoch == start[0] + 1 else 0), ITERATIONS + 1):
            iteration = (epoch - 1) * ITERATIONS + batch
            if batch % PER_LOG == 0:
                log.record("train", epoch, iteration, {"loss": 1 / iteration}, {"images_per_second": 3.0})
            if (epoch - 1, batch) == stop:
                return
        scores = {"train_loss": 1 / epoch} | ({"Mean_Dice": epoch / 10} if epoch % 2 == 0 else {})
        log.record("epoch", epoch, epoch * ITERATIONS, scores)
        if (epoch, 0) == stop:
            return


def files(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text(encoding="utf-8") for p in sorted(folder.iterdir())}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return files(folder)


def test_one_line_per_epoch_and_one_record_per_report(tmp_path) -> None:
    run(tmp_path)
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0] == {"epoch": "1", "iteration": "6", "train_loss": "1.0", "Mean_Dice": ""}
    assert float(rows[1]["Mean_Dice"]) == 0.2
    assert len(lines(tmp_path)) == EPOCHS * (ITERATIONS // PER_LOG + 1)
    assert lines(tmp_path)[0] == {
        "kind": "train", "epoch": 1, "iteration": 2, "values": {"loss": 0.5}, "timing": {"images_per_second": 3.0},
    }  # fmt: skip


# All places of a checkpoint: the end of an epoch, or its middle, with and without a report just before.
STATES = [(epoch, batch) for epoch in range(EPOCHS) for batch in range(ITERATIONS + 1) if epoch + batch]


@pytest.mark.parametrize("killed", [(3, 6), (4, 0)])
@pytest.mark.parametrize("saved", STATES)
def test_a_resumed_run_leaves_the_files_of_one_that_never_stopped(saved, killed, uninterrupted, tmp_path) -> None:
    run(tmp_path, stop=killed)  # the checkpoint may be older
    run(tmp_path, start=saved)
    assert files(tmp_path) == uninterrupted


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_cut_short_by_a_kill_does_not_spoil_what_follows(cut, uninterrupted, tmp_path) -> None:
    run(tmp_path, stop=(2, 0))
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "epoch": 3, "iteration": 14, "values": {}}'[:cut])
    run(tmp_path, start=(2, 0))
    assert files(tmp_path) == uninterrupted


def test_a_resume_before_the_first_record_starts_over(uninterrupted, tmp_path) -> None:
    run(tmp_path, stop=(1, 3))
    run(tmp_path)
    assert files(tmp_path) == uninterrupted


def test_what_nothing_defines_is_null_in_json_and_empty_in_csv(tmp_path) -> None:
    log = RunLog(tmp_path, None)
    log.record("epoch", 1, 5, {"Mean_Dice": NAN, "val_loss": float("inf"), "train_loss": np.float32(0.5)})
    assert lines(tmp_path)[0]["values"] == {"Mean_Dice": None, "val_loss": None, "train_loss": 0.5}
    assert (tmp_path / "log.csv").read_text().splitlines()[1] == "1,5,,,0.5"
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_times_are_not_in_the_table(tmp_path) -> None:
    # Equal runs write equal tables.
    log = RunLog(tmp_path, None)
    log.record("epoch", 1, 5, {"train_loss": 0.5}, {"images_per_second": 12.5})
    assert (tmp_path / "log.csv").read_text() == "epoch,iteration,train_loss\n1,5,0.5\n"


def test_other_processes_write_nothing(tmp_path) -> None:
    log = RunLog(tmp_path / "run", tmp_path / "logs", active=False)
    log.record("epoch", 1, 5, {"train_loss": 0.5})
    log.scalars({"a": 1.0}, 1)
    log.image("b", np.zeros((4, 4, 3), np.uint8), 1)
    log.text("c", "d")
    log.hparams({}, [])
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_shows_what_was_written_and_a_resume_replaces_later_steps(tmp_path) -> None:
    log = RunLog(tmp_path / "run", tmp_path / "logs")
    for step in range(1, 6):
        log.scalars({"train/loss": float(step), "val/Mean_Dice": NAN}, step)
    log.image("pictures", np.zeros((4, 6, 3), np.uint8), 3)
    log.text("config", "{\n  a\n}")
    log.close()
    log = RunLog(tmp_path / "run", tmp_path / "logs", epoch=1, iteration=3)
    log.scalars({"train/loss": 40.0}, 4)
    log.hparams({"lr": 0.1, "arch": "UNet"}, ["val/Mean_Dice", "train/loss"])
    log.close(finished=True)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    tags = events.Tags()
    assert "val/Mean_Dice" not in tags["scalars"]
    assert tags["scalars"] == ["train/loss"]  # curves, no single points
    assert len(list((tmp_path / "logs").iterdir())) == 1
    assert tags["images"] == ["pictures"]
    assert [p.name for p in (tmp_path / "logs").iterdir() if p.is_dir()] == []  # hparams do not create a separate run


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="logs cannot be written"):
        RunLog(tmp_path / "file" / "run", None)
    log = RunLog(tmp_path, None)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger, "write_text", full)
    with pytest.raises(UserError, match="the disk is full"):
        log.record("epoch", 1, 1, {"train_loss": 1.0})
