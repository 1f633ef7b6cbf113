"""train.py as users run it: to the end, stopped by signals, resumed, in several processes, profiled, compiled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train
from utils import checkpoint
from utils.evaluation import checkpoint_fit

Call = Callable[..., None]

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TRAINING = {
    "length": 12,
    "size": 32,
    "crop_size": 32,
    "batch_size": 2,
    "shuffle": True,
    "augment": True,
    "num_workers": 0,
}
VALIDATION = {"split": "val", "length": 5, "size": 32, "batch_size": 2, "num_workers": 0}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    saved = str(tmp_path / "saved")
    content = {
        "name": "tiny",
        "n_gpu": 0,
        "deterministic": True,
        "arch": {"type": "UNet", "args": {"width": 2}},
        "train_loader": {"type": "Shapes", "args": TRAINING},
        "val_loader": {"type": "Shapes", "args": VALIDATION},
        "trainer": {"epochs": 3, "save_dir": saved, "log_dir": saved + "/runs", "save_period": 1, "val_per_epochs": 1},
    }
    path.write_text(json.dumps(content))
    return path


def test_a_launched_process_leaves_at_once_with_its_code_and_its_output() -> None:
    """Threads of gloo may abort an interpreter that is shutting down; here __del__ at exit simulates this."""
    code = """
import os, sys
from utils import errors

class Late:
    def __del__(self):
        os.abort()

late = Late()
late.itself = late
def main():
    print("done")
    if sys.argv[1] == "mistake":
        raise errors.UserError("no such thing")
errors.run(main)
"""
    for what, exit_code in (("fine", 0), ("mistake", 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, what],
            cwd=ROOT, env=ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (exit_code, "done\n")
        assert done.stderr == ("error: no such thing\n" if exit_code else "")


def command(*arguments: str | Path, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, *map(str, arguments)]


def run(*arguments: str | Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments, processes=processes),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Return a function that runs train.py in this process, which has already imported torch."""

    def call(*arguments: str | Path) -> None:
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
        assert train.main() == 0

    yield call
    torch.use_deterministic_algorithms(False)


def run_folder(config: Path) -> Path:
    (folder,) = (config.parent / "saved/tiny/CrossEntropyLoss2d/rankdice").iterdir()
    return folder


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def stopped(config: Path, request: pytest.FixtureRequest) -> Path:
    """Return the config of a run that was stopped by a signal to its process group, including loader workers."""
    process = subprocess.Popen(
        command("train.py", "-c", config, "--set", "trainer.epochs=500", "--set", "train_loader.args.num_workers=1"),
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: list(config.parent.glob("saved/tiny/*/*/*/checkpoint-epoch1.pth")), process)
    os.killpg(process.pid, request.param)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "continue with: python train.py -r" in errors
    return config


def test_a_signal_saves_and_the_run_can_go_on(stopped: Path, call: Call) -> None:
    folder = run_folder(stopped)
    state = torch.load(folder / "latest.pth", weights_only=True)
    epochs = state["epoch"] + 1
    assert state["iteration"] >= 6
    call("-r", "auto", "-c", stopped, "--set", f"trainer.epochs={epochs}")
    after = torch.load(folder / "latest.pth", weights_only=True)
    assert after["epoch"] == epochs
    assert after["iteration"] == 6 * epochs


def test_a_run_that_was_stopped_in_its_fit_is_fitted_when_it_is_resumed(config: Path, call: Call) -> None:
    call("-c", config, "--set", "trainer.epochs=1")
    folder = run_folder(config)
    best = folder / "best_model.pth"
    state = checkpoint.read(best)
    checkpoint.save(checkpoint_fit.without_fit(state), best)
    before = (folder / "latest.pth").read_bytes()
    call("-r", folder / "latest.pth")
    assert checkpoint.read(best)["calibration"] == state["calibration"]
    assert (folder / "latest.pth").read_bytes() == before


def test_a_signal_in_the_fit_says_how_to_continue(config: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "-c", str(config), "--set", "trainer.epochs=1"])
    monkeypatch.setattr(checkpoint_fit, "fit", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main() == 130
    assert f"stopped and saved; continue with: python train.py -r {run_folder(config)}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "calibration" not in checkpoint.read(run_folder(config) / "best_model.pth")


def test_two_processes_train(config: Path) -> None:
    done = run("train.py", "-c", config, "--set", "trainer.epochs=1", processes=2)
    assert done.stdout.count("2 processes") == 1
    assert "calibration" in checkpoint.read(run_folder(config) / "best_model.pth")


@pytest.mark.parametrize("kind", ["a process is killed", "the launcher is stopped"])
def test_several_processes_end_with_our_message(kind: str, config: Path) -> None:
    launched = subprocess.Popen(
        command("train.py", "-c", config, "--set", "trainer.epochs=500", processes=2),
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: list(config.parent.glob("saved/tiny/*/*/*/checkpoint-epoch1.pth")), launched)
    if kind == "a process is killed":  # by the system, when the memory is full
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        ranks = [int(pid) for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(ranks[0], signal.SIGKILL)
        said = "another process of this run has ended"
    else:
        launched.terminate()
        said = "stopped and saved"
    _, errors = launched.communicate(timeout=60)
    assert said in errors
    assert f"continue with: python train.py -r {run_folder(config)}/latest.pth" in errors
    assert "gloo" not in errors
    assert "trainer.py" not in errors, "a traceback of ours"
    assert torch.load(run_folder(config) / "latest.pth", weights_only=True)["iteration"] >= 3


def test_the_launcher_for_synchronized_batch_norm(tmp_path: Path) -> None:
    # train.py does this by itself if there are several GPUs; here with two processes and no GPU.
    script = tmp_path / "child.py"
    # Each with one write, so that the lines of different processes do not mix.
    script.write_text("import os, sys; os.write(1, f'rank {os.environ[\"RANK\"]} {sys.argv[1:]}\\n'.encode())")
    code = f"import sys; from utils.distributed import launch; sys.exit(launch({str(script)!r}, ['--set', 'a=1'], 2))"
    done = run("-c", code)
    assert "starting 2 processes" in done.stdout
    assert "rank 0 ['--set', 'a=1']" in done.stdout
    assert "rank 1 ['--set', 'a=1']" in done.stdout


def test_the_launcher_passes_a_failure_on(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('error: the cause')\ntime.sleep(60)"
    )
    code = f"import sys; from utils.distributed import launch; sys.exit(launch({str(script)!r}, [], 2))"
    done = subprocess.run(
        command("-c", code), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert "error: the cause" in done.stderr


def test_a_profile_can_be_opened(config: Path, call: Call) -> None:
    call("-c", config, "--set", "trainer.profile=true", "--set", "trainer.epochs=2")
    (trace,) = (config.parent / "saved/runs/tiny").glob("*/*.pt.trace.json")
    assert '"traceEvents"' in trace.read_text()
