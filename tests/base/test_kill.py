"""A run that is killed with SIGKILL many times, at random points, ends bit-identical to an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base.runs import LATEST
from tests.base.kill_worker import OPTIONS
from tests.base.test_trainer import make_trainer, same_weights
from utils import checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_points(tmp_path: Path, seed: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed runs: the number of threads changes how sums are rounded
    try:
        whole = make_trainer(tmp_path / "whole", **OPTIONS)
        whole.train()
    finally:
        torch.set_num_threads(threads)
    done = subprocess.run(
        [sys.executable, "-m", "tests.base.kill_worker", str(tmp_path / "killed"), str(seed), "12"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 3, "the run was through before it could be killed"
    run = tmp_path / "killed/run"
    resumed = make_trainer(tmp_path / "killed", resume=LATEST, **OPTIONS)
    assert resumed.epoch == OPTIONS["epochs"]
    assert same_weights(whole.model, resumed.model)
    assert same_weights(whole.ema, resumed.ema)
    assert (tmp_path / "whole/run/log.csv").read_text() == (run / "log.csv").read_text()
    for path in run.glob("*.pth"):
        checkpoint.read(path)
    assert not list(run.glob(".*")), "files half-written under a kill are cleared away by the next start"
