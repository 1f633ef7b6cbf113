"""The folders of runs: each belongs to one run, is locked while it trains, and is found again by ``-r auto``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from base import runs
from base.runs import BEST, LATEST
from tests.base.test_trainer import ToyLoader, make_config, make_trainer
from utils import checkpoint
from utils import config as configs
from utils.batch import Batch
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_several_starts_in_one_second_get_folders_of_their_own(tmp_path) -> None:
    """Several processes claim a folder at the same time, like the seeds of a sweep."""
    config = make_config(tmp_path, tensorboard=True)
    children, moment = [], time.time() + 0.2
    for _ in range(8):
        child = os.fork()
        if child == 0:
            time.sleep(max(0.0, moment - time.time()))
            made = runs._claim(config)
            Path(made[0], "mine").touch(exist_ok=False)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    parent = tmp_path / "saved/toy/CrossEntropyLoss2d/max"
    assert len(list(parent.glob("*/mine"))) == len(list(parent.iterdir())) == 8
    logs = {runs.tensorboard_folder(config, folder) for folder in parent.iterdir()}
    assert len(logs) == 8
    assert all(path.is_dir() for path in logs)


def test_two_losses_in_one_minute_have_logs_of_their_own(tmp_path) -> None:
    config = make_config(tmp_path, tensorboard=True)
    other = configs.resolve(config.model_dump() | {"loss": "FocalLoss"})
    with runs.new(config) as first, runs.new(other) as second:
        assert runs.tensorboard_folder(config, first) != runs.tensorboard_folder(other, second)


def test_home_and_variables_in_the_folders_of_a_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SCRATCH_HERE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = make_config(Path("$SCRATCH_HERE"))
    assert runs.parent_folder(config) == tmp_path / "saved/toy/CrossEntropyLoss2d/max"
    config = make_config(Path("~"))
    assert runs.parent_folder(config) == tmp_path / "home/saved/toy/CrossEntropyLoss2d/max"
    with pytest.raises(UserError, match="the environment variable NOT_SET_HERE is not set"):
        runs.parent_folder(make_config(Path("${NOT_SET_HERE}")))


class Broken(ToyLoader):
    """Fails at a batch, as with a file that cannot be read."""

    at = 0

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(super().__iter__()):
            if number == self.at:
                raise UserError("image7.jpg cannot be read")
            yield batch


def start(folder: Path, loader: Any) -> None:
    """Start a run in a folder of its own, as train.py does."""
    config = make_config(folder, tensorboard=True)
    with runs.new(config) as claimed:
        trainer = make_trainer(folder, loader=loader, tensorboard=True)
        trainer.folder = claimed
        trainer.train()


def test_a_start_that_fails_in_its_first_batch_leaves_nothing(tmp_path) -> None:
    with pytest.raises(UserError, match="image7"):
        start(tmp_path, Broken())
    assert list(tmp_path.iterdir()) == []


def test_what_other_runs_have_made_stays(tmp_path) -> None:
    other = tmp_path / "saved/runs/toy/other/events"
    other.parent.mkdir(parents=True)
    other.write_text("of another run")
    with pytest.raises(UserError, match="image7"):
        start(tmp_path, Broken())
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [other]
    assert not list(tmp_path.rglob("*-*_*"))


def test_a_run_that_has_learned_something_stays(tmp_path) -> None:
    loader = Broken()
    loader.at = 1
    with pytest.raises(UserError, match="image7"):
        start(tmp_path, loader)
    (latest,) = tmp_path.rglob(LATEST)
    assert checkpoint.read(latest)["iteration"] == 1
    assert not list(latest.parent.glob(".*"))


WAITER = """
import sys, time
from pathlib import Path
from base import runs
with runs.locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_running_run_cannot_be_resumed_a_second_time(end, tmp_path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        with (
            pytest.raises(UserError, match=rf"another process trains this run \(process {process.pid} on "),
            runs.locked(tmp_path),
        ):
            pass
    finally:
        process.send_signal(end)
        process.wait()
    with runs.locked(tmp_path) as folder:  # however the other run ended
        assert folder == tmp_path
    assert not list(tmp_path.iterdir())


def test_logs_of_a_checkpoint_from_elsewhere_stay_in_its_folder(tmp_path) -> None:
    config, folder = make_config(tmp_path, tensorboard=True), tmp_path / "copied/run"
    moved = runs.with_own_logs(config, folder)
    assert runs.tensorboard_folder(moved, folder) == folder / "tensorboard/toy/run"
    assert runs.with_own_logs(moved, folder) == moved
    logs = runs.tensorboard_folder(config, folder)
    logs.mkdir(parents=True)
    (logs / "events.out.tfevents.1").touch()
    assert runs.with_own_logs(config, folder) == config, "a run goes on with its logs"


def finished(folder: Path, name: str, second: int, **changes: Any) -> Path:
    """Write the files of a run with a changed config."""
    path = folder / "saved/toy/CrossEntropyLoss2d/max" / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(configs.dump(changed(folder, **changes)))
    (path / LATEST).touch()
    os.utime(path / LATEST, (second, second))
    return path / LATEST


def changed(folder: Path, **changes: Any) -> Any:
    return configs.resolve(make_config(folder).model_dump(), [f"{path}={value}" for path, value in changes.items()])


def test_the_newest_run_of_this_config_is_found(tmp_path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(UserError, match="there is no run with a checkpoint"):
        runs.newest(config)
    own = finished(tmp_path, "a", 1)
    assert runs.newest(config) == own
    for second, (name, value) in enumerate(
        [("seed", 7), ("optimizer.args.lr", 0.2), ("train_loader.args.length", 9), ("arch.args.width", 8)], start=2
    ):
        finished(tmp_path, name, second, **{name: value})
        assert runs.newest(config) == own
    longer = finished(tmp_path, "longer", 9, **{"trainer.epochs": 5, "trainer.keep_last": 2})
    assert runs.newest(config) == longer


def test_what_a_fit_writes_is_not_the_last_state_of_a_run(tmp_path) -> None:
    trainer = make_trainer(tmp_path, epochs=2, keep_last=1)
    trainer.train()
    folder = tmp_path / "saved/toy/CrossEntropyLoss2d/max/a"
    folder.parent.mkdir(parents=True)
    (tmp_path / "run").rename(folder)
    latest = checkpoint.read(folder / LATEST)
    predict = latest["config"]["predict"] | {"temperature": 2.0}
    fit = {"found": {"temperature": 2.0}, "replaced": {"temperature": 1.0}}
    checkpoint.save(latest | {"calibration": fit, "config": latest["config"] | {"predict": predict}}, folder / BEST)
    checkpoint.save(latest, folder / "checkpoint-epoch2_calibrated.pth")
    assert runs.newest(trainer.config).samefile(folder / LATEST)
    (folder / "config.json").unlink()
    assert runs.newest(trainer.config).samefile(folder / LATEST)
    runs.prune(folder, 1, epoch=1)  # the run goes on from checkpoint-epoch1.pth
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == [
        "checkpoint-epoch2.pth",
        "checkpoint-epoch2_calibrated.pth",
    ]


def test_other_runs_are_continued_only_when_asked(tmp_path) -> None:
    path = finished(tmp_path, "a", 1, seed=7)
    with pytest.raises(UserError, match=r"(?s)no run below .* has this config.*seed: 7 -> 0.*-r .*a/latest.pth"):
        runs.newest(make_config(tmp_path))
    assert runs.newest(changed(tmp_path, seed=7)) == path


@pytest.mark.parametrize("lost", [BEST, LATEST])
def test_a_resume_links_what_a_kill_left_unlinked(lost, tmp_path, monkeypatch) -> None:
    """The run is killed after it wrote checkpoint-epoch3.pth, before the file got its other names."""
    link = checkpoint.link

    def until(source: Path, path: Path) -> None:
        if "epoch3" in source.name and path.name == lost:
            raise KeyboardInterrupt
        link(source, path)

    monkeypatch.setattr(checkpoint, "link", until)
    trainer = make_trainer(tmp_path, epochs=3)
    trainer.monitor.update = lambda scores: True
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    path = tmp_path / "run/checkpoint-epoch3.pth"
    assert checkpoint.read(tmp_path / "run" / lost)["epoch"] == 2
    runs.restore_links(checkpoint.read(path), path)
    assert (tmp_path / "run" / lost).samefile(path)
    older = tmp_path / "run/checkpoint-epoch1.pth"
    runs.restore_links(checkpoint.read(older), older)
    assert (tmp_path / "run" / lost).samefile(path), "an older checkpoint takes no name from a newer one"
