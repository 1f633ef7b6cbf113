"""Several processes: the same parameters, the same scores, one writer, and no hang when one of them dies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")


def torchrun(processes: int, *arguments: str, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    """Run the worker in several processes (one without a launcher), each on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    return subprocess.run(
        [sys.executable, *launcher, str(WORKER), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Return what the same ten steps left behind: in one process, in two, and accumulated."""
    results = {}
    for name, processes, batch, accumulate in (("one", 1, 4, 1), ("two", 2, 2, 1), ("accumulated", 1, 2, 2)):
        folder = tmp_path_factory.mktemp(name)
        done = torchrun(processes, "train", str(folder), str(batch), str(accumulate))
        assert done.returncode == 0, done.stderr[-3000:]
        results[name] = torch.load(folder / "result.pth", weights_only=True)
    return results


@pytest.mark.parametrize("other", ["two", "accumulated"])
def test_the_same_parameters_however_the_batch_is_made(trained: dict[str, dict], other: str) -> None:
    # Batch norm is frozen: its batch statistics depend on how a batch is cut, which only SyncBatchNorm hides.
    for key, value in trained["one"]["weights"].items():
        torch.testing.assert_close(
            trained[other]["weights"][key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_validation_scores_are_identical_in_one_and_two_processes(trained: dict[str, dict]) -> None:
    # Seven images over two processes: a padded duplicate would show.
    assert trained["one"]["evaluated"] == trained["two"]["evaluated"]
    assert trained["one"]["images"] == trained["two"]["images"] == 7


def test_training_scores_cover_all_processes(trained: dict[str, dict]) -> None:
    one, two = trained["one"]["train_scores"], trained["two"]["train_scores"]
    assert two["train_Mean_Dice"] == pytest.approx(one["train_Mean_Dice"], abs=1e-6)
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)


def test_only_the_main_process_writes(trained: dict[str, dict]) -> None:
    assert trained["two"]["banners"] == 1
    assert trained["two"]["log_lines"] == trained["one"]["log_lines"]


def test_what_is_validated_is_what_is_saved(tmp_path: Path) -> None:
    """Each process has moved batch norm's statistics by its own batches, and one of them is saved."""
    done = torchrun(2, "validate", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "result.pth", weights_only=True)
    assert found["val_loss"] == pytest.approx(found["again"], rel=1e-9)


def test_a_process_that_dies_ends_the_run_with_the_cause(tmp_path: Path) -> None:
    done = torchrun(2, "die", str(tmp_path), timeout=100)
    assert done.returncode != 0
    assert re.search("the cause of it all", done.stderr)
