"""The PNGs that inference.py writes are the label maps that test.py scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
import test as test_script
from dataloaders.shapes.dataset import Shapes
from tests.shapes_checkpoint import loader, write_checkpoint
from utils.images.palette import write_mask
from utils.metrics import Metrics
from utils.predict import PROCEDURES, Prediction
from utils.predict import __main__ as decode
from utils.predict.files import labels_for_png
from utils.predictor import Predictor

IMAGES, SIZE = 5, 48
# Procedures and ways to choose classes.
DECISIONS = [("T", "auto"), ("max", "auto"), ("max", "rule"), ("rankdice", "auto"), ("rankdice", "rule")]

Run = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint, with the images of its test data as files next to it."""
    folder = tmp_path_factory.mktemp("written")
    data = Shapes(split="test", length=IMAGES, size=SIZE)
    (folder / "photos").mkdir()
    for i in range(IMAGES):
        sample = data[i]
        Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(folder / f"photos/{sample.name}.png")
        write_mask(folder / f"labels/{sample.name}.png", sample.label.numpy().astype(np.uint8))
    return write_checkpoint(folder / "best.pth", test_loader=loader("test", IMAGES, size=SIZE))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(script: object, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        assert script.main() == 0

    return call


def maps(folder: Path) -> dict[str, np.ndarray]:
    found = {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}
    assert len(found) == IMAGES
    return found


def infer(run: Run, model: Path, folder: Path, *options: object) -> dict[str, np.ndarray]:
    run(inference, "-m", model, "-i", model.parent / "photos", "-o", folder, "-d", "cpu", *options)
    return maps(folder)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize(("procedure", "presence"), DECISIONS)
@pytest.mark.parametrize("mode", ["single", "multiscale"])
def test_masks_are_those_of_test_py(
    run: Run, model: Path, tmp_path: Path, procedure: str, presence: str, mode: str
) -> None:
    """Both follow ``predict.mode``, which the fit may have set."""
    options = ("-p", procedure, "--set", f"predict.presence={presence}", "--set", f"predict.mode={mode}")
    run(test_script, "-r", model, "-o", tmp_path / "scores", "--save-masks", *options)
    written = infer(run, model, tmp_path / "masks", "--batch-size", 3, *options)
    (scored,) = (tmp_path / "scores/masks").iterdir()
    assert_equal(written, maps(scored))


@pytest.mark.parametrize(
    "options",
    [
        ("predict.presence=auto",),
        ("predict.presence=rule",),
        ("predict.presence=rule", "predict.rankdice.metric=iou", "predict.rankdice.smooth=5"),
    ],
    ids=" ".join,
)
def test_the_scored_map_is_the_written_one(run: Run, model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    chosen = [part for option in options for part in ("--set", option)]
    run(test_script, "-r", model, "-o", tmp_path / "scores", "-p", "all", *chosen)
    procedures = json.loads((tmp_path / "scores/results.json").read_text())["procedures"]
    for row, procedure in (("rankdice_map", "rankdice"), ("max_present", "max")):
        written = infer(run, model, tmp_path / row, "-p", procedure, *chosen)
        if row == "rankdice_map" or "predict.presence=rule" in options:  # otherwise max is the plain argmax
            assert_scored(written, procedures[row])


def assert_scored(written: dict[str, np.ndarray], scored: dict[str, float]) -> None:
    """Check that these label maps have these scores."""
    data = Shapes(split="test", length=IMAGES, size=SIZE)
    metrics = Metrics(Shapes.num_classes, keep_images=True)
    for i in range(IMAGES):
        labels = torch.from_numpy(written[data[i].name].astype(np.int64))[None]
        metrics.update(Prediction(labels=labels), data[i].label[None], [data[i].name])
    for name in ("Mean_Dice", "Mean_IoU", "Dataset_mIoU", "Pixel_Accuracy"):
        assert scored[name] == pytest.approx(metrics.compute()[name], rel=1e-6), name


@pytest.mark.parametrize(("procedure", "presence"), DECISIONS)
@pytest.mark.parametrize(
    "cut",
    [
        ("-mo", "single"),
        ("-mo", "sliding", "--tile", "32"),
        ("-mo", "single", "--max-pixels", "1000", "--tile", "24", "40"),
        ("-mo", "sliding", "--tile", "32", "--memory", "1e-5"),
        ("-mo", "single", "--memory", "1e-5"),
    ],
    ids=["whole", "sliding", "tiled", "streamed", "streamed-whole"],
)
def test_saved_probabilities_give_the_same_masks(
    run: Run, model: Path, tmp_path: Path, procedure: str, presence: str, cut: tuple
) -> None:
    """Tiles and streams: what is written follows from the probabilities by the procedure that test.py uses.

    The scores of these probabilities are those of the written maps.
    """
    options = ("-p", procedure, "--set", f"predict.presence={presence}")
    written = infer(run, model, tmp_path / "masks", "--probs", *cut, *options)
    run(decode, "--probs", tmp_path / "masks", "-o", tmp_path / "again")
    assert_equal(written, maps(tmp_path / "again"))
    row = {("max", "auto"): "max", ("max", "rule"): "max_present"}.get((procedure, presence), f"{procedure}_map")
    if procedure != "T":  # its label map leaves pixels unassigned, and it has no row
        scores = ("-p", "all", "--labels", model.parent / "labels", "-o", tmp_path / "scores")
        run(decode, "--probs", tmp_path / "masks", *scores)
        assert_scored(written, json.loads((tmp_path / "scores/results.json").read_text())["procedures"][row])


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_python_gives_the_same_masks(run: Run, model: Path, tmp_path: Path, procedure: str) -> None:
    written = infer(run, model, tmp_path / "masks", "-p", procedure)
    predict = Predictor(model, predict=procedure, device="cpu", keep_probs=True)
    for name, labels in written.items():
        result = predict(model.parent / f"photos/{name}.png")
        np.testing.assert_array_equal(labels, result.labels)
        probs = result.probs[None]
        found = PROCEDURES[procedure](probs, predict.options)
        np.testing.assert_array_equal(labels, labels_for_png(procedure, probs, found, predict.options)[0])
