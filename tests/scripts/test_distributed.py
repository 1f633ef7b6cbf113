"""Several processes: the same parameters, the same scores, one writer, and no hang when one of them dies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base import parallel
from tests.base.test_trainer import make_config
from tests.scripts.distributed_worker import train
from utils import distributed
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the worker in two processes, each on one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *launcher, str(WORKER), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two processes have trained and validated."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("trained", "validated"):
        (folder / name).mkdir()
    done = torchrun("compare", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def trained(two: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Return the results of the same ten steps: in this process, in two processes, and with accumulation."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "accumulated")}
    train(folders["one"], 4, 1)
    train(folders["accumulated"], 2, 2)
    torch.use_deterministic_algorithms(False)
    folders["two"] = two / "trained"
    return {name: torch.load(folder / "result.pth", weights_only=True) for name, folder in folders.items()}


@pytest.mark.parametrize("other", ["two", "accumulated"])
def test_the_same_parameters_however_the_batch_is_made(trained: dict[str, dict], other: str) -> None:
    # Batch norm is frozen, because without SyncBatchNorm its statistics depend on how a batch is divided.
    for key, value in trained["one"]["weights"].items():
        torch.testing.assert_close(
            trained[other]["weights"][key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_validation_scores_are_identical_in_one_and_two_processes(trained: dict[str, dict]) -> None:
    # Seven images over two processes: an image counted twice would show.
    assert trained["one"]["evaluated"] == trained["two"]["evaluated"]
    assert trained["one"]["images"] == trained["two"]["images"] == 7


def test_a_network_from_elsewhere_may_have_parameters_without_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = torch.nn.Conv2d(3, 2, 1)
    network.unused = torch.nn.Conv2d(3, 2, 1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        config = make_config(tmp_path)
        config.arch.type = "External"
        wrapped = parallel.wrap(network, config, torch.device("cpu"))
        for _ in range(2):
            wrapped(torch.rand(1, 3, 4, 4)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert network.weight.grad is not None
    assert network.unused.weight.grad is None


def test_training_scores_cover_all_processes(trained: dict[str, dict]) -> None:
    one, two = trained["one"]["train_scores"], trained["two"]["train_scores"]
    assert two["train_Mean_Dice"] == pytest.approx(one["train_Mean_Dice"], abs=1e-6)
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)


def test_only_the_main_process_writes(trained: dict[str, dict]) -> None:
    assert trained["two"]["banners"] == 1
    assert trained["two"]["log_lines"] == trained["one"]["log_lines"]


def test_what_is_validated_is_what_is_saved(two: Path) -> None:
    """Each process has its own batch norm statistics, and those of one process are saved."""
    found = torch.load(two / "validated/result.pth", weights_only=True)
    assert found["val_loss"] == pytest.approx(found["again"], rel=1e-9)


def test_a_process_that_dies_ends_the_run_and_names_the_cause(tmp_path: Path) -> None:
    done = torchrun("die", str(tmp_path))
    assert done.returncode != 0
    assert re.search("the cause of it all", done.stderr)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, (0, 1)),
        ({"RANK": "3"}, (0, 1)),  # of another program; without WORLD_SIZE it is no launcher's
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR and MASTER_PORT are not. Start the processes with torchrun"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK .x. and WORLD_SIZE .1. are set.*they are no number of a process"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "they are no number of a process"),
    ],
)
def test_the_launchers_variables_are_checked(variables, found, monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(found, tuple):
        assert distributed.launched_as() == found
        assert distributed.is_first() == (found[0] == 0)
        return
    with pytest.raises(UserError, match=found), distributed.process_group(torch.device("cpu")):
        pass
