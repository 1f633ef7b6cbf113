"""python -m utils.predict on probabilities of other programs: masks, volumes, scores against label files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.config.schema import Predict
from utils.errors import UserError
from utils.facts import Facts
from utils.images import voc_colormap
from utils.images.palette import write_mask
from utils.metrics import Metrics
from utils.predict import PROCEDURES, PredictOptions, probabilities
from utils.predict import __main__ as command
from utils.predict.files import labels_for_png
from utils.predict.saved_probs import Case, SavedProbs, write_labels


def drawn(seed: int, *shape: int) -> torch.Tensor:
    """Return softmax probabilities ``(C, ...)``."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).softmax(0)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    assert command.main() == 0


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Return a folder of plain files with labels beside it."""
    for seed in range(4):
        probs = drawn(seed, 3, 12, 16)
        folder = tmp_path / "probs"
        folder.mkdir(exist_ok=True)
        if seed % 2:
            np.save(folder / f"im{seed}.npy", probs.numpy())
        else:
            np.savez_compressed(folder / f"im{seed}.npz", probabilities=probs[:, None].numpy())  # as nnU-Net does
        labels = drawn(seed + 10, 3, 12, 16).argmax(0).numpy().astype(np.uint8)
        labels[:2] = 255
        write_mask(tmp_path / "labels" / f"im{seed}.png", labels)
    return tmp_path / "probs"


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_plain_files_become_masks(procedure: str, plain: Path, tmp_path: Path, monkeypatch) -> None:
    run(monkeypatch, "--probs", plain, "-p", procedure, "-o", tmp_path / "out")
    options = PredictOptions()
    for seed in range(4):
        probs = drawn(seed, 3, 12, 16)[None]
        expected = labels_for_png(procedure, probs, PROCEDURES[procedure](probs, options), options)[0]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"im{seed}.png")), expected)


def test_scores_are_those_of_the_metrics(plain: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "scores"
    run(monkeypatch, "--probs", plain, "-p", "all", "--labels", tmp_path / "labels", "-o", out)
    printed = capsys.readouterr().out
    run(monkeypatch, "--probs", plain, "-p", "all", "--labels", tmp_path / "labels", "--details")
    assert "## Class IoU" not in printed
    assert "## Class IoU" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())["procedures"]
    for name in ("T", "max", "rankdice"):
        metrics = Metrics(3, keep_images=True)
        for seed in range(4):
            labels = torch.from_numpy(np.array(Image.open(tmp_path / "labels" / f"im{seed}.png")))[None]
            metrics.update(PROCEDURES[name](drawn(seed, 3, 12, 16)[None], PredictOptions()), labels, [f"im{seed}"])
        assert results[name]["Mean_Dice"] == pytest.approx(metrics.compute()["Mean_Dice"])
        assert f"{results[name]['Mean_Dice']:.4f}"[:5] in printed
    assert "class 2" in printed
    run(monkeypatch, "--probs", plain, "-p", "max", "--labels", tmp_path / "labels", "--class-names", "a", "b", "cat")
    assert "cat" in capsys.readouterr().out
    run(monkeypatch, "--probs", plain, "-p", "max", "--labels", tmp_path / "labels", "-o", out, "--coi", 2)
    found = json.loads((out / "results.json").read_text())
    assert found["protocol"]["classes_of_interest"] == ["class 2"]
    assert found["procedures"]["max"]["Class_Dice"]["class 1"] is None
    with pytest.raises(UserError, match=r"--coi: found \[3\]; expected different class ids from 0 to 2"):
        run(monkeypatch, "--probs", plain, "--coi", 2, 3)


def test_volumes_are_decided_as_a_whole(tmp_path: Path, monkeypatch) -> None:
    nibabel = pytest.importorskip("nibabel")
    folder, probs = tmp_path / "probs", drawn(5, 3, 4, 12, 16)
    folder.mkdir()
    np.savez(folder / "case.npz", probabilities=probs.numpy())
    np.savez(folder / "other.npz", softmax=probs.numpy())
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    image = nibabel.Nifti1Image(np.zeros((16, 12, 4), np.uint8), affine)
    nibabel.save(image, folder / "case.nii.gz")  # the prediction that nnU-Net writes next to it
    run(monkeypatch, "--probs", folder, "-p", "rankdice", "-o", tmp_path / "out")
    tall = probs.reshape(3, 48, 16)[None]
    expected = labels_for_png("rankdice", tall, PROCEDURES["rankdice"](tall, PredictOptions()), PredictOptions())
    expected = expected.reshape(4, 12, 16)
    written = nibabel.load(tmp_path / "out" / "case.nii.gz")
    assert np.array_equal(written.affine, affine)
    assert np.array_equal(np.asarray(written.dataobj).T, expected)
    assert np.array_equal(np.load(tmp_path / "out" / "other.npy"), expected)
    # Scored against itself, each class with a mask is right.
    for name in ("case", "other"):
        nibabel.save(nibabel.Nifti1Image(expected.T, affine), folder / f"{name}.nii.gz")
    run(monkeypatch, "--probs", folder, "-p", "max", "--labels", folder, "-o", tmp_path / "scores")
    scores = json.loads((tmp_path / "scores/results.json").read_text())["procedures"]["max"]
    assert scores["Multiclass_Accuracy"] == pytest.approx((probs.argmax(0).numpy() == expected).mean())


def test_a_fit_is_applied_to_other_probabilities(tmp_path: Path, monkeypatch, capsys) -> None:
    """The temperature found for an overconfident network is applied to other probabilities."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)  # of the labels
    for folder in ("val", "test"):
        (tmp_path / folder).mkdir()
        for i in range(12):
            logits = torch.randn(3, 12, 16, generator=generator) * 2
            labels = torch.distributions.Categorical(logits=logits.movedim(0, -1)).sample().numpy().astype(np.uint8)
            np.save(tmp_path / folder / f"{i}.npy", (4 * logits).softmax(0).numpy())
            write_mask(tmp_path / f"{folder}_labels" / f"{i}.png", labels)
    fit = tmp_path / "fit.json"
    run(monkeypatch, "--probs", tmp_path / "val", "--labels", tmp_path / "val_labels", "--fit", fit)
    assert "--use" in capsys.readouterr().out
    found = json.loads(fit.read_text())
    assert found["temperature"] == pytest.approx(4, rel=0.15)
    chosen = ("--use", fit, "-p", "rankdice")
    run(monkeypatch, "--probs", tmp_path / "test", *chosen, "-o", tmp_path / "out")
    section = Predict(**found)
    options = PredictOptions.from_config(section)
    for i in range(12):
        saved = torch.from_numpy(np.load(tmp_path / "test" / f"{i}.npy"))[None]
        probs = probabilities(saved.log(), "softmax", section.temperature, section.bias)
        expected = labels_for_png("rankdice", probs, PROCEDURES["rankdice"](probs, options), options)[0]
        written = np.asarray(Image.open(tmp_path / "out" / f"{i}.png"))
        assert (written == expected).mean() > 0.99
    scores = []
    for more in ((), ("--use", fit)):
        labels = ("--labels", tmp_path / "test_labels", "-o", tmp_path / "scores")
        run(monkeypatch, "--probs", tmp_path / "test", "-p", "rankdice", *more, *labels)
        results = json.loads((tmp_path / "scores/results.json").read_text())
        scores.append(results["procedures"]["rankdice"])
    assert results["protocol"]["temperature"] == found["temperature"]
    assert results["protocol"]["fitted"].endswith(f"are those of {fit}")
    report = capsys.readouterr().out
    assert "then apply it with --use FILE." in " ".join(report.split())
    assert "checkpoint" not in report
    assert "loss" not in report.replace("test_loss", "").replace("largest_loss", "")
    gaps = [abs(score["Expected_Dice"] - score["Measured_Dice"]) for score in scores]
    assert gaps[1] < gaps[0] / 2
    fit.write_text("{}x")
    with pytest.raises(UserError, match="expected a file that --fit wrote"):
        run(monkeypatch, "--probs", tmp_path / "test", "--use", fit)


