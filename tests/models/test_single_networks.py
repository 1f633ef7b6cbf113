"""Properties of single networks; those that all share are tested elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from models.backbones import ResNet, vgg
from models.deeplab import DeepLab
from models.deeplab_duc_hdc import DeepLab_DUC_HDC
from models.enet import Bottleneck, DownBottleneck, ENet, UpBottleneck
from models.fcn import FCN8, IMAGE_OFFSET, POOL3_OFFSET, POOL4_OFFSET, bilinear_enlargement
from models.gcn import GCN
from models.pooling import pool_with_indices, unpool
from models.segnet import SegNet
from models.segresnet import SegResNet, StemPooling, cut
from models.unet import UNet
from models.unet_resnet import UNetResnet
from models.upernet import UperNet

ODD_SIZES = [(33, 47), (34, 65), (61, 35), (64, 39)]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def randomize_norms(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for norm in norms(model):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


# -- pooling with indices ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(height=st.integers(2, 9), width=st.integers(2, 9), ceil_mode=st.booleans(), seed=st.integers(0, 2**16))
def test_unpool_puts_each_maximum_back_where_it_was(height: int, width: int, ceil_mode: bool, seed: int) -> None:
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    pooled, indices = pool_with_indices(x, ceil_mode)
    y = unpool(pooled, indices, (height, width))
    assert y.shape == x.shape
    assert torch.equal(y[y != 0], x[y != 0])
    assert (y != 0).sum() == pooled.numel()
    assert torch.equal(pool_with_indices(y.masked_fill(y == 0, -torch.inf), ceil_mode)[0], pooled)


def test_unpool_agrees_with_torch_and_has_its_gradient() -> None:
    pooled, indices = pool_with_indices(torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(1)))
    values = torch.randn(pooled.shape, requires_grad=True)
    ours = unpool(values, indices, (7, 9))
    theirs = F.max_unpool2d(values, indices, 2, output_size=(7, 9))
    assert torch.equal(ours, theirs)
    weight = torch.randn(ours.shape)
    (gradient,) = torch.autograd.grad((ours * weight).sum(), values)
    assert torch.equal(gradient, weight.flatten(2).gather(2, indices.flatten(2)).view_as(values))


# -- VGG -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_vgg_has_torchvisions_weights_and_features(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = nn.ModuleDict({"features": make_layers(cfgs["D"], batch_norm=name.endswith("bn"))}).eval()
    randomize_norms(reference)
    weights = reference.state_dict() | {"classifier.0.weight": torch.zeros(1)}
    torch.save(weights, tmp_path / "vgg.pth")
    backbone = vgg(name, pretrained=str(tmp_path / "vgg.pth")).eval()
    assert backbone.weights_from == f"backbone from {tmp_path / 'vgg.pth'}"
    x = torch.randn(1, 3, 65, 70)
    expected, y = [], x
    for layer in reference["features"]:
        y = layer(y)
        if isinstance(layer, nn.MaxPool2d):
            expected.append(y)
    with torch.no_grad():
        features = backbone(x)
    assert [f.shape[1] for f in features] == list(backbone.channels)
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# -- SegNet --------------------------------------------------------------------------------------------------


def shared_layers(model: SegNet) -> list[nn.Module]:
    encoder = set(model.backbone.modules())
    return [layer for stage in model.decoder for layer in stage if layer in encoder]


def test_segnet_shares_layers_only_in_its_published_form() -> None:
    assert not shared_layers(SegNet(2))
    shared = shared_layers(SegNet(2, published=True))
    assert sum(isinstance(layer, nn.Conv2d) for layer in shared) == 9
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in shared) == 10


def test_segnet_freezing_the_encoder_leaves_the_decoder_trainable() -> None:
    model = SegNet(2, freeze_backbone=True)
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"decoder", "classifier"}
    assert not any(p.requires_grad for p in model.get_backbone_params())


def test_segnet_loads_weights_whose_shared_norms_have_drifted_apart() -> None:
    """Synchronized BatchNorm duplicates the shared norms: both copies are needed for the same function."""
    torch.manual_seed(0)
    source = SegNet(2, published=True).eval()
    for stage in source.decoder:
        for i, layer in enumerate(stage):
            if isinstance(layer, nn.BatchNorm2d):
                stage[i] = copy.deepcopy(layer)
    randomize_norms(source)
    model = SegNet(2, published=True).eval()
    model.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x))
    kinds = {type(layer) for layer in shared_layers(model)}
    assert nn.Conv2d in kinds
    assert nn.BatchNorm2d not in kinds


def test_segnet_keeps_norms_tied_where_both_names_have_the_same_values() -> None:
    source = SegNet(2, published=True)
    randomize_norms(source)
    model = SegNet(2, published=True)
    model.load_state_dict(source.state_dict())
    assert len(shared_layers(model)) == 19


def test_segnet_accepts_small_images_and_its_published_form_says_what_it_accepts() -> None:
    with torch.no_grad():
        assert SegNet(2).eval()(torch.randn(1, 3, 5, 31)).shape == (1, 2, 5, 31)
    with pytest.raises(ValueError, match="at least 32 x 32, got 5 x 31"):
        SegNet(2, published=True)(torch.randn(1, 3, 5, 31))


# -- SegResNet -----------------------------------------------------------------------------------------------


def test_segresnet_positions_are_unique_unless_published() -> None:
    stem = torch.randn(2, 4, 15, 18, generator=torch.Generator().manual_seed(0))
    for overlapping in (False, True):
        pooled, indices, size = StemPooling(overlapping)(stem)
        assert torch.equal(pooled, F.max_pool2d(stem, 3, stride=2, padding=1))
        assert indices.shape == pooled.shape
        counts = [len(row.unique()) for row in indices.flatten(2).flatten(0, 1)]
        if overlapping:
            assert size == (16, 18)
            assert min(counts) < indices[0, 0].numel()
        else:
            assert size == (15, 18)
            assert min(counts) == indices[0, 0].numel()


@pytest.mark.parametrize("published", [False, True])
def test_segresnet_returns_every_size(published: bool) -> None:
    torch.manual_seed(0)
    model = SegResNet(2, backbone="resnet18", published=published).eval()
    with torch.no_grad():
        for size in [*ODD_SIZES, (32, 32), (7, 3)]:
            assert model(torch.randn(1, 3, *size)).shape == (1, 2, *size)


def test_segresnet_decodes_at_the_encoders_sizes() -> None:
    """Each decoder stage begins with the size of its encoder stage; cropping only at the end would shift features."""
    model = SegResNet(2, backbone="resnet18").eval()
    sizes: list[tuple[int, ...]] = []
    for stage in model.decoder:
        stage.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    x = torch.randn(1, 3, 70, 133)
    with torch.no_grad():
        model(x)
        features = model.backbone(x)
    assert sizes == [tuple(f.shape[-2:]) for f in reversed(features)]


def test_cut_drops_the_surplus_at_the_end_or_on_both_sides() -> None:
    x = torch.arange(7).expand(1, 1, 7, 7)
    like = torch.zeros(1, 1, 4, 4)
    assert cut(x, like)[0, 0, 0].tolist() == [0, 1, 2, 3]
    assert cut(x, like, centered=True)[0, 0, 0].tolist() == [1, 2, 3, 4]
    assert cut(x, like, centered=True, round_up=True)[0, 0, 0].tolist() == [2, 3, 4, 5]


# -- UNetResnet ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_unet_resnet_decoder_is_linear_only_in_its_published_form(backbone: str) -> None:
    for published in (False, True):
        model = UNetResnet(2, backbone=backbone, published=published)
        decoder = [m for name, m in model.named_modules() if not name.startswith("backbone")]
        nonlinear = [m for m in decoder if isinstance(m, (nn.BatchNorm2d, nn.ReLU))]
        assert len(nonlinear) == (0 if published else 2 * 11)
        assert model.output_stride == (8 if published else 32)
        with torch.no_grad():
            assert model.eval()(torch.randn(1, 3, 33, 47)).shape == (1, 2, 33, 47)


# -- ENet ----------------------------------------------------------------------------------------------------


def test_enet_has_one_slope_per_feature_map_as_in_the_paper() -> None:
    model = ENet(2)
    for block in (m for m in model.modules() if isinstance(m, Bottleneck)):
        assert block.prelu1.weight.numel() == block.bn1.num_features
        assert block.prelu2.weight.numel() == block.bn2.num_features
        assert block.prelu_out.weight.numel() == block.bn3.num_features
        assert isinstance(block.prelu3, nn.Identity)
    published = ENet(2, published=True)
    slopes = [m.weight.numel() for m in published.modules() if isinstance(m, nn.PReLU)]
    assert slopes[0] == 16
    assert set(slopes[1:]) == {1}
    assert isinstance(published.bottleneck40.prelu_out, nn.ReLU)


@pytest.mark.parametrize("size", [(8, 12), (9, 12), (7, 5)])
def test_enet_bottlenecks_undo_each_others_sizes(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, *size)
    y, pooled = DownBottleneck(16, 64, "down")(x)
    assert y.shape == (2, 64, (size[0] + 1) // 2, (size[1] + 1) // 2)
    assert UpBottleneck(64, 16, "up")(y, pooled).shape == x.shape


@pytest.mark.parametrize("published", [False, True])
def test_enet_takes_every_size_and_has_gradients_in_both_modes(published: bool) -> None:
    torch.manual_seed(0)
    model = ENet(2, published=published)
    for mode in (False, True):
        model.train(mode)
        for size in [*ODD_SIZES, (129, 161)]:
            model.zero_grad()
            y = model(torch.randn(1, 3, *size))
            assert y.shape == (1, 2, *size)
            y.square().mean().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_enet_says_how_many_image_channels_it_accepts() -> None:
    assert ENet(2, in_channels=15).eval()(torch.randn(1, 15, 8, 8)).shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match="in_channels must be less than 16"):
        ENet(2, in_channels=16)


# -- FCN8 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fcn() -> FCN8:
    torch.manual_seed(0)
    return FCN8(3).eval()


Grid = tuple[float, float]


def after(layer: nn.Module, grid: Grid) -> Grid:
    """Return (position of the first pixel's center, distance of pixels), in image pixels, after ``layer``."""
    start, step = grid
    if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.ConvTranspose2d)):
        return grid

    def first(value: int | tuple[int, ...]) -> int:
        return value if isinstance(value, int) else value[0]

    kernel, stride, padding = first(layer.kernel_size), first(layer.stride), first(layer.padding)
    if isinstance(layer, nn.ConvTranspose2d):
        step = step / stride
        return start + (padding - (kernel - 1) / 2) * step, step
    return start + ((kernel - 1) / 2 - padding) * step, step * stride


