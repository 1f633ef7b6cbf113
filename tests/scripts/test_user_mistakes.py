"""What users get wrong with train.py and test.py: one clear message, exit code 2, and nothing half-written.

Most run the script's ``main`` in this process, which is the script but for starting Python and torch once more.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import models
import test as test_script
import train as train_script
from models import MODELS
from utils import checkpoint, errors
from utils import config as configs
from utils.facts import Facts
from utils.images import voc_colormap, write_png

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["background", "cat", "dog"]
LOADER = {"data_dir": "data", "classes": CLASSES, "num_workers": 0}
CONFIG: dict[str, Any] = {
    "name": "run",
    "n_gpu": 0,
    "arch": {"type": "UNet", "args": {"width": 2}},
    "train_loader": {
        "type": "VOC",
        "args": {**LOADER, "batch_size": 2, "crop_size": 32, "augment": True, "shuffle": True},
    },
    "val_loader": {"type": "VOC", "args": {**LOADER, "split": "val", "batch_size": 1}},
    "trainer": {"epochs": 1, "tensorboard": False},
}


def make_tree(folder: Path, highest: int = 2) -> None:
    """Write a VOC tree of five small images whose labels are 0 ... ``highest``, and ignored pixels."""
    root = folder / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(root / "JPEGImages" / f"image{i}.jpg")
        label = rng.integers(0, highest + 1, (32, 40)).astype(np.uint8)
        label[0] = 255
        write_png(root / "SegmentationClass" / f"image{i}.png", label)
    (lists / "train.txt").write_text("image0\nimage1\nimage2\n")
    (lists / "val.txt").write_text("image3\nimage4\n")


class Code:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it_ran",)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, a valid config, and valid and invalid checkpoints."""
    folder = tmp_path_factory.mktemp("template")
    make_tree(folder / "data")
    make_tree(folder / "other_data", highest=7)
    (folder / "empty").mkdir()
    (folder / "file").write_text("I am a file")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "broken.json").write_text('{"name": "run", "arch" {}}')
    (folder / "other_arch.json").write_text(json.dumps(CONFIG | {"arch": {"type": "UNet", "args": {"width": 4}}}))
    torch.manual_seed(0)
    model = models.build("UNet", 3, width=2)
    facts = Facts(3, tuple(CLASSES), voc_colormap(3), (0.5,) * 3, (0.2,) * 3, 255)
    raw = configs.resolve(CONFIG, models=MODELS).model_dump()
    state = {"format": 2, "epoch": 1, "state_dict": model.state_dict(), "config": raw, "facts": facts.to_dict()}
    checkpoint.save(state, folder / "good.pth")
    more = {"num_classes": 4, "class_names": [*facts.class_names, "more"], "palette": [*facts.palette, (1, 2, 3)]}
    checkpoint.save(state | {"facts": facts.to_dict() | more}, folder / "wrong_count.pth")
    (folder / "cut.pth").write_bytes((folder / "good.pth").read_bytes()[:5000])
    (folder / "text.pth").write_text("not a checkpoint")
    torch.save(model.state_dict(), folder / "weights.pth")
    torch.save(state | {"optimizer": Code()}, folder / "evil.pth")
    (folder / "evil_pickle.pth").write_bytes(pickle.dumps(Code()))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


