"""A fitted checkpoint in inference.py: its temperature and threshold are used without a flag."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
from dataloaders.shapes.dataset import Shapes
from tests.running import run_here
from tests.shapes_checkpoint import loader, raw_config
from utils import checkpoint
from utils.batch import Normalize
from utils.config.schema import Predict
from utils.predict import PROCEDURES, PredictOptions

ORIGINAL, CALIBRATED = "best_model.pth", "best_model_calibrated.pth"
NO_CLASS = 255

pytestmark = pytest.mark.slow  # a network is trained first

Masks = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Return a folder with an overconfident network, the result of ``test.py --fit``, and two images."""
    folder = tmp_path_factory.mktemp("calibrated")
    trainer = {"epochs": 3, "val": False, "monitor": "off", "tensorboard": False, "save_dir": str(folder)}
    rate = {"type": "AdamW", "args": {"lr": 0.01}}
    train_loader = loader("train", 200, shuffle=True, batch_size=4)
    config = raw_config(trainer=trainer, optimizer=rate, train_loader=train_loader, val_loader=loader("val", 20))
    (folder / "config.json").write_text(json.dumps(config))
    run_here(["train.py", "--config", str(folder / "config.json")], root)
    state = checkpoint.read(next(folder.glob("small/*/*/*/latest.pth")))
    for name in list(state["state_dict"])[-2:]:  # the last convolution
        state["state_dict"][name] *= 3
    checkpoint.save(state, folder / "best_model.pth")
    run_here(["test.py", "-r", str(folder / "best_model.pth"), "--fit", "-o", str(folder)], root)
    state = checkpoint.read(folder / CALIBRATED)
    # On so few images, the gain of another temperature and threshold is not clear.
    state["config"]["predict"] |= {"threshold": 0.4, "temperature": 2.5}
    checkpoint.save(state, folder / CALIBRATED)
    (folder / "photos").mkdir()
    for i, name in enumerate(("a", "b")):
        image = Shapes(split="test", length=2, size=64)[i].image
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"photos/{name}.png")
    return folder


@pytest.fixture
def masks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Masks:
    """Run inference.py in this process; return the labels that it wrote."""

    def run(model: str, procedure: str, *more: str) -> dict[str, np.ndarray]:
        output = tmp_path / f"{model}-{procedure}-{len(more)}"
        monkeypatch.setattr(sys, "argv", ["inference.py", *command(folder, model, procedure, output), *more])
        assert inference.main() == 0
        return {name: np.asarray(Image.open(output / f"{name}.png")) for name in ("a", "b")}

    return run


def command(folder: Path, model: str, procedure: str, output: Path) -> list[str]:
    files = ["-m", str(folder / model), "-i", str(folder / "photos"), "-o", str(output)]
    return [*files, "-p", procedure, "-mo", "single", "-d", "cpu"]


def fitted(folder: Path, model: str = CALIBRATED) -> Predict:
    """Return what a checkpoint's config says about prediction."""
    return Predict(**checkpoint.read(folder / model)["config"]["predict"])


def probabilities(folder: Path, name: str, predict: Predict) -> torch.Tensor:
    """Return the probabilities ``(C, H, W)`` of an image from the original network."""
    loaded = checkpoint.load_model(folder / "best_model.pth")
    image = torch.from_numpy(np.asarray(Image.open(folder / f"photos/{name}.png")).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = loaded.model.eval()(Normalize(loaded.facts.mean, loaded.facts.std)(image))
    bias = torch.zeros(logits.shape[1]) if predict.bias is None else torch.tensor(predict.bias)
    return (logits[0] / predict.temperature + bias.view(-1, 1, 1)).softmax(0)


def above(probs: torch.Tensor, threshold: float) -> np.ndarray:
    """Return the labels of procedure T: the most probable class where it is above the threshold."""
    best, labels = probs.max(0)
    return torch.where(best > threshold, labels, NO_CLASS).numpy()


def test_t_uses_the_fitted_temperature_and_threshold(folder: Path, masks: Masks) -> None:
    found = fitted(folder)
    temperature, threshold = found.temperature, found.threshold
    assert temperature > 1.5
    tuned, plain = masks(CALIBRATED, "T"), masks(ORIGINAL, "T")
    for name in ("a", "b"):
        np.testing.assert_array_equal(plain[name], above(probabilities(folder, name, Predict()), 0.5))
        np.testing.assert_array_equal(tuned[name], above(probabilities(folder, name, found), threshold))
    flags = ("--set", f"predict.temperature={temperature}", "--set", f"predict.threshold={threshold}")
    flags += ("--set", f"predict.bias={json.dumps(found.bias)}")
    by_flags = masks(ORIGINAL, "T", *flags)
    assert all((by_flags[name] == tuned[name]).all() for name in tuned)


def test_both_numbers_count(folder: Path, masks: Masks) -> None:
    """A higher threshold, which more pixels miss, so that both numbers differ from their defaults."""
    state = checkpoint.read(folder / CALIBRATED)
    state["config"]["predict"]["threshold"] = 0.6
    checkpoint.save(state, folder / "strict_calibrated.pth")
    drawn = masks("strict_calibrated.pth", "T")
    for name in ("a", "b"):
        sure, warm = probabilities(folder, name, Predict()), probabilities(folder, name, fitted(folder))
        np.testing.assert_array_equal(drawn[name], above(warm, 0.6))
        for other in (above(sure, 0.5), above(warm, 0.5), above(sure, 0.6)):
            assert (drawn[name] != other).any()


def test_rankdice_and_max_use_what_was_fitted(folder: Path, masks: Masks, tmp_path: Path) -> None:
    scores = {}
    for model in (ORIGINAL, CALIBRATED):
        predict = fitted(folder, model)
        options = PredictOptions.from_config(predict)
        masks(model, "rankdice")
        plain = masks(model, "max")
        with (tmp_path / f"{model}-rankdice-0/expected_dice.csv").open() as file:
            rows = {Path(row["image"]).stem: row for row in csv.DictReader(file)}
        for name in ("a", "b"):
            probs = probabilities(folder, name, predict)[None]
            np.testing.assert_array_equal(plain[name], PROCEDURES["max"](probs, options).labels[0])
            found = PROCEDURES["rankdice"](probs, options)
            for c, cls in enumerate(Shapes.class_names):
                written = rows[name][cls]
                assert bool(written) == bool(found.volumes[0, c])
                assert not written or float(written) == pytest.approx(found.scores[0, c].item(), abs=1e-4)
        scores[model] = [rows[name]["background"] for name in ("a", "b")]
    assert scores[ORIGINAL] != scores[CALIBRATED]
