"""Properties of all networks in the registry; a new entry is tested automatically."""

from __future__ import annotations

import copy
import inspect
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import models
from base.base_model import BaseModel
from models import MODELS
from models import __main__ as table
from models.cost import count
from models.fcn import ConvolutionalVGG16
from tests.small_checkpoint import needs_new_torch
from utils.errors import UserError
from utils.registry import documented

#: The cheapest arguments of each network that has options.
SMALL: dict[str, dict[str, Any]] = {
    "UNetResnet": {"backbone": "resnet18"},
    "SegResNet": {"backbone": "resnet18"},
    "GCN": {"backbone": "resnet18"},
    "DeepLab": {"backbone": "resnet18"},
    "DeepLab_DUC_HDC": {"backbone": "resnet18"},
    "UperNet": {"backbone": "resnet18"},
    "PSPNet": {"backbone": "resnet18"},
    "PSPDenseNet": {"backbone": "densenet121"},
    "External": {
        "factory": "tests.models.small_network:SmallNetwork",
        "args": {"classes": "$num_classes", "channels": "$in_channels", "width": 96},
        "backbone": "encoder",
        "size_divisor": 1,
    },
}
#: Options that change the result, each with the smallest backbone for which this shows.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("DeepLab", {"backbone": "xception"}),
    ("DeepLab", {"backbone": "xception", "published": True}),
    ("DeepLab", {"backbone": "resnet50", "output_stride": 8}),
    ("DeepLab_DUC_HDC", {"backbone": "resnet18", "output_stride": 4}),
    ("DeepLab_DUC_HDC", {"backbone": "resnet18", "output_stride": 4, "published": True}),
    ("GCN", {"backbone": "resnet18", "use_deconv": True}),
    ("GCN", {"backbone": "resnet18", "use_deconv": True, "published": True}),
    ("GCN", {"backbone": "resnet18", "use_resnet_gcn": True}),
    ("UperNet", {"backbone": "resnet50", "output_stride": 8, "fpn_out": 64}),
    ("UperNet", {"backbone": "resnet50", "published": True}),
    ("PSPNet", {"backbone": "resnet50", "use_aux": False}),
    ("PSPDenseNet", {"backbone": "densenet161", "stem": "unpadded", "published": True}),
    ("SegNet", {"published": True}),
    ("SegResNet", {"backbone": "resnet50", "published": True}),
    ("UNetResnet", {"backbone": "resnet50", "published": True}),
    ("ENet", {"published": True}),
    ("FCN8", {"backbone": "vgg16_bn"}),
]
WITH_AUX = {"PSPNet", "PSPDenseNet"}
CLASSES = 5


def build(name: str, num_classes: int = CLASSES, **args: Any) -> BaseModel:
    """Build a network as small as possible: in FCN8, fc6 and fc7 (119 of 134 million parameters) get 64 channels."""
    torch.manual_seed(0)
    with mock.patch.object(ConvolutionalVGG16, "channels", (256, 512, 64)):
        return models.build(name, num_classes, **SMALL.get(name, {}) | args)


def takes(name: str, argument: str) -> bool:
    return argument in inspect.signature(MODELS[name].__init__).parameters


def output(y: Tensor | dict[str, Tensor]) -> Tensor:
    return y["out"] if isinstance(y, dict) else y


def total_loss(y: Tensor | dict[str, Tensor], target: Tensor) -> Tensor:
    outputs = y if isinstance(y, dict) else {"out": y}
    weights = {"out": 1.0, "aux": 0.4}
    return sum(weights[k] * nn.functional.cross_entropy(v, target) for k, v in outputs.items())


