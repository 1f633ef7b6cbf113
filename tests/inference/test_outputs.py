"""The other outputs of inference.py: overlays, probabilities, JSON, the table of expected scores."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.inference.running import Script, files, write
from tests.small_checkpoint import NAMES, everything_fitted, photo, write_checkpoint
from utils.predictor import Predictor


def test_all_outputs_besides_the_masks(script: Script, model: Path) -> None:
    write("photos/x/a.png", photo(40, 50))
    code, _, err = script("--overlay", "0.7", "--probs", "npz", "--json")
    assert code == 0, err
    assert files("masks") == ["expected_dice.csv", "probs.json", "x/a.json", "x/a.npz", "x/a.png", "x/a_overlay.jpg"]
    result = Predictor(model, mode="single", keep_probs=True)("photos/x/a.png")
    probs = np.load("masks/x/a.npz")["probs"]
    assert probs.dtype == np.float32
    np.testing.assert_array_equal(probs, result.probs.numpy())
    assert Image.open("masks/x/a_overlay.jpg").size == (50, 40)
    described = json.loads(Path("masks/x/a.json").read_text())
    assert (described["width"], described["height"], described["procedure"]) == (50, 40, "rankdice")
    assert sum(c["pixels"] for c in described["classes"]) == 40 * 50
    for entry in described["classes"]:
        assert entry["name"] == NAMES[entry["id"]]
        assert entry["pixels"] == (result.labels == entry["id"]).sum()
        assert "presence" not in entry  # not known without a fit
        assert entry["mask_pixels"] == result.volumes[entry["id"]]
        if entry["mask_pixels"]:
            assert entry["expected_dice"] == pytest.approx(result.scores[entry["id"]])
    assert described["expected_dice"] == pytest.approx(result.expected)


@pytest.mark.parametrize("memory", [[], ["--memory", "1e-5"]])
def test_probabilities_as_png(script: Script, model: Path, memory: list[str]) -> None:
    write("photos/a.png", photo(60, 50))
    assert script("--probs", "png", "-mo", "sliding", *memory)[0] == 0
    assert files("masks/a_probs") == [
        f"{c:03d}_{n}.png" for c, n in enumerate(["background", "dog___cat", "car", "tree"])
    ]
    probs = Predictor(model, mode="sliding", keep_probs=True)("photos/a.png").probs
    plane = np.asarray(Image.open("masks/a_probs/002_car.png")) / 255
    np.testing.assert_allclose(plane, probs[2], atol=0.5 / 255 + 5e-4)


def test_streamed_probabilities_are_a_regular_npz(script: Script) -> None:
    write("photos/a.png", photo(60, 50))
    assert script("--probs", "-mo", "sliding", "-o", "whole")[0] == 0
    assert script("--probs", "-mo", "sliding", "-o", "streamed", "--memory", "1e-5")[0] == 0
    whole, streamed = np.load("whole/a.npz")["probs"], np.load("streamed/a.npz")["probs"]
    assert streamed.shape == whole.shape
    np.testing.assert_allclose(streamed, whole, atol=1e-3)


def test_one_class_json(script: Script, tmp_path: Path) -> None:
    write("photos/a.png", photo(60, 50))
    one = write_checkpoint(tmp_path / "one.pth", num_classes=1)
    code, _, err = script("-m", one, "--json")
    assert code == 0, err
    described = json.loads(Path("masks/a.json").read_text())
    assert [c["name"] for c in described["classes"]] == ["background", "dog / cat"]
    assert "expected_dice" not in described["classes"][0]
    assert described["classes"][1]["mask_pixels"] == described["classes"][1]["pixels"]


def test_the_table_is_sorted_worst_first(script: Script, model: Path) -> None:
    for seed in range(5):
        write(f"photos/{seed}.png", photo(40, 50, seed=seed))
    _, out, _ = script()
    with open("masks/expected_dice.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "expected_dice", *NAMES[:4]]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores)
    assert len(rows) == 5
    result = Predictor(model, mode="single")(rows[0][0])
    assert scores[0] == pytest.approx(result.expected, abs=1e-4)
    assert result.presence is None
    assert f"lowest: {scores[0]:.3f}, {rows[0][0]}" in out


def test_a_presence_fit_says_which_classes_are_in_the_image(script: Script, tmp_path: Path) -> None:
    fitted = write_checkpoint(tmp_path / "fitted.pth", **everything_fitted())
    write("photos/a.png", photo(40, 50))
    for streamed, memory in (((), None), (("--memory", 1e-5), 10_737)):
        code, _, err = script("-m", fitted, "--json", "--force", *streamed)
        assert code == 0, err
        with open("masks/expected_dice.csv", newline="") as file:
            header, row = csv.reader(file)
        assert header == ["image", "expected_dice", *NAMES[:4], *(f"presence of {name}" for name in NAMES[:4])]
        presence = Predictor(fitted, mode="single", memory=memory)("photos/a.png").presence
        assert [float(cell) for cell in row[6:]] == pytest.approx(presence.tolist(), abs=1e-5)
        for entry in json.loads(Path("masks/a.json").read_text())["classes"]:
            assert entry["presence"] == pytest.approx(presence[entry["id"]], abs=1e-5)


def test_overlapping_masks_as_files(script: Script, model: Path) -> None:
    write("photos/x/a.png", photo(40, 50))
    assert script("--masks")[0] == 0
    result = Predictor(model, mode="single")("photos/x/a.png")
    found = {int(path.name[:3]): np.asarray(Image.open(path)) for path in Path("masks/x/a_masks").iterdir()}
    assert set(found) == set(result.volumes.nonzero()[0])
    for c, mask in found.items():
        np.testing.assert_array_equal(mask, result.masks[c] * 255)
    script("--masks", "--memory", "1e-6", "--tile", 64, "-p", "T")
    streamed = {int(path.name[:3]): np.asarray(Image.open(path)) for path in Path("masks/x/a_masks").iterdir()}
    whole = Predictor(model, mode="single", predict="T")("photos/x/a.png").masks
    assert set(streamed) == set(whole.any((1, 2)).nonzero()[0])
    for c, mask in streamed.items():
        assert (mask == whole[c] * 255).mean() > 0.99
    script("--masks", "--memory", "1e-6", "--tile", 64)
    for path in Path("masks/x/a_masks").iterdir():
        assert (np.asarray(Image.open(path)) == result.masks[int(path.name[:3])] * 255).mean() > 0.99
    code, _, err = script("--masks", "-p", "max")
    assert code == 2
    assert "procedure max has no overlapping masks" in err
