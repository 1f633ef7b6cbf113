"""Annotated areas are rendered as the labeling tools mean them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloaders.prepare import shapes
from tests.dataloaders.exports import (
    SQUARE,
    area,
    label_studio_code,
)


@given(st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 25)), min_size=3, max_size=8))
@settings(max_examples=60, deadline=None)
def test_polygons_cover_the_pixels_whose_centers_lie_inside(ring: list[tuple[float, float]]) -> None:
    found = shapes.polygons([np.array(ring)])(20, 20)
    for row in range(20):
        for column in range(20):
            x, y, inside = column + 0.5, row + 0.5, False
            for (x1, y1), (x2, y2) in zip(ring, [*ring[1:], ring[0]], strict=True):
                if (y1 <= y) != (y2 <= y) and x1 + (y - y1) / (y2 - y1) * (x2 - x1) <= x:
                    inside = not inside
            assert found[row, column] == inside, (row, column)


def test_boxes_and_ellipses() -> None:
    assert np.array_equal(shapes.box(5, 4, 10, 10)(30, 40), area(SQUARE))
    # Turned by 90 degrees about the upper left corner, a box lies to the left of it; about the center it stays.
    turned = shapes.box(15, 4, 10, 6, 90)(30, 40)
    assert np.argwhere(turned).min(0).tolist() == [4, 9]
    assert np.argwhere(turned).max(0).tolist() == [13, 14]
    assert np.array_equal(shapes.box(5, 4, 10, 10, 90, centered=True)(30, 40), area(SQUARE))
    disc = shapes.ellipse(20, 15, 10, 5, 0)(30, 40)
    assert abs(int(disc.sum()) - np.pi * 50) < 4
    assert np.array_equal(shapes.ellipse(20, 15, 5, 10, 90)(30, 40), disc)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_run_length_codes_of_coco_agree_with_pycocotools(height: int, width: int, seed: int) -> None:
    coder = pytest.importorskip("pycocotools.mask")
    drawn = np.random.default_rng(seed).random((height, width)) < 0.3
    code = coder.encode(np.asfortranarray(drawn.astype(np.uint8)))
    assert np.array_equal(shapes.runs(shapes.coco_counts(code["counts"]), height, width, order="F"), drawn)


def test_polygons_nearly_agree_with_pycocotools() -> None:
    coder = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        angles = np.sort(rng.random(9) * 2 * np.pi)
        ring = 100 + 80 * np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.5, 1, (9, 1))
        ours = shapes.polygons([ring])(200, 200)
        theirs = coder.decode(coder.frPyObjects([ring.ravel().tolist()], 200, 200))[:, :, 0] > 0
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.98


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_brush_strokes_of_label_studio(height: int, width: int, seed: int) -> None:
    drawn = np.random.default_rng(seed).random((height, width)) < 0.4
    code = label_studio_code(drawn)
    assert np.array_equal(shapes.label_studio_mask(code, height, width), drawn)
    with pytest.raises(ValueError, match="values"):
        shapes.label_studio_mask(code, height, width + 1)