@pytest.fixture(scope="module", params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared_model(name: str) -> BaseModel:
    """Return one network for all tests that do not change its parameters and statistics."""
    return build(name).eval()


@pytest.fixture
def model(shared_model: BaseModel) -> Iterator[BaseModel]:
    state = {k: v.clone() for k, v in shared_model.state_dict().items() if "running" in k or "tracked" in k}
    yield shared_model.eval()
    shared_model.load_state_dict(state, strict=False)
    shared_model.zero_grad(set_to_none=True)
    shared_model.eval()


# -- building ------------------------------------------------------------------------------------------------


def test_the_twelve_networks_are_there() -> None:
    assert set(MODELS) - {"External"} == {
        *("FCN8", "UNet", "UNetResnet", "SegNet", "SegResNet", "ENet"),
        *("GCN", "DeepLab", "DeepLab_DUC_HDC", "UperNet", "PSPNet", "PSPDenseNet"),
    }


def test_constructors_name_and_annotate_every_argument(name: str) -> None:
    parameters = list(inspect.signature(MODELS[name].__init__).parameters.values())[1:]
    assert parameters[0].name == "num_classes"
    for parameter in parameters:
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, parameter
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert parameter.name == "num_classes" or parameter.default is not inspect.Parameter.empty, parameter
        assert parameter.name in documented(MODELS[name]), f"{parameter} is not in the docstring"


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("PSPnet", {}, "did you mean PSPNet"),
        ("PSPNet", {"bakbone": "resnet18"}, "bakbone"),
        ("PSPNet", {"backbone": "resnet19"}, "resnet19"),
        ("PSPNet", {"stem": "wide"}, "stem"),
        ("PSPDenseNet", {"backbone": "densenet7"}, "densenet7"),
        ("PSPDenseNet", {"stem": "deep"}, "stem"),
        ("DeepLab_DUC_HDC", {"backbone": "resnet19"}, "resnet19"),
        ("DeepLab", {"output_stride": 4}, "output_stride"),
        ("UNet", {"in_channels": 0}, "in_channels"),
        ("UperNet", {"backbone": "resnet18", "published": True}, "fpn_out"),
        ("GCN", {"kernel_size": 8}, "kernel_size"),
        ("GCN", {"use_resnet_gcn": True, "published": True}, "never ran"),
        ("GCN", {"use_resnet_gcn": True, "backbone": "timm:mobilenetv3_small_050"}, "not a ResNet"),
    ],
)
def test_bad_arguments_are_user_errors(kind: str, args: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        models.build(kind, CLASSES, **args)


def test_number_of_classes_is_checked() -> None:
    with pytest.raises(UserError, match="num_classes"):
        models.build("ENet", 0)


def test_without_pretrained_no_network_is_touched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with torch.device("meta"):
        models.build(name, CLASSES, **SMALL.get(name, {}))
        if takes(name, "pretrained"):
            assert inspect.signature(MODELS[name].__init__).parameters["pretrained"].default is False
            models.build(name, CLASSES, pretrained=False, **SMALL.get(name, {}))


def test_pretrained_true_asks_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not takes(name, "pretrained"):
        pytest.skip("has no backbone")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with torch.device("meta"), pytest.raises(UserError, match="pretrained.*false"):
        models.build(name, CLASSES, pretrained=True, **SMALL.get(name, {}))


def test_no_module_is_used_twice_by_accident(shared_model: BaseModel) -> None:
    names: dict[int, str] = {}
    for name, module in shared_model.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters()):
            assert names.setdefault(id(module), name) == name


# -- shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(129, 161), (97, 240), (61, 47)])
def test_logits_have_the_inputs_size(model: BaseModel, size: tuple[int, int]) -> None:
    with torch.no_grad():
        y = model(torch.randn(1, 3, *size))
    assert isinstance(y, Tensor)
    assert y.shape == (1, CLASSES, *size)
    assert y.isfinite().all()


def test_one_image_of_odd_size_trains(name: str, model: BaseModel) -> None:
    y = model.train()(torch.randn(1, 3, 97, 129))
    outputs = y if isinstance(y, dict) else {"out": y}
    assert set(outputs) == ({"out", "aux"} if name in WITH_AUX else {"out"})
    for logits in outputs.values():
        assert logits.shape == (1, CLASSES, 97, 129)
        assert logits.isfinite().all()
    if name == "PSPNet":
        sum(v.mean() for v in outputs.values()).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_logits_start_small_enough_to_train_on(name: str) -> None:
    """A network without BatchNorm at its end can start with logits of 100: the first steps then diverge."""
    model = build(name).train()
    with torch.no_grad():
        assert output(model(torch.randn(2, 3, 64, 64))).std() < 3


