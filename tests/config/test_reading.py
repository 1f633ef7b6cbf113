"""Config files and overrides: what is read, and what is refused."""

from __future__ import annotations

import json

import pytest

from tests.config.running import BASE, message, resolve, write
from utils import config as configs
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("data")


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
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"config file; did you mean mine\.json\?$"):
        configs.read(tmp_path / "mime.json")
    with pytest.raises(UserError, match="cannot be read"):
        configs.read(tmp_path)


def test_syntax_errors_say_where(tmp_path) -> None:
    with pytest.raises(UserError, match=r"broken\.json.*3"):
        configs.read(write(tmp_path / "broken.json", '{\n  "name": "a",\n  "arch" 5\n}'))


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


def test_a_value_may_contain_an_equals_sign() -> None:
    assert resolve(("about=a=b",)).about == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.epochs", "expected path=value"),
        ("=3", "expected path=value"),
        ("trainer..epochs=3", "expected path=value"),
        ("name.first=3", "name is 'run', not a section that could contain 'first'"),
        ("trainr.epochs=3", "trainr: unknown key; did you mean trainer?"),
        ("trainer.epoch=3", "trainer.epoch: unknown key; did you mean epochs?"),
        ("trainer.epochs=three", 'trainer.epochs: found "three"; should be a valid integer'),
    ],
)
def test_wrong_overrides(override, expected) -> None:
    assert expected in message((override,))
