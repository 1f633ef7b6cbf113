"""Backbones have the documented features, agree with torchvision, and load weights or say why not."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from models.backbones import Backbone, DenseNet, ResNet, Xception, vgg
from models.backbones.common import adapt_first_conv
from models.backbones.resnet import RESNETS
from models.deeplab_duc_hdc import hybrid_dilations
from utils.errors import UserError

FAMILY = [
    *((ResNet, {"name": name, "output_stride": stride}) for name in RESNETS for stride in (32, 16, 8)),
    (ResNet, {"name": "resnet50", "output_stride": 8, "stem": "deep"}),
    (ResNet, {"name": "resnet50", "output_stride": 8, "stem_stride": 1}),
    (ResNet, {"name": "resnet18", "dilations": (1, 1, (2, 3), 4), "output_stride": 16}),
    *((vgg, {"name": name}) for name in ("vgg11", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19_bn")),
    *((DenseNet, {"name": name, "output_stride": 8}) for name in ("densenet121", "densenet161")),
    (DenseNet, {"name": "densenet169", "output_stride": 32}),
    (DenseNet, {"name": "densenet201", "output_stride": 16, "last_norm": False}),
    *((Xception, {"output_stride": stride}) for stride in (16, 8)),
]


def _label(value: Any) -> str:
    if callable(value):
        return value.__name__
    return ",".join(str(v) for v in value.values())


def randomized(network: nn.Module) -> nn.Module:
    """Give each BatchNorm distinct statistics and parameters, so that a missing or exchanged one shows."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.2)
    return network.eval()


@pytest.mark.parametrize(("make", "args"), FAMILY, ids=_label)
@pytest.mark.parametrize("in_channels", [3, 5])
def test_features_have_the_announced_channels_and_strides(make: Any, args: dict, in_channels: int) -> None:
    with torch.device("meta"):
        backbone = make(in_channels=in_channels, **args)
        features = backbone(torch.empty(2, in_channels, 192, 128))
    assert isinstance(backbone, Backbone)
    assert [f.shape[1] for f in features] == list(backbone.channels)
    assert [(192 // f.shape[2], 128 // f.shape[3]) for f in features] == [(s, s) for s in backbone.strides]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_resnets_compute_what_torchvision_computes(name: str, output_stride: int, tmp_path: Path) -> None:
    dilate = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}[output_stride]
    if name == "resnet18" and output_stride < 32:
        pytest.skip("torchvision does not dilate basic blocks")
    theirs = randomized(torchvision.models.get_model(name, replace_stride_with_dilation=list(dilate)))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = ResNet(name, pretrained=str(tmp_path / "weights.pth"), output_stride=output_stride).eval()
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        y, features = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))), ours(x)
        for stage, feature in zip((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), features, strict=True):
            y = stage(y)
            torch.testing.assert_close(feature, y)


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_vggs_compute_what_torchvision_computes(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):  # the classifier's 124 million weights need no memory
        theirs = torchvision.models.get_model(name, num_classes=2)
    features = theirs.features.to_empty(device="cpu")
    for module in features.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()
    randomized(features)
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, tmp_path / "weights.pth")
    ours = vgg(name, pretrained=str(tmp_path / "weights.pth")).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[-1], features(x))


def test_densenets_compute_what_torchvision_computes(tmp_path: Path) -> None:
    theirs = randomized(torchvision.models.densenet121(num_classes=2))
    # torchvision's files still have the old names (norm.1 for norm1).
    old = {k.replace("norm1", "norm.1").replace("conv1", "conv.1"): v for k, v in theirs.state_dict().items()}
    old = {k.replace("norm2", "norm.2").replace("conv2", "conv.2"): v for k, v in old.items()}
    torch.save(old, tmp_path / "weights.pth")
    ours = DenseNet("densenet121", pretrained=str(tmp_path / "weights.pth")).eval()
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[-1], theirs.features(x).relu())