@pytest.mark.parametrize(("kind", "args"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(v))
def test_variants_give_the_inputs_size(kind: str, args: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = models.build(kind, CLASSES, **args)
        for size in ((129, 161), (97, 240), (66, 131), (128, 128)):
            x = torch.empty(1, 3, *size)
            for mode in (False, True):
                with torch.no_grad():
                    assert output(model.train(mode)(x)).shape == (1, CLASSES, *size)


def test_image_sizes_that_cannot_be_trained_on_are_reported() -> None:
    with pytest.raises(UserError, match="one image of 32 x 32 at a time.*batch_size"):
        build("UperNet").train()(torch.randn(1, 3, 32, 32))
    model = build("UNet")
    model.size_divisor = 8
    with pytest.raises(UserError, match="multiples of 8, got 33 x 40: set crop_size"):
        model(torch.randn(2, 3, 33, 40))


@pytest.mark.parametrize("in_channels", [1, 4])
def test_images_may_have_other_channels(name: str, in_channels: int) -> None:
    with torch.device("meta"):
        model = models.build(name, CLASSES, in_channels=in_channels, **SMALL.get(name, {})).eval()
        assert model(torch.empty(2, in_channels, 64, 96)).shape == (2, CLASSES, 64, 96)
        with pytest.raises(ValueError, match=rf"built for images with {in_channels} channels .* got 3"):
            model(torch.empty(2, 3, 64, 96))
        with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
            model(torch.empty(in_channels, 64, 96))


def test_no_device_is_written_down(name: str, root: Path) -> None:
    # On the meta device, a tensor on any other device would raise; see the two tests above. Here: the messages.
    source = Path(inspect.getfile(MODELS[name])).read_text()
    assert "cuda" not in source
    assert ".cpu()" not in source


def test_the_output_stride_is_that_of_the_deepest_features(model: BaseModel) -> None:
    seen: list[int] = []

    def look(_: nn.Module, __: Any, y: Any) -> None:
        if isinstance(y, Tensor) and y.dim() == 4 and y.shape[-1] > 6:
            seen.append(y.shape[-1])

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 512))
    for hook in hooks:
        hook.remove()
    special = {
        "External": 512 // 8,  # of the network in the tests
        "FCN8": math.ceil((512 + 198) / 32) - 6,  # pads the image by 100 and has an unpadded 7x7 convolution
        "SegNet": 512 // 16,  # reverts its last pooling before any convolution
    }
    assert min(seen) == special.get(type(model).__name__, 512 // model.output_stride)


# -- training ------------------------------------------------------------------------------------------------


def test_gradient_flows_to_every_trainable_parameter(name: str, model: BaseModel) -> None:
    x, target = torch.randn(2, 3, 64, 64), torch.randint(CLASSES, (2, 64, 64))
    total_loss(model.train()(x), target).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


def test_parameter_groups_are_disjoint_and_complete(name: str, model: BaseModel) -> None:
    backbone, decoder = model.get_backbone_params(), model.get_decoder_params()
    together = [id(p) for p in (*backbone, *decoder)]
    assert len(together) == len(set(together))
    assert set(together) == {id(p) for p in model.parameters()}
    assert decoder
    assert bool(backbone) == (name not in {"UNet", "ENet"})


def norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def test_frozen_bn_stays_frozen(name: str) -> None:
    args = {"backbone": "vgg16_bn"} if name == "FCN8" else {}
    model = build(name, freeze_bn=True, **args)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    assert before
    for _ in range(2):
        model.train()
        model(torch.randn(2, 3, 64, 64))
        model.eval()
    model.train()
    assert model.training
    assert not any(m.training for m in norms(model).values())
    assert all(p.requires_grad for m in norms(model).values() for p in m.parameters())
    for key, tensor in before.items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_frozen_synchronized_bn_stays_frozen() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build("PSPNet", freeze_bn=True)).train()
    assert norms(model)
    assert not any(m.training for m in norms(model).values())


def test_a_frozen_backbone_leaves_the_decoder_trainable(name: str) -> None:
    if not takes(name, "freeze_backbone"):
        assert name in {"UNet", "ENet"}
        pytest.skip("has no backbone")
    model = build(name, freeze_backbone=True).train()
    x, target = torch.randn(2, 3, 64, 64), torch.randint(CLASSES, (2, 64, 64))
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    total_loss(model(x), target).backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.get_backbone_params())
    decoder = [p for p in model.get_decoder_params() if p.requires_grad]
    assert decoder
    assert all(p.grad is not None for p in decoder)
    assert not any(m.training for m in model.backbone.modules())
    for key, tensor in before.items():
        assert torch.equal(model.backbone.state_dict()[key], tensor), key


