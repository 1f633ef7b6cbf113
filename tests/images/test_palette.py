"""Palettes, masks on disk, overlays and grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.images import palette as pal
from utils.images import voc_colormap

COLORS = [(0, 0, 0), (200, 10, 30), (7, 250, 99)]


def labels(shape: tuple[int, int] = (13, 21), classes: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, classes, shape).astype(np.uint8)


def test_default_palette_is_vocs() -> None:
    assert voc_colormap(4) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert len(set(voc_colormap(300))) == 300


def test_written_masks_contain_indices_and_show_colors(tmp_path: Path) -> None:
    mask = labels()
    mask[0, 0] = 255
    pal.write_mask(tmp_path / "new" / "m.png", mask, COLORS)
    image = Image.open(tmp_path / "new" / "m.png")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), mask)
    seen = np.asarray(image.convert("RGB"))
    known = mask != 255
    np.testing.assert_array_equal(seen[known], np.array(COLORS)[mask[known]])
    assert tuple(seen[0, 0]) == voc_colormap(256)[255]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.png"]


def test_more_than_256_classes_are_written_with_16_bits(tmp_path: Path) -> None:
    mask = np.arange(400, dtype=np.uint16).reshape(20, 20)
    pal.write_mask(tmp_path / "m.png", mask)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "m.png")), mask)


def test_one_color_is_that_of_label_one() -> None:
    picture = pal.colorize(np.array([[0, 1]], np.uint8), [(1, 2, 3)])
    assert picture.tolist() == [[[0, 0, 0], [1, 2, 3]]]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_overlay_blends(channels: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (300, 21, channels)).astype(np.uint8)
    mask = labels((300, 21))
    shown = image[:, :, :3] if channels >= 3 else np.repeat(image[:, :, :1], 3, 2)
    before = image.copy()
    for opacity in (0.0, 0.3, 1.0):
        expected = (1 - opacity) * shown.astype(float) + opacity * np.array(COLORS)[mask]
        got = pal.overlay(image, mask, COLORS, opacity)
        assert got.dtype == np.uint8
        np.testing.assert_allclose(got, expected, atol=0.51)
    np.testing.assert_array_equal(image, before)


def test_overlay_in_place_needs_no_second_picture() -> None:
    image = np.zeros((5, 6, 3), np.uint8)
    picture = pal.overlay(image, labels((5, 6)), COLORS, 0.5, in_place=True)
    assert np.shares_memory(picture, image)
    assert image.any()


def test_float_images_are_shown() -> None:
    assert pal.displayable(np.array([[[0.0], [0.5], [1.2]]], np.float32))[0, :, 0].tolist() == [0, 128, 255]


def test_grid_places_pictures() -> None:
    red, blue = np.full((4, 6, 3), (255, 0, 0), np.uint8), np.full((8, 3, 3), (0, 0, 255), np.uint8)
    canvas = pal.grid([red, blue, red], columns=2, gap=2)
    assert canvas.shape == (2 + 2 * 10, 2 + 2 * 8, 3)
    assert (canvas[2:6, 2:8] == (255, 0, 0)).all()
    assert (canvas[2:10, 10:13] == (0, 0, 255)).all()
    assert (canvas[12:16, 2:8] == (255, 0, 0)).all()
    assert (canvas == 255).all(-1).sum() == canvas.shape[0] * canvas.shape[1] - 24 - 24 - 24
