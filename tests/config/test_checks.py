"""Checks of the classes that a config names: signatures, matching facts, tables, the command line."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from utils import cli, errors
from utils.config import building, data_checks, resolve
from utils.config.schema import Config
from utils.errors import UserError, did_you_mean
from utils.facts import Facts
from utils.registry import Registry, argument_model

FACTS = Facts(3, ("background", "cat", "dog"), ((0, 0, 0), (9, 9, 9), (5, 5, 5)), (0.5,) * 3, (0.2,) * 3, 255)


def config(**changes: Any) -> Config:
    raw = {
        "name": "run",
        "arch": {"type": "UNet"},
        "train_loader": {"type": "VOC", "args": {"batch_size": 2}},
        "val_loader": {"type": "VOC", "args": {"split": "val"}},
    }
    return resolve(raw | changes)


# -- signatures ------------------------------------------------------------------------------------------------


class Base:
    def __init__(self, size: int, rate: float = 0.5, crop: tuple[int, int] | None = None, **common: Any) -> None: ...


class Other:
    def __init__(self, mode: Literal["a", "b"] = "a", names: list[str] | None = None, size: str = "") -> None: ...


def complaints(**args: Any) -> list[str]:
    return [str(p) for p in argument_model("Thing", [Base, Other], ("mode",)).problems("x.args", args)]


def test_good_arguments_pass() -> None:
    assert complaints(size=3) == []
    # JSON has lists instead of tuples, and integers instead of floats.
    assert complaints(size=3, rate=1, crop=[4, 5], names=["a"]) == []
    assert complaints(size=3, crop=None, names=None) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "x.args.size: Thing needs this argument, but it is missing"),
        ({"size": "3"}, 'x.args.size: found "3"; should be a valid integer'),
        ({"size": 3.5}, "x.args.size: found 3.5; should be a valid integer"),
        ({"size": True}, "x.args.size: found true; should be a valid integer"),
        ({"size": 3, "rate": "fast"}, 'x.args.rate: found "fast"; should be a valid number'),
        ({"size": 3, "rate": float("nan")}, "x.args.rate: found NaN; should be a finite number"),
        ({"size": 3, "crop": [1]}, "x.args.crop: found [1]"),
        ({"size": 3, "names": [1]}, "x.args.names: found [1]; should be a valid string"),
        ({"size": 3, "siez": 1}, "x.args.siez: Thing takes no such argument; did you mean size? Allowed: "),
    ],
)
def test_wrong_arguments_are_reported(args, message) -> None:
    (found,) = complaints(**args)
    assert found.startswith(message)


def test_the_first_constructor_that_knows_a_name_gets_it() -> None:
    assert complaints(size=3) == []  # the int of Base, not the str of Other
    assert list(argument_model("Base", [Base]).model_fields) == ["size", "rate", "crop"]


# -- facts -----------------------------------------------------------------------------------------------------


def test_facts_that_agree() -> None:
    data_checks.check_facts(config(predict={"CoI": [0, 2]}), FACTS, {"val_loader": replace(FACTS, mean=(0.1,) * 3)})


@pytest.mark.parametrize(
    ("changes", "other", "message"),
    [
        ({}, {"num_classes": 4}, "val_loader: its data has 4 classes (background, cat, dog), the model 3"),
        ({}, {"in_channels": 1}, "val_loader: its images have 1 channels, the model takes 3"),
        ({}, {"ignore_index": -1}, "val_loader: its data ignores the label -1, the model ignores 255"),
        ({}, {"value_range": (0.0, 4095.0)}, "its value_range and nodata are [[0.0, 4095.0], null], those of"),
        ({}, {"nodata": -9999.0}, "its value_range and nodata are [null, -9999.0], those of the model"),
        ({"predict": {"CoI": [3]}}, {}, "predict.CoI: found [3]; the data has the classes 0 to 2"),
        ({"trainer": {"monitor": "max Class_Dice/dg"}}, {}, "there is no class 'dg'; did you mean dog?"),
    ],
)
def test_facts_that_disagree(changes, other, message) -> None:
    with pytest.raises(UserError) as error:
        data_checks.check_facts(config(**changes), FACTS, {"val_loader": replace(FACTS, **other)})
    assert message in str(error.value)


def test_builders_speak_with_the_path_of_the_field() -> None:
    def build(**args: Any) -> None:
        raise ValueError(f"size must be positive, got {args['size']}")

    with pytest.raises(UserError, match=r"train_loader\.args: size must be positive, got -1"):
        building.build_section("train_loader.args", build, size=-1)
    assert building.build_section("x", dict, a=1) == {"a": 1}


def test_a_loader_is_built_with_what_the_program_knows() -> None:
    seen: dict[str, Any] = {}

    def build(type: str, **args: Any) -> str:
        seen.update(args, type=type)
        return "loader"

    used = config(seed=5, ignore_index=7)
    assert building.build_loader(build, used, "test") == "loader"
    assert seen == {"type": "VOC", "split": "val", "seed": 5, "ignore_index": 7}


def test_balanced_weights_come_from_the_data() -> None:
    dataset = SimpleNamespace(class_weights=lambda: torch.tensor([0.5, 1.0, 2.0]))
    balanced = config(loss={"type": "CrossEntropyLoss2d", "args": {"weight": "balanced"}})
    loss = building.build_loss(balanced, dataset, 255)
    assert loss.weight.tolist() == [0.5, 1.0, 2.0]
    assert balanced.loss.args == {"weight": "balanced"}  # and the config still says so
    assert building.build_loss(config(loss={"type": "FocalLoss", "args": {"gamma": 1}}), dataset, 255).gamma == 1


@pytest.mark.parametrize(
    ("loss", "procedures", "warned"),
    [
        ("CrossEntropyLoss2d", ["rankdice"], False),
        ("BCEWithLogitsLoss2d", ["rankdice"], False),
        ("DiceLoss", ["rankdice"], True),
        ("DiceLoss", ["max", "T"], False),
        ("LovaszSoftmax", ["max", "rankdice"], True),
        ({"type": "CrossEntropyLoss2d", "args": {"label_smoothing": 0.1}}, ["rankdice"], True),
        ({"type": "CrossEntropyLoss2d", "args": {"weight": "balanced"}}, ["rankdice"], True),
    ],
)
def test_rankdice_on_a_loss_that_gives_no_probabilities_is_a_warning(loss, procedures, warned, capsys) -> None:
    data_checks.warn_about_loss(config(loss=loss), procedures)
    text = capsys.readouterr().err
    assert text.startswith("warning: rankdice needs calibrated probabilities") == warned
    assert bool(text) == warned


@pytest.mark.parametrize(
    "loss",
    [
        "FocalLoss",
        {"type": "CrossEntropyLoss2d", "args": {"label_smoothing": 0.1}},
        "BCEWithLogitsFocalLoss2d",
        "CE_DiceLoss",
    ],
)
def test_rankdice_on_a_cautious_loss_asks_for_a_temperature_until_there_is_one(loss, capsys) -> None:
    data_checks.warn_about_loss(config(loss=loss), ["rankdice"])
    text = capsys.readouterr().err
    assert "test.py --fit" in text
    assert "not probabilities" not in text
    data_checks.warn_about_loss(config(loss=loss, predict={"temperature": 0.6}), ["rankdice"])
    assert not capsys.readouterr().err
    data_checks.warn_about_loss(config(loss="DiceLoss", predict={"temperature": 0.6}), ["rankdice"])
    assert "not probabilities" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"type": "Poly"}, None),
        ({"type": "OneCycle"}, None),
        ({"type": "CosineAnnealingLR"}, None),
        ({"type": "MultiStepLR", "args": {"milestones": [5000, 7000]}}, None),
        (
            {"type": "StepLR", "args": {"step_size": 30}},
            "StepLR brings the learning rate below 0.001 of its highest value after 90 of 8000 iterations. Its numbers "
            'count iterations, 100 per epoch; with "lr_scheduler": {"step": "epoch", ...} they count epochs',
        ),
        ({"type": "StepLR", "args": {"step_size": 30}, "step": "epoch"}, None),
        ({"type": "MultiStepLR", "args": {"milestones": [30, 60, 75]}}, "after 75 of 8000 iterations. Its numbers"),
        ({"type": "MultiStepLR", "args": {"milestones": [30, 60, 75]}, "step": "epoch"}, None),
        ({"type": "ExponentialLR", "args": {"gamma": 0.5}, "step": "epoch"}, "after 1000 of 8000 iterations\n"),
    ],
)
def test_a_rate_that_fades_early_is_a_warning(schedule, message, capsys) -> None:
    data_checks.warn_about_schedule(config(lr_scheduler=schedule), batches=100)
    text = capsys.readouterr().err
    assert text == "" if message is None else message in text


# -- tables ----------------------------------------------------------------------------------------------------


def test_a_table_imports_what_is_asked_for_and_knows_other_spellings() -> None:
    table = Registry("thing", {"Path": "pathlib.Path", "Broken": "no.such.module.X"}, aliases={"path": "Path"})
    assert list(table) == ["Path", "Broken"]
    assert table["Path"] is table["path"] is Path
    assert "path" in table
    assert "Paht" not in table
    with pytest.raises(UserError, match="there is no thing called 'Paht'; did you mean Path"):
        table["Paht"]
    with pytest.raises(ModuleNotFoundError):
        table["Broken"]


def test_the_nearest_name() -> None:
    assert did_you_mean("pspnet", ["PSPNet", "UNet"]) == "; did you mean PSPNet?"
    assert did_you_mean("zzz", ["PSPNet", "UNet"]) == "."
    assert did_you_mean("x", []) == "."


# -- the command line ------------------------------------------------------------------------------------------


def test_devices(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    assert cli.select_devices(None) == []
    assert cli.select_devices("cpu") == ["n_gpu=0"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "before"
    assert cli.select_devices("2,0") == ["n_gpu=2"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,0"


@pytest.mark.parametrize("device", ["", "gpu", "cuda", "0,", "-1", "0 1", "0,0"], ids=repr)
def test_no_devices(device, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    with pytest.raises(UserError, match="expected"):
        cli.select_devices(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "before"


def test_overrides_are_gathered_in_order() -> None:
    parser = argparse.ArgumentParser()
    cli.add_overrides(parser)
    cli.add_device(parser)
    args = parser.parse_args(["--set", "a.b=1", "-d", "0", "--set", "c= 2"])
    assert (args.set, args.device) == (["a.b=1", "c= 2"], "0")
    assert parser.parse_args([]).set == []


@pytest.mark.parametrize(
    ("result", "code", "message"),
    [
        (None, 0, ""),
        (0, 0, ""),
        (130, 130, ""),
        (UserError("config.json: no"), 2, "error: config.json: no\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_how_a_script_ends(result, code, message, capsys) -> None:
    def main() -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    assert (ended.value.code, capsys.readouterr().err) == (code, message)


def test_a_defect_of_the_program_keeps_its_traceback() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        errors.run(main)


def test_classes_in_another_order_are_refused() -> None:
    for same in (FACTS.class_names, ("Background", "CAT", "dog"), ("class 0", "class 1", "class 2")):
        data_checks.check_facts(config(), FACTS, {"val_loader": replace(FACTS, class_names=same)})
    with pytest.raises(UserError, match=r"val_loader: class 1 of its data is 'dog', but 'cat' for the model"):
        data_checks.check_facts(
            config(), FACTS, {"val_loader": replace(FACTS, class_names=("background", "dog", "cat"))}
        )


def test_a_resumed_run_keeps_its_classes_and_what_it_measured() -> None:
    measured = config(train_loader={"type": "VOC", "args": {"mean": "auto"}})
    now = replace(FACTS, mean=(0.1,) * 3, std=(0.3,) * 3)
    assert data_checks.resumed_facts(measured, FACTS, now) == replace(now, mean=FACTS.mean)
    assert data_checks.resumed_facts(config(), FACTS, now) == now
    with pytest.raises(UserError, match="train_loader: class 1 of its data is 'dog'"):
        data_checks.resumed_facts(config(), FACTS, replace(FACTS, class_names=("background", "dog", "cat")))


def test_without_val_loader_the_held_out_samples_are_used() -> None:
    held_out = SimpleNamespace(kind="held out")
    args = {"val_fold": [0, 5]}
    given = config(train_loader={"type": "VOC", "args": args}, val_loader=None)
    for stage in ("val", "test"):
        built = building.build_loader(
            lambda kind, **_: SimpleNamespace(get_val_loader=lambda whole: held_out), given, stage
        )
        assert built is held_out