def test_fcn8_crops_align_the_three_streams_with_the_image(fcn: FCN8) -> None:
    grid: Grid = (0.0, 1.0)
    pools = []
    for stage in fcn.backbone.vgg.stages:
        for layer in (*stage, fcn.backbone.vgg.pool):
            grid = after(layer, grid)
        pools.append(grid)
    for layer in (fcn.backbone.fc6, fcn.backbone.fc7, fcn.up_fc7):
        grid = after(layer, grid)
    start, step = pools[3]
    assert grid == (start + POOL4_OFFSET * step, step)
    grid = after(fcn.up_pool4, grid)
    start, step = pools[2]
    assert grid == (start + POOL3_OFFSET * step, step)
    start, step = after(fcn.up_pool3, grid)
    assert (start + IMAGE_OFFSET * step, step) == (0.0, 1.0)


@pytest.mark.parametrize("factor", [2, 8])
def test_bilinear_enlargement_is_bilinear_interpolation_channel_by_channel(factor: int) -> None:
    x = torch.randn(1, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    y = bilinear_enlargement(3, factor)(x)
    half = factor // 2
    inner = y[..., half:-half, half:-half]
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    # Beyond the outermost pixel centers, the convolution fades to zero, and interpolation repeats the pixel.
    window = (..., slice(half, -half), slice(half, -half))
    torch.testing.assert_close(inner[window], expected[window])


def test_fcn8_scores_pool3_and_pool4_unscaled_unless_published(fcn: FCN8) -> None:
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, key=key: seen.update({key: inputs[0]}))
        for key, layer in enumerate((fcn.score_pool3, fcn.score_pool4, fcn.score_fc7))
    ]
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        fcn(x)
        features = fcn.backbone(x)
    for hook in hooks:
        hook.remove()
    for key, expected in enumerate(features):
        assert torch.equal(seen[key], expected)


