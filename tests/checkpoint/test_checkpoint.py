"""The config and the model of a checkpoint, whoever wrote it."""

from __future__ import annotations

import gzip
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from dataloaders import LOADERS
from tests.checkpoint.states import FACTS, LEGACY, RAW, state, written
from utils.checkpoint import config_of, load_model, read, save
from utils.errors import UserError
from utils.facts import Facts

# -- the config of a checkpoint --------------------------------------------------------------------------------


def write_config(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(RAW | changes), encoding="utf-8")
    return path


def test_the_checkpoints_own_config_is_used_even_without_its_data() -> None:
    config = config_of(state(), "model.pth")
    assert config.train_loader.args["data_dir"] == "moved/away"
    assert config.arch.args == {"width": 4}


def test_class_names_come_from_the_checkpoint_if_their_file_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolved(classes: str, *overrides: str) -> Any:
        loader = {"type": "Folder", "args": {"data_dir": "moved/away", "classes": "classes.txt"}}
        moved = f"test_loader.args.data_dir={tmp_path}"
        given = [moved, f"test_loader.args.classes={classes}", *overrides]
        kept = state(config=RAW | {"train_loader": loader, "test_loader": loader})
        return config_of(kept, "model.pth", None, given, stages=("test",)).test_loader.args["classes"]

    (tmp_path / "x").mkdir()  # the data is there, but not classes.txt
    assert resolved("classes.txt") == ["background", "cat", "dog"]
    assert f"test_loader: there is no classes.txt in {tmp_path}" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"neither other\.txt nor"):
        resolved("other.txt")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert resolved("classes.txt") == "classes.txt"
    assert "test_loader" not in capsys.readouterr().err


def test_a_given_config_replaces_all_but_arch_and_overrides_come_last(tmp_path) -> None:
    given = write_config(tmp_path / "given.json", name="given", predict={"test": "T"}, seed=3)
    config = config_of(state(), "model.pth", given, ("seed=4",))
    assert (config.name, config.predict.test, config.seed) == ("given", "T", 4)
    without = {key: value for key, value in RAW.items() if key != "arch"}
    (tmp_path / "without.json").write_text(json.dumps(without))
    assert config_of(state(), "model.pth", tmp_path / "without.json").arch.args == {"width": 4}


def test_a_given_config_that_drops_a_fit_is_reported(tmp_path, capsys) -> None:
    fitted = state() | {"calibration": {"found": {"threshold": 0.4, "temperature": 1.0}}}
    path = written(fitted, tmp_path / "model.pth")
    load_model(path, config=write_config(tmp_path / "same.json", predict={"threshold": 0.4}))
    assert "fitted" not in capsys.readouterr().err
    load_model(path, config=write_config(tmp_path / "given.json"))
    assert "predict.threshold were fitted on validation data, but" in capsys.readouterr().err


def test_another_arch_in_the_given_config_is_an_error_that_shows_both(tmp_path) -> None:
    for arch in ({"type": "UNet", "args": {"width": 8}}, {"type": "PSPNet"}, "UNet", {"args": {}}, 5, None):
        given = write_config(tmp_path / "given.json", arch=arch)
        with pytest.raises(UserError, match="cannot be changed") as error:
            config_of(state(), "model.pth", given)
        assert str(arch) in str(error.value)
        assert "{'type': 'UNet', 'args': {'width': 4}}" in str(error.value)


@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ({"type": "PSPNet", "args": {}}, {"type": "PSPNet", "args": {"in_channels": 3, "freeze_bn": False}}),
        ({"type": "PSPNet", "args": {"pretrained": True}}, {"type": "PSPNet", "args": {"pretrained": False}}),
        ({"type": "PSPNet", "args": {}}, {"type": "PSPNet"}),
        ({"type": "FCN8", "args": {}}, {"type": "FCN8", "args": {"backbone": "resnet101"}}),
        ({"type": "UNet", "args": {}}, {"type": "UNet", "args": {"backbone": "resnet101"}}),
    ],
)
def test_an_arch_may_spell_out_defaults_and_what_never_had_an_effect(stored, given, tmp_path) -> None:
    content = state(config=state()["config"] | {"arch": stored})
    config = config_of(content, "model.pth", write_config(tmp_path / "given.json", arch=given))
    assert config.arch.model_dump() == {"args": {}} | stored


def test_folders_are_checked_for_the_stages_that_are_used(tmp_path) -> None:
    with pytest.raises(UserError, match='the config in model.pth: train_loader.args.data_dir: found "moved/away"'):
        config_of(state(), "model.pth", stages=("train",))
    moved = (f"train_loader.args.data_dir={tmp_path}",)
    assert config_of(state(), "model.pth", overrides=moved, stages=("train",))


def test_without_any_config_one_must_be_given(tmp_path) -> None:
    bare = {"state_dict": state()["state_dict"]}
    with pytest.raises(UserError, match="weights alone but no config; pass the config of its run with --config"):
        config_of(bare, "weights.pth")
    assert config_of(bare, "weights.pth", write_config(tmp_path / "given.json")).arch.type == "UNet"
    with pytest.raises(UserError, match="expected its config to be an object, found str"):
        config_of(state(config="config.json"), "model.pth")


def test_a_stored_config_with_mistakes_is_reported_with_the_checkpoints_name() -> None:
    content = state(config={"name": "a", "arch": {"type": "UNett"}})
    with pytest.raises(UserError, match="the config in model.pth") as error:
        config_of(content, "model.pth")
    assert "did you mean UNet?" in str(error.value)


