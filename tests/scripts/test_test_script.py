"""test.py as users run it: one pass, the fit, procedures on saved probabilities, several processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.shapes_checkpoint import loader, raw_config, write_checkpoint
from utils.errors import UserError
from utils.predict import __main__ as decode
from utils.predict.files import read_probs

ROOT = Path(__file__).resolve().parents[2]
ALL = ["T", "max", "max_present", "rankdice", "rankdice_paper", "rankdice_map", "rankdice_iou"]


def script():
    """Return the module test.py; its name is also one of the standard library."""
    spec = importlib.util.spec_from_file_location("test_script", ROOT / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["test.py", *map(str, arguments)])
    assert script().main() == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best_model.pth")


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_without_loaders_for_it_the_held_out_samples_are_scored(tmp_path, monkeypatch, capsys) -> None:
    train = loader("train", 12, shuffle=True, endless=False, val_fold=[1, 4])
    path = write_checkpoint(tmp_path / "best_model.pth", train_loader=train, val_loader=None, test_loader=None)
    run(monkeypatch, capsys, "-r", path, "-p", "max", "-o", tmp_path / "out")
    protocol = results(tmp_path / "out")["protocol"]
    assert (protocol["images"], protocol["split"]) == (3, "held out of train")
    assert "train_loader holds out" in protocol["note"]


def test_masks_of_an_earlier_run_do_not_stay(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    arguments = ("-r", checkpoint, "-o", tmp_path)
    run(monkeypatch, capsys, *arguments, "-p", "max", "--save-masks")
    drawn = tmp_path / "masks" / "drawn.png"
    Image.new("L", (4, 4)).save(drawn)
    run(monkeypatch, capsys, *arguments, "-p", "T", "--limit", "2", "--save-masks")
    masks = (path.relative_to(tmp_path / "masks").parts[0] for path in (tmp_path / "masks").rglob("*.png"))
    assert sorted(masks) == ["T", "T", "drawn.png"]
    run(monkeypatch, capsys, *arguments, "-p", "T")
    assert list((tmp_path / "masks").rglob("*.png")) == [drawn]


def test_everything_from_one_call(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    out = run(
        monkeypatch, capsys, "-r", checkpoint, "-p", "all", "-o", tmp_path / "out", "--save-masks",
        "--save-probs", tmp_path / "probs", "--set", "tester.tensorboard=true", "--boundary",
    )  # fmt: skip
    found = results(tmp_path / "out")
    assert list(found["procedures"]) == ALL
    assert found["protocol"]["images"] == 7
    assert found["protocol"]["image_sizes"] == "32 x 32"
    assert found["protocol"]["note"] is None
    for name, scores in found["procedures"].items():
        assert scores["milliseconds_per_image"] > 0
        assert 0 <= scores["Mean_Boundary_IoU"] <= 1
        assert scores["peak_mebibytes"] > 0
        assert scores["Worst_Tenth_Dice"] <= scores["Mean_Dice"]
        assert ("Expected_Dice" in scores) == (name in ("rankdice", "rankdice_paper"))
        assert ("Expected_IoU" in scores) == (name == "rankdice_iou")
    for text in ("## Protocol", "images_per_class_mean", "## Comparison", "Paired bootstrap", "## Verdict", "ECE"):
        assert text in out
    assert (tmp_path / "out/report.html").stat().st_size > 10_000
    assert list((tmp_path / "out").glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (tmp_path / "out/masks").iterdir()) == sorted(ALL)
    # Each procedure on the saved probabilities gives the same files, byte for byte.
    for name in ALL:
        procedure, _, kind = name.partition("_")
        metric = "iou" if kind == "iou" else "dice"
        again = tmp_path / "again" / name
        command = ["predict", "--probs", tmp_path / "probs", "-p", procedure, "--metric", metric, "-o", again]
        command += ["--presence", "prune"] if kind == "present" else []
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        assert decode.main() == 0
        before = sorted((tmp_path / "out/masks" / name).iterdir())
        assert len(before) == 7
        assert [p.read_bytes() for p in before] == [p.read_bytes() for p in sorted(again.iterdir())]
    assert Image.open(before[0]).mode == "P"


def test_alone_a_procedure_scores_as_among_all(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    run(monkeypatch, capsys, "-r", checkpoint, "-p", "all", "-o", tmp_path / "all")
    together = results(tmp_path / "all")["procedures"]
    for name in ("T", "max", "rankdice"):
        run(monkeypatch, capsys, "-r", checkpoint, "-p", name, "-o", tmp_path / name)
        alone = results(tmp_path / name)["procedures"][name]
        timing = ("milliseconds_per_image", "peak_mebibytes")
        assert {k: v for k, v in alone.items() if k not in timing} == {
            k: v for k, v in together[name].items() if k not in timing
        }
        assert not (tmp_path / name / "report.html").exists()


def test_an_ensemble_scores_the_mean_of_the_probabilities(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    other = write_checkpoint(tmp_path / "other.pth", predict={"temperature": 3.0})
    folders = [tmp_path / name for name in ("first", "second", "both")]
    for files, folder in zip(([checkpoint], [other], [checkpoint, other]), folders, strict=True):
        run(monkeypatch, capsys, "-r", *files, "-p", "max", "-o", tmp_path / "out", "--save-probs", folder)
    assert results(tmp_path / "out")["protocol"]["checkpoint"] == f"{checkpoint}, {other}"
    saved = sorted(path.name for path in folders[0].glob("*.npz"))
    assert len(saved) == 7
    for name in saved:
        first, second, both = (read_probs(folder / name) for folder in folders)
        torch.testing.assert_close(both, (first + second) / 2)
    run(monkeypatch, capsys, "-r", other, checkpoint, "-p", "max")
    assert (tmp_path / "ensemble/results.json").is_file()


def test_scores_of_saved_probabilities_say_what_the_folder_knows(tmp_path, monkeypatch, capsys) -> None:
    trained = write_checkpoint(tmp_path / "best.pth", predict={"threshold": 0.19, "temperature": 1.5, "test": "T"})
    on_val = ("--set", "test_loader=null")
    saved = ("--save-probs", tmp_path / "probs", "--save-masks", "-o", tmp_path)
    run(monkeypatch, capsys, "-r", trained, "-p", "max", *on_val, *saved)
    command = ["predict", "--probs", tmp_path / "probs", "-p", "all", "--labels", tmp_path / "masks/max"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    assert decode.main() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "best.pth" in out.split("checkpoint :")[1].split(" probabilities")[0]
    assert "temperature 1.5 (in the saved probabilities), threshold 0.19, no presence fit" in out
    assert "there is no test_loader: scored on the validation data" in out
    assert "utils.predict uses max, unless -p names another" in out
    assert "none" not in out.lower().replace("without_mask", "")


def test_fitting_writes_a_checkpoint_that_is_used_without_a_flag(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    before = checkpoint.read_bytes()
    out = run(monkeypatch, capsys, "-r", checkpoint, "--fit", "-o", tmp_path, "--set", "test_loader.args.length=1")
    assert "Fitted on 6 validation images (Shapes val)" in out
    assert "NLL" in out
    assert "6 validation images are few" in out
    fitted = tmp_path / "best_model_calibrated.pth"
    assert out.endswith(f"now    : python test.py -r {fitted} -p all\n")
    assert checkpoint.read_bytes() == before
    state = torch.load(fitted, weights_only=True)
    old = torch.load(checkpoint, weights_only=True)
    record, predict = state["calibration"], state["config"]["predict"]
    assert predict | record["found"] == predict
    assert record["kept"] == max(record["figures"], key=lambda name: record["figures"][name]["rankdice"])
    assert "optimizer" not in state
    # Nothing else in the config has changed, and the options of this run are not in it.
    old["config"]["predict"] |= record["found"]
    assert state["config"] == old["config"]
    assert all(torch.equal(state["state_dict"][k], v) for k, v in old["state_dict"].items())

    out = run(monkeypatch, capsys, "-r", fitted, "-p", "all", "-o", tmp_path / "out")
    found = results(tmp_path / "out")
    assert found["protocol"]["temperature"] == predict["temperature"]
    assert "fitted on 6 validation images" in found["protocol"]["fitted"]
    # A temperature does not change the loss, and improves the likelihood of the probabilities.
    warm = ("--set", "predict.temperature=3.0")
    out = run(monkeypatch, capsys, "-r", fitted, "-p", "all", "-o", tmp_path / "warm", *warm)
    found = results(tmp_path / "warm")
    assert "temperature are overridden" in found["protocol"]["fitted"]
    untempered, loss = found["protocol"]["test_loss"], found["procedures"]["max"]["test_loss"]
    assert "without the temperature" in untempered
    assert untempered[:40] in out
    run(monkeypatch, capsys, "-r", checkpoint, "-p", "max", "-o", tmp_path / "own")
    own = results(tmp_path / "own")
    assert own["protocol"]["test_loss"] is None
    assert own["procedures"]["max"]["test_loss"] == loss
    assert found["reliability"]["NLL"] < loss
    # With several views, the loss is that of the mean probabilities, which include the temperature.
    run(monkeypatch, capsys, "-r", fitted, "-p", "max", "-o", tmp_path / "views", "--tta", "flip", *warm)
    views = results(tmp_path / "views")
    assert views["protocol"]["test_loss"] is None
    assert views["procedures"]["max"]["test_loss"] < loss
    on_val = f"test_loader={json.dumps(loader('val', 6))}"
    run(monkeypatch, capsys, "-r", fitted, "-p", "T", "-o", tmp_path / "val", "--set", on_val)
    assert results(tmp_path / "val")["protocol"]["note"].endswith("optimistic; the fit used them too")

    from utils.predictor import Predictor

    predictor = Predictor(fitted)
    assert (predictor.network.temperature, predictor.options.threshold) == (
        predict["temperature"],
        predict["threshold"],
    )
    # A second fit starts from the network's own logits, so it gives the same result.
    run(monkeypatch, capsys, "-r", fitted, "--fit", "-o", tmp_path)
    assert torch.load(fitted, weights_only=True)["calibration"] == record


def test_what_was_fitted_with_presence_is_reported_before_and_after(tmp_path, monkeypatch, capsys) -> None:
    fit = {"weight": 1.0, "center": 0.0, "spread": 1.0, "bias": 0.0, "class_bias": [0.0] * 8, "score_shift": 0.0}
    fit |= {"score_slope": 0.0, "mean_score": 0.5, "mask_shift": 0.1, "mask_slope": 0.0, "mask_class": [0.0] * 8}
    fit |= {"images": 50, "classes": list(range(8)), "metric": "dice"}
    path = write_checkpoint(tmp_path / "a.pth", predict={"presence_fit": fit})
    run(monkeypatch, capsys, "-r", path, "-p", "all", "-o", tmp_path)
    found = results(tmp_path)["procedures"]
    assert found["rankdice"]["Unfitted_Dice"] != found["rankdice"]["Expected_Dice"]
    assert "Unfitted_Dice" not in found["rankdice_paper"]
    assert found["max"]["Mean_Dice"] != found["max_present"]["Mean_Dice"]
    run(monkeypatch, capsys, "-r", path, "-p", "max", "-o", tmp_path / "max")
    assert list(results(tmp_path / "max")["procedures"]) == ["max_present"]


def test_fitting_never_looks_at_the_test_data(tmp_path, monkeypatch, capsys) -> None:
    path = write_checkpoint(tmp_path / "a.pth", test_loader={"type": "VOC", "args": {"data_dir": "gone"}})
    run(monkeypatch, capsys, "-r", path, "--fit")
    assert (tmp_path / "a_calibrated.pth").exists()


def test_fitting_on_enough_images_needs_no_caution(tmp_path, monkeypatch, capsys) -> None:
    path = write_checkpoint(tmp_path / "a.pth", val_loader=loader("val", 40))
    out = run(monkeypatch, capsys, "-r", path, "--fit")
    assert "Fitted on 40 validation images" in out
    assert "are few" not in out
    assert "39 validation images are few" in run(monkeypatch, capsys, "-r", path, "--fit", "--limit", 39)


def test_fitting_takes_what_training_held_out(tmp_path, monkeypatch, capsys) -> None:
    train = loader("train", 12, shuffle=True, val_split=0.25, endless=False)
    path = write_checkpoint(tmp_path / "a.pth", val_loader=None, train_loader=train)
    assert "Fitted on 3 validation images (held out of Shapes train)" in run(monkeypatch, capsys, "-r", path, "--fit")
    quiet = {"monitor": "off", "val": False}
    path = write_checkpoint(tmp_path / "b.pth", val_loader=None, trainer=quiet)
    with pytest.raises(UserError, match="val_loader: missing, and train_loader holds out no images"):
        run(monkeypatch, capsys, "-r", path, "--fit")


def test_test_data_that_chose_the_checkpoint_are_reported_as_optimistic(tmp_path, monkeypatch, capsys) -> None:
    path = write_checkpoint(tmp_path / "a.pth", test_loader=None)
    out = run(monkeypatch, capsys, "-r", path, "-p", "max")
    assert "scores are optimistic" in " ".join(out.split())


def test_test_data_with_other_images_of_the_run_are_reported_as_optimistic(tmp_path, monkeypatch, capsys) -> None:
    for split, shared in (("val", "val_loader"), ("train", "train_loader"), ("test", None)):
        test = loader(split, 6)
        path = write_checkpoint(tmp_path / "best_model.pth", val_loader=loader("val", 4), test_loader=test)
        run(monkeypatch, capsys, "-r", path, "-p", "max")
        note = results(tmp_path)["protocol"]["note"]
        if shared is None:
            assert note is None
        else:
            assert f"{shared} and test_loader have" in note
            assert "images in common" in note


def test_moved_data_of_a_config_without_a_test_loader(tmp_path, monkeypatch, capsys) -> None:
    """``test_loader`` falls back to ``val_loader``, also if ``--set`` changes it."""
    path = write_checkpoint(tmp_path / "best_model.pth", test_loader=None)
    run(monkeypatch, capsys, "-r", path, "-p", "max", "--set", "test_loader.args.length=4")
    protocol = results(tmp_path)["protocol"]
    assert (protocol["data"], protocol["split"], protocol["images"]) == ("Shapes", "val", 4)
    # Earlier changes of val_loader apply; a test_loader on the command line replaces it completely.
    before = ["--set", "val_loader.args.length=5", "--set", "test_loader.args.batch_size=2"]
    run(monkeypatch, capsys, "-r", path, "-p", "max", *before)
    assert results(tmp_path)["protocol"]["images"] == 5
    named = ["--set", "test_loader.args.classes=4", "--set", "test_loader.type=VOC"]
    with pytest.raises(UserError, match=r"test_loader\.args"):
        run(monkeypatch, capsys, "-r", path, "-p", "max", *named)
    given = tmp_path / "config.json"
    given.write_text(json.dumps(raw_config(test_loader=None, val_loader=loader("test", 6))))
    run(monkeypatch, capsys, "-r", path, "-c", given, "-p", "max", "--set", "test_loader.args.length=3")
    protocol = results(tmp_path)["protocol"]
    assert (protocol["split"], protocol["images"]) == ("test", 3)


def test_results_of_two_checkpoints_of_a_folder_stay_apart(tmp_path, monkeypatch, capsys) -> None:
    """Files in a folder belong together: the page is removed when the scores next to it change."""
    best, other = (write_checkpoint(tmp_path / name) for name in ("best_model.pth", "best_model_calibrated.pth"))
    files = ["results.json", "per_image.csv", "report.html", "confusion_max.csv"]
    limit = ("--limit", 2)
    run(monkeypatch, capsys, "-r", best, "-p", "all", *limit)
    before = {name: (tmp_path / name).read_bytes() for name in files}
    out = run(monkeypatch, capsys, "-r", other, "-p", "rankdice", *limit)
    assert {name: (tmp_path / name).read_bytes() for name in files} == before
    apart = tmp_path / "best_model_calibrated"
    assert sorted(p.name for p in apart.iterdir()) == ["per_image.csv", "results.json"]
    assert f"written: {apart / 'results.json'}" in out
    assert "replaced" not in out
    assert "removed" not in out

    out = run(monkeypatch, capsys, "-r", best, "-p", "max", *limit)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted([best.name, other.name, *files[:2]])
    assert f"removed: {tmp_path / 'report.html'}" in out
    out = run(monkeypatch, capsys, "-r", other, "-p", "max", *limit, "-o", tmp_path)
    assert f"replaced: the results of {best}" in out
    # A folder that the config names is shared by all checkpoints of its run.
    there = ["--set", f"tester.out_dir={tmp_path / 'there'}"]
    run(monkeypatch, capsys, "-r", best, "-p", "max", *limit, *there)
    run(monkeypatch, capsys, "-r", other, "-p", "max", *limit, *there)
    for folder, path in ((tmp_path / "there", best), (tmp_path / "there/best_model_calibrated", other)):
        assert results(folder)["protocol"]["checkpoint"] == str(path)


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpoint_does_not_choose_where_results_go(inside, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "run").mkdir()
    there = tmp_path / ("run/results" if inside else "elsewhere")
    path = write_checkpoint(tmp_path / "run/best_model.pth")
    state = torch.load(path, weights_only=True)
    state["config"]["tester"] = {"out_dir": str(there)}
    torch.save(state, path)
    run(monkeypatch, capsys, "-r", path, "-p", "max", "--limit", 1)
    assert (there if inside else tmp_path / "run").joinpath("results.json").exists()
    assert there.exists() == inside
    run(monkeypatch, capsys, "-r", path, "-p", "max", "--limit", 1, "--set", f"tester.out_dir={there}")
    assert (there / "results.json").exists()


def test_images_without_a_mask_are_counted(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    strict = ["--set", "predict.presence=prune", "--set", "predict.rankdice.prune=1.0"]
    out = run(monkeypatch, capsys, "-r", checkpoint, "-p", "rankdice", "-o", tmp_path, "--limit", 3, *strict)
    scores = results(tmp_path)["procedures"]["rankdice"]
    assert scores["images_without_mask"] == 3
    assert scores["without_mask_because"] == "no class has a probability above predict.rankdice.prune (1)"
    assert "images_without_mask" in out


def test_views_limits_and_their_mention(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    run(monkeypatch, capsys, "-r", checkpoint, "-p", "max", "-o", tmp_path, "--limit", 4, "--tta", "flip", "multiscale")
    protocol = results(tmp_path)["protocol"]
    assert protocol["images"] == 4
    assert "0.75, 1.0, 1.25" in protocol["views"]
    assert "mirror images" in protocol["views"]


@pytest.mark.parametrize("arguments", [["--fit", "-p", "all"], ["--limit", "0"], ["-p", "best"], ["--tta", "rotate"]])
def test_options_that_make_no_sense(arguments, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["test.py", "-r", "x.pth", *arguments])
    with pytest.raises(SystemExit) as stop:
        script().main()
    assert stop.value.code == 2


def near(a: object, b: object) -> bool:
    """Return whether results agree up to rounding: the sums of rankdice depend on which images share a batch."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    return a == pytest.approx(b, rel=1e-12) if isinstance(a, float) else a == b


