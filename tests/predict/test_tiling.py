"""Tiling and views against simple references: one tile, one view, one pixel at a time, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from utils.predict import tiling


def network(classes: int = 4, seed: int = 0) -> nn.Module:
    """A small network whose output pixels depend on a 7 x 7 neighborhood and on their place in the input."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, classes, 3, padding=1)).eval()


def picture(height: int, width: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- references


def reference_starts(length: int, tile: int, overlap: float) -> list[int]:
    starts, position, stride = [], 0, max(1, math.floor(tile * (1 - overlap)))
    while position + tile < length:
        starts.append(position)
        position += stride
    return [*starts, max(0, length - tile)]


def reference_sliding(forward, image: Tensor, tile: int, overlap: float) -> np.ndarray:
    """Sum and weight per pixel, one tile at a time, divided at the end."""
    _, height, width = image.shape
    total, weight = None, np.zeros((height, width))
    for y in reference_starts(height, tile, overlap):
        for x in reference_starts(width, tile, overlap):
            part = image[:, y : y + tile, x : x + tile]
            scores = forward(part[None])[0].double().numpy()
            tall, wide = scores.shape[1:]
            window = np.outer(
                np.sin(np.pi * (np.arange(tall) + 0.5) / tall) ** 2 + 1e-6,
                np.sin(np.pi * (np.arange(wide) + 0.5) / wide) ** 2 + 1e-6,
            )
            if total is None:
                total = np.zeros((scores.shape[0], height, width))
            total[:, y : y + tall, x : x + wide] += window * scores
            weight[y : y + tall, x : x + wide] += window
    return total / weight


def bilinear(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize one plane, pixel centers aligned by their areas (half-pixel rule)."""

    def taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, None)
        low = np.minimum(at.astype(int), old - 1)
        return low, np.minimum(low + 1, old - 1), at - low

    top, bottom, fy = taps(plane.shape[0], height)
    left, right, fx = taps(plane.shape[1], width)
    upper = plane[top][:, left] * (1 - fx) + plane[top][:, right] * fx
    lower = plane[bottom][:, left] * (1 - fx) + plane[bottom][:, right] * fx
    return upper * (1 - fy)[:, None] + lower * fy[:, None]


def reference_multiscale(forward, image: Tensor, scales, flip: bool) -> np.ndarray:
    """Softmax of every view, resized back, averaged; one view at a time, resized by the formula above."""
    _, height, width = image.shape
    planes, results = image.double().numpy(), []
    for scale in scales:
        tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
        scaled = np.stack([bilinear(plane, tall, wide) for plane in planes])
        for mirrored in [False, True] if flip else [False]:
            view = scaled[:, :, ::-1] if mirrored else scaled
            scores = forward(torch.from_numpy(view.copy()).float()[None])[0].double().numpy()
            scores = np.stack([bilinear(plane, height, width) for plane in scores])
            exps = np.exp(scores - scores.max(0))
            probs = exps / exps.sum(0)
            results.append(probs[:, :, ::-1] if mirrored else probs)
    return np.mean(results, axis=0)


# ------------------------------------------------------------------------------------------------ tests


@given(length=st.integers(1, 400), tile=st.integers(1, 130), overlap=st.floats(0, 0.95, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_tiles_cover_the_axis_and_weights_sum_to_one(length: int, tile: int, overlap: float) -> None:
    starts = tiling.tile_starts(length, tile, overlap)
    assert starts == reference_starts(length, tile, overlap)
    size = min(tile, length)
    assert starts[0] == 0
    assert starts[-1] + size == length
    assert all(0 < b - a <= max(1, tile * (1 - overlap)) for a, b in zip(starts, starts[1:], strict=False))
    weights = tiling.blend_weights(length, tile, overlap)
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    assert weights.min() > 0
    torch.testing.assert_close(total, torch.ones(length), rtol=0, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(40, 53), (97, 64), (16, 90), (20, 20), (33, 1)])
@pytest.mark.parametrize(("tile", "overlap", "batch"), [(32, 0.25, 4), (24, 0.5, 3), (32, 0.0, 1), (17, 0.7, 8)])
def test_sliding_equals_reference(height: int, width: int, tile: int, overlap: float, batch: int) -> None:
    net, image = network(), picture(height, width)
    expected = reference_sliding(net, image[0], tile, overlap)
    got = tiling.sliding(net, image, 4, tiling.Tiles(tile, overlap, batch))
    np.testing.assert_allclose(got[0].numpy(), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_strips_change_nothing() -> None:
    net, image = network(), picture(70, 150)[0]
    whole = tiling.sliding(net, image[None], 4, tiling.Tiles(32))[0]
    stitched, seen = torch.full_like(whole, torch.nan), torch.zeros(70, 150)
    blocks = 0
    for y, x, scores in tiling.sliding_blocks(net, image, 4, tiling.Tiles(32, 0.25, 3, max_bytes=4 * 32 * 4 * 47)):
        stitched[:, y : y + scores.shape[1], x : x + scores.shape[2]] = scores
        seen[y : y + scores.shape[1], x : x + scores.shape[2]] += 1
        blocks += 1
        assert scores.shape[2] <= 47
    assert blocks == 4 * 3  # 4 strips, 3 rows of tiles
    assert (seen == 1).all()
    torch.testing.assert_close(stitched, whole, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_constant_scores_have_no_seams() -> None:
    """If the network's output is constant, so is the blend: the weights sum to one at every pixel."""
    got = tiling.sliding(
        lambda tiles: torch.full((len(tiles), 2, *tiles.shape[-2:]), 0.3), picture(75, 61), 2, tiling.Tiles(16)
    )
    torch.testing.assert_close(got, torch.full((1, 2, 75, 61), 0.3), rtol=0, atol=1e-6)


@torch.inference_mode()
def test_blending_hides_seams() -> None:
    """A network that is wrong near the border of a tile: the result must not jump where tiles meet."""

    def border_effect(tiles: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, tiles.shape[-1]).expand(len(tiles), 1, *tiles.shape[-2:])
        return ramp.clone()

    blended = tiling.sliding(border_effect, picture(64, 400), 1, tiling.Tiles(64, 0.5))[0, 0, 0]
    assert blended.diff().abs().max() < 2 / 63  # without blending, it jumps by 0.5


@torch.inference_mode()
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.0, 1.25), (0.5, 2.25)])
def test_multiscale_equals_reference(scales: tuple[float, ...], flip: bool) -> None:
    net, image = network(), picture(37, 50, batch=2)
    got = tiling.views(net, image, scales, flip, link=lambda scores: scores.softmax(1))
    for one, result in zip(image, got, strict=True):
        np.testing.assert_allclose(result.numpy(), reference_multiscale(net, one, scales, flip), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got.sum(1), torch.ones(2, 37, 50))


