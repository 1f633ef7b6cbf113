"""Configs: what is read, what is refused and how that is said, and that every field has a reader."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from dataloaders import LOADERS
from models import MODELS
from tests.config.test_configs import our_configs
from tests.predecessors import PUBLISHED, RANKSEG
from utils import config as configs
from utils.config import __main__ as command
from utils.config import editor as editors
from utils.config import schema
from utils.config.building import build_loader
from utils.config.checks import TRAINING_SCORES, VALIDATION_SCORES
from utils.config.schema import Config
from utils.errors import UserError
from utils.losses import LOSSES

BASE: dict[str, Any] = {
    "name": "run",
    "arch": {"type": "PSPNet", "args": {"backbone": "resnet18"}},
    "train_loader": {"type": "VOC", "args": {"data_dir": "data", "batch_size": 2}},
    "val_loader": {"type": "VOC", "args": {"data_dir": "data", "split": "val"}},
}


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder that has the data folder of the configs below."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def resolve(overrides: tuple[str, ...] = (), stages: tuple[str, ...] = configs.STAGES, **changes: Any) -> Config:
    """Resolve the config above with some of its sections changed."""
    raw = json.loads(json.dumps(BASE)) | changes
    return configs.resolve(raw, overrides, source="config.json", models=MODELS, loaders=LOADERS, stages=stages)


def message(overrides: tuple[str, ...] = (), stages: tuple[str, ...] = configs.STAGES, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        resolve(overrides, stages, **changes)
    return str(error.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# -- reading ---------------------------------------------------------------------------------------------------


def test_comments_and_trailing_commas(tmp_path) -> None:
    text = """// a run
    {
        "name": "run", // the name of it
        /* and
           the rest */
        "arch": {"type": "UNet", "args": {},},
        "train_loader": {"type": "VOC", "args": {"data_dir": "http://not/a/comment", "classes": ["a", "b",],},},
    }"""
    raw = configs.read(write(tmp_path / "config.json", text))
    assert raw["train_loader"]["args"] == {"data_dir": "http://not/a/comment", "classes": ["a", "b"]}


def test_a_byte_order_mark_and_the_editors_key_are_no_problem(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"$schema": "configs/schema.json", **BASE}).encode())
    assert configs.read(path) == BASE


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"name": "a", "name": "b"}', "name"),
        ('{"trainer": {"epochs": 1, "epochs": 2}}', "epochs"),
        ('{"name": "a"', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1, 2]", "expected one JSON object, found list"),
        ("[" * 5000, "not"),
        ("name: a\narch: b", "not valid JSON"),
        (b"\xff\xfe\x00\x01", "cannot be read as a config"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, expected) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="broken.json") as error:
        configs.read(path)
    assert expected in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path) -> None:
    with pytest.raises(UserError, match="there is no such config file"):
        configs.read(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="cannot be read"):
        configs.read(tmp_path)


def test_syntax_errors_say_where(tmp_path) -> None:
    with pytest.raises(UserError, match=r"broken\.json.*3"):
        configs.read(write(tmp_path / "broken.json", '{\n  "name": "a",\n  "arch" 5\n}'))


# -- overrides -------------------------------------------------------------------------------------------------


def test_overrides_reach_any_field() -> None:
    config = resolve(
        (
            "trainer.epochs=3",
            "arch.args.backbone=resnet50",
            "predict.CoI=[0, 2]",
            "predict.rankdice.prune=null",
            "train_loader.args.augment=true",
            "optimizer.args.lr=1e-3",
            "trainer.save_dir=else where",
            'name="7"',
            "about=",
        )
    )
    assert config.trainer.epochs == 3
    assert config.arch.args["backbone"] == "resnet50"
    assert config.predict.CoI == [0, 2]
    assert config.predict.rankdice.prune is None
    assert config.train_loader.args["augment"] is True
    assert config.optimizer.args["lr"] == 1e-3
    assert config.trainer.save_dir == "else where"
    assert config.name == "7"
    assert config.about == ""


def test_overrides_apply_in_order_and_leave_their_source_alone() -> None:
    raw = json.loads(json.dumps(BASE))
    changed = configs.override(raw, ["trainer.epochs=3", "trainer.epochs=4", "test_loader.args.split=val"])
    assert changed["trainer"] == {"epochs": 4}
    assert changed["test_loader"] == {"args": {"split": "val"}}
    assert raw == BASE


def test_a_loss_by_name_takes_arguments_from_overrides() -> None:
    assert resolve(("loss.args.gamma=3",), loss="FocalLoss").loss.args == {"gamma": 3}
    assert resolve(("loss=DiceLoss",)).loss.type == "DiceLoss"
    assert resolve(("loss.type=DiceLoss",)).loss.type == "DiceLoss"
    assert resolve(("loss.args.weight=balanced",)).loss.model_dump() == {
        "type": "CrossEntropyLoss2d",
        "args": {"weight": "balanced"},
    }
    assert resolve(("lr_scheduler.args.warmup=10",)).lr_scheduler.type == "Poly"


def test_a_value_may_hold_an_equals_sign() -> None:
    assert resolve(("about=a=b",)).about == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.epochs", "expected path=value"),
        ("=3", "expected path=value"),
        ("trainer..epochs=3", "expected path=value"),
        ("name.first=3", "name is 'run', not a section that could hold 'first'"),
        ("trainr.epochs=3", "trainr: unknown key; did you mean trainer?"),
        ("trainer.epoch=3", "trainer.epoch: unknown key; did you mean epochs?"),
        ("trainer.epochs=three", 'trainer.epochs: found "three"; should be a valid integer'),
    ],
)
def test_wrong_overrides(override, expected) -> None:
    assert expected in message((override,))


# -- mistakes --------------------------------------------------------------------------------------------------

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
    "no folder given": ({"train_loader": {"type": "VOC"}}, ["train_loader.args.data_dir: VOC reads files"]),
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
    "useless schedule": ({"lr_scheduler": {"type": "ReduceLROnPlateau"}}, ["waits for a metric", "use Poly"]),
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
        ["optimizer.args: SGD: Invalid learning rate: -5"],
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
        ["lr_scheduler.args: ChainedScheduler: ", "StepL is not one"],
    ),
    "a seed that is too large": ({"seed": 2**63}, ["seed: found 9223372036854775808; should be less than or equal"]),
    "an endless number": ({"about": "x", "n_gpu": 10**40}, ["n_gpu: found a whole number of more than 30 digits"]),
    "text that no file name holds": ({"name": "a\0b"}, ['name: found "a\\u0000b"; text must not contain', "NUL"]),
    "text that is not Unicode": ({"about": "\ud800"}, ['about: found "\\ud800"; text must be valid Unicode']),
    "a key that is not Unicode": ({"\ud800": 1}, ["text must be valid Unicode"]),
    "a name that is too long": ({"name": "n" * 300}, ["the name becomes a folder: expected 1 to 200 bytes"]),
    "a folder's name that is too long": ({"trainer": {"save_dir": "s" * 300}}, ["cannot be made (File name too long)"]),
    "no validation data": ({"val_loader": None}, ["val_loader: missing, and train_loader.args.val_split is not given"]),
    "nothing to train on": ({"train_loader": None}, ["train_loader: found null; expected a section"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_path_found_allowed_and_nearest(mistake) -> None:
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


def test_all_problems_are_told_at_once() -> None:
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


def test_what_is_wrong_already_is_not_complained_about_twice() -> None:
    # The placeholder for a missing model or a wrong type must not show up as an unknown name of its own.
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
def test_a_folder_that_cannot_be_made_is_told_before_the_run(field, tmp_path) -> None:
    write(tmp_path / "file", "")
    text = message(trainer={field: "file/runs"})
    assert f"trainer.{field}: found 'file/runs'" in text or f'trainer.{field}: found "file/runs"' in text
    assert "is a file, not a folder" in text
    assert resolve(trainer={field: "new/folders/on/the/way"})
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc to fail to write to")
def test_a_folder_that_cannot_be_written_is_told_before_the_run() -> None:
    assert "/proc cannot be written to" in message(trainer={"save_dir": "/proc/runs"})
    assert resolve(trainer={"log_dir": "/proc/runs", "tensorboard": False})


def test_balanced_weights_are_taken_whatever_the_classes() -> None:
    assert resolve(loss={"type": "CrossEntropyLoss2d", "args": {"weight": "balanced"}})
    one = {"type": "VOC", "args": {"data_dir": "data", "classes": ["thing"]}}
    for name in ("CrossEntropyLoss2d", "BCEWithLogitsLoss2d", "DiceLoss", "LovaszHinge", "LovaszSoftmax"):
        assert resolve(train_loader=one, val_loader=one, loss=name)


def test_one_channel_and_its_class_of_interest() -> None:
    one = {"type": "VOC", "args": {"data_dir": "data", "classes": ["thing"]}}
    assert resolve(train_loader=one, predict={"CoI": [0]})
    assert "the class itself is number 0" in message(train_loader=one, predict={"CoI": [1]})


def test_a_stage_without_data_is_told() -> None:
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


# -- defaults and the way back ---------------------------------------------------------------------------------


def test_defaults() -> None:
    config = resolve()
    assert config.n_gpu == 1
    assert config.loss.type == "CrossEntropyLoss2d"
    assert config.lr_scheduler.type == "Poly"
    assert config.optimizer.type == "SGD"
    assert config.optimizer.args == {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    assert config.optimizer.backbone_lr_factor == 0.1
    assert config.aux_weight == 0.4
    assert config.ignore_index is None
    assert (config.predict.CoI, config.predict.threshold, config.predict.temperature) == ("all", 0.5, 1.0)
    assert config.predict.rankdice.model_dump() == {"solver": "exact", "metric": "dice", "smooth": 0.0, "prune": 0.5}
    assert config.loader("test") == config.val_loader
    assert resolve(optimizer={"type": "Adam"}).optimizer.args == {}
    assert resolve(optimizer={"args": {"lr": 0.1}}).optimizer.args == {"lr": 0.1}


def test_defaults_are_not_shared_between_configs() -> None:
    first = resolve()
    first.optimizer.args["lr"] = 5.0
    first.loss.args["weight"] = "balanced"
    assert resolve().optimizer.args["lr"] == 0.01
    assert resolve().loss.args == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "DiceLoss"},
        {"loss": {"type": "FocalLoss", "args": {"gamma": 1.5}}},
        {"predict": {"CoI": [1, 2], "rankdice": {"prune": None}}, "about": 'ünï\n"quotes"'},
        {"optimizer": {"type": "Adam", "args": {"betas": [0.8, 0.99]}}},
    ],
)
def test_a_written_config_reads_as_the_same(changes, tmp_path) -> None:
    config = resolve(**changes)
    text = configs.dump(config)
    again = configs.load(write(tmp_path / "config.json", text), models=MODELS, loaders=LOADERS)
    assert again == config
    assert configs.dump(again) == text
    # What a checkpoint carries is the same thing without JSON in between.
    assert configs.resolve(config.model_dump(), models=MODELS, loaders=LOADERS) == config


# -- configs of others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [PUBLISHED, RANKSEG], ids=["yassouali", "rankseg"])
def test_published_configs_load_unchanged(raw, tmp_path, capsys) -> None:
    path = write(tmp_path / "config.json", json.dumps(raw))
    config = configs.load(path, models=MODELS, loaders=LOADERS)
    for key in ("name", "n_gpu", "use_synch_bn", "ignore_index"):
        assert getattr(config, key) == raw[key]
    assert config.loss.type == raw["loss"]
    assert config.arch.type == raw["arch"]["type"]
    assert config.train_loader.args == raw["train_loader"]["args"]
    assert config.trainer.model_dump() | raw["trainer"] == config.trainer.model_dump()
    assert capsys.readouterr().err == ""
    if raw is RANKSEG:
        # The published FCN8 swallowed a backbone it does not have: said once, and taken out.
        assert config.notes == ["ignored, because they have no effect: arch.args.backbone (FCN8 has no such choice)"]
        assert "backbone" not in config.arch.args
        assert config.predict.CoI == [0, 11, 13]
    else:
        assert config.notes == []


@pytest.mark.parametrize("type", ["KvasirSEG", "kvasirSEG"])
def test_published_names_of_loaders(type) -> None:
    loader = {"type": type, "args": {"data_dir": "data", "batch_size": 1}}
    assert resolve(train_loader=loader, val_loader=loader, predict={"CoI": [1]})


# -- configs of ours -------------------------------------------------------------------------------------------


def folders_of(raw: dict[str, Any]) -> Iterator[Path]:
    for stage in ("train_loader", "val_loader", "test_loader"):
        folder = (raw.get(stage) or {}).get("args", {}).get("data_dir")
        if folder:
            yield Path(folder)


@pytest.mark.parametrize("file", our_configs())
def test_every_config_we_ship_is_valid_and_tells_its_story(file, root) -> None:
    raw = configs.read(root / file)
    for folder in folders_of(raw):
        assert not folder.is_absolute()
        folder.mkdir(parents=True, exist_ok=True)
    config = configs.load(root / file, models=MODELS, loaders=LOADERS)
    assert config.about, "a config says in `about` what it is and what it costs"


def without_torch(rules: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without the arguments of torch's classes, which depend on its version."""
    theirs = ("optimizer", "lr_scheduler")
    kept = {name: rule for name, rule in rules["$defs"].items() if not name.startswith(theirs)}
    return rules | {"$comment": "", "$defs": kept}


