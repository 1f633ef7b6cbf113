"""Mistakes in configs: each message has the path, what was found, and what is allowed."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from dataloaders import LOADERS
from models import MODELS
from tests.config.running import BASE, message, resolve, write
from utils import config as configs
from utils.config.building import build_loader
from utils.config.checks import TRAINING_SCORES, VALIDATION_SCORES
from utils.errors import UserError
from utils.losses import LOSSES

pytestmark = pytest.mark.usefixtures("data")


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown section": ({"trainr": {}}, ["trainr: unknown key; did you mean trainer? Allowed: name, about"]),
    "unknown field": ({"trainer": {"epoch": 3}}, ["trainer.epoch: unknown key; did you mean epochs?", "save_dir"]),
    "text for a number": ({"n_gpu": "1"}, ['n_gpu: found "1"; should be a valid integer']),
    "number for a switch": ({"use_synch_bn": 1}, ["use_synch_bn: found 1; should be a valid boolean"]),
    "number too small": ({"trainer": {"epochs": 0}}, ["trainer.epochs: found 0; should be greater than or equal to 1"]),
    "not a number": ({"aux_weight": float("nan")}, ["aux_weight: found NaN", "finite"]),
    "infinite": ({"predict": {"temperature": float("inf")}}, ["predict.temperature: found Infinity", "finite"]),
    "word for another": (
        {"predict": {"val": "rankDice"}},
        ["predict.val: found \"rankDice\"; should be 'T', 'max' or 'rankdice'; did you mean rankdice?"],
    ),
    "fields that disagree": (
        {"predict": {"rankdice": {"metric": "iou", "solver": "ba"}}},
        ["predict.rankdice: found", "solver: 'ba' does not support the metric 'iou'; use 'exact' or 'rma'"],
    ),
    "a name that is a path": ({"name": "a/b"}, ['name: found "a/b"; the name becomes a folder']),
    "classes of interest as text": (
        {"predict": {"CoI": "some"}},
        ["predict.CoI: found \"some\"; should be 'all' or a valid list"],
    ),
    "a negative class of interest": ({"predict": {"CoI": [0, -1]}}, ["predict.CoI.1: found -1"]),
    "no class of interest": ({"predict": {"CoI": []}}, ["predict.CoI: found []", "at least one"]),
    "a class of interest twice": ({"predict": {"CoI": [1, 1]}}, ["predict.CoI: found [1, 1]", "once"]),
    "a class of interest that there is not": (
        {"predict": {"CoI": [3, 21]}},
        ["predict.CoI: found [21]; the data has the classes 0 to 20"],
    ),
    "a name for a section": ({"arch": "PSPNet"}, ['arch: found "PSPNet"; expected a section such as {"type"']),
    "unknown model": ({"arch": {"type": "PSPnet"}}, ['arch.type: found "PSPnet"; did you mean PSPNet?', "FCN8, UNet"]),
    "unknown model argument": (
        {"arch": {"type": "PSPNet", "args": {"bakbone": "resnet50"}}},
        ["arch.args.bakbone: PSPNet takes no such argument; did you mean backbone?", "Allowed:", "freeze_bn"],
    ),
    "model argument of another type": (
        {"arch": {"type": "PSPNet", "args": {"freeze_bn": "yes"}}},
        ['arch.args.freeze_bn: found "yes"; should be a valid boolean'],
    ),
    "model argument of the program": (
        {"arch": {"type": "PSPNet", "args": {"num_classes": 3}}},
        ["arch.args.num_classes: set by the program"],
    ),
    "unknown loader": ({"train_loader": {"type": "voc"}}, ['train_loader.type: found "voc"; did you mean VOC?']),
    "unknown loader argument": (
        {"train_loader": {"type": "VOC", "args": {"data_dir": "data", "batchsize": 2}}},
        ["train_loader.args.batchsize: VOC takes no such argument; did you mean batch_size?"],
    ),
    "no folder given": (
        {"train_loader": {"type": "VOC"}},
        ["train_loader.args.data_dir: missing; VOC reads its files from there"],
    ),
    "a folder that there is not": (
        {"val_loader": {"type": "VOC", "args": {"data_dir": "nowhere"}}},
        ['val_loader.args.data_dir: found "nowhere", which is not a folder', "--set val_loader.args.data_dir=FOLDER"],
    ),
    "palette and classes that disagree": (
        {"train_loader": {"type": "VOC", "args": {"data_dir": "data", "classes": ["a", "b"], "palette": [[0, 0, 0]]}}},
        ["train_loader.args: palette must have one color per class"],
    ),
    "unknown optimizer": ({"optimizer": {"type": "SDG"}}, ['optimizer.type: found "SDG"; did you mean SGD?']),
    "useless optimizer": ({"optimizer": {"type": "LBFGS"}}, ['optimizer.type: found "LBFGS"', "use SGD or AdamW"]),
    "unknown optimizer argument": (
        {"optimizer": {"args": {"momentun": 0.9}}},
        ["optimizer.args.momentun: SGD takes no such argument; did you mean momentum?"],
    ),
    "optimizer argument of another type": (
        {"optimizer": {"args": {"lr": "0.1"}}},
        ['optimizer.args.lr: found "0.1"; should be a valid number'],
    ),
    "unknown schedule": ({"lr_scheduler": {"type": "poly"}}, ['lr_scheduler.type: found "poly"; did you mean Poly?']),
    "useless schedule": ({"lr_scheduler": {"type": "ReduceLROnPlateau"}}, ["depends on a score", "use Poly"]),
    "schedule without what it needs": (
        {"lr_scheduler": {"type": "StepLR"}},
        ["lr_scheduler.args.step_size: StepLR needs this argument"],
    ),
    "schedule that needs momentum": (
        {"lr_scheduler": {"type": "OneCycle"}, "optimizer": {"args": {"lr": 0.1}}},
        ["lr_scheduler: OneCycle changes the momentum, but SGD has none; give optimizer.args.momentum"],
    ),
    "schedule that needs an optimizer with momentum": (
        {"lr_scheduler": {"type": "OneCycle"}, "optimizer": {"type": "Adagrad", "args": {}}},
        ["Adagrad has none; choose an optimizer that has one, or set lr_scheduler.args.momentums to null"],
    ),
    "unknown loss": ({"loss": "CrossEntropy"}, ['loss.type: found "CrossEntropy"; did you mean CrossEntropyLoss2d?']),
    "unknown loss argument": (
        {"loss": {"type": "FocalLoss", "args": {"gama": 2}}},
        ["loss.args.gama: FocalLoss takes no such argument; did you mean gamma?"],
    ),
    "loss argument out of range": (
        {"loss": {"type": "FocalLoss", "args": {"gamma": -1}}},
        ["loss.args.gamma: found -1; should be greater than or equal to 0"],
    ),
    "weights for another number of channels": (
        {"loss": {"type": "CrossEntropyLoss2d", "args": {"weight": [1.0, 2.0]}}},
        ["loss.args: CrossEntropyLoss2d: weight has 2 entries; logits with 21 channels need 21"],
    ),
    "monitor without a mode": ({"trainer": {"monitor": "Mean_Dice"}}, ['trainer.monitor: found "Mean_Dice"; expected']),
    "unknown monitor": (
        {"trainer": {"monitor": "max mDice"}},
        ["trainer.monitor: 'mDice' cannot be monitored; did you mean", "Possible: Mean_Dice"],
    ),
    "monitor the wrong way round": ({"trainer": {"monitor": "max val_loss"}}, ["keep the worst", "'min val_loss'"]),
    "monitor of another procedure": (
        {"trainer": {"monitor": "max Multiclass_Accuracy"}},
        ["Multiclass_Accuracy needs predict.val 'max', and predict.val is 'rankdice'"],
    ),
    "monitor of what rankdice does not expect": (
        {"trainer": {"monitor": "max Expected_Dice"}, "predict": {"rankdice": {"metric": "iou"}}},
        ["trainer.monitor: found Expected_Dice; with predict.rankdice.metric 'iou' rankdice computes Expected_IoU"],
    ),
    "monitor of a class that there is not": (
        {"trainer": {"monitor": "max Class_Dice/aeroplan"}},
        ["trainer.monitor: there is no class 'aeroplan'; did you mean aeroplane?"],
    ),
    **{
        f"a loader's {name} {json.dumps(value)}": (
            {"train_loader": {"type": type, "args": {"data_dir": "data", name: value}}},
            [f"train_loader.args.{name}: found {json.dumps(value)}", expected],
        )
        for type, name, value, expected in [
            ("VOC", "crop_size", 0, "greater than or equal to 1"),
            ("VOC", "base_size", 2**31, "less than or equal to 65536"),
            ("VOC", "batch_size", 0, "greater than or equal to 1"),
            ("VOC", "num_workers", -1, "greater than or equal to 0"),
            ("VOC", "val_split", -0.1, "greater than or equal to 0"),
            ("VOC", "split", "trian", "did you mean train? VOC has train, val"),
            ("VOC", "sampler", "weigthed", "should be 'weighted'"),
            ("VOC", "on_error", "ignore", "should be 'raise' or 'skip'"),
            ("VOC", "classes", 2**63, "less than or equal to 65536"),
            ("VOC", "palette", [[0, 0, 256]], "less than or equal to 255"),
            ("Shapes", "length", 10**9, "less than or equal to 1000000"),
            ("Shapes", "size", 2**31, "less than or equal to 8192"),
        ]
    },
    "no classes": (
        {"train_loader": {"type": "Folder", "args": {"data_dir": "data", "classes": None}}},
        ["train_loader.args.classes: Folder needs the names of your classes"],
    ),
    "a variable that is not set": (
        {"train_loader": {"type": "VOC", "args": {"data_dir": "$NO_SUCH/data"}}},
        ["train_loader.args.data_dir: ", "the environment variable NO_SUCH is not set"],
    ),
    "a learning rate below 0": (
        {"optimizer": {"args": {"lr": -5}}},
        ["optimizer.args.lr: SGD: Invalid learning rate: -5"],
    ),
    "an epsilon below 0": (
        {"optimizer": {"type": "Adam", "args": {"eps": -1}}},
        ["optimizer.args: Adam: Invalid epsilon value: -1"],
    ),
    "weight decay where there is none": (
        {"optimizer": {"type": "Rprop", "args": {}, "no_decay_on_norm_and_bias": True}},
        ["optimizer.args: Rprop: no_decay_on_norm_and_bias: Rprop has no weight decay"],
    ),
    "a power below 0": (
        {"lr_scheduler": {"args": {"power": -1}}},
        ["lr_scheduler.args.power: found -1; should be greater than 0"],
    ),
    "a step size of 0": (
        {"lr_scheduler": {"type": "StepLR", "args": {"step_size": 0}}},
        ["lr_scheduler.args: StepLR: ", "modulo"],
    ),
    "a part of a schedule that there is not": (
        {"lr_scheduler": {"type": "ChainedScheduler", "args": {"schedulers": [{"type": "StepL"}]}}},
        ["lr_scheduler.args.schedulers: ChainedScheduler: ", "StepL is not one"],
    ),
    "a seed that is too large": ({"seed": 2**63}, ["seed: found 9223372036854775808; should be less than or equal"]),
    "an endless number": ({"about": "x", "n_gpu": 10**40}, ["n_gpu: found a whole number of more than 30 digits"]),
    "text that no file name holds": ({"name": "a\0b"}, ['name: found "a\\u0000b"; text must not contain', "NUL"]),
    "text that is not Unicode": ({"about": "\ud800"}, ['about: found "\\ud800"; text must be valid Unicode']),
    "a key that is not Unicode": ({"\ud800": 1}, ["text must be valid Unicode"]),
    "a name that is too long": ({"name": "n" * 300}, ["the name becomes a folder: expected 1 to 200 bytes"]),
    "a folder's name that is too long": (
        {"trainer": {"save_dir": "s" * 300}},
        ["cannot be created (File name too long)"],
    ),
    "no validation data": ({"val_loader": None}, ["val_loader: missing, and train_loader.args.val_split is not set"]),
    "nothing to train on": ({"train_loader": None}, ["train_loader: found null; expected a section"]),
}


@pytest.mark.parametrize("loader", ["val_loader", "test_loader"])
def test_arguments_of_training_are_refused_where_images_are_scored(loader: str) -> None:
    args = {"data_dir": "data", "split": "val", "batch_size": 2}

    def problems(type: str = "VOC", **more: Any) -> str:
        return message(**{loader: {"type": type, "args": args | more}})

    for name, value in {"sampler": "weighted", "drop_last": True, "val_split": 0.2, "val_fold": [0, 5]}.items():
        assert f"{loader}.args.{name}: found " in problems(**{name: value})
    assert "the scores would be for randomly changed images. Remove it" in problems(augment=True, crop_size=32)
    assert f"{loader}.args.mean: found [0.0, 0.0, 0.0], but all images are normalized as in training" in problems(
        mean=[0.0, 0.0, 0.0]
    )


def test_arguments_that_change_no_score_are_accepted() -> None:
    args = {"data_dir": "data", "split": "val", "augment": True, "val": True, "crop_size": 32, "shuffle": True}
    normalized = {"mean": "auto", "std": [0.5, 0.5, 0.5]}
    train = {"type": "VOC", "args": {"data_dir": "data", **normalized}}
    found = resolve(train_loader=train, val_loader={"type": "VOC", "args": args | normalized})
    assert found.val_loader is not None
    assert "shuffle" not in found.val_loader.args
    assert "ignored, because they have no effect: val_loader.args.shuffle" in found.notes
    folder = {"data_dir": "data", "classes": ["a", "b"], "val_fold": [0, 5]}  # here it chooses the images of "val"
    resolve(
        train_loader={"type": "Folder", "args": folder},
        val_loader={"type": "Folder", "args": folder | {"split": "val"}},
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_with_path_found_allowed_and_nearest(mistake) -> None:
    changes, expected = MISTAKES[mistake]
    text = message(**changes)
    assert text.startswith("config.json: "), "one problem is one line"
    assert "\n" not in text
    for part in expected:
        assert part in text


def test_a_required_field_that_is_missing() -> None:
    raw = {key: value for key, value in BASE.items() if key != "name"}
    with pytest.raises(UserError, match="name: required"):
        configs.resolve(raw)
    with pytest.raises(UserError, match="4 problems|3 problems") as error:
        configs.resolve({}, models=MODELS, loaders=LOADERS)
    assert all(f"{field}: required" in str(error.value) for field in ("name", "arch", "train_loader"))


def test_all_problems_are_reported_at_once() -> None:
    """Wrong types, wrong names, wrong arguments and fields that disagree, in one message."""
    text = message(
        n_gpu="two",
        foo=1,
        arch={"type": "PSPNet", "args": {"bakbone": "resnet50"}},
        train_loader={"type": "VOC", "args": {"data_dir": "nowhere", "crop": 3}},
        optimizer={"type": "SDG"},
        loss={"type": "FocalLoss", "args": {"gama": 2}},
        lr_scheduler={"typ": "Poly"},
        predict={"CoI": [30], "val": "best", "threshold": 2},
        trainer={"epochs": -1, "monitor": "max mDice"},
    )
    expected = [
        "n_gpu: found",
        "foo: unknown key",
        "arch.args.bakbone: PSPNet takes no such argument",
        "train_loader.args.crop: VOC takes no such argument",
        'train_loader.args.data_dir: found "nowhere"',
        'optimizer.type: found "SDG"',
        "loss.args.gama: FocalLoss",
        "lr_scheduler.typ: unknown key",
        "predict.CoI: found [30]",
        "predict.val: found",
        "predict.threshold: found 2",
        "trainer.epochs: found -1",
        "trainer.monitor: 'mDice' cannot be monitored",
    ]
    for part in expected:
        assert part in text, part
    assert text.splitlines()[0] == f"config.json has {len(expected)} problems:"
    assert len(text.splitlines()) == 1 + len(expected)


def test_errors_are_not_reported_twice() -> None:
    # The placeholder for a missing model or a wrong type must not be reported as an unknown name.
    for changes in ({"arch": None}, {"arch": {"args": {}}}, {"arch": {"type": 5}}, {"train_loader": "VOC"}):
        assert "?'" not in message(**changes)
        assert "\n" not in message(**changes)


def test_fields_of_training_are_not_looked_at_when_testing() -> None:
    changes = {"trainer": {"monitor": "max mDice", "save_dir": "data/nothing"}}
    assert resolve(stages=("test",), **changes).trainer.monitor == "max mDice"
    moved = {"train_loader": {"type": "VOC", "args": {"data_dir": "gone"}}}
    assert resolve(stages=("test",), **moved)
    assert "train_loader.args.data_dir" in message(**moved)


@pytest.mark.parametrize("field", ["save_dir", "log_dir"])
def test_a_folder_that_cannot_be_created_is_reported_before_the_run(field, tmp_path) -> None:
    write(tmp_path / "file", "")
    text = message(trainer={field: "file/runs"})
    assert f"trainer.{field}: found 'file/runs'" in text or f'trainer.{field}: found "file/runs"' in text
    assert "is a file, not a folder" in text
    assert resolve(trainer={field: "new/folders/on/the/way"})
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc to fail to write to")
def test_a_folder_that_cannot_be_written_is_reported_before_the_run() -> None:
    assert "/proc cannot be written to" in message(trainer={"save_dir": "/proc/runs"})
    assert resolve(trainer={"log_dir": "/proc/runs", "tensorboard": False})


def test_balanced_weights_are_accepted_for_any_classes() -> None:
    assert resolve(loss={"type": "CrossEntropyLoss2d", "args": {"weight": "balanced"}})
    one = {"type": "VOC", "args": {"data_dir": "data", "classes": ["thing"]}}
    for name in ("CrossEntropyLoss2d", "BCEWithLogitsLoss2d", "DiceLoss", "LovaszHinge", "LovaszSoftmax"):
        assert resolve(train_loader=one, val_loader=one, loss=name)


def test_one_channel_and_its_class_of_interest() -> None:
    one = {"type": "VOC", "args": {"data_dir": "data", "classes": ["thing"]}}
    assert resolve(train_loader=one, predict={"CoI": [0]})
    assert "the class itself is number 0" in message(train_loader=one, predict={"CoI": [1]})
    changes = {"predict": {"val": "max"}, "trainer": {"monitor": "max Multiclass_Accuracy"}}
    assert resolve(**changes)
    assert "Multiclass_Accuracy is not computed for one class" in message(train_loader=one, **changes)


def test_a_class_of_no_interest_cannot_be_monitored() -> None:
    two = {"type": "VOC", "args": {"data_dir": "data", "classes": ["rest", "thing"]}}
    changes = {"train_loader": two, "val_loader": None, "trainer": {"val": True, "monitor": "max Class_Dice/rest"}}
    told = "trainer.monitor: rankdice makes no mask of 'rest', which is not in predict.CoI [1]"
    assert told in message(**changes, predict={"CoI": [1]})
    for predict in ({"CoI": [0]}, {"CoI": [1], "val": "max"}):
        assert told not in message(**changes, predict=predict)


def test_a_stage_without_data_is_reported() -> None:
    config = resolve(
        val_loader=None,
        trainer={"val": False},
    )
    with pytest.raises(UserError, match="test_loader: missing"):
        build_loader(lambda *args, **kwargs: None, config, "test")


def test_every_loss_and_every_model_is_known_by_its_own_name() -> None:
    for name in LOSSES:
        assert resolve(loss=name).loss.type == name
    for name in MODELS:
        assert resolve(arch={"type": name}).arch.type == name


@pytest.mark.parametrize("score", [*VALIDATION_SCORES, *TRAINING_SCORES, "Class_Dice/cat", "Class_IoU/cat"])
def test_every_logged_score_can_be_monitored(score) -> None:
    mode = "min" if score.endswith("loss") else "max"
    procedure = "max" if score == "Multiclass_Accuracy" else "rankdice"
    metric = "iou" if score == "Expected_IoU" else "dice"
    predict = {"val": procedure, "rankdice": {"metric": metric}}
    assert resolve(trainer={"monitor": f"{mode} {score}"}, predict=predict)
