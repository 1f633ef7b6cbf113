"""The published checkpoints: structure, function and files, from recorded facts (no published code is run).

The facts are optional data beside the repository; where they are absent these tests are skipped.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from base.base_model import BaseModel
from models import MODELS, upstream
from models.cost import count
from tests.predecessors import PUBLISHED
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FACTS = Path(os.environ.get("SEGMENTATION_SHARED", ROOT.parent / "shared")) / "compat"
SPECS = sorted(path.name.removesuffix(".json.gz") for path in FACTS.glob("state_dicts/*.json.gz"))
GOLDEN = sorted(path.stem for path in FACTS.glob("golden/*.npz"))

#: Relative to the standard deviation of the logits. Other CPUs and thread counts differ by less than 1.5e-5.
TOLERANCE = 1e-4

#: GFLOPs of one image of 512 x 512, as recorded for the published code.
GFLOPS = {
    "PSPNet-resnet18-c19": 105.9,
    "PSPNet-resnet152-c19": 651.2,
    "DeepLab-resnet101-c19": 177.2,
    "DeepLab-resnet101_os8-c19": 520.3,
    "DeepLab-xception-c19": 165.4,
    "DeepLab-xception_os8-c19": 483.0,
    "DeepLab_DUC_HDC-resnet101-c19": 601.0,
    "UperNet-resnet101-c19": 365.2,
    "GCN-resnet50-c19": 54.0,
    "GCN-resnet50_deconv-c19": 55.2,
    "SegNet-vgg16_bn-c19": 344.9,
    "SegResNet-resnet50-c19": 99.7,
    "UNetResnet-resnet50-c19": 282.0,
    "FCN8-vgg16-c19": 380.5,
    "PSPDenseNet-densenet201-c19": 292.5,
    "PSPDenseNet-densenet121_scratch-c19": 110.3,
    "UNet-none-c19": 395.2,
    "ENet-none-c19": 4.1,
}


@cache
def spec(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((FACTS / "state_dicts" / f"{name}.json.gz").read_bytes()))


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def filled(name: str) -> dict[str, Tensor]:
    """Return the recorded state dict with the values of the fill rule."""
    facts, weights = spec(name), {}
    fill = facts["fill"]
    for key, shape, _, kind in facts["keys"]:
        if key in facts["aliases"]:
            weights[key] = weights[facts["aliases"][key]]
        elif kind == "bn_num_batches_tracked":
            weights[key] = torch.zeros(shape, dtype=torch.int64)
        else:
            noise = rng(zlib.crc32(f"{fill['salt']}:{key}".encode())).standard_normal(shape)
            value = _scaled(kind, noise, shape) * 2.0 ** fill["scale_log2"].get(key, 0)
            weights[key] = torch.from_numpy(value.astype(np.float32))
    return weights


def _scaled(kind: str, noise: np.ndarray, shape: list[int]) -> np.ndarray:
    match kind:
        case "conv_weight" | "conv_transpose_weight":
            return noise * math.sqrt(2 / math.prod(shape[1:]))
        case "conv_bias" | "conv_transpose_bias" | "bn_bias" | "bn_running_mean":
            return 0.2 * noise
        case "bn_weight":
            return 1 + 0.2 * noise
        case "bn_running_var":
            return 1 + 0.2 * np.abs(noise)
        case "prelu_weight":
            return 0.7 + 0.2 * noise
    raise AssertionError(kind)


def recorded_shapes(name: str, prefix: str = "") -> dict[str, Tensor]:
    """Return the recorded state dict without values."""
    return {prefix + key: torch.empty(shape, device="meta") for key, shape, *_ in spec(name)["keys"]}


def config_args(name: str) -> dict[str, Any]:
    """Return ``arch.args`` of a published config, with options that had no effect."""
    args = dict(spec(name)["kwargs"]) | {"freeze_bn": False, "freeze_backbone": False, "no_such_option": 1}
    return args | ({"backbone": "resnet101"} if spec(name)["model"] == "FCN8" else {})


def rebuilt(name: str, weights: dict[str, Tensor], device: str = "cpu") -> BaseModel:
    """Build the network of a recorded state dict as for a checkpoint, without spending time on initialization."""
    kind, args, classes = upstream.infer(weights, spec(name)["model"], config_args(name))
    with torch.device("meta"):
        model = models.build(kind, classes, **args)
    return model if device == "meta" else model.to_empty(device=device).eval()


# -- structure -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_recorded_state_dicts_fit_exactly(name: str) -> None:
    facts, weights = spec(name), recorded_shapes(name, prefix="module.")
    model = rebuilt(name, weights, device="meta")
    own, translated = model.state_dict(), upstream.translate(model, weights)
    assert translated.keys() == own.keys()
    assert all(translated[key].shape == own[key].shape for key in own)
    assert model.num_classes == facts["num_classes"]
    assert model.count_parameters() == facts["n_params"]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == facts["n_bn_layers"]
    unused = sum(p.numel() for n, p in model.named_parameters() if ".bn" in n and not p.requires_grad)  # GCN
    assert model.count_parameters(trainable_only=True) + unused == facts["n_params_trainable"]
    assert upstream.identify(upstream.strip_wrappers(weights)) == facts["model"]


@pytest.mark.parametrize("name", SPECS)
def test_shared_tensors_are_shared(name: str) -> None:
    facts, weights = spec(name), recorded_shapes(name)
    model = rebuilt(name, weights, device="meta")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert len({id(p) for p in parameters.values()}) == facts["n_param_tensors"]


@pytest.mark.parametrize("name", SPECS)
def test_parameter_groups_are_the_recorded_ones_or_better(name: str) -> None:
    facts, weights = spec(name), recorded_shapes(name)
    model = rebuilt(name, weights, device="meta")
    ours = {n: p.numel() for n, p in model.named_parameters() if n.startswith("backbone.")}
    recorded = facts["param_groups"]["counts"].get("backbone", {"tensors": 0, "elements": 0})
    if facts["model"] in {"PSPDenseNet", "SegNet", "FCN8"}:
        # Departures that are mended in both forms: the lost block4, the encoder counted as decoder; and FCN8's last
        # scoring layer counted as backbone.
        return
    assert (len(ours), sum(ours.values())) == (recorded["tensors"], recorded["elements"])


@pytest.mark.parametrize("name", [n for n in SPECS if n in GFLOPS])
def test_the_recorded_work_is_done(name: str) -> None:
    kind, args, classes = upstream.infer(recorded_shapes(name), spec(name)["model"], config_args(name))
    _, gflops = count(kind, args, 512, classes)
    assert gflops == pytest.approx(GFLOPS[name], rel=2e-3, abs=0.06)


def test_all_models_have_facts() -> None:
    if not SPECS:
        pytest.skip("the optional recorded facts are absent")
    assert {spec(name)["model"] for name in SPECS} == {n for n in MODELS if MODELS[n].published_mark}
    assert {n for n in MODELS if not MODELS[n].published_mark} == {"External"}


# -- function ------------------------------------------------------------------------------------------------


def compare(logits: Tensor, golden: Any, tag: str) -> None:
    """Compare with the recorded samples and, where the sizes agree, with the statistics of all logits."""
    sub, (mean, std, low, high) = golden[f"{tag}_sub"], golden[f"{tag}_stats"]
    ours = logits[:, :, ::7, ::7].numpy()
    # DeepLab_DUC_HDC's recorded output is larger than the input; ours is cropped at the bottom and right.
    same_size = tuple(golden[f"{tag}_shape"]) == tuple(logits.shape)
    sub = sub[:, :, : ours.shape[2], : ours.shape[3]]
    assert np.abs(ours - sub).max() / std < TOLERANCE
    if same_size:
        found = (logits.mean(), logits.std(correction=0), logits.min(), logits.max())
        assert np.abs(np.array([v.item() for v in found]) - (mean, std, low, high)).max() < 1e-3 * std
        histogram = torch.bincount(logits.argmax(1).flatten(), minlength=logits.shape[1]).numpy()
        moved = np.abs(histogram - golden[f"{tag}_argmax_hist"]).sum() / 2
        assert moved <= 1e-3 * histogram.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_published_form_computes_the_recorded_outputs(name: str) -> None:
    facts, weights = spec(name), filled(name)
    model = rebuilt(name, weights)
    upstream.load_weights(model, weights)
    with np.load(FACTS / "golden" / f"{name}.npz") as golden, torch.no_grad():
        for tag, given in facts["inputs"].items():
            x = torch.from_numpy(rng(given["seed"]).standard_normal(given["shape"]).astype(np.float32))
            model.eval()
            logits = model(x)
            assert logits.shape == (x.shape[0], facts["num_classes"], *x.shape[-2:])
            if name.startswith("SegResNet") and tag == "A":
                continue  # a known defect: for these sizes the published code shears the map
            compare(logits, golden, f"eval_{tag}")
            if facts["train_mode_outputs"] == 2:
                for module in model.train().modules():
                    if isinstance(module, (nn.BatchNorm2d, nn.modules.dropout._DropoutNd)):
                        module.eval()
                outputs = model(x)
                assert torch.equal(outputs["out"], logits)
                compare(outputs["aux"], golden, f"train_{tag}_aux")


@pytest.mark.parametrize("name", [n for n in GOLDEN if n in ("ENet-none-c19", "GCN-resnet18-c21")])
def test_the_fill_is_the_recorded_one(name: str) -> None:
    fill, weights = spec(name)["fill"], filled(name)
    arrays = [weights[key].numpy().astype(np.float64) for key, *_ in spec(name)["keys"]]
    assert sum(a.sum() for a in arrays) == pytest.approx(fill["sum"], rel=1e-9)
    assert sum(np.abs(a).sum() for a in arrays) == pytest.approx(fill["abs_sum"], rel=1e-9)


@pytest.mark.parametrize("name", [n for n in SPECS if n.rsplit("-c", 1)[0] == "GCN-resnet18"])
def test_the_default_form_is_another_function(name: str) -> None:
    weights = filled(name)
    kind, args, classes = upstream.infer(weights, spec(name)["model"], config_args(name))
    with torch.device("meta"):
        default = models.build(kind, classes, **args | {"published": False})
    published, default = rebuilt(name, weights), default.to_empty(device="cpu").eval()
    for model in (published, default):
        upstream.load_weights(model, weights)
    x = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (published(x) - default(x)).abs().mean()
    assert difference > 1e-2


@pytest.mark.parametrize("name", [n for n in SPECS if n.rsplit("-c", 1)[0] == "DeepLab-xception"])
def test_published_weights_do_not_fit_another_structure(name: str) -> None:
    weights = filled(name)
    kind, args, classes = upstream.infer(weights, spec(name)["model"], config_args(name))
    with torch.device("meta"):
        default = models.build(kind, classes, **args | {"published": False})
    with pytest.raises(UserError, match="the weights do not fit DeepLab"):
        upstream.load_weights(default.to_empty(device="cpu"), weights)


# -- files ---------------------------------------------------------------------------------------------------

SMALLEST = "GCN-resnet18-c21"
TIED = [n for n in SPECS if n in ("SegNet-vgg16_bn-c19", "PSPDenseNet-densenet121_scratch-c19")]


@pytest.mark.parametrize("name", TIED)
def test_synchronized_runs_keep_both_versions_of_a_shared_norm(name: str) -> None:
    weights = filled(name)
    shared = [a for a in spec(name)["aliases"] if a.endswith("running_mean")]
    assert shared
    for alias in shared:
        prefix = alias.removesuffix("running_mean")
        for entry in ("weight", "bias", "running_mean", "running_var"):
            weights[prefix + entry] = weights[prefix + entry] + 0.5
    model = rebuilt(name, weights)
    upstream.load_weights(model, weights)
    own = model.state_dict()
    for key, tensor in upstream.translate(model, weights).items():
        assert torch.equal(own[key], tensor), key
    convolutions = {id(m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Conv2d)}
    names = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Conv2d)]
    assert len(convolutions) < len(names)  # shared convolutions stay shared


@pytest.fixture(scope="module")
def recorded(shared_dir: Path) -> dict[str, Tensor]:
    assert (shared_dir / "compat").is_dir()
    return filled(SMALLEST)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_wrappers_prefixes_are_removed(recorded: dict[str, Tensor], prefix: str) -> None:
    model = models.build("GCN", 21, backbone="resnet18", published=True)
    upstream.load_weights(model, {prefix + key: tensor for key, tensor in recorded.items()})
    assert torch.equal(model.classifier.weight, recorded["final_conv.weight"])


def test_our_own_names_load(recorded: dict[str, Tensor]) -> None:
    source, target = (models.build("GCN", 4, backbone="resnet18") for _ in range(2))
    upstream.load_weights(target, {f"module.{key}": tensor for key, tensor in source.state_dict().items()})
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    kind, args, classes = upstream.infer(source.state_dict(), "GCN", {"kernel_size": 11})
    assert (kind, classes) == ("GCN", 4)
    assert args == {"kernel_size": 11, "backbone": "resnet18", "in_channels": 3, "pretrained": False}


def test_the_fixed_form_takes_published_weights(recorded: dict[str, Tensor]) -> None:
    model = models.build("GCN", 21, backbone="resnet18")
    upstream.load_weights(model, recorded)
    assert torch.equal(model.classifier.weight, recorded["final_conv.weight"])


@pytest.mark.parametrize(
    ("kind", "args", "classes", "message"),
    [
        ("GCN", {"backbone": "resnet18"}, 19, "for 21 classes, the model has 19"),
        ("GCN", {"backbone": "resnet34"}, 21, r"missing \(backbone.*backbone resnet18, the model has resnet34"),
        ("GCN", {"backbone": "resnet18", "in_channels": 4}, 21, "3 channels, the model for 4"),
        ("GCN", {"backbone": "resnet18", "use_deconv": True}, 21, r"5 missing \(upsamples"),
        ("PSPNet", {"backbone": "resnet18"}, 21, "published GCN"),
    ],
)
def test_what_does_not_fit_is_explained(
    recorded: dict[str, Tensor], kind: str, args: dict[str, Any], classes: int, message: str
) -> None:
    with torch.device("meta"):
        model = models.build(kind, classes, **args)
    with pytest.raises(UserError, match=message):
        upstream.load_weights(model, recorded)


def test_a_published_checkpoint_for_the_fixed_form_is_explained(shared_dir: Path) -> None:
    with torch.device("meta"):
        model = models.build("UperNet", 19)
    with pytest.raises(UserError, match="published: true"):
        upstream.load_weights(model, recorded_shapes("UperNet-resnet101-c19"))


def test_another_networks_weights_are_refused(recorded: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"not those of PSPNet .* published GCN"):
        upstream.infer(recorded, "PSPNet", {})
    with pytest.raises(UserError, match="not those of UNet"):
        upstream.infer(recorded, "UNet", {})


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("best", [0, float("-inf"), np.float64(0.71), np.float32(0.71)])
def test_published_checkpoint_files_load(recorded: dict[str, Tensor], tmp_path: Path, best: Any, legacy: bool) -> None:
    from utils.checkpoint import load_model

    weights = {f"module.{key}": tensor for key, tensor in recorded.items()}
    momentum = {0: {"momentum_buffer": torch.zeros(3)}}
    checkpoint = {
        "arch": "DataParallelWithCallback",
        "epoch": 77,
        "state_dict": weights,
        "optimizer": {"state": momentum, "param_groups": [{"lr": 0.01, "initial_lr": 0.01, "params": [0]}]},
        "monitor_best": best,
        "config": PUBLISHED | {"arch": {"type": "GCN", "args": {"backbone": "resnet18", "freeze_bn": False}}},
    }
    torch.save(checkpoint, tmp_path / "best_model.pth", _use_new_zipfile_serialization=not legacy)
    loaded = load_model(tmp_path / "best_model.pth")
    assert type(loaded.model).__name__ == "GCN"
    assert loaded.model.published
    assert not loaded.model.training
    assert (loaded.facts.num_classes, loaded.epoch) == (21, 77)
    assert torch.equal(loaded.model.classifier.weight, recorded["final_conv.weight"])