def test_the_schema_for_editors_is_up_to_date(root) -> None:
    kept = json.loads((root / "configs" / "schema.json").read_text(encoding="utf-8"))
    expected = json.loads(editors.text(MODELS, LOADERS))
    if kept["$comment"] != expected["$comment"]:  # written with another version of torch
        kept, expected = without_torch(kept), without_torch(expected)
    assert kept == expected, "update it: python -m utils.config schema > configs/schema.json"


def test_the_schema_knows_the_arguments_of_every_constructor(editor) -> None:
    for field, table in (("arch", MODELS), ("train_loader", LOADERS), ("loss", LOSSES)):
        for name in table:
            wrong = BASE | {field: {"type": name, "args": {"no_such_argument": 1}}}
            assert not editor.is_valid(wrong), name
    for wrong in ({"optimizer": {"type": "SGD", "args": {"lr": "fast"}}}, {"loss": {"type": "FocalLoss", "args": [1]}}):
        assert not editor.is_valid(BASE | wrong)
    for good in (
        {"optimizer": {"type": "OfTomorrow", "args": {"x": 1}}},
        {"lr_scheduler": {"type": "Poly", "args": {}}},
    ):
        assert editor.is_valid(BASE | good)
    assert not editor.is_valid(BASE | {"train_loader": {"type": "VOC", "args": {"crop_size": 0}}})


