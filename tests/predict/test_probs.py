"""Saved probabilities: the same bits, hence the same masks, under any procedure; and files that went wrong."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small_checkpoint import NAMES
from utils.errors import UserError
from utils.facts import Facts
from utils.images.palette import default_palette
from utils.predict import PROCEDURES, PredictOptions, decode
from utils.predict import stored as probs

FACTS = Facts(4, NAMES[:4], default_palette(4), (0.5,) * 3, (0.2,) * 3, 255)


def maps(seed: int = 0, classes: int = 4, height: int = 11, width: int = 17) -> torch.Tensor:
    logits = torch.randn(1, classes, height, width, generator=torch.Generator().manual_seed(seed)) * 4
    return logits.softmax(1) if classes > 1 else logits.sigmoid()


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the probabilities of three images, one of them below a sub-folder."""
    options = PredictOptions(threshold=0.3, prune=0.2, classes=(1, 2, 3))
    writer = probs.ProbsWriter(tmp_path / "probs", probs.Index(FACTS, options, "rankdice", 1.5, "best.pth"))
    for seed, name in enumerate(("one", "city/two", "three.v2")):
        writer.write([name], maps(seed))
    return tmp_path / "probs"


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    assert decode.main() == 0


def test_every_bit_comes_back(tmp_path) -> None:
    values = maps(3)[0]
    values[0, 0, :6] = torch.tensor([0.0, 1.0, 1e-45, 1.1754944e-38, 0.1, 1 - 2**-24])  # zeros, subnormals, the edges
    probs.write_probs(tmp_path / "x.npz", values)
    found = probs.read_probs(tmp_path / "x.npz")
    assert found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))
    # And NumPy alone reads it, as documented.
    with np.load(tmp_path / "x.npz") as file:
        again = np.moveaxis(file["planes"], 0, -1).copy().view("<f4")[..., 0]
    assert np.array_equal(again, values.numpy())


def test_files_are_smaller_than_raw_and_than_numpys(tmp_path) -> None:
    smooth = torch.nn.functional.interpolate(maps(1, 8, 16, 16).log(), size=(128, 128), mode="bilinear").softmax(1)[0]
    probs.write_probs(tmp_path / "ours.npz", smooth)
    np.savez_compressed(tmp_path / "numpy.npz", probs=smooth.numpy())
    ours, numpys = ((tmp_path / name).stat().st_size for name in ("ours.npz", "numpy.npz"))
    assert ours < numpys < 1.05 * smooth.numel() * 4


def test_a_slice_is_written_as_it_is_seen(tmp_path) -> None:
    batch = maps(5, 6, 8, 8).permute(0, 1, 3, 2)
    probs.write_probs(tmp_path / "x.npz", batch[0, ::2])
    assert torch.equal(probs.read_probs(tmp_path / "x.npz"), batch[0, ::2])


@pytest.mark.parametrize("procedure", ["T", "max", "rankdice"])
@pytest.mark.parametrize("metric", ["dice", "iou"])
def test_decoded_masks_are_those_of_the_run(procedure, metric, folder, tmp_path, monkeypatch) -> None:
    run(monkeypatch, "--probs", folder, "-p", procedure, "--metric", metric, "-o", tmp_path / "out", "--packed")
    options = PredictOptions(threshold=0.3, prune=0.2, classes=(1, 2, 3), metric=metric)
    for seed, name in enumerate(("one", "city/two", "three.v2")):
        expected = PROCEDURES[procedure](maps(seed), options)
        picture = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert np.array_equal(picture, probs.pictures(procedure, maps(seed), expected, options)[0])
        packed = tmp_path / "out" / f"{name}.masks.npz"
        assert packed.exists() == (procedure != "max")
        if procedure != "max":
            with np.load(packed) as file:
                masks = np.unpackbits(file["masks"], axis=-1, count=file["shape"][-1]).astype(bool)
                assert ("scores" in file) == (procedure == "rankdice")
            assert np.array_equal(masks, expected.masks[0].numpy())


def test_what_is_not_said_is_as_in_the_run(folder, tmp_path, monkeypatch, capsys) -> None:
    run(monkeypatch, "--probs", folder)
    assert "written: 3 masks of rankdice" in capsys.readouterr().out
    run(monkeypatch, "--probs", folder)  # masks written into the folder are not taken for probabilities
    assert "written: 3 masks" in capsys.readouterr().out
    assert sorted(p.name for p in (folder / "masks/rankdice").iterdir()) == ["city", "one.png", "three.v2.png"]
    assert probs.read_index(folder).options == PredictOptions(threshold=0.3, prune=0.2, classes=(1, 2, 3))
    assert probs.read_index(folder).facts == FACTS


def test_labels_of_overlapping_masks() -> None:
    values = torch.tensor([[[[0.5, 0.3, 0.6]], [[0.4, 0.6, 0.1]]]])
    masks = torch.tensor([[[[True, True, False]], [[True, False, False]]]])
    assert probs.mask_labels(values, masks, 255).tolist() == [[[0, 0, 255]]]
    assert probs.mask_labels(values[:, :1], masks[:, :1], 255).tolist() == [[[1, 1, 0]]]


@pytest.mark.parametrize(
    ("name", "inside"), [("a/b", "a/b"), ("/etc/x", "etc/x"), ("../../x", "x"), ("a\\b", "a/b"), ("..", "image")]
)
def test_names_stay_inside_the_folder(name, inside) -> None:
    assert probs.file_name(name) == inside


def test_bad_folders_and_files(folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="holds no probs.json"):
        probs.read_index(tmp_path)
    whole = (folder / "one.npz").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a zip"):
        (folder / "one.npz").write_bytes(content)
        with pytest.raises(UserError, match="one.npz: not the probabilities of an image, or cut short"):
            probs.read_probs(folder / "one.npz")
    probs.write_probs(folder / "one.npz", maps(0)[0] * 3)
    with pytest.raises(UserError, match="one.npz: .*\\[0, 1\\]"):
        run(monkeypatch, "--probs", folder, "-p", "rankdice")
    (folder / "probs.json").write_text("{}")
    with pytest.raises(UserError, match="not as test.py --save-probs writes it"):
        probs.read_index(folder)
    with pytest.raises(UserError, match="could not be written"):
        probs.ProbsWriter(folder / "one.npz" / "below", probs.Index(FACTS, PredictOptions(), "T", 1.0, "x"))