def four_images(size: int) -> tuple[Tensor, Tensor]:
    """Return four noisy images of two flat regions each, and their labels."""
    generator = torch.Generator().manual_seed(1)
    colors = torch.tensor([[-1.5, 0.0, 0.5], [1.5, -0.5, 0.0], [0.0, 1.5, -1.0]])
    target = torch.zeros(4, size, size, dtype=torch.long)
    target[0, : size // 2], target[1, :, size // 3 :] = 1, 2
    target[2, size // 2 :, : size // 2], target[3, :, :] = 2, 1
    images = colors[target].permute(0, 3, 1, 2)
    return images + 0.2 * torch.randn(images.shape, generator=generator), target


#: Adam's learning rate where 1e-3 needs more than 60 steps.
OVERFIT_LR = {"DeepLab_DUC_HDC": 3e-3, "FCN8": 0.1}


@pytest.mark.slow
def test_overfits_four_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"freeze_backbone": True} if name == "FCN8" else {}
    model = build(name, num_classes=3, **args).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    images, target = four_images(32)
    if name == "FCN8":
        # A step through its 134 million parameters on images padded by 100 takes ten seconds: only the decoder learns
        # here, on features computed once. (The whole network was seen to learn, at a rate of 1e-4.)
        with torch.no_grad():
            features = model.backbone(images)
        monkeypatch.setattr(model.backbone, "forward", lambda _: features)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=OVERFIT_LR.get(name, 1e-3))
    first = None
    for _ in range(60):
        optimizer.zero_grad(set_to_none=True)
        y = model(images)
        loss = total_loss(y, target)
        loss.backward()
        optimizer.step()
        first = first or loss.item()
        if loss.item() < 0.2 * first and (output(y).argmax(1) == target).float().mean() > 0.9:
            return
    pytest.fail(f"after 60 steps the loss went from {first:.3f} to {loss.item():.3f}")


def test_the_start_is_neither_dead_nor_exploding(model: BaseModel) -> None:
    torch.manual_seed(1)
    y = output(model.train()(torch.randn(2, 3, 96, 96)))
    assert 1e-3 < y.std().item() < 100


# -- how it is run -------------------------------------------------------------------------------------------


def relative_error(y: Tensor, reference: Tensor) -> float:
    return ((y.double() - reference.double()).square().mean() / reference.double().var()).sqrt().item()


def calibrate(model: BaseModel) -> None:
    """Set the running statistics to those of a batch, so that activations have a usual size in evaluation."""
    for module in norms(model).values():
        module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    for module in norms(model).values():
        module.momentum = 0.1
    model.eval()


def test_bfloat16_and_channels_last_stay_close_to_float32(name: str, model: BaseModel) -> None:
    calibrate(model)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        reference = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        model.to(memory_format=torch.channels_last)
        last = model(x.to(memory_format=torch.channels_last))
        model.to(memory_format=torch.contiguous_format)
    if name in {"SegNet", "SegResNet", "ENet"}:
        # Unpooling by arg-max indices moves an activation to a neighbor wherever rounding changes the winner;
        # averages over small windows do not see that.
        pool = nn.AvgPool2d(8)
        assert relative_error(pool(low.float()), pool(reference)) < 0.3
    else:
        assert relative_error(low, reference) < 0.15
    assert relative_error(last, reference) < 1e-4


@needs_new_torch
@pytest.mark.slow
def test_torch_export_computes_the_same(model: BaseModel) -> None:
    x = torch.randn(1, 3, 65, 96)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        assert relative_error(exported(x), model(x)) < 1e-5


@needs_new_torch
@pytest.mark.slow
def test_onnx_computes_the_same(tmp_path: Path) -> None:
    """For the network with pooling to fixed sizes; tests/scripts/test_export.py tests the rest, with free sizes."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = build("PSPNet").eval(), torch.randn(1, 3, 64, 96)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(y), model(x)) < 1e-4


@pytest.mark.gpu
def test_the_gpu_computes_the_same(model: BaseModel) -> None:
    calibrate(model)
    # In float64, because in float32 rounding may decide which of two nearly equal pixels SegNet's pooling chooses.
    model, x = copy.deepcopy(model).double(), torch.randn(2, 3, 97, 129).double()
    with torch.no_grad():
        reference = model(x)
        y = model.to("cuda")(x.to("cuda")).cpu()
    assert relative_error(y, reference) < 1e-9


# -- the table -----------------------------------------------------------------------------------------------


def test_every_network_can_be_counted(name: str) -> None:
    parameters, gflops = count(name, SMALL.get(name, {}), size=64, classes=CLASSES)
    assert parameters > 1e5
    assert gflops > 0.01


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="did you mean ENet"):
        table.main(["enet", "ENet"])
    table.main(["ENet", "--size", "64", "--repeats", "1"])
    header, _, row, *_ = capsys.readouterr().out.splitlines()
    assert [h.strip() for h in header.strip("|").split("|")] == [
        *("model", "backbone", "parameters", "GFLOPs", "output stride", "forward", "peak memory")
    ]
    assert row.startswith("| ENet | - | 0.4 M | 0.1 | 8 |")