def test_mistakes_are_named(plain: Path, tmp_path: Path, monkeypatch) -> None:
    labels = tmp_path / "labels"
    (labels / "im3.png").rename(labels / "im9.png")
    with pytest.raises(UserError, match=r"no label file for 1 of 4 images, such as im3"):
        run(monkeypatch, "--probs", plain, "--labels", labels)
    write_mask(labels / "im3.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(UserError, match=r"im3.png: has the shape \(5, 5\)"):
        run(monkeypatch, "--probs", plain, "--labels", labels)
    with pytest.raises(UserError, match="expected 3 names, found 1"):
        run(monkeypatch, "--probs", plain, "--class-names", "a")
    np.save(plain / "im3.npy", drawn(0, 4, 12, 16).numpy())
    with pytest.raises(UserError, match=r"im3.npy: expected \(3, height, width\)"):
        run(monkeypatch, "--probs", plain)
    np.save(plain / "im3.npy", drawn(0, 3, 12, 16).numpy() * 3)
    with pytest.raises(UserError, match=r"im3.npy: expected probabilities in \[0, 1\]"):
        run(monkeypatch, "--probs", plain)
    np.save(plain / "im3.npy", np.full((3, 12, 16), np.nan))
    with pytest.raises(UserError, match="im3.npy: .* not finite"):
        run(monkeypatch, "--probs", plain, "-p", "max")
    for end in (".npy", ".nii.gz"):
        (labels / "im3.png").unlink(missing_ok=True)
        (labels / f"im3{end}").write_bytes(b"no labels")
        np.save(plain / "im3.npy", drawn(0, 3, 12, 16).numpy())
        with pytest.raises(UserError, match=f"im3{end}: cannot be read as labels|im3{end}: .* nibabel"):
            run(monkeypatch, "--probs", plain, "--labels", labels)
        (labels / f"im3{end}").unlink()
    np.save(plain / "im3.npy", np.zeros((3, 0, 16), np.float32))
    with pytest.raises(UserError, match=r"im3.npy: expected floating point .* of shape \(3, 0, 16\)"):
        run(monkeypatch, "--probs", plain)
    np.savez(plain / "im0.npz", probs=drawn(0, 3, 12, 16).permute(1, 2, 0).numpy())
    with pytest.raises(UserError, match=r"im0.npz: expected \(classes, height, width\), found \(12, 16, 3\)"):
        run(monkeypatch, "--probs", plain)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no probabilities"):
        SavedProbs(tmp_path / "empty")


def test_files_that_could_be_mixed_up_are_refused(plain: Path, tmp_path: Path, monkeypatch) -> None:
    np.save(plain / "im3.npy", torch.rand(3, 12, 16).numpy())
    with pytest.raises(UserError, match=r"im3\.npy: its classes do not sum to 1 in every pixel, unlike those of .*im0"):
        run(monkeypatch, "--probs", plain, "-p", "max")
    np.save(tmp_path / "labels/im1.npy", np.zeros((12, 16), np.uint8))
    with pytest.raises(UserError, match=r"im1\.png and .*im1\.npy have the same name"):
        SavedProbs(plain, tmp_path / "labels")
    np.savez(plain / "im3.npz", drawn(3, 3, 12, 16).numpy())
    with pytest.raises(UserError, match=r"im3\.npy and .*im3\.npz have the same name"):
        SavedProbs(plain)


def test_files_of_others_are_not_overwritten(plain: Path, tmp_path: Path, monkeypatch) -> None:
    labels = tmp_path / "labels"
    before = (labels / "im0.png").read_bytes()
    with pytest.raises(UserError, match=r"im0.png; .*--force"):
        run(monkeypatch, "--probs", plain, "-p", "max", "-o", labels)
    assert (labels / "im0.png").read_bytes() == before


def test_a_volume_that_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, facts = tmp_path / "volume.npy", Facts(2, ("a", "b"), voc_colormap(2), (0.5,), (0.2,), 255)
    write_labels(path, facts, Case("volume", tmp_path / "volume.npz"), np.ones((2, 3, 4), np.uint8))
    before = path.read_bytes()

    def full(file: Path, values: np.ndarray) -> None:
        Path(file).write_bytes(b"part")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="no space left"):
        write_labels(path, facts, Case("volume", tmp_path / "volume.npz"), np.zeros((2, 3, 4), np.uint8))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["volume.npy"]