@pytest.fixture(scope="module")
def editor() -> Draft202012Validator:
    """Return what an editor makes of the schema we ship."""
    root = Path(__file__).resolve().parents[2]
    rules = json.loads((root / "configs" / "schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(rules)
    return Draft202012Validator(rules)


@pytest.mark.parametrize("file", our_configs())
def test_the_schema_accepts_our_configs(file, root, editor) -> None:
    editor.validate(configs.read(root / file))


def test_the_schema_accepts_resolved_and_published_configs_and_refuses_mistakes(editor) -> None:
    for raw in (BASE, PUBLISHED, RANKSEG, json.loads(configs.dump(resolve())), {"$schema": "x", **BASE}):
        editor.validate(raw)
    for wrong in ("unknown section", "unknown field", "text for a number", "word for another", "unknown model"):
        assert not editor.is_valid(BASE | MISTAKES[wrong][0]), wrong
    assert not editor.is_valid({"name": "a"})


def test_every_field_says_what_it_means() -> None:
    for section in sections():
        for name, field in section.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
                assert field.description, f"{section.__name__}.{name}"


# -- a field that is accepted is read by someone ---------------------------------------------------------------

# How the code calls the sections it reads from: `config.trainer`, `self.settings`, ...
HOLDERS = {
    "Config": {"config", "self", "loaded"},
    "Component": {"component", "arch", "loss", "lr_scheduler", "schedule", "train_loader", "loader"},
    "Optimizer": {"optimizer", "section"},
    "Schedule": {"lr_scheduler", "section"},
    "RankDiceOptions": {"rankdice", "chosen"},
    "PresenceFit": {"fit"},
    "Predict": {"predict"},
    "Trainer": {"trainer", "settings"},
    "Tester": {"tester"},
}
# Free text for those who read the file; it travels in every checkpoint.
FOR_PEOPLE = {("Config", "about"), ("PresenceFit", "images")}


def sections() -> list[type[BaseModel]]:
    found = [getattr(schema, name) for name in HOLDERS]
    known = {c for c in vars(schema).values() if isinstance(c, type) and issubclass(c, schema.Section)}
    assert known - set(found) == {schema.Section}
    return found


def reads(root: Path) -> set[tuple[str, str]]:
    """Return every (holder, attribute) that the code reads, as in ``holder.attribute`` or ``x.holder.attribute``."""
    found = set()
    code = [
        *root.glob("*.py"),
        *(p for d in ("base", "utils", "models", "dataloaders") for p in root.glob(f"{d}/**/*.py")),
    ]
    for path in code:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = node.value
                name = getattr(holder, "attr", None) or getattr(holder, "id", None)
                found.add((name, node.attr))
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):  # a fit is a dictionary
                found.add((getattr(node.value, "attr", None) or getattr(node.value, "id", None), node.slice.value))
    return found


@pytest.fixture(scope="module")
def reads_of_the_code() -> set[tuple[str, str]]:
    return reads(Path(__file__).resolve().parents[2])


@pytest.mark.parametrize(
    ("section", "field"),
    [(s.__name__, f) for s in sections() for f in s.model_fields if (s.__name__, f) not in FOR_PEOPLE],
)
def test_a_field_that_is_accepted_is_read_by_someone(section, field, reads_of_the_code) -> None:
    assert any((holder, field) in reads_of_the_code for holder in HOLDERS[section])


# -- the command line ------------------------------------------------------------------------------------------


SHAPES: dict[str, Any] = BASE | {
    "train_loader": {"type": "Shapes", "args": {"batch_size": 2, "length": 8, "size": 32}},
    "val_loader": {"type": "Shapes", "args": {"split": "val", "length": 2, "size": 32}},
}


def run_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any], *overrides: str) -> None:
    path = write(tmp_path / "good.json", json.dumps(raw))
    items = [part for item in overrides for part in ("--set", item)]
    monkeypatch.setattr(sys, "argv", ["config.py", "check", str(path), *items])
    assert command.main() == 0


