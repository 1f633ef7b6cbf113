"""Validation, test.py, the predictor and the export compute bit-identical probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import models
from trainer import Trainer
from utils import export
from utils.checkpoint import LoadedModel
from utils.config import resolve
from utils.config.schema import Config
from utils.errors import UserError
from utils.facts import Facts
from utils.losses import build as build_loss
from utils.predict import PredictOptions
from utils.predict.network import AMP_DTYPES, Ensemble, Network, check_finite
from utils.predictor import Predictor

FACTS = Facts(3, ("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)), (0.4,) * 3, (0.2,) * 3, 255)
IMAGES = torch.randint(0, 256, (2, 3, 48, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
# Arguments that make the networks small.
SMALL = {"UNet": {"width": 4}, "ENet": {}, "SegNet": {}}


class Net(nn.Module):
    """Logits that depend on position and neighbors, so that views of an image differ."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(tuple(x.shape[-2:]))
        return self.conv(x) * 3


def config(arch: str, **trainer: object) -> Config:
    raw = {
        "name": "x",
        "arch": {"type": arch, "args": SMALL.get(arch, {"pretrained": False})},
        "train_loader": {"type": "VOC", "args": {"data_dir": "away", "split": "train", "crop_size": 48}},
        "trainer": {"val": False, "monitor": "off", **trainer},
        "predict": {"temperature": 1.7},
    }
    return resolve(raw)


def built(settings: Config) -> LoadedModel:
    """Build a network with random weights, without its own initialization, which takes seconds for large networks."""
    with torch.device("meta"):
        model = models.build(settings.arch.type, 3, **settings.arch.args)
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for name, values in model.state_dict().items():
        if name.endswith("running_var"):
            values.fill_(1)
        elif values.is_floating_point():
            values.uniform_(-0.05, 0.05) if values.ndim > 1 else values.uniform_(0, 0.1)
    return LoadedModel(model, FACTS, settings, "softmax", Path("x.pth"), 1)


def paths(loaded: LoadedModel, images: Tensor) -> dict[str, Tensor]:
    """Return the probabilities that each user of a network computes from float images."""
    cpu, settings = torch.device("cpu"), loaded.config
    trainer = SimpleNamespace(
        config=settings,
        settings=settings.trainer,
        data=SimpleNamespace(facts=loaded.facts),
        device=cpu,
        loss=build_loss("CrossEntropyLoss2d", 255),
        amp=AMP_DTYPES[settings.trainer.amp],
        deployed_model=loaded.model,
        options=PredictOptions.from_config(settings.predict),
    )
    with torch.inference_mode():
        predictor = Predictor(loaded, mode="single", device=cpu, keep_probs=True)
        results = predictor(list(images))
        return {
            "test.py": loaded.network(cpu, scales=(1.0,), flip=False).forward(images)[1],
            "validation": Trainer.evaluator(trainer).network.forward(images)[1],
            "Predictor": torch.stack([result.probs for result in results]),
            # An exported program always computes in float32.
            **({"export": export.deployable(loaded)(images)} if settings.trainer.amp == "off" else {}),
        }


@pytest.mark.parametrize("arch", [name for name in models.MODELS if name != "External"])
def test_the_same_bits_wherever_a_network_is_used(arch: str) -> None:
    loaded = built(config(arch))
    half = replace(loaded, config=config(arch, amp="bf16", channels_last=True))
    large, small = IMAGES[:1].float() / 255, IMAGES[:1, :, :20, :24].float() / 255
    for used, images in ((loaded, large), (loaded, small), (half, small)):
        found = paths(used, images)
        for name, probs in found.items():
            assert torch.equal(probs, found["test.py"]), name
    with torch.inference_mode():
        assert not torch.equal(loaded.network(amp=None).probabilities(small), found["test.py"])


@pytest.mark.parametrize("size", [(1, 1), (20, 70), (31, 32)])
def test_small_images_are_padded_everywhere(size: tuple[int, int]) -> None:
    net = Net()
    images = IMAGES[:, :, : size[0], : size[1]]
    network = Network(net, FACTS, "softmax")
    probs = network.probabilities(images)
    assert probs.shape == (2, 3, *images.shape[-2:])
    assert net.sizes == [(max(32, images.shape[2]), max(32, images.shape[3]))]
    logits, same = network.forward(images)
    assert torch.equal(same, probs)
    assert torch.equal(logits.softmax(1), probs)


def test_sides_become_multiples_of_what_a_network_needs() -> None:
    net = Net()
    net.size_divisor = 16
    assert Network(net, FACTS, "softmax").probabilities(IMAGES).shape == (2, 3, 48, 40)
    assert net.sizes == [(48, 48)]


def test_views_are_averaged_as_probabilities() -> None:
    used = Network(Net(), FACTS, "softmax", temperature=2.0, scales=(1.0, 2.0), flip=True)
    with torch.no_grad():
        logits, probs = used.forward(IMAGES)
        x = used.normalize(IMAGES)
        expected = torch.zeros(2, 3, 48, 40)
        for size in ((48, 40), (96, 80)):
            view = nn.functional.interpolate(x, size=size, mode="bilinear")
            for flipped in (False, True):
                score = used.model(view.flip(-1) if flipped else view)
                score = score.flip(-1) if flipped else score
                score = nn.functional.interpolate(score, size=(48, 40), mode="bilinear")
                expected += (score / 2).softmax(1) / 4
    torch.testing.assert_close(probs, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits.softmax(1), probs, atol=1e-6, rtol=1e-5)
    assert used.averages
    assert not replace(used, scales=(1.0,), flip=False).averages


def test_the_logits_of_averaged_sigmoids_give_them_back() -> None:
    used = Network(Net(), FACTS, "sigmoid", flip=True)
    with torch.no_grad():
        logits, probs = used.forward(IMAGES)
    torch.testing.assert_close(logits.sigmoid(), probs, atol=1e-6, rtol=1e-5)
    assert logits.isfinite().all()


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    first = Network(Net(0), FACTS, "softmax", temperature=2.0)
    second = Network(Net(1), replace(FACTS, mean=(0.1,) * 3), "softmax", flip=True)
    both = Ensemble((first, second))
    with torch.no_grad():
        logits, probs = both.forward(IMAGES)
        expected = (first.probabilities(IMAGES) + second.probabilities(IMAGES)) / 2
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(logits.softmax(1), probs, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="class_names"):
        Ensemble((first, replace(second, facts=replace(FACTS, class_names=("b", "a", "c")))))
    with pytest.raises(UserError, match="the loss of the first implies softmax, that of another sigmoid"):
        Ensemble((first, replace(second, activation="sigmoid")))
    one = replace(FACTS, num_classes=1)
    Ensemble((replace(first, facts=one), replace(second, facts=one, activation="sigmoid")))  # both are sigmoids


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    probs = torch.full((3, 2, 4, 4), 0.5)
    check_finite(probs)
    probs[1, 0, 2, 2] = bad
    with pytest.raises(UserError, match=r"second: .* not finite"):
        check_finite(probs, ["first", "second", "third"])