# -- models ----------------------------------------------------------------------------------------------------


def test_a_loaded_model_has_everything_needed_to_use_it(tmp_path) -> None:
    save(state(), tmp_path / "model.pth")
    loaded = load_model(tmp_path / "model.pth")
    torch.manual_seed(0)
    original = models.build("UNet", 3, width=4).eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), original(images))
    assert not loaded.model.training
    assert loaded.facts == FACTS
    assert (loaded.activation, loaded.epoch) == ("softmax", 7)
    config = loaded.config.model_dump() | {"loss": "BCEWithLogitsLoss2d"}
    save(state(config=config), tmp_path / "model.pth")
    assert load_model(tmp_path / "model.pth").activation == "sigmoid"


def test_averaged_weights_are_the_ones_in_use(tmp_path) -> None:
    averaged = {k: torch.zeros_like(v) for k, v in state()["state_dict"].items()}
    save(state(ema=averaged), tmp_path / "model.pth")
    assert not any(p.any() for p in load_model(tmp_path / "model.pth").model.parameters())


def test_wrappers_prefixes_do_not_matter(tmp_path) -> None:
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        save(state(state_dict={prefix + k: v for k, v in state()["state_dict"].items()}), tmp_path / "model.pth")
        assert load_model(tmp_path / "model.pth").model.num_classes == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": Facts.of(LOADERS["VOC"]).to_dict()}, "3 classes"),
        ({"facts": {"classes": 3}}, "its 'facts'"),
        ({"facts": 3}, "its 'facts'"),
        ({"state_dict": {"a": torch.ones(1)}}, "do not fit UNet"),
    ],
)
def test_weights_that_do_not_fit_are_explained_with_the_file(changes, message, tmp_path) -> None:
    save(state(**changes), tmp_path / "model.pth")
    with pytest.raises(UserError, match="model.pth: ") as error:
        load_model(tmp_path / "model.pth")
    assert message in str(error.value)


def test_a_checkpoint_of_published_structure(tmp_path) -> None:
    """``module.`` before each name, the wrapper's class as arch, a numpy scalar, no facts, the legacy format."""
    ours = state()
    published = {
        "arch": "DataParallel",
        "epoch": 80,
        "state_dict": OrderedDict((f"module.{k}", v) for k, v in ours["state_dict"].items()),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.01, "initial_lr": 0.01, "params": [0]}]},
        "monitor_best": np.float64(0.71),
        "config": RAW | {"arch": {"type": "UNet", "args": {"width": 4, "backbone": "resnet50", "freeze_bn": False}}},
    }
    path = written(published, tmp_path / "best_model.pth", **LEGACY)
    loaded = load_model(path)
    assert loaded.facts.num_classes == 3
    assert loaded.facts.class_names == ("background", "cat", "dog")
    assert loaded.facts.mean == tuple(LOADERS["VOC"].mean)
    assert loaded.epoch == 80
    assert all(torch.equal(loaded.model.state_dict()[k], v) for k, v in ours["state_dict"].items())


def test_a_checkpoint_whose_data_has_other_classes_is_reported(tmp_path) -> None:
    published = {"state_dict": state()["state_dict"], "config": RAW | {"train_loader": {"type": "VOC"}}}
    with pytest.raises(UserError, match="best.pth: its weights have 3 classes, its data set VOC has 21"):
        load_model(written(published, tmp_path / "best.pth"))


def test_weights_alone_with_a_config(tmp_path) -> None:
    path = written(state()["state_dict"], tmp_path / "weights.pth")
    config = config_of(read(path), path, write_config(tmp_path / "config.json"))
    assert load_model(path, config=config).facts.num_classes == 3


@pytest.mark.parametrize(
    ("record", "arch", "args", "loader"),
    [
        ("ENet-none-c19", "ENet", {}, "CityScapes"),
        ("PSPNet-resnet18-c19", "PSPNet", {"backbone": "resnet18"}, "CityScapes"),
    ],
)
def test_a_checkpoint_with_the_recorded_names(record, arch, args, loader, shared_dir, tmp_path) -> None:
    with gzip.open(shared_dir / "compat" / "state_dicts" / f"{record}.json.gz") as file:
        entries = json.load(file)["keys"]
    weights = {f"module.{name}": torch.ones(shape, dtype=getattr(torch, kind)) for name, shape, kind, *_ in entries}
    raw = RAW | {"arch": {"type": arch, "args": args}, "train_loader": {"type": loader, "args": {"data_dir": "gone"}}}
    content = {
        "arch": "DataParallel",
        "epoch": 3,
        "state_dict": weights,
        "monitor_best": np.float32(0.5),
        "config": raw,
    }
    loaded = load_model(written(content, tmp_path / "best_model.pth"))
    assert loaded.facts.num_classes == 19
    assert loaded.facts.class_names == tuple(LOADERS[loader].class_names)


def test_facts_survive_the_way_through_a_file() -> None:
    assert Facts.from_dict(json.loads(json.dumps(FACTS.to_dict()))) == FACTS
    facts = Facts.of(LOADERS["VOC"])
    assert (facts.num_classes, len(facts.palette), facts.in_channels) == (21, 21, 3)
    json.dumps(facts.to_dict())  # plain numbers, no numpy