@torch.inference_mode()
def test_one_plain_view_is_the_forward_pass() -> None:
    net, image = network(), picture(30, 41)
    torch.testing.assert_close(tiling.views(net, image), net(image), rtol=0, atol=0)


@torch.inference_mode()
def test_views_leave_their_input_alone() -> None:
    image = picture(9, 9)
    before = image.clone()
    tiling.views(lambda x: x, image, (1.0, 1.0), flip=True)
    tiling.views(lambda x: x, image, (1.0, 1.0))
    assert torch.equal(image, before)


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 40), (40, 5), (40, 40)])
def test_small_images_are_padded_for_the_network(height: int, width: int) -> None:
    image = picture(height, width)
    assert tiling.pad_to(image, 32).shape[-2:] == (max(32, height), max(32, width))
    assert torch.equal(tiling.pad_to(image, 32)[..., :height, :width], image)
    assert tiling.pad_to(image, 1, 8).shape[-2:] == (-(-height // 8) * 8, -(-width // 8) * 8)
    right = tiling.pad_to(image, 32)[..., :height, width:]
    assert torch.equal(right, image[..., -1:].expand_as(right))  # the border is repeated, without an artificial edge


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 0.1), "tile"), ((4, 1.0), "overlap"), ((4, -0.1), "overlap"), ((4, 0.1, 0), "batch_size")],
)
def test_bad_arguments_are_named(arguments: tuple, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        tiling.Tiles(*arguments)


@torch.inference_mode()
def test_every_tile_has_one_size_and_batches_are_full() -> None:
    """All tiles have one shape, so they can be batched, and compiled networks compile once."""
    sizes = []

    def forward(tiles: Tensor) -> Tensor:
        sizes.append(tuple(tiles.shape))
        return F.avg_pool2d(tiles, 3, 1, 1)

    tiling.sliding(forward, picture(100, 77), 3, tiling.Tiles(32, 0.25, 5))
    assert {shape[1:] for shape in sizes} == {(3, 32, 32)}
    assert {shape[0] for shape in sizes[:-1]} == {5}