def test_fcn8_kernels_are_in_the_state_dict_but_not_trained(fcn: FCN8) -> None:
    frozen = [name for name, p in fcn.named_parameters() if not p.requires_grad]
    assert frozen == ["up_fc7.weight", "up_pool4.weight", "up_pool3.weight"]
    assert set(frozen) <= set(fcn.state_dict())


def test_fcn8_takes_a_single_pixel(fcn: FCN8) -> None:
    with torch.no_grad():
        assert fcn(torch.randn(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_fcn8_takes_fc6_and_fc7_from_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(n: int, length: int) -> Tensor:
        return torch.arange(length, dtype=torch.float32).expand(n, length)  # small in memory

    features = nn.ModuleDict({"features": make_layers(cfgs["D"])}).state_dict()
    weights = features | {
        "classifier.0.weight": rows(4096, 512 * 7 * 7),
        "classifier.0.bias": torch.ones(4096),
        "classifier.3.weight": rows(4096, 4096),
        "classifier.3.bias": torch.ones(4096),
        "classifier.6.weight": rows(1000, 4096),
        "classifier.6.bias": torch.ones(1000),
    }
    monkeypatch.setattr("models.backbones.common.read", lambda _: {"state_dict": weights})
    model = FCN8(2, pretrained="vgg16.pth")
    # The classifier read pool5 (512 x 7 x 7) flattened in that order.
    assert torch.equal(model.backbone.fc6.weight[5], rows(1, 512 * 49).view(512, 7, 7))
    assert torch.equal(model.backbone.fc7.weight[7, :, 0, 0], rows(1, 4096)[0])
    assert (model.backbone.fc6.bias == 1).all()
    assert torch.equal(model.backbone.vgg.stages[0][0].weight, features["features.0.weight"])
    assert model.backbone.weights_from == "backbone from vgg16.pth"


def test_fcn8_explains_the_backbone_that_published_configs_name() -> None:
    with pytest.raises(ValueError, match="got 'resnet101'.*was always VGG-16"):
        FCN8(2, backbone="resnet101")


# -- the papers' forms ----------------------------------------------------------------------------------------


def test_unet_is_the_papers_unless_published() -> None:
    with torch.device("meta"):
        ours, published = UNet(2), UNet(2, published=True)
    assert ours.count_parameters() == 31_037_698  # as other implementations with BatchNorm
    assert not hasattr(ours, "middle_conv")
    widths = [m.out_channels for m in ours.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [w for level in (64, 128, 256, 512, 1024, 512, 256, 128, 64) for w in (level, level)] + [2]
    assert published.count_parameters() < ours.count_parameters()


def test_unets_skips_have_the_resolution_of_their_level() -> None:
    model, seen = UNet(2, width=4).eval(), []
    for up in (model.up1, model.up2, model.up3, model.up4):
        up.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[-1], inputs[1].shape[-1])))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert seen == [(4, 8), (8, 16), (16, 32), (32, 64)]


