"""Fine-tuning: matching weights are loaded, the others stay random, and both are listed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import models
import train
from models.upstream import transfer
from tests.small_checkpoint import write_checkpoint
from utils import checkpoint
from utils.errors import UserError


def build(kind: str, num_classes: int, seed: int = 0, **args: Any) -> Any:
    torch.manual_seed(seed)
    return models.build(kind, num_classes, **args)


def same(model: nn.Module, other: nn.Module, names: Any) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in names)


def test_another_number_of_classes_starts_the_head() -> None:
    source, model, before = (build("PSPNet", n, seed, backbone="resnet18") for n, seed in ((5, 1), (3, 2), (3, 2)))
    done = transfer(model, {f"module.{k}": v for k, v in source.state_dict().items()})
    heads = ["classifier.weight", "classifier.bias", "aux_head.2.weight", "aux_head.2.bias"]
    assert [name.split()[0] for name in done.reshaped] == heads
    assert not done.missing + done.unused + done.adapted
    assert same(model, source, done.taken)
    assert same(model, before, heads)
    assert "classifier.bias (5 in the file, 3 here)" in done.text()


def test_classes_of_the_same_name_keep_their_part_of_the_head() -> None:
    source, model, before = (build("UNet", n, seed, width=4) for n, seed in ((4, 1), (3, 2), (3, 2)))
    done = transfer(model, source.state_dict(), ("sky", "car", "cow"), ("road", "car", "sky", "tree"))
    assert done.by_class == ("final_conv.weight (2 of 3)", "final_conv.bias (2 of 3)")
    assert not done.reshaped
    new, old, first = (m.state_dict() for m in (model, source, before))
    for key in ("final_conv.weight", "final_conv.bias"):
        assert torch.equal(new[key][:2], old[key][[2, 1]])
        assert torch.equal(new[key][2], first[key][2])
    assert transfer(before, source.state_dict(), ("a", "b", "c"), ("road", "car", "sky", "tree")).by_class == ()


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("UNet", {"width": 8}),  # layers with as many channels as there are classes
        ("ENet", {}),
        ("GCN", {"backbone": "resnet18"}),
        ("PSPNet", {"backbone": "resnet18"}),
        ("DeepLab_DUC_HDC", {"backbone": "resnet18"}),
        ("External", {"factory": "tests.models.small_network:SmallNetwork", "args": {"classes": "$num_classes"}}),
    ],
)
def test_the_same_classes_in_another_order_keep_their_logits(kind: str, args: dict[str, Any]) -> None:
    names = ["road", "car", "sky", "tree", "sign", "pole", "wall", "bus"]
    order = [3, 0, 4, 7, 1, 2, 6, 5]
    source, model = (build(kind, 8, seed, **args) for seed in (1, 2))
    before = torch.get_rng_state()
    done = transfer(model, source.state_dict(), [names[i] for i in order], names)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not done.reshaped + done.missing + done.unused
    heads = len(done.by_class)
    assert len(done.taken) + heads == len([k for k in model.state_dict() if "num_batches" not in k])
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), source.eval()(images)[:, order], rtol=1e-4, atol=1e-5)
    if kind == "PSPNet":
        assert torch.equal(model.aux_head[2].weight, source.aux_head[2].weight[order])
    same_order = transfer(build(kind, 8, 3, **args), source.state_dict(), ["street", *names[1:]], names)
    assert not same_order.by_class


@pytest.mark.parametrize(("kind", "args"), [("UNet", {"width": 4}), ("ENet", {})])
@pytest.mark.parametrize("theirs", [("background", "vessel"), ("background", "vessel", "other")])
def test_one_class_of_several_keeps_the_rest_of_the_network(kind: str, args: dict, theirs: tuple[str, ...]) -> None:
    source, model = build(kind, len(theirs), 1, **args), build(kind, 1, 2, **args)
    done = transfer(model, source.state_dict(), ["vessel"], theirs)
    assert not done.reshaped + done.missing + done.unused + done.adapted
    assert len(done.by_class) in (1, 2)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), source.eval()(images)[:, 1:2], rtol=1e-4, atol=1e-5)


def test_a_head_that_cannot_be_found_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    args = {"factory": "tests.models.small_network:FixedSize", "args": {"classes": "$num_classes"}}
    source, model = (build("External", 2, seed, **args) for seed in (1, 2))
    transfer(model, source.state_dict(), ("car", "road"), ("road", "car"))
    assert "the head are not put into the order of the classes" in capsys.readouterr().err
    assert model.training


@pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (3, 4), (4, 3)])
def test_another_number_of_channels_adapts_the_first_layer(theirs: int, ours: int) -> None:
    source, model = (build("UNet", 4, seed, width=4, in_channels=n) for seed, n in ((1, theirs), (2, ours)))
    done = transfer(model, source.state_dict())
    (first,) = done.adapted
    assert first.startswith("start_conv.0")
    assert not done.reshaped + done.missing + done.unused
    weight, expected = model.state_dict()[first], source.state_dict()[first]
    torch.testing.assert_close(
        weight.sum(1) if ours == 1 else weight[:, 0] * ours / theirs,
        {True: expected.sum(1), False: expected[:, 0]}[ours == 1],
    )


@pytest.mark.parametrize("program", ["torchvision", "timm", "smp"])
def test_encoders_of_other_programs_match(program: str) -> None:
    if program == "torchvision":
        theirs, model = torchvision.models.resnet18(), build("UNetResnet", 3, backbone="resnet18")
        pairs = {"backbone.layer4.1.conv2.weight": "layer4.1.conv2.weight"}
    elif program == "timm":
        timm = pytest.importorskip("timm")
        theirs, model = timm.create_model("convnext_atto"), build("UperNet", 3, backbone="timm:convnext_atto")
        pairs = {"backbone.network.stages_3.blocks.1.mlp.fc2.weight": "stages.3.blocks.1.mlp.fc2.weight"}
    else:
        smp = pytest.importorskip("segmentation_models_pytorch")
        theirs = smp.Unet("resnet18", encoder_weights=None)
        model = build("PSPNet", 3, backbone="resnet18")
        pairs = {"backbone.layer1.0.conv1.weight": "encoder.layer1.0.conv1.weight"}
    done = transfer(model, theirs.state_dict())
    backbone = [k for k in model.state_dict() if k.startswith("backbone.") and "num_batches" not in k]
    assert set(done.taken) == set(backbone)
    assert not done.adapted
    assert all(name.startswith(("fc.", "head.", "decoder.", "segmentation_head.")) for name in done.unused)
    for ours, name in pairs.items():
        assert torch.equal(model.state_dict()[ours], theirs.state_dict()[name])


def test_a_published_checkpoint_of_other_classes_is_translated() -> None:
    source, model = build("UperNet", 5, 1, backbone="resnet18"), build("UperNet", 3, 2, backbone="resnet18")
    recorded = {
        k.replace("classifier.", "head.").replace("fpn.fuse.", "FPN.conv_fusion."): v
        for k, v in source.state_dict().items()
    }
    done = transfer(model, recorded)
    assert [name.split()[0] for name in done.reshaped] == ["classifier.weight", "classifier.bias"]
    assert not done.missing
    assert same(model, source, done.taken)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(UserError, match=r"only 0 of \d+ tensors fit ENet"):
        transfer(build("ENet", 3), build("UNet", 3, width=4).state_dict())


@pytest.mark.parametrize("prefix", ["generator.", "model.net.", "module.student.backbone."])
def test_a_prefix_that_all_names_share_is_left_out(prefix: str) -> None:
    source, model = build("UNet", 4, 1, width=4), build("UNet", 4, 2, width=4)
    weights = {f"{prefix}{k}": v for k, v in source.state_dict().items()} | {"criterion.weight": torch.ones(4)}
    done = transfer(model, weights)
    assert done.unused == ("criterion.weight",)
    assert same(model, source, source.state_dict())


def test_weights_of_the_encoder_alone_match_the_named_backbone() -> None:
    args = {"factory": "tests.models.small_network:SmallNetwork", "args": {"classes": 4}, "backbone": "encoder"}
    source, model = (build("External", 4, seed, **args) for seed in (1, 2))
    done = transfer(model, source.backbone.state_dict())
    assert not done.unused
    assert same(model.backbone, source.backbone, source.backbone.state_dict())


@pytest.mark.parametrize("form", ["model", "model_state_dict", "net", "two", "lightning", "alone", "safetensors"])
def test_files_of_other_programs_are_read(form: str, tmp_path: Path) -> None:
    source, model, path = build("UNet", 4, 1, width=4), build("UNet", 4, 2, width=4), tmp_path / "weights.pt"
    weights = source.state_dict()
    if form == "lightning":
        torch.save({"state_dict": {f"model.{k}": v for k, v in weights.items()}, "epoch": 3}, path)
    elif form == "two":
        torch.save({"ema": build("UNet", 4, 3, width=4).state_dict(), "model": weights}, path)
    elif form == "safetensors":
        path = path.with_suffix(".safetensors")
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    else:
        torch.save(weights if form == "alone" else {form: weights, "epoch": 3}, path)
    text = checkpoint.start_from(model, path)
    assert same(model, source, weights)
    assert "not" not in text.partition("\n")[2]
    assert str(path) in model.weights_from


def test_two_sets_of_weights_without_a_usual_name_are_refused(tmp_path: Path) -> None:
    weights = build("UNet", 4, width=4).state_dict()
    torch.save({"student": weights, "teacher": weights, "epoch": 3}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="weights are in student, teacher, so save one of them alone"):
        checkpoint.read(tmp_path / "weights.pt")


def test_train_says_what_was_taken_and_where_the_weights_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"length": 4, "size": 32, "batch_size": 2, "num_workers": 0}
    content = {
        "name": "tuned",
        "n_gpu": 0,
        "arch": {"type": "UNet", "args": {"width": 4}},
        "train_loader": {"type": "Shapes", "args": shapes | {"crop_size": 32}},
        "trainer": {"epochs": 1, "val": False, "monitor": "off", "save_dir": str(tmp_path), "tensorboard": False},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    path = write_checkpoint(tmp_path / "four_classes.pth")
    for weights, words in (([], "weights  : random weights"), (["-w", str(path)], f"weights  : {path} (")):
        monkeypatch.setattr(sys, "argv", ["train.py", "-c", str(tmp_path / "config.json"), *weights])
        assert train.main() == 0
        shown = capsys.readouterr().out
        assert words in shown
    assert "classes with the same name in both: 2: final_conv.weight (1 of 8), final_conv.bias (1 of 8)" in shown
