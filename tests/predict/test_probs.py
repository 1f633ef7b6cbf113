"""Saved probabilities: bit-identical, so the masks of all procedures are the same; and damaged files."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small_checkpoint import NAMES
from utils.errors import UserError
from utils.facts import Facts
from utils.images import voc_colormap
from utils.predict import PROCEDURES, PredictOptions
from utils.predict import __main__ as decode
from utils.predict import files as probs
from utils.predict.saved_probs import SavedProbs

FACTS = Facts(4, NAMES[:4], voc_colormap(4), (0.5,) * 3, (0.2,) * 3, 255)


def maps(seed: int = 0, classes: int = 4, height: int = 11, width: int = 17) -> torch.Tensor:
    logits = torch.randn(1, classes, height, width, generator=torch.Generator().manual_seed(seed)) * 4
    return logits.softmax(1) if classes > 1 else logits.sigmoid()


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the probabilities of three images, one of them below a sub-folder."""
    options = PredictOptions(threshold=0.3, prune=0.2, classes=(1, 2, 3))
    probs.prepare_folder(tmp_path / "probs", probs.Index(FACTS, options, "rankdice", 1.5, "best.pth"))
    for seed, name in enumerate(("one", "city/two", "three.v2")):
        probs.write_probs(tmp_path / "probs" / f"{name}.npz", maps(seed)[0])
    return tmp_path / "probs"


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    assert decode.main() == 0


def test_every_bit_is_read_back(tmp_path) -> None:
    values = maps(3)[0]
    values[0, 0, :6] = torch.tensor([0.0, 1.0, 1e-45, 1.1754944e-38, 0.1, 1 - 2**-24])  # zeros, subnormals, the edges
    probs.write_probs(tmp_path / "x.npz", values)
    found = probs.read_probs(tmp_path / "x.npz")
    assert found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))
    # NumPy alone can read it.
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(file["probs"], values.numpy())


@pytest.mark.parametrize("key", ["probs", "probabilities", "softmax", "anything", None])
def test_probabilities_of_other_programs_are_read(key, tmp_path) -> None:
    values = maps(3)[0].numpy()
    path = tmp_path / ("x.npy" if key is None else "x.npz")
    if key is None:
        np.save(path, values.astype(np.float64))
    else:
        np.savez(path, **{key: values})
    assert torch.equal(probs.read_probs(path), torch.from_numpy(values))


@pytest.mark.parametrize(
    "arrays", [{"a": np.zeros((2, 3, 3), np.float32), "b": np.zeros(3)}, {"a": np.zeros((3, 3), int)}]
)
def test_other_arrays_are_refused(arrays, tmp_path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match="x.npz: .*expected"):
        probs.read_probs(tmp_path / "x.npz")


