"""Networks from elsewhere, built by a factory or read from a file: trained, resumed, tested and exported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import inference
import models
import test as test_script
import train
from tests.models.small_network import SmallNetwork
from tests.small_checkpoint import NAMES, needs_new_torch, write_checkpoint
from utils import checkpoint, export
from utils.config import __main__ as config_script
from utils.errors import UserError

SMALL = "tests.models.small_network:SmallNetwork"
ARGS = {"classes": "$num_classes", "channels": "$in_channels"}

NETWORKS: dict[str, dict[str, Any]] = {
    "own code": {"factory": SMALL, "args": ARGS | {"form": "mapping"}, "backbone": "encoder"},
    "transformers": {
        "factory": "transformers:SegformerForSemanticSegmentation",
        "args": {
            "config": {
                "factory": "transformers:SegformerConfig",
                "args": {
                    "num_labels": "$num_classes",
                    "hidden_sizes": [8, 8, 16, 16],
                    "depths": [1, 1, 1, 1],
                    "num_attention_heads": [1, 1, 2, 2],
                    "decoder_hidden_size": 16,
                },
            }
        },
        "backbone": "segformer",
    },
    "segmentation_models_pytorch": {
        "factory": "segmentation_models_pytorch:Unet",
        "args": {
            "encoder_name": "mobilenet_v2",
            "encoder_depth": 3,
            "encoder_weights": None,
            "decoder_channels": [16, 8, 8],
            "classes": "$num_classes",
        },
        "backbone": "encoder",
        "size_divisor": 8,
    },
    "torchvision": {
        "factory": "torchvision.models.segmentation:deeplabv3_mobilenet_v3_large",
        "args": {"weights": None, "weights_backbone": None, "num_classes": "$num_classes", "aux_loss": True},
        "backbone": "backbone",
    },
}


def shapes(split: str, length: int) -> dict[str, Any]:
    args = {"split": split, "length": length, "size": 32, "batch_size": 2, "num_workers": 0}
    return {"type": "Shapes", "args": args | ({"crop_size": 32, "shuffle": True} if split == "train" else {})}


def write_config(folder: Path, args: dict[str, Any]) -> Path:
    saved = str(folder / "saved")
    content = {
        "name": "external",
        "n_gpu": 0,
        "deterministic": True,
        "arch": {"type": "External", "args": args},
        "train_loader": shapes("train", 6),
        "val_loader": shapes("val", 4),
        "test_loader": shapes("test", 4),
        "optimizer": {"type": "SGD", "differential_lr": "backbone" in args, "args": {"lr": 0.01}},
        "trainer": {"epochs": 2, "save_dir": saved, "tensorboard": False, "save_period": 1, "val_per_epochs": 1},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs a script's ``main`` in this process with a command line."""

    def run(main: Callable[[], int | None], *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        return main() or 0

    return run


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@needs_new_torch
@pytest.mark.slow
@pytest.mark.parametrize("source", NETWORKS)
def test_networks_of_others_train_resume_are_scored_and_exported(
    source: str, run: Callable[..., int], tmp_path: Path
) -> None:
    pytest.importorskip(NETWORKS[source]["factory"].split(":")[0].split(".")[0])
    config = write_config(tmp_path, NETWORKS[source])
    fit = f"trainer.fit={str(source == 'own code').lower()}"  # which only depends on probabilities
    assert run(train.main, "-c", config, "--set", fit) == 0
    (last,) = (tmp_path / "saved").rglob("checkpoint-epoch2.pth")
    first, best, trained = last.with_name("checkpoint-epoch1.pth"), last.with_name("best_model.pth"), weights_of(last)
    assert not all(torch.equal(v, trained[k]) for k, v in weights_of(first).items())

    assert run(train.main, "-r", first, "--trust-code") == 0
    resumed = weights_of(last)
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(v, resumed[k]) for k, v in trained.items())

    assert run(test_script.main, "-r", best, "-p", "all", "--trust-code") == 0
    results = json.loads((best.parent / "results.json").read_text())
    assert {"T", "max", "rankdice"} <= {name.split()[0] for name in results["procedures"]}

    exported = tmp_path / "net.pt2"
    assert run(export.main, "-m", best, "-f", "torch-export", "-o", exported, "--trust-code") == 0
    assert exported.is_file()


