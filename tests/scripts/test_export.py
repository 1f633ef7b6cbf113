"""Exported programs: their results for sizes that were not traced, and the messages if the export fails."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from tests.models.test_models import calibrate
from tests.small_checkpoint import NAMES, everything_fitted, needs_new_torch, photo, write_checkpoint
from utils import errors, export
from utils.checkpoint import LoadedModel
from utils.config.schema import Predict
from utils.facts import Facts
from utils.predict import PROCEDURES, PredictOptions, label_map
from utils.predictor import Predictor

pytestmark = needs_new_torch


class Toy(nn.Module):
    """Typical parts of networks: strided convolutions, pyramid pooling, resizes, a skipped resize."""

    def __init__(self, classes: int = 3, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        context = F.interpolate(self.pool(y), size=y.shape[-2:], mode="bilinear", align_corners=False)
        y = 6 * self.head(torch.cat([y, context], 1))
        if y.shape[-2:] == x.shape[-2:]:
            return y
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def loaded(model: nn.Module, classes: int = 3, temperature: float = 1.0, channels: int = 3) -> LoadedModel:
    config = SimpleNamespace(
        arch=SimpleNamespace(type="Toy"),
        predict=Predict(temperature=temperature, threshold=0.4, presence="rule"),
        trainer=SimpleNamespace(amp="off", channels_last=False),
    )
    facts = Facts(classes, NAMES[:classes], ((0, 0, 0),) * classes, (0.4,) * channels, (0.2,) * channels, 255, channels)
    return LoadedModel(model.eval(), facts, config, "softmax", Path("toy.pth"), 1)


def pictures(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_a_network_at_other_sizes(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Toy()
    path = tmp_path / f"toy{export.SUFFIXES[kind]}"
    network = loaded(model, temperature=2.0).single()
    worst = export.export(loaded(model, temperature=2.0), path, kind)
    assert worst < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        properties = session.get_modelmeta().custom_metadata_map
        program = lambda x: torch.from_numpy(session.run(["probabilities"], {"images": x.numpy()})[0])  # noqa: E731
    else:
        extra = {"facts.json": ""}
        program = torch.export.load(path, extra_files=extra).module()
        properties = json.loads(extra["facts.json"])
    assert json.loads(properties["class_names"]) == list(NAMES[:3])
    assert "probabilities" in properties["output"]
    found = {key: properties[key] for key in ("temperature", "threshold", "presence", "prune", "metric", "procedure")}
    assert found == {
        "temperature": "2.0",
        "threshold": "0.4",
        "presence": "rule",
        "prune": "0.5",
        "metric": "dice",
        "procedure": "rankdice",
    }
    assert PredictOptions(**json.loads(properties["options"])) == PredictOptions(threshold=0.4, presence="rule")
    for size in ((1, 64, 64), (5, 65, 250), (1, 400, 301), (2, 96, 72), (3, 40, 33), (2, 9, 70), (1, 1, 1)):
        images = pictures(*size)
        if kind == "torch-export" and min(size[1:]) < 64:
            with pytest.raises(AssertionError, match=">= 64"):
                program(images)
            continue
        with torch.no_grad():
            if min(size[1:]) < 32:  # padded by repeating the border
                expected = network.probabilities(images)
                torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)
                continue
            expected = (model((images - 0.4) / 0.2) / 2.0).softmax(1)  # temperature, softmax
        torch.testing.assert_close(program(images).detach(), expected, rtol=1e-4, atol=1e-5)


def test_logits_and_one_channel(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Toy(classes=1, channels=4)
    path, images = tmp_path / "toy.pt2", pictures(2, 70, 71, 4)
    export.export(loaded(model, 1, channels=4), path, "torch-export")
    with torch.no_grad():
        logits = model((images - 0.4) / 0.2)
        torch.testing.assert_close(torch.export.load(path).module()(images), logits.sigmoid(), rtol=1e-4, atol=1e-5)
        export.export(loaded(model, 1, channels=4), path, "torch-export", logits=True)
        torch.testing.assert_close(torch.export.load(path).module()(images), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_enet_at_other_sizes(tmp_path: Path) -> None:
    """Its decoder returns to the encoder's sizes, which were halved and rounded up."""
    import onnxruntime

    torch.manual_seed(0)
    model = models.build("ENet", 3)
    calibrate(model)
    export.export(loaded(model), tmp_path / "enet.onnx", logits=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "enet.onnx"))
    for size in ((1, 64, 64), (2, 65, 131), (1, 99, 70), (1, 96, 73)):
        images = pictures(*size)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = model((images - 0.4) / 0.2).numpy()
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), size


@pytest.mark.parametrize("size", [(7, 9), (6, 6), (5, 40), (1, 1)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6, (2, 5), (None, 3)])
def test_portable_pooling_is_adaptive_pooling(size: tuple[int, int], bins: int | tuple[int, int]) -> None:
    x = pictures(2, *size).double()
    torch.testing.assert_close(export.adaptive_average(x, bins), F.adaptive_avg_pool2d(x, bins))


def test_pooling_is_left_as_it_was(tmp_path: Path) -> None:
    before = F.adaptive_avg_pool2d
    with pytest.raises(errors.UserError):
        export.export(loaded(Counting()), tmp_path / "x.pt2", "torch-export")
    assert F.adaptive_avg_pool2d is before