def test_upernets_convolutions_have_norms_and_its_classifier_one_pixel() -> None:
    with torch.device("meta"):
        model = UperNet(3, backbone="resnet50")
    convolutions = [m for m in (*model.fpn.modules(), *model.pyramid.modules()) if isinstance(m, nn.Conv2d)]
    norms_there = [m for m in (*model.fpn.modules(), *model.pyramid.modules()) if isinstance(m, nn.BatchNorm2d)]
    assert len(convolutions) == len(norms_there) == 12  # 3 laterals, 3 smoothing, 1 fusion; 4 bins, 1 fusion
    assert model.classifier.kernel_size == (1, 1)
    assert model.classifier.in_channels == 512


def test_deeplabs_xception_is_separable_throughout() -> None:
    with torch.device("meta"):
        model, published = DeepLab(3), DeepLab(3, published=True)
    dense = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.groups == 1
    ]
    assert dense == ["backbone.conv1", "backbone.conv2"]
    assert published.count_parameters() > model.count_parameters()


@pytest.mark.parametrize("stride", [8, 4])
def test_duc_predicts_each_pixel_from_its_coarse_position(stride: int) -> None:
    model = DeepLab_DUC_HDC(3, backbone="resnet18", output_stride=stride).eval()
    for conv in model.dense:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    model.dense[2].bias.data[stride**2 + 1] = 1.0  # class 1, first row, second column of a cell
    with torch.no_grad():
        y = model(torch.randn(1, 3, 33, 47))
    expected = torch.zeros(1, 3, 33, 47)
    expected[:, 1, ::stride, 1::stride] = 1
    assert torch.equal(y, expected)


def test_resnet_gcn_has_global_convolutions_in_its_last_two_stages_and_weights_for_the_others(tmp_path: Path) -> None:
    source = ResNet("resnet18")
    file = tmp_path / "resnet18.pth"
    torch.save(source.state_dict(), file)
    model = GCN(3, backbone="resnet18", use_resnet_gcn=True, pretrained=str(file)).eval()
    backbone = model.backbone
    assert backbone.weights_from.endswith("resnet18.pth (without layer3 and layer4)")
    for name, value in source.state_dict().items():
        if name.startswith(("conv1", "bn1", "layer1", "layer2")):
            assert torch.equal(backbone.state_dict()[name], value)
    for stage, (kernel_size, width) in ((backbone.layer3, (5, 85)), (backbone.layer4, (7, 128))):
        assert len(stage) == 2
        block = stage[1]
        assert block.convolve[1].num_features == width
        x = torch.zeros(1, block.expand[0].out_channels, 15, 15, requires_grad=True)
        block.convolve[0](x)[0, 0, 7, 7].backward()
        assert x.grad is not None
        seen = x.grad.abs().sum(dim=1)[0].nonzero()
        assert seen.min() == 7 - kernel_size // 2
        assert seen.max() == 7 + kernel_size // 2
        assert len(seen) == kernel_size**2
    assert [tuple(f.shape[1:]) for f in backbone(torch.randn(1, 3, 65, 97))][2:] == [(256, 5, 7), (512, 3, 4)]
