"""Files are read without running code; files that cannot be used are refused in one line."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.states import LEGACY, state, written
from utils.checkpoint import load_model, read, save
from utils.errors import UserError

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
def test_a_file_that_is_not_a_checkpoint_is_reported_in_one_line(case, tmp_path) -> None:
    content, message = NO_CHECKPOINTS[case]
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as error:
            read(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert message in text
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


def test_changed_bytes_give_an_explanation_or_weights(tmp_path) -> None:
    """With any bytes in the file: plain data, or one message."""
    path = tmp_path / "model.pth"
    rng = np.random.default_rng(0)
    sources = [saved_bytes(WEIGHTS), saved_bytes(WEIGHTS, **LEGACY)]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        content = bytearray(sources[rng.integers(2)])
        # Most bytes are weights; the other ones matter.
        reach = len(content) if rng.random() < 0.3 else 700
        for at in rng.integers(0, reach, rng.integers(1, 12)):
            content[at] = rng.integers(256)
        path.write_bytes(content)
        try:
            read(path)
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def tensors_without_numbers() -> dict[str, torch.Tensor]:
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
    odd = {"state_dict": {"a": tensors_without_numbers().get(case)}}
    content, message = MALFORMED.get(case, (odd, "it is not a checkpoint of a network"))
    path = written(WEIGHTS | content, tmp_path / "model.pth")
    with pytest.raises(UserError) as error:
        read(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 330


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"mean": ("a", "b", "c")}, "mean.0: Input should be a valid number"),
        ({"mean": (0.5,)}, "mean and std: expected a number for each of 3 channels"),
        ({"std": (0.0, 1.0, 1.0)}, "std.0: Input should be greater than 0"),
        ({"num_classes": 10**12}, "num_classes: Input should be less than or equal to 65536"),
        ({"palette": 3}, "palette: "),
        ({"nodata": "x"}, "nodata must be a number"),
        ({"value_range": (1.0, 0.0)}, "value_range must be"),
        ({"palette": [[0, 0, 0]]}, "class_names and palette: expected 3 of each, found 3 and 1"),
        ({"class_names": []}, "class_names and palette: expected 3 of each, found 0 and 3"),
        ({"ignore_index": None}, "ignore_index: "),
    ],
)
def test_malformed_facts_are_refused(facts, message, tmp_path) -> None:
    content = state()
    content["facts"] = content["facts"] | facts
    path = written(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match="its 'facts'") as error:
        load_model(path)
    assert message in str(error.value)


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


def test_every_flipped_bit_that_changes_a_weight_is_detected(tmp_path) -> None:
    assert flips(tmp_path, state(), 80, seed=0)[0] == 80


def flips(folder: Path, content: Any, wanted: int, seed: int) -> tuple[int, int]:
    """Flip single bits that change a weight if torch reads the file; return how many `read` refuses, and the total."""
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
    """Creates a file when it is unpickled."""

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
        assert "weights_only=False" in str(error.value)  # the fix, for users who trust the file


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