def test_a_checkpoint_alone_does_not_choose_what_runs(run: Callable[..., int], tmp_path: Path) -> None:
    config = write_config(tmp_path, NETWORKS["own code"])
    assert run(train.main, "-c", config, "--set", "trainer.epochs=1") == 0
    (path,) = (tmp_path / "saved").rglob("best_model.pth")
    Image.new("RGB", (40, 30)).save(photograph := tmp_path / "photograph.png")
    for main, option in ((train.main, "-r"), (test_script.main, "-r"), (inference.main, "-m"), (export.main, "-m")):
        more = ["-i", photograph, "-o", tmp_path / "masks"] if main is inference.main else []
        with pytest.raises(UserError, match=rf"{SMALL}.*--trust-code"):
            run(main, option, path, *more)
    with pytest.raises(UserError, match="--trust-code"):
        checkpoint.load_model(path)
    assert checkpoint.load_model(path, trust_code=True).model.backbone is not None
    assert run(test_script.main, "-r", path, "-c", config, "-o", tmp_path / "scores") == 0
    more = ["-i", photograph, "-o", tmp_path / "masks", "--mode", "single", "--device", "cpu"]
    assert run(inference.main, "-m", path, "--trust-code", *more) == 0
    # A config without arch uses that of the checkpoint, so the user has not approved it.
    content = json.loads(config.read_text())
    del content["arch"]
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match="--trust-code"):
        run(test_script.main, "-r", path, "-c", config)


# -- the network ---------------------------------------------------------------------------------------------


def external(num_classes: int = 4, **args: Any) -> Any:
    return models.build("External", num_classes, **args)


@pytest.mark.parametrize("form", ["tensor", "mapping", "object"])
def test_outputs_of_each_form_become_logits_of_the_images_size(form: str) -> None:
    model = external(factory=SMALL, args=ARGS | {"form": form}).eval()
    x = torch.randn(2, 3, 37, 61)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 4, 37, 61)
        low = model.network.head(model.network.encoder(x))
        torch.testing.assert_close(y, nn.functional.interpolate(low, size=(37, 61), mode="bilinear"))
    assert set(model.train()(x)) == {"out", "aux"} if form == "mapping" else model.train()(x).shape == y.shape


def test_the_backbone_is_the_named_submodule() -> None:
    model = external(factory=SMALL, args=ARGS, backbone="encoder", freeze_backbone=True, freeze_bn=True).train()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"network.head.weight", "network.head.bias"}
    assert {id(p) for p in model.get_backbone_params()} == {id(p) for p in model.network.encoder.parameters()}
    assert not any(m.training for m in model.backbone.modules())
    assert model.network.dropout.training


def test_probabilities_become_logits_and_a_contradiction_is_refused() -> None:
    args = ARGS | {"form": "probabilities"}
    x = torch.randn(1, 3, 16, 16)
    model = external(factory=SMALL, args=args, outputs="probabilities").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x).softmax(1), model.network(x))
    with pytest.raises(UserError, match='write outputs: "probabilities"'):
        external(factory=SMALL, args=args).eval()(x)
    with pytest.raises(UserError, match="found probabilities, but"):
        external(factory=SMALL, args=ARGS, outputs="probabilities").eval()(x)


def test_probabilities_of_auxiliary_outputs_become_logits_too() -> None:
    model = external(factory=SMALL, args=ARGS | {"form": "aux probabilities"}, outputs="probabilities").train()
    model.network.dropout.p = 0.0
    x = torch.randn(2, 3, 16, 16)
    found, expected = model(x), model.network(x)
    for name in ("out", "aux"):
        torch.testing.assert_close(found[name].softmax(1), expected[name])