def test_the_command_line_checks_and_prints(tmp_path, monkeypatch, capsys) -> None:
    run_check(tmp_path, monkeypatch, SHAPES, "trainer.epochs=3")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(configs.dump(configs.resolve(SHAPES, ["trainer.epochs=3"])))
    with pytest.raises(UserError, match="did you mean UNet"):
        run_check(tmp_path, monkeypatch, SHAPES, "arch.type=UNett")
    moved = {"type": "VOC", "args": {"data_dir": "/not/here", "augment": True, "crop_size": 32}}
    path = write(tmp_path / "moved.json", json.dumps(SHAPES | {"train_loader": moved}))
    monkeypatch.setattr(sys, "argv", ["config.py", "check", "--no-data", str(path)])
    assert command.main() == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["train_loader"]["args"]["data_dir"] == "/not/here"
    assert "note: train_loader: augment turns on flip, rotate" in shown.err
    monkeypatch.setattr(sys, "argv", ["config.py", "schema"])
    assert command.main() == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["name", "arch", "train_loader"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("arch.args.backbone=resnet19", "backbone must be one of resnet18"),
        ("arch.args.stem=round", "stem"),
        ("train_loader.args.sampler=weighted", "sampler"),
        ("train_loader.args.val_split=0.01", "val_split"),
        ("train_loader.args.in_channels=2", "in_channels"),
        ("val_loader.args.in_channels=1", "val_loader: its images have 1 channels"),
        ("train_loader.args.classes=3", "classes"),
        ("val_loader.args.mean=[0.5]", "mean must have one number per channel"),
        ("lr_scheduler.args.warmup=1000", "warmup is 1000; expected >= 0 and less than the run's 320 steps"),
        ('lr_scheduler={"type": "ExponentialLR", "args": {"gamma": 1e300}}', "the learning rate would be inf"),
        ('lr_scheduler={"type": "PolynomialLR", "args": {"power": -1}}', "lr_scheduler.args"),
    ],
)
def test_the_command_line_refuses_what_train_py_refuses(override, told, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(UserError) as error:
        run_check(tmp_path, monkeypatch, SHAPES, override)
    assert told in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"name": "x",\n "arch": {},\n  "loss" {}}', ", line 3, column 10: not valid JSON"),
        ('{"seed": 1, "seed": 2}', ': not valid JSON (comments and trailing commas are fine): Duplicate key "seed"'),
        ("", ": not valid JSON"),
    ],
)
def test_invalid_json_is_told_by_file_line_and_column(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        configs.read(path)
    assert str(error.value).startswith(f"{path}{told}")
    assert "<string>" not in str(error.value)
