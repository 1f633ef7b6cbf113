"""Encoders from timm: every decoder that takes them, several families, weights from files and packages."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models.backbones import Needs, TimmEncoder, encoder
from models.backbones.from_timm import PACKAGES
from utils.errors import UserError

timm = pytest.importorskip("timm")

DECODERS = ("PSPNet", "UperNet", "DeepLab", "UNetResnet", "GCN")
#: The smallest of each family, and the strides that its deepest features can have.
FAMILIES = {
    "resnet10t": (32, 16, 8),
    "tf_efficientnet_lite0": (32, 16, 8),
    "convnext_atto": (32, 16, 8),
    "mobilenetv3_small_050": (32, 16, 8),
    "swin_tiny_patch4_window7_224": (32,),
    "vit_tiny_patch16_224": (16,),
}
LIGHT = "mobilenetv3_small_050"
LITE0 = "tf_efficientnet_lite0"
(PACKAGE,) = PACKAGES


def output(y: Tensor | dict[str, Tensor]) -> Tensor:
    return y["out"] if isinstance(y, dict) else y


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_decoder_trains_on_each_family_at_an_odd_size(decoder: str, family: str) -> None:
    torch.manual_seed(0)
    model = models.build(decoder, 3, backbone=f"timm:{family}").train()
    wanted = {"PSPNet": 8, "DeepLab": 16}.get(decoder, 32)
    assert model.output_stride == (wanted if wanted in FAMILIES[family] else FAMILIES[family][0])
    x, target = torch.randn(2, 3, 37, 61), torch.randint(3, (2, 37, 61))
    optimizer = torch.optim.SGD(
        [{"params": model.get_backbone_params(), "lr": 1e-3}, {"params": model.get_decoder_params(), "lr": 1e-2}]
    )
    for _ in range(2):
        optimizer.zero_grad()
        logits = output(model(x))
        assert logits.shape == (2, 3, 37, 61)
        loss = nn.functional.cross_entropy(logits, target)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    without = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("aux_head")]
    assert not without
    assert len(model.get_backbone_params()) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_timm(family: str) -> None:
    ours = TimmEncoder(family, finest=1).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs, features = ours.network(x), ours(x)
        odd = ours(x[..., :61, :67])
    for f, t, channels, stride in zip(features, theirs, ours.channels, ours.strides, strict=True):
        assert f.shape == (1, channels, -(-64 // stride), -(-96 // stride))
        torch.testing.assert_close(f, t.permute(0, 3, 1, 2) if family.startswith("swin") else t)
    assert [f.shape[2:] for f in odd] == [(-(-61 // s), -(-67 // s)) for s in ours.strides]


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_an_encoder_that_can_be_dilated_has_the_wanted_stride(stride: int) -> None:
    assert encoder(f"timm:{LIGHT}", 3, False, Needs(stride, must=True)).strides[-1] == stride


def test_freezing_reaches_timms_layers() -> None:
    model = models.build("UNetResnet", 3, backbone=f"timm:{LIGHT}", freeze_bn=True, freeze_backbone=True).train()
    assert not any(p.requires_grad for p in model.get_backbone_params())
    assert not any(m.training for m in model.backbone.modules())
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    model(torch.randn(2, 3, 33, 47)).mean().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


def test_torch_export_computes_the_same() -> None:
    model = models.build("UNetResnet", 3, backbone=f"timm:{LIGHT}").eval()
    x = torch.randn(1, 3, 37, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


# -- weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("convnext_atto")


@pytest.mark.parametrize("kind", ["alone", "wrapped", "safetensors"])
def test_weights_come_from_a_file(kind: str, classifier: nn.Module, tmp_path: Path) -> None:
    path, weights = tmp_path / "weights.pth", classifier.state_dict()
    if kind == "safetensors":
        path = tmp_path / "model.safetensors"
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    else:
        torch.save(weights if kind == "alone" else {"model": {f"module.{k}": v for k, v in weights.items()}}, path)
    loaded = TimmEncoder("convnext_atto", pretrained=str(path)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        # The classifier uses the features of the last stage, normalized if there is a norm.
        expected = classifier.eval().stages(classifier.stem(x))
        torch.testing.assert_close(loaded(x)[-1], expected)


def test_a_file_in_the_authors_format_is_renamed_by_timm(classifier: nn.Module, tmp_path: Path) -> None:
    names = [  # those of ConvNeXt's first release
        *((r"^stem\.", "downsample_layers.0."), (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.")),
        *((r"\.blocks\.", "."), ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"head\.norm", "norm")),
        (r"head\.fc", "head"),
    ]
    old = {}
    for key, tensor in classifier.state_dict().items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        old[key] = tensor
    torch.save({"model": old}, tmp_path / "weights.pth")
    loaded = TimmEncoder("convnext_atto", pretrained=str(tmp_path / "weights.pth")).network
    torch.testing.assert_close(loaded.stages_3.blocks[1].mlp.fc2.weight, classifier.stages[3].blocks[1].mlp.fc2.weight)
    torch.testing.assert_close(loaded.stem_0.weight, classifier.stem[0].weight)


@pytest.mark.parametrize("in_channels", [1, 5])
def test_the_first_layer_is_adapted_to_the_images(in_channels: int, tmp_path: Path) -> None:
    weights = timm.create_model(LIGHT).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    network = TimmEncoder(LIGHT, in_channels, str(tmp_path / "weights.pth")).network
    first, rgb = network.conv_stem.weight, weights["conv_stem.weight"]
    assert first.shape[1] == in_channels
    expected = rgb.sum(1, keepdim=True) if in_channels == 1 else rgb[:, [0, 1, 2, 0, 1]] * 3 / 5
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(1)}, "do not fit timm's mobilenetv3_small_050: conv_stem.weight is missing"),
        (3, "pretrained: .* found int"),
    ],
)
def test_other_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        models.build("GCN", 3, backbone=f"timm:{LIGHT}", pretrained=str(tmp_path / "weights.pth"))


def test_a_failed_download_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(UserError, match=r"could not download.*no route to host.*pretrained: false"):
        models.build("GCN", 3, backbone=f"timm:{LIGHT}", pretrained=True)


def test_a_package_with_weights_is_named_where_it_fits_and_refused_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    encoder = f"timm:{PACKAGES[PACKAGE][0]}"
    with pytest.raises(UserError, match=rf'^arch\.args\.pretrained: true: could not .*Write pretrained: "{PACKAGE}"'):
        models.build("GCN", 3, backbone=encoder, pretrained=True)
    for backbone in ("resnet18", f"timm:{LIGHT}"):
        with pytest.raises(UserError, match=rf'^arch\.args\.pretrained: {PACKAGE} .*weights of .*"{encoder}"'):
            models.build("UNetResnet", 3, backbone=backbone, pretrained=PACKAGE)


def test_without_timm_one_line_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        models.build("GCN", 3, backbone=f"timm:{LIGHT}")


@pytest.mark.parametrize(
    ("decoder", "args", "message"),
    [
        ("GCN", {"backbone": "timm:convnext_atoo"}, "did you mean convnext_atto"),
        ("GCN", {"backbone": "timm:mixer_s16_224"}, "one size only"),
        ("GCN", {"backbone": "timm:vit_tiny_patch16_224", "use_deconv": True}, "whose strides double"),
        ("DeepLab", {"backbone": "timm:densenet121", "output_stride": 8}, "Leave output_stride out"),
        ("UperNet", {"backbone": f"timm:{LIGHT}", "published": True}, "published"),
        ("PSPNet", {"backbone": f"timm:{LIGHT}", "stem": "deep"}, "its own stem"),
        ("PSPNet", {"backbone": f"timm:{LIGHT}", "pretrained": PACKAGE}, "contains the weights of"),
    ],
)
def test_impossible_arguments_are_refused(decoder: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.build(decoder, 3, **args)


# -- the package with weights of EfficientNet-Lite0 ------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"pip install {PACKAGE}"):
        TimmEncoder(LITE0, pretrained=PACKAGE)


def test_the_package_sees_a_street_in_a_photograph_of_one() -> None:
    from models.backbones.from_timm import _from_package
    from utils.images import read_image

    pytest.importorskip(PACKAGES[PACKAGE][1])
    shared = os.environ.get("SEGMENTATION_SHARED")
    if not shared:
        pytest.skip("needs a photograph")
    photograph = next(Path(shared, "data", "camvid").rglob("0001TP_007890.jpg"))
    image = torch.from_numpy(read_image(photograph)).permute(2, 0, 1)[None].float()
    image = nn.functional.interpolate(image, size=(300, 400), mode="bilinear", antialias=True)
    network = timm.create_model(LITE0).eval()
    network.load_state_dict(_from_package(PACKAGE, LITE0), strict=False)
    with torch.no_grad():
        classes = network((image - 127) / 128).softmax(1).topk(5).indices[0].tolist()
    assert set(classes) & {919, 920}  # street sign, traffic light
    ours = TimmEncoder(LITE0, pretrained=PACKAGE).eval()
    with torch.no_grad():
        x = (image[..., :288, :384] - 127) / 128
        deep = network.blocks(network.bn1(network.conv_stem(x)))
        torch.testing.assert_close(ours(x)[-1], deep)