@pytest.mark.parametrize("form", ["probabilities", "sigmoid"])
def test_probabilities_keep_their_values_with_a_loss_of_sigmoids(form: str) -> None:
    args = ARGS | {"form": form}
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model = external(factory=SMALL, args=args, outputs="probabilities", activation="sigmoid").eval()
        torch.testing.assert_close(model(x).sigmoid(), model.network(x))
        one = external(1, factory=SMALL, args=ARGS | {"form": "sigmoid"}, outputs="probabilities").eval()
        torch.testing.assert_close(one(x).sigmoid(), one.network(x))
        if form == "sigmoid":
            with pytest.raises(UserError, match="the sum 1 at every pixel .or a loss with sigmoids"):
                external(factory=SMALL, args=args, outputs="probabilities").eval()(x)


@pytest.mark.parametrize("classes", [1, 4])
def test_outputs_that_may_be_those_of_a_sigmoid_are_reported_once(
    classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = external(classes, factory=SMALL, args=ARGS | {"form": "sigmoid"}).eval()
    for _ in range(2):
        model(torch.randn(1, 3, 16, 16))
    assert capsys.readouterr().err.count('if it ends in a sigmoid, write outputs: "probabilities"') == 1
    external(factory=SMALL, args=ARGS).eval()(torch.randn(1, 3, 16, 16))
    assert not capsys.readouterr().err


def test_the_loss_of_the_config_says_which_probabilities_a_network_returns(
    run: Callable[..., int], tmp_path: Path
) -> None:
    config = write_config(tmp_path, {"factory": SMALL, "args": ARGS | {"form": "sigmoid"}, "outputs": "probabilities"})
    options = ["--set", "trainer.epochs=1", "--set", "trainer.fit=false", "--set", "loss=BCEWithLogitsLoss2d"]
    assert run(train.main, "-c", config, *options) == 0
    (path,) = (tmp_path / "saved").rglob("best_model.pth")
    loaded = checkpoint.load_model(path, trust_code=True)
    images = torch.rand(1, 3, 32, 32)
    network = loaded.single()
    with torch.no_grad():
        expected = loaded.model.network(network.normalize(images))
        torch.testing.assert_close(network.probabilities(images), expected)
    with pytest.raises(UserError, match="the sum 1 at every pixel"):
        run(train.main, "-c", config, "--set", "trainer.epochs=1")


def test_a_parameter_that_the_backbone_shares_belongs_to_it() -> None:
    model = external(factory=SMALL.replace("SmallNetwork", "Tied"), args={"classes": 4}, backbone="encoder")
    shared = model.network.decoder.weight
    assert any(p is shared for p in model.get_backbone_params())
    assert not any(p is shared for p in model.get_decoder_params())
    assert len(model.get_backbone_params()) + len(model.get_decoder_params()) == len(list(model.parameters()))
    model.freeze(backbone=True)
    assert not shared.requires_grad


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "network."])
def test_weights_alone_are_scored_with_the_config_of_the_network(
    prefix: str, run: Callable[..., int], tmp_path: Path
) -> None:
    network = SmallNetwork(8).eval()
    torch.save({prefix + key: value for key, value in network.state_dict().items()}, tmp_path / "weights.pth")
    config = write_config(tmp_path, {"factory": SMALL, "args": ARGS})
    loaded = checkpoint.load_model(tmp_path / "weights.pth", config=config)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.network(x), network(x))
    if not prefix:
        assert run(test_script.main, "-r", tmp_path / "weights.pth", "-c", config, "-o", tmp_path / "scores") == 0
        torch.save({"encoder.0.weight": torch.zeros(1)}, tmp_path / "weights.pth")
        with pytest.raises(UserError, match="do not fit External: .*missing"):
            checkpoint.load_model(tmp_path / "weights.pth", config=config)


