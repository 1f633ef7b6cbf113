"""``train.py -r``: which config is used, what has changed, and when there is nothing left to do."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train as train_script
from utils import config as configs
from utils import errors

LOADER = {"length": 4, "size": 32, "batch_size": 2, "num_workers": 0}
CONFIG: dict[str, Any] = {
    "name": "run",
    "n_gpu": 0,
    "arch": {"type": "UNet", "args": {"width": 2}},
    "train_loader": {"type": "Shapes", "args": {**LOADER, "crop_size": 32, "shuffle": True, "augment": True}},
    "val_loader": {"type": "Shapes", "args": {**LOADER, "split": "val"}},
    "trainer": {"epochs": 1, "tensorboard": False, "save_period": 1},
}

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Run train.py in an empty folder; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    write(CONFIG)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            errors.run(train_script.main)
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    return call


def write(config: dict[str, Any], **trainer: Any) -> None:
    Path("config.json").write_text(json.dumps(config | {"trainer": config["trainer"] | trainer}))


def config_rates(rate: float, epochs: int) -> list[float]:
    """Return the learning rates of a Poly run with two batches per epoch."""
    return [rate * (1 - step / (2 * epochs)) ** 0.9 for step in range(2 * epochs)]


def latest() -> Path:
    (path,) = Path("saved").glob("run/*/*/*/latest.pth")
    return path


@pytest.mark.parametrize("which", ["auto", "file"])
def test_a_changed_config_is_used_and_the_change_is_reported(train: Train, which: str) -> None:
    assert train("-c", "config.json")[0] == 0
    write(CONFIG, epochs=2, keep_last=1)
    code, text = train("-r", "auto" if which == "auto" else str(latest()), "-c", "config.json")
    assert code == 0, text
    assert "trainer.epochs: 1 -> 2" in text
    assert "trainer.keep_last: null -> 1" in text
    state = torch.load(latest(), weights_only=True)
    assert state["epoch"] == 2
    assert state["config"]["trainer"]["keep_last"] == 1
    assert json.loads((latest().parent / "config.json").read_text())["trainer"]["epochs"] == 2


def test_with_auto_another_arch_is_an_error_as_with_a_file(train: Train) -> None:
    assert train("-c", "config.json")[0] == 0
    write(CONFIG | {"arch": {"type": "UNet", "args": {"width": 4}}})
    for which, said in (("auto", "arch.args.width: 2 -> 4"), (str(latest()), "of a checkpoint cannot be changed")):
        code, text = train("-r", which, "-c", "config.json")
        assert code == 2
        assert said in text


def test_an_override_of_the_arch_is_given_again(train: Train) -> None:
    wider = ["-c", "config.json", "--set", "arch.args.width=4"]
    assert train(*wider)[0] == 0
    code, text = train("-r", "auto", *wider, "--set", "trainer.epochs=2")
    assert code == 0, text
    assert "arch" not in text.partition("changed since")[2].partition("    run")[0]


def test_another_learning_rate_and_weight_decay_count(train: Train) -> None:
    first = {"type": "AdamW", "args": {"lr": 0.001, "weight_decay": 0.01}}
    write(CONFIG | {"optimizer": first}, log_per_iter=1)
    assert train("-c", "config.json")[0] == 0
    changes = [f"optimizer.args.{name}" for name in ("lr=0.05", "weight_decay=0.2")]
    code, text = train("-r", str(latest()), "--set", "trainer.epochs=2", "--set", changes[0], "--set", changes[1])
    assert code == 0, text
    (group,) = torch.load(latest(), weights_only=True)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.2
    lines = (json.loads(line) for line in (latest().parent / "log.jsonl").read_text().splitlines())
    rates = [line["values"]["lr/all"] for line in lines if line["kind"] == "train"]
    old, new = (config_rates(rate, epochs) for rate, epochs in ((0.001, 1), (0.05, 2)))
    assert rates == pytest.approx([*old, *new[2:]])  # two batches per epoch; the second follows the new curve


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('optimizer={"type":"AdamW","args":{"lr":0.1}}', "optimizer.type: the checkpoint has SGD, the config AdamW"),
        ('arch={"type":"ENet"}', "this run trains UNet, the config asks for ENet. Start a new run"),
        ("optimizer.no_decay_on_norm_and_bias=true", "optimizer: the parameter groups are all ("),
        (
            "train_loader.args.in_channels=1 val_loader.args.in_channels=1",
            "train_loader: its images have 1 channels, the model takes 3",
        ),
    ],
)
def test_what_a_run_cannot_be_resumed_with_is_one_message(train: Train, change: str, said: str) -> None:
    assert train("-c", "config.json")[0] == 0
    before = latest().read_bytes()
    code, text = train(
        "-r", str(latest()), "--set", "trainer.epochs=2", *(word for item in change.split() for word in ("--set", item))
    )
    assert code == 2
    assert said in text
    assert "Traceback" not in text
    assert latest().read_bytes() == before


def test_an_unchanged_config_changes_nothing(train: Train) -> None:
    """Stopped after one of two epochs, as by a kill: the same config, and the same final weights."""
    write(CONFIG, epochs=2)
    assert train("-c", "config.json")[0] == 0
    whole = torch.load(latest(), weights_only=True)["state_dict"]
    folder = latest().parent
    for name in ("latest.pth", "best_model.pth", "checkpoint-epoch2.pth"):
        (folder / name).unlink()
    code, text = train("-r", "auto", "-c", "config.json")
    assert code == 0, text
    assert "changed since" not in text
    parted = torch.load(latest(), weights_only=True)["state_dict"]
    assert all(torch.equal(whole[name], parted[name]) for name in whole)


def test_a_finished_run_says_that_there_is_nothing_to_do(train: Train) -> None:
    write(CONFIG, epochs=2)
    assert train("-c", "config.json")[0] == 0
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in latest().parent.iterdir()}
    for arguments in (["-r", "auto", "-c", "config.json"], ["-r", str(latest()), "--set", "trainer.epochs=1"]):
        code, text = train(*arguments)
        assert code == 0
        planned = 1 if "--set" in arguments else 2
        assert f"nothing to do: 2 of {planned} epochs are done; train longer with --set trainer.epochs=N" in text
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in latest().parent.iterdir()} == before


def test_a_run_that_stopped_early_is_over(train: Train) -> None:
    """Like a requeued job: it resumes any existing checkpoint."""
    write(CONFIG, epochs=9, early_stop=1, val_per_epochs=1, monitor="max Mean_Dice")
    config = json.loads(Path("config.json").read_text())
    config["optimizer"] = {"type": "SGD", "args": {"lr": 1e-12}}
    Path("config.json").write_text(json.dumps(config))
    code, text = train("-c", "config.json")
    assert "early stop: Mean_Dice has not improved in 1 validation" in text
    before = latest().read_bytes()
    code, text = train("-r", str(latest()))
    assert code == 0
    assert "nothing to do: the run stopped early in epoch 2" in text
    assert "--set trainer.early_stop=0" in text
    assert latest().read_bytes() == before
    code, text = train("-r", str(latest()), "--set", "trainer.early_stop=0", "--set", "trainer.epochs=3")
    assert code == 0
    assert torch.load(latest(), weights_only=True)["epoch"] == 3


def test_differences_name_each_field_with_both_values() -> None:
    config = configs.resolve(CONFIG)
    before = json.loads(configs.dump(config))
    assert configs.differences(before, config) == []
    before["train_loader"]["args"]["crop_size"] = [16, 32]
    del before["arch"]["args"]["width"]
    before["seed"] = 7
    assert sorted(configs.differences(before, config)) == [
        "arch.args.width: absent -> 2",
        "seed: 7 -> 0",
        "train_loader.args.crop_size: [16, 32] -> 32",
    ]


def test_a_malformed_training_state_is_one_message(train: Train) -> None:
    assert train("-c", "config.json", "--set", "optimizer.args.momentum=0.9")[0] == 0
    state = torch.load(latest(), weights_only=False)
    rng = {"processes": [state["processes"][0] | {"rng": None}]}
    buffers = {key: {"momentum_buffer": torch.zeros(3, 1)} for key in state["optimizer"]["state"]}
    for change in (
        {"epoch": None},
        {"not_improved_count": "x"},
        {"monitor_best": None},
        {"names": 3},
        {"facts": {}},
        {"optimizer": state["optimizer"] | {"state": buffers}},
        rng,
    ):
        torch.save(state | change, "malformed.pth")
        code, text = train("-r", "malformed.pth", "--set", "trainer.epochs=2")
        assert code == 2, change
        assert "Traceback" not in text
        assert "o start a new run from its weights" in text or "expected a whole number as 'epoch'" in text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_memory_is_named_as_the_reason(train: Train, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    assert train("-c", "config.json")[0] == 0

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr("base.resume.optim.restore", full)
    code, text = train("-r", str(latest()), "--set", "trainer.epochs=2")
    assert code == 2
    assert "error: out of memory: " in text
    assert "malformed" not in text


def test_a_run_that_has_moved_goes_on_in_its_new_place(train: Train) -> None:
    write(CONFIG, save_dir="here/saved", log_dir="here/logs", tensorboard=True)
    assert train("-c", "config.json")[0] == 0
    (folder,) = Path("here/saved").glob("run/*/*/*")
    folder.rename("moved")
    shutil.rmtree("here")
    Path("here").touch()  # nothing can be written below a file
    code, text = train("-r", "moved/latest.pth", "--set", "trainer.epochs=2")
    assert code == 0, text
    assert "trainer.save_dir: " in text
    assert torch.load("moved/latest.pth", weights_only=False)["epoch"] == 2
    assert list(Path("moved/tensorboard").rglob("events*"))
