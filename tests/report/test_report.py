"""Reports: the fields that the README shows, files that programs can read, and nothing half-written."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.checkpoint import states
from utils import report, tables
from utils.checkpoint import LoadedModel
from utils.config import resolve
from utils.errors import UserError
from utils.evaluation import Evaluation
from utils.files import check_folder
from utils.metrics import Metrics
from utils.predict import PROCEDURES, PredictOptions
from utils.report import content as contents

FACTS = replace(states.FACTS, class_names=("background", "dog, cat", "car"))
NAMES = ["b", "a", "empty"]
DATASET = SimpleNamespace(crop_size=None, val=False)


def config(**changes: Any) -> Any:
    raw = {
        "name": "run",
        "arch": {"type": "UNet"},
        "train_loader": {"type": "VOC", "args": {"data_dir": "gone"}},
        "val_loader": {"type": "VOC", "args": {"data_dir": "gone", "split": "val"}},
    }
    return resolve(raw | changes)


def outcome(
    procedures: tuple[str, ...] = ("T", "max", "rankdice"), classes: tuple[int, ...] | None = None
) -> Evaluation:
    """Return the evaluation of three images. All pixels of one are ignored; class 2 does not occur."""
    probs = torch.tensor(
        [
            [[[0.9, 0.8], [0.6, 0.2]], [[0.1, 0.2], [0.4, 0.8]], [[0.0, 0.0], [0.0, 0.0]]],
            [[[0.9, 0.9], [0.9, 0.9]], [[0.1, 0.1], [0.1, 0.1]], [[0.0, 0.0], [0.0, 0.0]]],
            [[[0.9, 0.9], [0.9, 0.9]], [[0.1, 0.1], [0.1, 0.1]], [[0.0, 0.0], [0.0, 0.0]]],
        ]
    )
    target = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 0]], [[255, 255], [255, 255]]])
    found = {}
    for name in procedures:
        found[name] = Metrics(3, 255, classes=classes, keep_images=True)
        found[name].update(PROCEDURES[name](probs, PredictOptions()), target, NAMES)
    return Evaluation(
        metrics=found,
        losses={"a": 0.25},
        laps=dict.fromkeys((*procedures, "forward"), (0.006, 3)),
        peak_bytes=dict.fromkeys(procedures, 0),
        images=3,
    )


def content(procedures: tuple[str, ...] = ("T", "max", "rankdice"), **changes: Any) -> dict[str, Any]:
    used = config(**changes)
    loaded = LoadedModel(torch.nn.Conv2d(3, 3, 1), FACTS, used, "softmax", Path("saved/best_model.pth"), 7)
    interest = None if used.predict.CoI == "all" else tuple(used.predict.CoI)
    return report.results(outcome(procedures, interest), loaded, DATASET)


def test_results_have_the_fields_of_the_readme() -> None:
    found = content()
    assert list(found) == ["protocol", "procedures", "comparison", "advice"]
    assert list(found["procedures"]) == ["T", "max", "rankdice"]
    for name, scores in found["procedures"].items():
        for key in ("test_loss", "Pixel_Accuracy", "Mean_IoU", "Mean_Dice", "Dataset_mIoU", "Dataset_mDice"):
            assert 0 <= scores[key] <= 1, (name, key)
        assert list(scores["Class_Dice"]) == list(scores["Class_IoU"]) == list(FACTS.class_names)
        assert scores["Class_Dice"]["car"] is None
        assert scores["milliseconds_per_image"] == pytest.approx(2.0)
        assert ("Expected_Dice" in scores) == (name == "rankdice")
        assert ("Multiclass_Accuracy" in scores) == (name == "max")
    # Image b under max: class 0 has P {3 pixels}, Y {2}, both 2; class 1 has P 1, Y 2, both 1.
    assert found["procedures"]["max"]["Mean_Dice"] == pytest.approx(((4 / 5 + 2 / 3) / 2 + 1) / 2)
    assert found["procedures"]["max"]["Class_Images"] == {"background": 2, "dog, cat": 1, "car": 0}


@pytest.mark.parametrize(
    ("expected", "measured", "said"),
    [(0.6, 0.7, "underconfident"), (0.7, 0.6, "overconfident"), (0.64, 0.6, None), (None, None, None)],
)
def test_a_forecast_that_is_far_off_leads_to_advice_on_a_temperature(expected, measured, said) -> None:
    scores = {} if expected is None else {"Expected_Dice": expected, "Measured_Dice": measured}
    found = contents.advice(scores, 30)
    if said is None:
        assert found is None
    else:
        assert f"the network is {said}." in found
        assert "--fit" in found
        assert "differ from those of the fit" in contents.advice(scores, 30, fitted=True)
        assert "differ" not in contents.advice(scores, 30, fitted=True, same=True)


def test_the_advice_does_not_say_that_validation_images_differ_from_themselves(monkeypatch) -> None:
    monkeypatch.setattr(contents, "FAR_OFF", -1.0)
    val = {"type": "VOC", "args": {"data_dir": "gone", "split": "val"}}
    held_out = {"type": "VOC", "args": {"data_dir": "gone", "val_split": 0.2}}
    for loaders, same in (
        ({}, True),
        ({"test_loader": val | {"args": val["args"] | {"batch_size": 2}}}, True),
        ({"test_loader": {"type": "VOC", "args": {"data_dir": "gone", "split": "test"}}}, False),
        ({"val_loader": None, "train_loader": held_out}, True),
    ):
        loaded = LoadedModel(torch.nn.Conv2d(3, 3, 1), FACTS, config(**loaders), "softmax", Path("x"), 7)
        found = report.results(outcome(), loaded, DATASET, setting=contents.Setting(fitted="threshold 0.2 was fitted"))
        assert ("These are the validation images" in found["advice"]) == same, loaders
        assert ("differ" in found["advice"]) == (not same)
        assert ("the fit used them too" in str(found["protocol"]["note"])) == same


def test_advice_does_not_need_many_images_but_says_if_they_are_few(monkeypatch) -> None:
    monkeypatch.setattr(contents, "FAR_OFF", -1.0)
    found = content()
    assert "3 images are few, so this may be chance." in found["advice"]
    assert "## Advice" in report.text(found)
    monkeypatch.setattr(contents, "FEW_IMAGES", 3)
    assert "few" not in content()["advice"]
    assert "advice" not in content(predict={"temperature": 0.8})
    assert "advice" not in content(("T", "max"))


def test_the_protocol_says_what_was_measured_and_how() -> None:
    protocol = content(predict={"CoI": [1], "count_ignored": True, "temperature": 2.0})["protocol"]
    assert protocol["checkpoint"] == "saved/best_model.pth"
    assert protocol["epoch"] == 7
    assert (protocol["data"], protocol["split"], protocol["images"]) == ("VOC", "val", 3)
    assert protocol["resolution"] == "whole images"
    assert protocol["classes_of_interest"] == ["dog, cat"]
    assert protocol["ignored_pixels"] == "count as wrong predictions"
    assert protocol["temperature"] == 2.0
    cropped = SimpleNamespace(crop_size=(380, 400), val=True)
    loaded = LoadedModel(torch.nn.Conv2d(3, 3, 1), FACTS, config(), "softmax", Path("x"), 7)
    found = report.results(outcome(), loaded, cropped)["protocol"]
    assert found["resolution"] == "shorter side rescaled to 380, center crop 380 x 400"


def test_validation_data_in_another_folder_are_not_taken_for_test_data() -> None:
    moved = {"type": "VOC", "args": {"data_dir": "copy", "split": "val"}}
    assert "in another folder" in contents.optimism(config(test_loader=moved))
    moved["args"]["split"] = "test"
    assert contents.optimism(config(test_loader=moved)) is None
    folders = [{"type": "Folder", "args": {"data_dir": name}} for name in ("val", "test")]
    assert contents.optimism(config(val_loader=folders[0], test_loader=folders[1])) is None


def test_results_are_strict_json_with_null_for_what_nothing_defines() -> None:
    text = json.dumps(content(), allow_nan=False)
    assert json.loads(text)["procedures"]["max"]["Class_IoU"]["car"] is None


def test_classes_of_no_interest_have_no_score() -> None:
    found = content(predict={"CoI": [1]})
    assert found["procedures"]["max"]["Class_Dice"]["background"] is None
    assert found["procedures"]["max"]["Class_Dice"]["dog, cat"] is not None
    assert "{background: -, dog, cat: 0." in report.text(found, details=True)


def test_one_procedure_is_reported_and_several_are_compared() -> None:
    text = report.text(content())
    for field in ("PixelAcc", "mIoU", "mDice", "worst 10 %", "expected", "measured", "ms/image", "## Comparison"):
        assert field in text
    assert text.count("## Results of") == 1
    assert "## Results of UNet, CrossEntropyLoss2d, rankdice\n" in text
    assert "inference.py uses rankdice" in text
    assert text.index("## Comparison") < text.index("## Results of") < text.index("## Verdict")
    for name in PROCEDURES:
        alone = report.text(content((name,)))
        assert f"## Results of UNet, CrossEntropyLoss2d, {name}" in alone
        for field in ("test_loss", "Pixel_Accuracy", "Mean_IoU", "Mean_Dice", "Class_IoU", "Class_Dice"):
            assert field in alone
    assert contents.ABSENT_CLASSES in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    assert "nan" not in text
    assert "## Comparison" not in report.text(content(("rankdice",)))


def test_details_are_the_scores_of_every_procedure() -> None:
    text = report.text(content(), details=True)
    assert "## Class IoU" in text
    assert text.count("\n    background ") == 2
    assert text.count("\n    Class_Dice ") == 3
    assert max(map(len, text.splitlines())) <= 100


def test_rows_of_equal_scores_are_named_once() -> None:
    found = content()
    found["procedures"]["rankdice_paper"] = found["procedures"]["rankdice"] | {"milliseconds_per_image": 99.0}
    found["procedures"]["rankdice_iou"] = found["procedures"]["rankdice"] | {"Mean_IoU": 0.1}
    found["comparison"]["Mean_Dice"]["rankdice_paper"] = found["comparison"]["Mean_Dice"]["rankdice"]
    text = report.text(found)
    assert "\n    rankdice_paper: the same scores as rankdice\n" in text
    found["procedures"]["T"] = found["procedures"]["max_present"] = found["procedures"]["max"]
    assert "\n    max_present: the same scores as max\n" in report.text(found)
    assert "\n    rankdice_paper  " not in text
    assert "\n    rankdice_iou  " in text
    assert report.text(found, details=True).count("\n    rankdice_paper  ") == 2


@pytest.mark.parametrize(
    ("predict", "deployed"),
    [
        ({}, "rankdice"),
        ({"rankdice": {"metric": "iou"}}, "rankdice_iou"),
        ({"test": "T"}, "T"),
        ({"test": "T", "threshold": 0.3}, "T_tuned"),
        ({"test": "max"}, "max"),
        ({"test": "max", "presence": "prune"}, "max_present"),
    ],
)
def test_the_procedure_that_inference_uses_is_named(predict, deployed) -> None:
    assert content(predict=predict)["protocol"]["deployed"] == deployed


def test_numbers_on_the_screen_are_short_and_whole_in_the_file() -> None:
    found = content(predict={"temperature": 0.29552449857571994})
    assert "temperature           : 0.2955\n" in report.text(found)
    assert found["protocol"]["temperature"] == 0.29552449857571994


def test_procedures_of_their_own_are_explained_below_the_table() -> None:
    found = content()
    for i, (name, what) in enumerate(contents.EXPLAINED.items()):
        assert name not in report.text(found)
        found["procedures"][name] = found["procedures"]["rankdice"] | {"Mean_Dice": i / 10}
        assert what in " ".join(report.text(found).split())


def test_tables_are_aligned() -> None:
    lines = tables.plain(["name", "score"], [["a", "0.5"], ["much longer", "12.25"]], "    ").splitlines()
    assert lines == [
        "    name         score",
        "    -----------  -----",
        "    a              0.5",
        "    much longer  12.25",
    ]


def test_files(tmp_path) -> None:
    folder = check_folder(tmp_path / "new" / "results")
    assert list(tmp_path.iterdir()) == []  # no folder before there is something to write
    paths = report.write(content(), outcome(), FACTS, folder)
    assert [p.name for p in paths] == ["results.json", "per_image.csv"]
    assert sorted(p.name for p in folder.iterdir()) == ["per_image.csv", "results.json"]
    assert json.loads(paths[0].read_text()) == content()
    with open(paths[1], newline="") as file:
        rows = list(csv.DictReader(file))
    # Sorted by the last procedure, worst first; the image without a score comes last, with empty cells.
    assert [row["image"] for row in rows] == ["b", "a", "empty"]
    assert rows[2]["rankdice_mDice"] == ""
    assert float(rows[0]["max_Dice_dog, cat"]) == pytest.approx(2 / 3, abs=1e-6)
    assert float(rows[1]["max_mDice"]) == 1
    assert {"T_PixelAcc", "rankdice_expected_Dice"} < set(rows[0])
    means = [float(row["max_mDice"]) for row in rows if row["max_mDice"]]
    assert sum(means) / len(means) == pytest.approx(content()["procedures"]["max"]["Mean_Dice"], abs=1e-6)


def test_the_table_of_images_contains_the_classes_of_interest(tmp_path) -> None:
    report.write(content(predict={"CoI": [1]}), outcome(("max",), (1,)), FACTS, tmp_path)
    header = next(csv.reader((tmp_path / "per_image.csv").read_text().splitlines()))
    assert header == ["image", "max_mDice", "max_mIoU", "max_PixelAcc", "max_Dice_dog, cat"]


def test_replaced_results_are_reported(tmp_path) -> None:
    protocol = {"checkpoint": "saved/a.pth", "images": 20}
    assert report.to_be_replaced(tmp_path, protocol) is None
    for found, said in (
        ({"checkpoint": "saved/a.pth", "images": 20}, None),
        ({"checkpoint": "saved/a.pth", "images": 101}, "results over 101 images"),
        ({"checkpoint": "saved/b.pth", "images": 20}, "the results of saved/b.pth"),
        ({}, None),
    ):
        (tmp_path / "results.json").write_text(json.dumps({"protocol": found}))
        assert report.to_be_replaced(tmp_path, protocol) == said


def test_an_older_result_is_replaced_completely_or_kept(tmp_path, monkeypatch) -> None:
    report.write(content(), outcome(), FACTS, tmp_path)
    before = (tmp_path / "results.json").read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="could not be written: the disk is full"):
        report.write(content(("T",)), outcome(("T",)), FACTS, tmp_path)
    assert (tmp_path / "results.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["per_image.csv", "results.json"]


def test_a_folder_that_cannot_be_written_is_reported_before_the_test(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(UserError, match="results cannot be written there: .* is a file, not a folder"):
            check_folder(folder)


def test_no_image_at_all_is_reported_without_an_error(tmp_path) -> None:
    empty = Evaluation(
        {"max": Metrics(3, 255, keep_images=True)}, {}, {"max": (0.0, 0), "forward": (0.0, 0)}, {"max": 0}
    )
    loaded = LoadedModel(torch.nn.Conv2d(3, 3, 1), FACTS, config(), "softmax", Path("x"), 7)
    found = report.results(empty, loaded, DATASET)
    assert found["procedures"]["max"]["Mean_Dice"] is None
    assert "Mean_Dice" in report.text(found)
    report.write(found, empty, FACTS, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_scores_as_tensorboard_scalars(tmp_path) -> None:
    report.write_scalars(content(), tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = events.Scalars("test_max/Mean_Dice")
    assert [(e.step, e.value) for e in found] == [(7, pytest.approx(content()["procedures"]["max"]["Mean_Dice"]))]
    assert "test_rankdice/Class_Dice/background" in events.Tags()["scalars"]
    assert "test_max/Class_Dice/car" not in events.Tags()["scalars"]