def test_a_folder_is_not_mixed(folder) -> None:
    index = probs.read_index(folder)
    probs.prepare_folder(folder, index)  # the same run continues
    other = replace(index, run="f" * 16, checkpoint="other.pth")
    with pytest.raises(UserError, match=r"another run \(best.pth\).*--force"):
        probs.prepare_folder(folder, other)
    with pytest.raises(UserError, match="another run"):
        probs.prepare_folder(folder, replace(index, data="VOC test"))
    probs.prepare_folder(folder, other, force=True)
    assert not list(folder.rglob("*.npz"))
    probs.write_probs(folder / "old.npz", maps()[0], run="a" * 16)
    (folder / probs.INDEX).unlink()
    with pytest.raises(UserError, match=r"probabilities of another run \(such as old.npz"):
        probs.prepare_folder(folder, other)
    probs.prepare_folder(folder, other, force=True)
    assert not list(folder.rglob("*.npz"))
    np.savez(folder / "foreign.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="did not write"):
        probs.prepare_folder(folder, other)
    assert (folder / "foreign.npz").exists()


def test_files_of_another_run_are_not_read(folder) -> None:
    probs.write_probs(folder / "z.npz", maps()[0], run="a" * 16)
    with pytest.raises(UserError, match="was not written by the run"):
        SavedProbs(folder)


def test_a_folder_of_images_may_be_called_masks(folder) -> None:
    probs.write_probs(folder / "masks" / "b.npz", maps()[0])
    assert [case.name for case in SavedProbs(folder).cases] == ["city/two", "masks/b", "one", "three.v2"]


def test_a_slice_is_written_as_it_is_seen(tmp_path) -> None:
    batch = maps(5, 6, 8, 8).permute(0, 1, 3, 2)
    probs.write_probs(tmp_path / "x.npz", batch[0, ::2])
    assert torch.equal(probs.read_probs(tmp_path / "x.npz"), batch[0, ::2])


@pytest.mark.parametrize("procedure", ["T", "max", "rankdice"])
@pytest.mark.parametrize("metric", ["dice", "iou"])
def test_decoded_masks_are_those_of_the_run(procedure, metric, folder, tmp_path, monkeypatch) -> None:
    run(monkeypatch, "--probs", folder, "-p", procedure, "--metric", metric, "-o", tmp_path / "out", "--masks")
    options = PredictOptions(threshold=0.3, prune=0.2, classes=(1, 2, 3), metric=metric)
    for seed, name in enumerate(("one", "city/two", "three.v2")):
        expected = PROCEDURES[procedure](maps(seed), options)
        picture = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert np.array_equal(picture, probs.labels_for_png(procedure, maps(seed), expected, options)[0])
        masks = tmp_path / "out" / f"{name}_masks"
        assert masks.exists() == (procedure != "max")
        if procedure != "max":
            found = {int(path.name[:3]): np.asarray(Image.open(path)) == 255 for path in masks.iterdir()}
            assert set(found) == set(expected.masks[0].flatten(1).any(1).nonzero()[:, 0].tolist())
            assert all(np.array_equal(mask, expected.masks[0, c].numpy()) for c, mask in found.items())


def test_options_left_out_are_those_of_the_run(folder, tmp_path, monkeypatch, capsys) -> None:
    run(monkeypatch, "--probs", folder)
    assert "written: 3 masks of rankdice" in capsys.readouterr().out
    run(monkeypatch, "--probs", folder)  # masks written into the folder are not taken for probabilities
    assert "written: 3 masks" in capsys.readouterr().out
    assert sorted(p.name for p in (folder / "masks/rankdice").iterdir()) == ["city", "one.png", "three.v2.png"]
    assert probs.read_index(folder).options == PredictOptions(threshold=0.3, prune=0.2, classes=(1, 2, 3))
    assert probs.read_index(folder).facts == FACTS


@pytest.mark.parametrize(
    ("name", "inside"), [("a/b", "a/b"), ("/etc/x", "etc/x"), ("../../x", "x"), ("a\\b", "a/b"), ("..", "image")]
)
def test_names_stay_inside_the_folder(name, inside) -> None:
    assert probs.file_name(name) == inside


def test_bad_folders_and_files(folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="contains no probs.json"):
        probs.read_index(tmp_path)
    whole = (folder / "one.npz").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a zip"):
        (folder / "one.npz").write_bytes(content)
        with pytest.raises(UserError, match="one.npz: not a file of probabilities, or truncated"):
            probs.read_probs(folder / "one.npz")
    probs.write_probs(folder / "one.npz", maps(0)[0] * 3)
    with pytest.raises(UserError, match="one.npz: .*\\[0, 1\\]"):
        run(monkeypatch, "--probs", folder, "-p", "rankdice")
    (folder / "probs.json").write_text("{}")
    with pytest.raises(UserError, match="not in the format of test.py --save-probs"):
        probs.read_index(folder)
    with pytest.raises(UserError, match="could not be written"):
        probs.prepare_folder(folder / "one.npz" / "below", probs.Index(FACTS, PredictOptions(), "T", 1.0, "x"))
