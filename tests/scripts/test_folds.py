"""``test.py --folds``: the checkpoints of a cross-validation as one table with its spread."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.scripts.test_test_script import ROOT, run, script
from tests.shapes_checkpoint import loader, write_checkpoint
from utils.errors import UserError
from utils.report import folds


def fold(folder: Path, k: int, count: int = 3, **changes) -> Path:
    """Write the checkpoint of fold k of 10 images; the weights of the folds differ."""
    train = loader("train", 10, shuffle=True, endless=False, val_fold=[k, count])
    changes = {"train_loader": train, "val_loader": None, "test_loader": None} | changes
    path = write_checkpoint(folder / f"fold{k}" / "best_model.pth", **changes)
    state = torch.load(path, weights_only=True)
    state["state_dict"] = {n: v * (1 + 0.01 * k) if "weight" in n else v for n, v in state["state_dict"].items()}
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("folds")
    for k in range(3):
        (folder / f"fold{k}").mkdir()
    return [fold(folder, k) for k in range(3)]


def test_each_image_is_scored_once_by_the_checkpoint_that_held_it_out(three, monkeypatch, capsys) -> None:
    out = run(monkeypatch, capsys, "--folds", *three, "-p", "all")
    folder = three[0].parent.parent / "folds"
    found = json.loads((folder / "results.json").read_text())
    rows = list(csv.DictReader((folder / "per_image.csv").open()))
    assert len(rows) == len({row["image"] for row in rows}) == found["protocol"]["images"] == 10
    assert sorted(one["protocol"]["images"] for one in found["folds"]) == [3, 3, 4]
    assert found["protocol"]["folds"] == 3
    # Each fold alone, as test.py scores a single checkpoint.
    for path, one in zip(three, found["folds"], strict=True):
        run(monkeypatch, capsys, "-r", path, "-p", "max", "-o", folder / "one")
        alone = json.loads((folder / "one/results.json").read_text())["procedures"]["max"]
        assert alone["Mean_Dice"] == pytest.approx(one["procedures"]["max"]["Mean_Dice"])
        assert alone["Class_IoU"] == one["procedures"]["max"]["Class_IoU"]
    for name, spread in found["spread"].items():
        for key in ("Mean_Dice", "Pixel_Accuracy"):
            values = [one["procedures"][name][key] for one in found["folds"]]
            assert spread[key]["mean"] == pytest.approx(statistics.fmean(values))
            assert spread[key]["std"] == pytest.approx(statistics.stdev(values))
        dice = [float(row[f"{name}_mDice"]) for row in rows]
        assert found["procedures"][name]["Mean_Dice"] == pytest.approx(statistics.fmean(dice), abs=1e-6)
    assert "## mDice of each fold" in out
    assert f"{found['spread']['max']['Mean_Dice']['std']:.4f}" in out
    assert "±" in out
    assert max(map(len, out.split("## mDice of each fold")[1].splitlines())) <= max(100, len(str(folder)) + 30)
    assert "comparison" in found


def test_a_threshold_fitted_in_one_fold_is_shown_for_all(three, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "fold0").mkdir()
    first = fold(tmp_path, 0, predict={"threshold": 0.3})
    run(monkeypatch, capsys, "--folds", first, *three[1:], "-p", "all", "-o", tmp_path / "out")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert all("T_tuned" in one["procedures"] for one in found["folds"])
    same = found["folds"][1]["procedures"]
    assert same["T_tuned"]["Mean_Dice"] == same["T"]["Mean_Dice"]
    assert found["protocol"]["threshold"].startswith("of each fold: 0.3000, 0.5000")
    run(monkeypatch, capsys, "--folds", *three, "-p", "max", "-o", tmp_path / "max")
    assert list(json.loads((tmp_path / "max/results.json").read_text())["spread"]) == ["max"]


def refused(monkeypatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["test.py", *map(str, arguments)])
    with pytest.raises((UserError, SystemExit)) as error:
        script().main()
    return str(error.value)


def test_folds_that_do_not_fit_together_are_refused(three, tmp_path, monkeypatch, capsys) -> None:
    assert "none of the 2 checkpoints held out" in refused(monkeypatch, "--folds", *three[:2])
    assert "both held out" in refused(monkeypatch, "--folds", three[0], three[0], *three[1:])
    (tmp_path / "fold1").mkdir()
    own = loader("train", 10, shuffle=True, endless=False)
    leaked = fold(tmp_path, 1, train_loader=own, val_loader=loader("train", 10, endless=False))
    assert "was trained on 10 images (such as" in refused(monkeypatch, "--folds", three[0], leaked)
    other = fold(tmp_path, 1, predict={"CoI": [1]})
    message = refused(monkeypatch, "--folds", three[0], other, three[2])
    assert "predict.CoI is all in" in message
    state = torch.load(three[1], weights_only=True)
    state["facts"]["class_names"] = ["sky", *state["facts"]["class_names"][1:]]
    torch.save(state, tmp_path / "other.pth")
    message = refused(monkeypatch, "--folds", three[0], tmp_path / "other.pth", three[2])
    assert f"--folds {tmp_path / 'other.pth'}: class 0 of its data is 'sky', but 'background' for the model" in message
    for arguments in (["--folds", three[0]], ["--folds", *three, "-r", three[0]], ["--folds", *three, "--limit", 1]):
        refused(monkeypatch, *arguments)
        assert "--folds" in capsys.readouterr().err
    assert not (tmp_path / "folds").exists()


def test_two_processes_find_the_same(three, tmp_path, monkeypatch, capsys) -> None:
    run(monkeypatch, capsys, "--folds", *three, "-p", "all", "-o", tmp_path / "one")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "test.py")]
    command += ["--folds", *map(str, three), "-p", "all", "-o", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("## mDice of each fold") == 1
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for name, scores in one["procedures"].items():
        for key in ("Mean_Dice", "Mean_IoU", "Dataset_mDice", "Class_Dice", "images"):
            assert two["procedures"][name][key] == pytest.approx(scores[key]), (name, key)
        assert two["spread"][name]["Mean_Dice"] == pytest.approx(one["spread"][name]["Mean_Dice"])
    assert (tmp_path / "one/per_image.csv").read_bytes() == (tmp_path / "two/per_image.csv").read_bytes()


def test_the_default_folder_is_above_all_checkpoints() -> None:
    assert folds.folder_of(["/a/b/c/best.pth", "/a/b/d/e/best.pth"]) == Path("/a/b/folds")