def test_two_processes_report_what_one_does(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["-r", str(checkpoint), "-p", "all", "--save-masks", "--limit", "5"]
    run(monkeypatch, capsys, *arguments, "-o", tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "test.py"),
         *arguments, "-o", str(tmp_path / "two")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    timing = ("milliseconds_per_image", "peak_mebibytes")
    for name in ALL:
        a, b = one["procedures"][name], two["procedures"][name]
        assert a.pop("test_loss") == pytest.approx(b.pop("test_loss"), rel=1e-5)
        assert near({k: v for k, v in a.items() if k not in timing}, {k: v for k, v in b.items() if k not in timing})
    assert one["comparison"]["verdict"] == two["comparison"]["verdict"]
    assert one["reliability"]["pixels"] == two["reliability"]["pixels"]
    assert one["reliability"]["ECE"] == pytest.approx(two["reliability"]["ECE"], rel=1e-4)
    assert done.stdout.count("## Verdict") == 1
    masks = [sorted((tmp_path / n / "masks/max").iterdir()) for n in ("one", "two")]
    assert [p.name for p in masks[0]] == [p.name for p in masks[1]]
    assert len(masks[0]) == 5
    shown = [(tmp_path / n / "report.html").read_text().split('<div class="case"><p><b>')[1:] for n in ("one", "two")]
    assert [case[:60] for case in shown[0]] == [case[:60] for case in shown[1]]
