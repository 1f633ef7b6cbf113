"""Checkpoints: there whole or not at all, read without running code, understood whoever wrote them."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import resource
import signal
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from dataloaders import LOADERS
from models import MODELS
from utils import checkpoint
from utils import config as configs
from utils.checkpoint import config_of, load_model, read, save
from utils.errors import UserError
from utils.facts import Facts

FACTS = Facts(
    num_classes=3,
    class_names=("background", "cat", "dog"),
    palette=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    ignore_index=255,
)
RAW: dict[str, Any] = {
    "name": "run",
    "arch": {"type": "UNet", "args": {"width": 4}},
    "train_loader": {"type": "VOC", "args": {"data_dir": "moved/away", "classes": ["background", "cat", "dog"]}},
    "trainer": {"val": False, "monitor": "off"},
}


def state(**changes: Any) -> dict[str, Any]:
    """Return what a run of ours saves, as far as using the model needs it."""
    torch.manual_seed(0)
    model = models.build("UNet", 3, width=4)
    content = {
        "format": checkpoint.FORMAT,
        "arch": "UNet",
        "epoch": 7,
        "state_dict": model.state_dict(),
        "config": configs.resolve(RAW, models=MODELS).model_dump(),
        "facts": FACTS.to_dict(),
        "monitor_best": 0.5,
    }
    return content | changes


def written(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- writing ---------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read(tmp_path) -> None:
    path = tmp_path / "new" / "folder" / "model.pth"
    content = state()
    save(content, path)
    again = read(path)
    assert again.keys() == content.keys()
    assert all(torch.equal(again["state_dict"][k], v) for k, v in content["state_dict"].items())
    assert {k: v for k, v in again.items() if k != "state_dict"} == {
        k: v for k, v in content.items() if k != "state_dict"
    }
    assert names_in(path.parent) == ["model.pth"]


class Boom(Exception):
    """Something that goes wrong in the middle of writing."""


@pytest.mark.parametrize(
    ("failure", "raised", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "the disk is full; the earlier file is"),
        (OSError(errno.EIO, "Input/output error"), UserError, "Input/output error"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), UserError, "disk full?"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (Boom("program error"), Boom, "program error"),
    ],
)
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, failure, raised, told
) -> None:
    path = tmp_path / "model.pth"
    save({"state_dict": {"a": torch.ones(3)}}, path)
    before = path.read_bytes()

    def broken(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise failure

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(raised) as error:
        save({"state_dict": {"a": torch.zeros(3)}}, path)
    assert told in str(error.value)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["model.pth"]


def test_a_disk_that_takes_no_more_bytes(tmp_path) -> None:
    """A true failure of the operating system, from within torch's own writer: a limit on the size of files."""
    path = tmp_path / "model.pth"
    save({"state_dict": {"a": torch.ones(3)}}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not be written: File too large; the earlier file is untouched"):
            save({"state_dict": {"a": torch.ones(10**6)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["model.pth"]


def test_a_process_killed_in_the_middle_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "model.pth"
    save({"state_dict": {"a": torch.ones(3)}}, path)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:  # dies at once, without any cleaning up
        torch.save = lambda content, file: (file.write(b"half"), file.flush(), os.kill(os.getpid(), signal.SIGKILL))
        save({"state_dict": {"a": torch.zeros(3)}}, path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_bytes() == before
    # What the dead left is hidden, and taken for a checkpoint by nobody.
    assert [n for n in names_in(tmp_path) if not n.startswith(".")] == ["model.pth"]
    assert list(tmp_path.glob("*.pth")) == [path]


def test_places_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        save({"state_dict": {}}, tmp_path / "file" / "model.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match="could not be written"):
        save({"state_dict": {}}, tmp_path / "folder.pth")
    assert names_in(tmp_path) == ["file", "folder.pth"]


def test_a_checkpoint_has_several_names(tmp_path) -> None:
    first, best = tmp_path / "checkpoint-epoch1.pth", tmp_path / "best_model.pth"
    save({"state_dict": {"a": torch.ones(3)}}, first)
    checkpoint.link(first, best)
    checkpoint.link(first, best)  # once more is no more
    assert best.samefile(first)
    second = tmp_path / "checkpoint-epoch2.pth"
    save({"state_dict": {"a": torch.zeros(3)}}, second)
    checkpoint.link(second, best)
    first.unlink()
    assert read(best)["state_dict"]["a"].tolist() == [0, 0, 0]
    assert names_in(tmp_path) == ["best_model.pth", "checkpoint-epoch2.pth"]


def test_a_copy_where_links_are_not_possible(tmp_path, monkeypatch) -> None:
    source, other = tmp_path / "a.pth", tmp_path / "b.pth"
    save(state(), source)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.link(source, other)
    assert read(other).keys() == read(source).keys()
    assert not other.samefile(source)
    assert names_in(tmp_path) == ["a.pth", "b.pth"]


# -- files that are no checkpoints -----------------------------------------------------------------------------


def zip_of(**entries: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return stream.getvalue()


def saved_bytes(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


WEIGHTS = {"state_dict": {"a": torch.arange(1000.0)}}
LEGACY = {"_use_new_zipfile_serialization": False}

NO_CHECKPOINTS = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello world\n", "it begins with b'hello world"),
    "json": (b'{"name": "run"}\n', "not a checkpoint"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "a web page, so the download failed"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "other zip": (zip_of(a="text"), "not a checkpoint"),
    "first byte": (b"P", "not a checkpoint"),
    "half a zip": (saved_bytes(WEIGHTS)[:2800], "truncated (2,800 bytes)"),
    "zip without its end": (saved_bytes(WEIGHTS)[:-1], "truncated"),
    "half a legacy file": (saved_bytes(WEIGHTS, **LEGACY)[:2000], "truncated (2,000 bytes)"),
    "legacy without its end": (saved_bytes(WEIGHTS, **LEGACY)[:-1], "truncated"),
    "first byte of legacy": (b"\x80", "truncated (1 bytes)"),
    "a tensor": (saved_bytes(torch.ones(2)), "expected a checkpoint (a dict with 'state_dict'), found Tensor"),
    "a list": (saved_bytes([1, 2]), "found list"),
    "nothing": (saved_bytes({}), "found the keys none"),
    "other keys": (saved_bytes({"weights": 3, "step": 4}), "found the keys weights, step"),
    "a number for weights": (saved_bytes({"state_dict": 5}), "expected tensors by name in 'state_dict', found int"),
    "numbers for tensors": (saved_bytes({"state_dict": {"a": 5}}), "expected tensors by name"),
    "a pickle": (pickle.dumps({"state_dict": 1}), "refused"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_told_in_one_line(case, tmp_path) -> None:
    content, told = NO_CHECKPOINTS[case]
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as error:
            read(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert told in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 330


def test_a_missing_file_names_its_neighbors(tmp_path) -> None:
    save(WEIGHTS, tmp_path / "best_model.pth")
    with pytest.raises(UserError, match="no such checkpoint file; in that folder: best_model.pth"):
        read(tmp_path / "best.pth")
    with pytest.raises(UserError, match="is a folder; it contains best_model.pth; pass one of them"):
        read(tmp_path)
    with pytest.raises(UserError, match='"..." stands for the folder of a run'):
        read("saved/.../best_model.pth")
    with pytest.raises(UserError, match="no such checkpoint file"):
        read(tmp_path / "no" / "folder" / "best.pth")
    for age, run in enumerate(("new", "old")):
        folder = tmp_path / "saved" / "plants" / run
        for name in ("best_model.pth", "latest.pth"):
            save(WEIGHTS, folder / name)
            os.utime(folder / name, (1e9 - age, 1e9 - age))
    with pytest.raises(UserError, match=r"newest below it: .*plants/new with best_model\.pth, latest\.pth$"):
        read(tmp_path / "saved")


def test_bytes_gone_wrong_end_in_an_explanation_or_in_weights(tmp_path) -> None:
    """Whatever is in the file: plain data, or one message."""
    path = tmp_path / "model.pth"
    rng = np.random.default_rng(0)
    sources = [saved_bytes(WEIGHTS), saved_bytes(WEIGHTS, **LEGACY)]
    outcomes = {"read": 0, "told": 0}
    for _ in range(300):
        content = bytearray(sources[rng.integers(2)])
        # Most bytes are weights; it is the others that hurt.
        reach = len(content) if rng.random() < 0.3 else 700
        for at in rng.integers(0, reach, rng.integers(1, 12)):
            content[at] = rng.integers(256)
        path.write_bytes(content)
        try:
            read(path)
            outcomes["read"] += 1
        except UserError:
            outcomes["told"] += 1
    assert min(outcomes.values()) > 20


def tensors_that_hold_nothing() -> dict[str, torch.Tensor]:
    return {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(10**12, device="meta"),
        "endless": torch.ones(1).expand(10**12),
        "complex": torch.ones(2, dtype=torch.complex64),
    }


def endless() -> dict[str, Any]:
    nested: dict[str, Any] = {}
    nested["again"] = nested
    return nested


MALFORMED = {
    "no tensors in ema": ({"ema": {"a": 5}}, "expected tensors by name in 'ema', found dict with int as 'a'"),
    "a tensor in the config": ({"config": {"name": torch.ones(2)}}, "found a tensor as config.name"),
    "an endless config": ({"config": endless()}, "nested too deeply"),
    "text as epoch": ({"epoch": "three"}, "expected a whole number as 'epoch', found 'three'"),
    "a negative iteration": ({"iteration": -1}, "expected a whole number as 'iteration', found '-1'"),
    "names that are no text": ({"state_dict": {5: torch.ones(1)}}, "expected tensors by name in 'state_dict'"),
}


@pytest.mark.parametrize("case", [*MALFORMED, "sparse", "meta", "endless", "complex"])
def test_malformed_contents_are_refused_in_one_line(case, tmp_path) -> None:
    odd = {"state_dict": {"a": tensors_that_hold_nothing().get(case)}}
    content, told = MALFORMED.get(case, (odd, "it is not a checkpoint of a network"))
    path = written(WEIGHTS | content, tmp_path / "model.pth")
    with pytest.raises(UserError) as error:
        read(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 330


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"mean": ("a", "b", "c")}, "mean.0: Input should be a valid number"),
        ({"mean": (0.5,)}, "mean and std: expected a finite number for each of 3 channels"),
        ({"std": (0.0, 1.0, 1.0)}, "std: expected numbers above 0"),
        ({"num_classes": 10**12}, "num_classes: expected 1 to 65536"),
        ({"palette": 3}, "palette: "),
        ({"ignore_index": None}, "ignore_index: "),
    ],
)
def test_malformed_facts_are_refused(facts, told, tmp_path) -> None:
    content = state()
    content["facts"] = content["facts"] | facts
    path = written(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match="its 'facts'") as error:
        load_model(path)
    assert told in str(error.value)


def test_a_network_larger_than_its_weights_is_not_built(tmp_path) -> None:
    content = state()
    content["config"]["arch"]["args"]["width"] = 8192
    with pytest.raises(UserError, match="its config describes a network with"):
        load_model(written(content, tmp_path / "model.pth"))


def test_weights_that_are_not_finite_name_their_layer(tmp_path) -> None:
    content = state(iteration=77)
    name = next(name for name in content["state_dict"] if name.endswith("weight"))
    content["state_dict"][name].flatten()[0] = float("nan")
    with pytest.raises(UserError, match=f"the weights {name} are not finite .* iteration 77"):
        load_model(written(content, tmp_path / "model.pth"))


def test_every_flipped_bit_that_changes_a_weight_is_noticed(tmp_path) -> None:
    assert flips(tmp_path, state(), 80, seed=0)[0] == 80


def flips(folder: Path, content: Any, wanted: int, seed: int) -> tuple[int, int]:
    """Flip single bits that change a weight, for torch reads them; return how many `read` refuses, and of how many."""
    path = written(content, folder / "model.pth")
    data, rng = path.read_bytes(), np.random.default_rng(seed)
    caught = tried = 0
    while tried < wanted:
        at = int(rng.integers(len(data)))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        try:
            found = torch.load(path, weights_only=True)["state_dict"]
            if all(torch.equal(value, content["state_dict"][name]) for name, value in found.items()):
                continue  # padding, names of entries
        except Exception:
            continue  # torch notices
        tried += 1
        try:
            read(path)
        except UserError:
            caught += 1
    return caught, tried


class Code:
    """Would make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(kind, tmp_path) -> None:
    path, trace = tmp_path / "model.pth", tmp_path / "it ran"
    content = {"state_dict": {"a": torch.ones(2)}, "config": Code(trace)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(Code(trace)))
    else:
        written(content, path, **(LEGACY if kind == "legacy" else {}))
    with pytest.raises(UserError, match="refused") as error:
        read(path)
    assert not trace.exists()
    if kind != "bare pickle":
        assert "would run code (posix.system)" in str(error.value)
        assert "weights_only=False" in str(error.value)  # the way out, for those who trust the file


def test_whole_modules_and_other_objects_are_refused_by_name(tmp_path) -> None:
    path = written(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"refused.*torch\.nn\.modules\.linear\.Linear"):
        read(path)


# -- files of others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "best", [0, -float("inf"), np.float64(0.7), np.float32(0.7), np.int64(3), np.bool_(True)], ids=repr
)
def test_numpy_scalars_of_published_checkpoints_are_plain_data(best, options, tmp_path) -> None:
    path = written({"state_dict": {"a": torch.ones(1)}, "monitor_best": best}, tmp_path / "model.pth", **options)
    assert read(path)["monitor_best"] == best


def test_numpy_scalars_under_the_name_that_numpy_1_gave_them(tmp_path) -> None:
    path = written({"state_dict": {"a": torch.ones(1)}, "monitor_best": np.float64(0.7)}, tmp_path / "m.pth", **LEGACY)
    content = path.read_bytes()
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert new in content or old in content
    path.write_bytes(content.replace(new, old))
    assert read(path)["monitor_best"] == 0.7


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_weights_alone_are_a_checkpoint(options, tmp_path) -> None:
    path = written(OrderedDict(a=torch.ones(2)), tmp_path / "weights.pth", **options)
    assert read(path).keys() == {"state_dict"}


# -- the config of a checkpoint --------------------------------------------------------------------------------


def write_config(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(RAW | changes), encoding="utf-8")
    return path


def test_the_checkpoints_own_config_is_used_whatever_became_of_its_data() -> None:
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

    (tmp_path / "x").mkdir()  # data, but no classes.txt
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


def test_a_stored_config_with_mistakes_is_told_by_the_checkpoints_name() -> None:
    content = state(config={"name": "a", "arch": {"type": "UNett"}})
    with pytest.raises(UserError, match="the config in model.pth") as error:
        config_of(content, "model.pth")
    assert "did you mean UNet?" in str(error.value)


# -- models ----------------------------------------------------------------------------------------------------


def test_a_model_comes_back_with_all_it_takes_to_use_it(tmp_path) -> None:
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
    ("changes", "told"),
    [
        ({"facts": FACTS.to_dict() | {"num_classes": 5}}, "3 classes"),
        ({"facts": {"classes": 3}}, "its 'facts'"),
        ({"facts": 3}, "its 'facts'"),
        ({"state_dict": {"a": torch.ones(1)}}, "do not fit UNet"),
    ],
)
def test_weights_that_do_not_fit_are_explained_with_the_file(changes, told, tmp_path) -> None:
    save(state(**changes), tmp_path / "model.pth")
    with pytest.raises(UserError, match="model.pth: ") as error:
        load_model(tmp_path / "model.pth")
    assert told in str(error.value)


def test_a_checkpoint_of_published_structure(tmp_path) -> None:
    """``module.`` before every name, the wrapper's name for arch, a numpy scalar, no facts, legacy container."""
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


def test_a_checkpoint_whose_data_has_other_classes_is_told(tmp_path) -> None:
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
