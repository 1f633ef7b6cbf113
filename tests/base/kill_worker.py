"""Trains the toy network in a child that is killed again and again: ``kill_worker.py FOLDER SEED KILLS``.

The child is forked, so a restart does not import torch again; it always continues from ``latest.pth``. Prints how
many kills happened before the run was finished.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from base.runs import LATEST
from tests.base.test_trainer import make_trainer

OPTIONS = {"epochs": 6, "save_every_iters": 2, "ema": 0.9, "save_period": 2, "keep_last": 2, "log_per_iter": 3}


def child(folder: Path) -> None:
    """Train to the end, starting from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    resume = LATEST if (folder / "run" / LATEST).exists() else None
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process ends with it)
    make_trainer(folder, resume=resume, **OPTIONS).train()


def main() -> None:
    folder, rng, kills = Path(sys.argv[1]), random.Random(int(sys.argv[2])), int(sys.argv[3])
    killed = 0
    while True:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(folder)
                status = 0
            finally:
                os._exit(status)
        if killed < kills:
            # Between the first batch and the third epoch.
            time.sleep(rng.uniform(0.0, 0.25))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status):
            raise SystemExit("the resumed run failed")
        else:
            print(killed)
            return


if __name__ == "__main__":
    main()