Script = Callable[..., str]


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def complaint(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run a script with wrong arguments; return its message."""

    def call(script: ModuleType, *arguments: str) -> str:
        before = tree(place)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            errors.run(script.main)
        text = capsys.readouterr().err
        assert ended.value.code == 2, text
        check_message(text)
        assert tree(place) == before, "something was left behind"
        return text

    return call


def check_message(text: str) -> None:
    assert text.startswith("error: "), text
    assert text.count("error: ") == 1, text
    assert "Traceback" not in text
    assert text.endswith("\n")


# Name -> arguments, parts of the message.
TRAINING: dict[str, tuple[list[str], list[str]]] = {
    "no such config": (["-c", "nowhere.json"], ["nowhere.json: there is no such config file"]),
    "config is a folder": (["-c", "data"], ["data: cannot be read as a config"]),
    "broken json": (["-c", "broken.json"], ["broken.json, line 1, column 24: not valid JSON", 'Unexpected "{"']),
    "no such key": (["--set", "trainer.epoch=3"], ["trainer.epoch: unknown key; did you mean epochs?"]),
    "override without a value": (["--set", "trainer.epochs"], ["expected path=value"]),
    "override of a section": (["--set", "trainer=3"], ["trainer: found 3; expected a section"]),
    "no such model": (["--set", "arch.type=UNett"], ['arch.type: found "UNett"; did you mean UNet?']),
    "no such argument": (["--set", "arch.args.depth=3"], ["arch.args.depth: UNet takes no such argument"]),
    "no such backbone": (
        ["--set", 'arch={"type": "PSPNet", "args": {"backbone": "resnet19"}}'],
        ["arch", "resnet19", "resnet18"],
    ),
    "no such weights": (
        ["--set", 'arch={"type": "PSPNet", "args": {"backbone": "resnet18", "pretrained": "nowhere.pth"}}'],
        ["nowhere.pth"],
    ),
    "no such device": (["-d", "gpu0"], ["--device gpu0: expected GPU numbers"]),
    "no such data folder": (
        ["--set", "train_loader.args.data_dir=nowhere"],
        ['train_loader.args.data_dir: found "nowhere", which is not a folder'],
    ),
    "not the tree that is expected": (
        ["--set", "train_loader.args.data_dir=empty"],
        ["train_loader.args.data_dir: ", "VOCdevkit/VOC2012", "expected", "found in empty"],
    ),
    "names for classes of interest": (
        ["--set", 'predict.CoI=["cat"]'],
        ["class ids instead of names: background is 0, cat is 1, dog is 2"],
    ),
    "no such split": (["--set", "train_loader.args.split=training"], ["split", "training", "train"]),
    "labels out of range": (
        ["--set", "train_loader.args.data_dir=other_data"],
        ["label values that are not a class", "SegmentationClass", "0 to 2"],
    ),
    "data sets with different classes": (
        ["--set", 'train_loader.args.classes=["background", "cat", "dog", "cow"]'],
        ["val_loader: its data has 3 classes"],
    ),
    "no batch at all": (["--set", "train_loader.args.batch_size=0"], ["batch_size", "0"]),
    "no such class of interest": (["--set", "predict.CoI=[3]"], ["predict.CoI: found [3]", "0 to 2"]),
    "no such monitor": (["--set", "trainer.monitor=max mDice"], ["trainer.monitor: 'mDice' cannot be monitored"]),
    "no such class to monitor": (["--set", "trainer.monitor=max Class_Dice/cow"], ["there is no class 'cow'"]),
    "weights for other classes": (
        ["--set", 'loss={"type": "CrossEntropyLoss2d", "args": {"weight": [1, 2]}}'],
        ["weight has 2 entries; logits with 3 channels need 3"],
    ),
    "a learning rate below 0": (["--set", "optimizer.args.lr=-1"], ["optimizer.args.lr: ", "-1"]),
    "a field of another section": (["--set", "epochs=3"], ["epochs: unknown key; did you mean trainer.epochs?"]),
    "an argument of a section": (
        ["--set", "data_dir=x"],
        ["data_dir: unknown key; did you mean train_loader.args.data_dir"],
    ),
    "a schedule longer than the run": (["--set", "lr_scheduler.args.warmup=1000"], ["lr_scheduler.args"]),
    "a place that cannot be written": (["--set", "trainer.save_dir=file/runs"], ["trainer.save_dir", "is a file"]),
    "no such checkpoint": (["-r", "nowhere.pth"], ["no such checkpoint file; in that folder: cut.pth"]),
    "nothing to resume": (["-r", "auto"], ["there is no run with a checkpoint below"]),
    "not a checkpoint": (["-r", "text.pth"], ["text.pth: not a checkpoint: it begins with b'not a checkpoint'"]),
    "weights without the state of a run": (["-r", "weights.pth"], ["no training state", "--weights"]),
    "a checkpoint that would run code": (["-r", "evil.pth"], ["refused", "posix.system"]),
    "another arch than the checkpoint's": (["-r", "good.pth", "-c", "other_arch.json"], ["cannot be changed"]),
}

TESTING: dict[str, tuple[list[str], list[str]]] = {
    "no such checkpoint": (["-r", "best.pth"], ["best.pth: there is no such checkpoint file; in that folder: cut.pth"]),
    "a folder for a checkpoint": (["-r", "."], ["is a folder; it contains cut.pth, ", "; pass one of them"]),
    "a folder without a checkpoint": (["-r", "data"], ["data: is a folder without a checkpoint\n"]),
    "the dots of a command": (["-r", "saved/.../best_model.pth"], ['"..." stands for the folder of a run']),
    "not a checkpoint": (["-r", "text.pth"], ["text.pth: not a checkpoint"]),
    "a picture for a checkpoint": (["-r", "data/VOCdevkit/VOC2012/JPEGImages/image0.jpg"], ["not a checkpoint"]),
    "half a checkpoint": (["-r", "cut.pth"], ["truncated (5,000 bytes)"]),
    "a checkpoint that would run code": (["-r", "evil.pth"], ["refused", "posix.system"]),
    "a pickle that would run code": (["-r", "evil_pickle.pth"], ["refused"]),
    "weights without a config": (["-r", "weights.pth"], ["no config; pass the config of its run with --config"]),
    "weights for another number of classes": (["-r", "wrong_count.pth"], ["wrong_count.pth: ", "3 classes"]),
    "weights of another width": (["--set", "arch.args.width=4"], ["good.pth: the weights do not fit UNet"]),
    "another arch than the checkpoint's": (
        ["-c", "other_arch.json"],
        ["cannot be changed", "'width': 4", "'width': 2"],
    ),
    "no such config": (["-c", "nowhere.json"], ["nowhere.json: there is no such config file"]),
    "broken json": (["-c", "broken.json"], ["broken.json, line 1, column 24: not valid JSON", 'Unexpected "{"']),
    "no such data folder": (
        ["--set", "val_loader.args.data_dir=nowhere"],
        ['val_loader.args.data_dir: found "nowhere"', "--set val_loader.args.data_dir=FOLDER"],
    ),
    "not the tree that is expected": (["--set", "val_loader.args.data_dir=empty"], ["VOCdevkit/VOC2012"]),
    "data with other classes": (
        ["--set", 'val_loader.args.classes=["background", "cat", "dog", "cow"]'],
        ["test_loader: its data has 4 classes", "the model 3"],
    ),
    "labels out of range": (["--set", "val_loader.args.data_dir=other_data"], ["label values that are not a class"]),
    "images of another kind": (["--set", "val_loader.args.in_channels=1"], ["channels"]),
    "no such class of interest": (["--set", "predict.CoI=[3]"], ["predict.CoI: found [3]"]),
    "no such procedure": (["--set", "predict.test=argmax"], ["predict.test: found \"argmax\"; should be 'T', 'max'"]),
    "no such device": (["-d", "0,x"], ["--device 0,x: expected GPU numbers"]),
    "override without a value": (["--set", "seed"], ["--set seed: expected path=value"]),
    "a place that cannot be written": (["-o", "file/results"], ["results cannot be written there", "--output"]),
}


@pytest.mark.parametrize("mistake", TRAINING)
def test_mistakes_in_training(mistake, complaint) -> None:
    arguments, expected = TRAINING[mistake]
    if "-c" not in arguments and ("-r" not in arguments or "auto" in arguments or "weights.pth" in arguments):
        arguments = ["-c", "config.json", *arguments]
    text = complaint(train_script, *arguments)
    for part in expected:
        assert part in text, text


@pytest.mark.parametrize("mistake", TESTING)
def test_mistakes_in_testing(mistake, complaint) -> None:
    arguments, expected = TESTING[mistake]
    if "-r" not in arguments:
        arguments = ["-r", "good.pth", *arguments]
    text = complaint(test_script, *arguments)
    for part in expected:
        assert part in text, text


def test_a_broken_image_is_reported_by_its_name(complaint, place) -> None:
    root = place / "data" / "VOCdevkit" / "VOC2012"
    (root / "JPEGImages" / "image3.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert "image3.jpg" in complaint(test_script, "-r", "good.pth")
    (root / "JPEGImages" / "image0.jpg").unlink()
    text = complaint(train_script, "-c", "config.json")
    assert "image0.jpg" in text
    assert "python -m dataloaders check" in text
    assert '"on_error": "skip"' in text


def test_an_image_and_a_label_of_different_sizes_are_reported(complaint, place) -> None:
    label = place / "data" / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "image4.png"
    write_png(label, np.zeros((20, 20), np.uint8))
    text = complaint(test_script, "-r", "good.pth")
    assert "differ in size" in text
    assert "20x20" in text


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (train_script, []),
        (train_script, ["-r", "auto"]),
        (train_script, ["-c", "config.json", "--epochs", "3"]),
        (test_script, ["-r", "good.pth", "-p", "argmax"]),
        (test_script, ["-r", "good.pth", "--limit", "0"]),
    ],
)
def test_wrong_usage_is_reported_with_the_usage(script, arguments, place, monkeypatch, capsys) -> None:
    before = tree(place)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        errors.run(script.main)
    text = capsys.readouterr().err
    assert ended.value.code == 2
    assert text.startswith("usage: ")
    assert text.count("error: ") == 1
    assert tree(place) == before


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "-c", "config.json", "--set", "arch.args.depth=3", "--set", "trainer.monitor=max mDice"],
        ["test.py", "-r", "evil.pth"],
        ["test.py", "-r", "good.pth", "--set", "val_loader.args.data_dir=other_data"],
    ],
)
def test_the_scripts_themselves(command, place) -> None:
    before = tree(place)
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2
    check_message(done.stderr)
    assert tree(place) == before


def test_without_a_mistake_both_run(place, monkeypatch, capsys) -> None:
    """The cases above fail only because of their mistakes."""
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", "config.json"])
    with pytest.raises(SystemExit) as ended:
        errors.run(train_script.main)
    assert ended.value.code == 0, capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["test.py", "-r", "good.pth", "-o", "results", "-p", "all"])
    with pytest.raises(SystemExit) as ended:
        errors.run(test_script.main)
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    assert "## Comparison" in captured.out
    assert {"per_image.csv", "report.html", "results.json"} <= {p.name for p in Path("results").iterdir()}


def test_an_image_without_a_mask_is_one_warning(place, monkeypatch, capsys) -> None:
    for i in range(5):
        for folder in ("images", "masks"):
            (place / "pairs" / folder).mkdir(parents=True, exist_ok=True)
            channels = (3,) if folder == "images" else ()
            write_png(place / "pairs" / folder / f"{i}.png", np.zeros((32, 32, *channels), np.uint8))
    (place / "pairs/masks/2.png").unlink()
    loader = {"data_dir": "pairs", "classes": CLASSES, "val_fraction": 0.5, "num_workers": 0, "batch_size": 2}
    train = {"type": "Folder", "args": {**loader, "crop_size": 32, "augment": True}}
    config = CONFIG | {"train_loader": train, "val_loader": {"type": "Folder", "args": {**loader, "split": "val"}}}
    (place / "pairs.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", "pairs.json"])
    with pytest.raises(SystemExit) as ended:
        errors.run(train_script.main)
    text = capsys.readouterr().err
    assert ended.value.code == 0, text
    assert text.count("warning: 1 image has no mask and is skipped: pairs/images/2.png\n") == 1
    assert text.count("has no mask") == 1


@pytest.mark.parametrize(("choice", "hint"), [("rankdise", "; did you mean rankdice?"), ("xy", "")])
def test_the_nearest_choice_is_named(choice: str, hint: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["test.py", "-r", "best.pth", "-p", choice])
    with pytest.raises(SystemExit) as ended:
        test_script.parse_arguments()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"invalid choice: '{choice}'" in last
    assert last.endswith(f"){hint}")


@pytest.mark.parametrize("option", ["-r", "-c", "-o", "--save-probs"])
def test_an_empty_value_is_refused(option: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["test.py", "-r", "best.pth", option, ""])
    with pytest.raises(SystemExit) as ended:
        test_script.parse_arguments()
    assert ended.value.code == 2
    assert "the value is empty (is a variable of the shell not set?)" in capsys.readouterr().err