def dilations(backbone: nn.Module, stage: str) -> list[int]:
    stage_module = backbone.get_submodule(stage)
    return [m.dilation[0] for m in stage_module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def test_dilations_follow_the_output_stride_or_the_argument() -> None:
    with torch.device("meta"):
        by_stride = ResNet("resnet18", output_stride=8)
        assert dilations(by_stride, "layer3") == [1, 2, 2, 2]
        assert dilations(by_stride, "layer4") == [2, 4, 4, 4]
        given = ResNet("resnet50", output_stride=16, dilations=(1, 1, 1, 2))
        assert dilations(given, "layer4") == [2, 2, 2]
        hybrid = ResNet("resnet101", output_stride=8, dilations=hybrid_dilations("resnet101"))
        assert dilations(hybrid, "layer3") == [1, 2, 3] * 7 + [2, 2]
        assert dilations(hybrid, "layer4") == [3, 4, 5]


@pytest.mark.parametrize(
    ("make", "args", "message"),
    [
        (ResNet, {"name": "resnet20"}, "resnet20"),
        (Xception, {"output_stride": 32}, "output_stride"),
    ],
)
def test_bad_arguments_are_named(make: Any, args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**args)


# -- weights -------------------------------------------------------------------------------------------------


def test_first_conv_of_one_channel_answers_as_to_a_gray_rgb_image() -> None:
    weight = torch.randn(8, 3, 7, 7)
    gray = torch.randn(1, 1, 20, 20)
    answer = torch.conv2d(gray, adapt_first_conv(weight, 1))
    torch.testing.assert_close(answer, torch.conv2d(gray.expand(-1, 3, -1, -1), weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_channels", [2, 3, 4, 6, 7])
def test_first_conv_of_many_channels_keeps_the_size_of_responses(in_channels: int) -> None:
    weight = torch.ones(8, 3, 7, 7)
    adapted = adapt_first_conv(weight, in_channels)
    assert adapted.shape == (8, in_channels, 7, 7)
    constant = torch.ones(1, in_channels, 7, 7)
    answer = torch.conv2d(constant, adapted)
    torch.testing.assert_close(answer, torch.full_like(answer, 3.0 * 7 * 7), rtol=1e-4, atol=0)


def fake_download(monkeypatch: pytest.MonkeyPatch, outcome: dict[str, Tensor] | Exception) -> list[str]:
    """Let torchvision's weights API return ``outcome``; return the list of requested URLs."""
    asked: list[str] = []

    def load(url: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        asked.append(url)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    return asked


@pytest.mark.parametrize("in_channels", [3, 4])
def test_pretrained_true_loads_torchvisions_weights(monkeypatch: pytest.MonkeyPatch, in_channels: int) -> None:
    weights = torchvision.models.resnet18().state_dict()
    asked = fake_download(monkeypatch, weights)
    backbone = ResNet("resnet18", in_channels=in_channels, pretrained=True)
    assert len(asked) == 1
    assert "resnet18" in asked[0]
    torch.testing.assert_close(backbone.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])
    torch.testing.assert_close(backbone.conv1.weight[:, :3] * in_channels / 3, weights["conv1.weight"])


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")])
def test_offline_the_cache_folder_and_the_way_out_are_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fake_download(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        ResNet("resnet18", pretrained=True)
    message = str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints" / "resnet18") in message
    assert "pretrained: false" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("make", "args"),
    [
        (ResNet, {"name": "resnet50", "stem": "deep"}),
        (Xception, {}),
        (DenseNet, {"name": "densenet121", "stem": "unpadded"}),
    ],
    ids=_label,
)
def test_networks_without_torchvision_weights_say_so_and_take_files(make: Any, args: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"torchvision has no ImageNet weights.*path\.pth"):
        make(pretrained=True, **args)
    saved = make(**args)
    torch.save({"state_dict": {f"module.{k}": v for k, v in saved.state_dict().items()}}, tmp_path / "file.pth")
    loaded = make(pretrained=str(tmp_path / "file.pth"), **args)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[key]), key


def test_unusable_weight_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint file"):
        ResNet("resnet18", pretrained=str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="pretrained: .*not a checkpoint"):
        ResNet("resnet18", pretrained=str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected a checkpoint"):
        ResNet("resnet18", pretrained=str(tmp_path / "list.pth"))
    torch.save(ResNet("resnet18").state_dict(), tmp_path / "18.pth")
    with pytest.raises(UserError, match="do not fit resnet34: they lack"):
        ResNet("resnet34", pretrained=str(tmp_path / "18.pth"))