def test_config_check_downloads_no_weights(run: Callable[..., int], tmp_path: Path) -> None:
    fail = {"factory": "tests.models.small_network:fail"}
    config = write_config(tmp_path, {"factory": SMALL, "args": ARGS, "pretrained": {"width": fail}})
    with pytest.raises(UserError, match="out of luck"):
        run(train.main, "-c", config)
    assert run(config_script.main, "check", config) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "either factory"),
        ({"factory": "torch.nn"}, "package.module:function"),
        ({"factory": "no_such_package:f"}, "cannot import no_such_package"),
        ({"factory": "torch.nn:Conf2d"}, "has no function Conf2d"),
        ({"factory": "tests.models.small_network:fail"}, "raised RuntimeError: out of luck"),
        ({"factory": SMALL, "args": {"clases": 4}}, "raised TypeError.*clases"),
        ({"factory": "tests.models.small_network:not_a_module"}, "returns dict, not an nn.Module"),
        ({"factory": SMALL, "args": ARGS, "backbone": "stem"}, "no submodule 'stem'; it has encoder, dropout, head"),
        ({"factory": SMALL, "args": ARGS, "freeze_backbone": True}, "needs the backbone's name"),
        ({"factory": SMALL, "args": ARGS, "size_divisor": 0}, "size_divisor: found 0; should be greater"),
        ({"factory": SMALL, "args": ARGS, "pretrained": True}, "arguments of the factory"),
        ({"file": "absent.pt2"}, "there is no file absent.pt2"),
        ({"file": "config.json"}, "not a network in a file"),
    ],
)
def test_what_cannot_be_built_is_explained(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        external(**args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"classes": 7}, r"returns outputs of shape \(2, 7, 4, 4\).*the data has 4 classes"),
        ({"classes": 4, "form": "unknown"}, "a mapping with answer"),
        ({"classes": 4, "form": "several"}, "returns tuple of 2; expected a tensor"),
        ({"classes": 4, "form": "aux of two classes"}, r"outputs 'aux' of shape \(2, 2, 4, 4\); expected \(2, 4, h, w"),
        ({"classes": 4, "form": "mean over the batch"}, r"outputs of shape \(1, 4, 4, 4\); expected \(2, 4, h, w"),
        (
            {"classes": 4, "channels": 1},
            r'on images of shape \(2, 3, 32, 32\): RuntimeError: .*small_network.py, line \d+.*"\$in_channels"',
        ),
    ],
)
def test_outputs_that_do_not_fit_are_explained(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        external(factory=SMALL, args=args)(torch.randn(2, 3, 32, 32))


def test_pretrained_arguments_are_for_the_start_only() -> None:
    model = external(factory=SMALL, args=ARGS, pretrained={"width": 8})
    assert model.network.head.in_channels == 16
    assert external(factory=SMALL, args=ARGS, pretrained=False).network.head.in_channels == 32


# -- networks in files -----------------------------------------------------------------------------------------


def espnet(classes: int) -> nn.Module:
    """Return a network like ESPNet: a reduction, then the sum of parallel dilated convolutions."""

    class Pyramid(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.reduce = nn.Conv2d(width, width // 4, 1)
            self.branches = nn.ModuleList(
                nn.Conv2d(width // 4, width // 4, 3, padding=d, dilation=d) for d in (1, 2, 4, 8)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.reduce(x)
            parts = [branch(y) for branch in self.branches]
            for i in range(1, 4):
                parts[i] = parts[i] + parts[i - 1]
            return torch.relu(x + torch.cat(parts, 1))

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), Pyramid(16), Pyramid(16), nn.Conv2d(16, classes, 1)
    ).eval()


def write(network: nn.Module, path: Path, free: bool = True, size: tuple[int, ...] = (2, 3, 64, 96)) -> Path:
    """Write a network in the format of the suffix, with free batch, height and width or with one size."""
    x, Dim = torch.randn(size), torch.export.Dim
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},) if free else None
    if path.suffix == ".ts":
        torch.jit.trace(network, x).save(path)
    elif path.suffix == ".pt2":
        torch.export.save(torch.export.export(network, (x,), dynamic_shapes=shapes), path)
    else:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        torch.onnx.export(network, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=False)
    return path


@pytest.mark.parametrize("name", ["net.pt2", "net.ts", "net.onnx"])
def test_a_network_in_a_file_computes_what_it_did(name: str, tmp_path: Path) -> None:
    network = espnet(4)
    model = external(file=str(write(network, tmp_path / name))).eval()
    for size in ((1, 3, 40, 56), (3, 3, 64, 64)):
        x = torch.randn(size)
        with torch.no_grad():
            expected = nn.functional.interpolate(network(x), size=size[2:], mode="bilinear")
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="not trained"):
        model.train()