class Counting(nn.Module):
    """Branches on the values of its input, which no graph can express."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] if x.sum() > 0 else x[:, :3] + 1


class SizeDependent(nn.Module):
    """Behaves differently for large images: the traced program would be silently wrong for them."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[2] * x.shape[3] < 20_000 else x.flip(2)


class FreePadding(nn.Module):
    """ONNX cannot express this: a transposed convolution whose padding depends on the image size."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 3, 3, 2, 1), nn.ConvTranspose2d(3, 3, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x), output_size=x.shape[-2:])


def test_the_part_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.UserError, match=r"cannot be exported as onnx.*aten\.convolution"):
        export.export(loaded(FreePadding()), tmp_path / "x.onnx")


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
@pytest.mark.parametrize(
    ("model", "message"),
    [(Counting(), "Toy cannot be exported as"), (SizeDependent(), "does not match PyTorch")],
)
def test_models_that_cannot_be_exported(model: nn.Module, message: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{export.SUFFIXES[kind]}"
    with pytest.raises(errors.UserError, match=message):
        export.export(loaded(model), path, kind)
    assert not list(tmp_path.iterdir())


def test_the_program_and_its_metadata_decide_as_the_predictor_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As documented: export a checkpoint with the command, run it, and apply the procedure in the metadata."""
    import onnxruntime

    model = write_checkpoint(tmp_path / "best.pth", **everything_fitted(), mode="multiscale")
    monkeypatch.setattr(sys, "argv", ["export", "--model", str(model), "--format", "onnx"])
    monkeypatch.setattr(export, "SECONDS_OF_SILENCE", 0.2)
    assert export.main() == 0
    said = capsys.readouterr().out
    first, second, third = (line for line in said.splitlines() if " of 3: " in line)
    assert first == "1 of 3: trace the network"
    assert re.fullmatch(r"2 of 3: write the file \(\d+ s for the step before\)", second)
    assert re.fullmatch(r"3 of 3: compare its outputs with those of PyTorch \(\d+ s for the step before\)", third)
    assert re.search(r"\n   \d+ s so far\n", said)
    assert "largest difference to PyTorch" in said
    assert "the exported program processes each image in a single view, but inference.py uses mode multiscale" in said
    session = onnxruntime.InferenceSession(str(tmp_path / "best.onnx"))
    facts = session.get_modelmeta().custom_metadata_map
    options = PredictOptions(**json.loads(facts["options"]))
    fitted = everything_fitted()
    assert json.loads(facts["bias"]) == list(fitted["bias"])
    assert float(facts["temperature"]) == fitted["temperature"]
    image = photo(75, 90)
    pixels = (image[None].transpose(0, 3, 1, 2) / 255).astype(np.float32)
    probs = torch.from_numpy(session.run(None, {"images": pixels})[0])
    for name in PROCEDURES:
        expected = Predictor(model, predict=name, mode="single")(image)
        assert (label_map(name, probs, options)[0].numpy() == expected.labels).mean() > 0.999
    assert facts["procedure"] == name == "rankdice"
    found = PROCEDURES[name](probs, options)
    np.testing.assert_allclose(found.scores[0], expected.scores, atol=1e-4)
    assert (found.masks[0].numpy() == expected.masks).mean() > 0.999
    assert not found.chosen.all()  # chosen by presence


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_padding_same_of_timm(stride: int) -> None:
    padding = pytest.importorskip("timm.layers.padding", reason="timm is not installed")
    for length in range(1, 40):
        for kernel in (1, 2, 3, 5):
            for dilation in (1, 2):
                arguments = length, kernel, stride, dilation
                assert export.same_padding(*arguments) == padding.get_same_padding(*arguments), arguments


def test_padding_of_timm_leaves_simple_sizes() -> None:
    """With float divisions in its sizes, a network of ten such layers would take far too long to trace."""
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    network = nn.Sequential(*(layers.create_conv2d(c, 4, 3, stride=2, padding="same") for c in (3, 4, 4)))
    with export._traceable(), torch.no_grad():
        program = export._trace(network, 3)
    sizes = [str(n.meta["val"].shape) for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert any("//" in size for size in sizes)
    assert not any("Div" in size or "Max" in size for size in sizes), sizes[-1]
    images = torch.rand(1, 3, 75, 90)
    torch.testing.assert_close(program.module()(images), network(images))


MISTAKES = {
    "no such checkpoint": (["--model", "missing.pth"], "missing.pth: there is no such checkpoint"),
    "another suffix": (["--output", "model.pb"], "is named .onnx"),
    "no such folder": (["--output", "no/where/x.onnx"], "there is no folder no/where"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["export", "--model", "m.pth", *arguments])
    with pytest.raises(errors.UserError, match=message):
        export.main()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(errors.UserError, match="needs onnxscript, which is not installed: pip install onnxscript"):
        export.check_packages("onnx")
    export.check_packages("torch-export")
    monkeypatch.setattr(torch.export, "export", lambda mod, args: None)
    with pytest.raises(errors.UserError, match=r"needs torch 2\.9 or newer, found .*: pip install --upgrade torch"):
        export.export(Mock(), tmp_path / "model.pt2", "torch-export")