@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
def test_a_file_of_one_size_divides_batches_and_resizes_on_request(name: str, tmp_path: Path) -> None:
    network = espnet(4)
    path = str(write(network, tmp_path / name, free=False))
    x = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        expected = nn.functional.interpolate(network(x), size=(64, 96), mode="bilinear")
        torch.testing.assert_close(external(file=path)(x), expected, atol=1e-5, rtol=1e-4)
        other = torch.randn(1, 3, 50, 50)
        with pytest.raises(UserError, match="64 x 96 only, got 50 x 50.*arch.args.resize to true"):
            external(file=path)(other)
        assert external(file=path, resize=True)(other).shape == (1, 4, 50, 50)


class OfType(nn.Module):
    """Takes images of one data type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 4, 1).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


@pytest.mark.parametrize(
    ("name", "dtype"), [("net.pt2", torch.float16), ("net.pt2", torch.float64), ("net.onnx", torch.float16)]
)
def test_images_get_the_data_type_that_a_file_takes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network = OfType(dtype).eval()
    if name == "net.onnx":
        pytest.importorskip("onnxscript")
        torch.onnx.export(network, (torch.rand(1, 3, 8, 8, dtype=dtype),), tmp_path / name, dynamo=True, verbose=False)
    else:
        program = torch.export.export(network, (torch.rand(1, 3, 8, 8, dtype=dtype),))
        torch.export.save(program, tmp_path / name)
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        found = external(file=str(tmp_path / name)).eval()(x)
        torch.testing.assert_close(found.float(), network(x.to(dtype)).float(), rtol=1e-3, atol=1e-3)


@needs_new_torch
def test_a_file_of_the_exporter_is_not_normalized_twice(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    model = write_checkpoint(tmp_path / "four.pth")
    config = json.loads(write_config(tmp_path, {}).read_text())
    names = list(NAMES[:4])
    facts = {"classes": names, "size": 64}
    for loader in ("train_loader", "val_loader", "test_loader"):
        config[loader]["args"] |= facts
    for name, kind in (("net.pt2", "torch-export"), ("net.onnx", "onnx")):
        path, out = tmp_path / name, tmp_path / "config.json"
        assert run(export.main, "-m", model, "-f", kind, "-o", path) == 0
        config["arch"]["args"] = {"file": str(path), "outputs": "probabilities"}
        for mean, std, classes, message in (
            ([0.45] * 3, [0.25] * 3, names, "normalizes the images itself.*mean to .0, 0, 0. and std to .1, 1, 1."),
            ([0] * 3, [1] * 3, names[::-1], "for the classes background, dog / cat.*has tree, car"),
            ([0] * 3, [1] * 3, names, ""),
        ):
            config["train_loader"]["args"] |= {"mean": mean, "std": std, "classes": classes}
            out.write_text(json.dumps(config))
            if message:
                with pytest.raises(UserError, match=message):
                    checkpoint.load_model(path, config=out)
            else:
                loaded, images = checkpoint.load_model(path, config=out), torch.rand(1, 3, 64, 70)
                with torch.no_grad():
                    expected = checkpoint.load_model(model).single().probabilities(images)
                    torch.testing.assert_close(loaded.single().probabilities(images), expected, atol=1e-4, rtol=1e-3)


def test_config_check_accepts_a_network_in_a_file(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(espnet(8), tmp_path / "espnet.pt2")
    assert run(config_script.main, "check", write_config(tmp_path, {"file": str(path)})) == 0
    assert "train.py cannot train a network in a file" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["option", "config"])
def test_an_exported_network_is_scored_and_used_without_its_code(
    how: str, run: Callable[..., int], tmp_path: Path
) -> None:
    path = write(espnet(8), tmp_path / "espnet.pt2")
    config = write_config(tmp_path, {"file": str(path)})
    given = ["-r", path] if how == "option" else []
    out = tmp_path / "scores"
    assert run(test_script.main, *given, "-c", config, "-p", "all", "-o", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["protocol"]["images"] == 4
    if how == "option":
        with pytest.raises(UserError, match="not trained"):
            run(train.main, "-c", config)
        with pytest.raises(UserError, match="pass the config of its run with --config"):
            run(test_script.main, "-r", path)
        with pytest.raises(UserError, match="whole network"):
            run(train.main, "-c", config, "-w", path)
