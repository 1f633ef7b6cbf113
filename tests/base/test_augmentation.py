"""Augmentation: a single warp, image and label aligned, no label values that the file does not contain."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base import augmentation as aug

IGNORE = 255


def coordinate_image(height: int, width: int) -> np.ndarray:
    """Return an image of its own x and y coordinates (and ones, which show what is inside)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([x, y, np.ones_like(x)], axis=2)


def coordinate_label(height: int, width: int) -> np.ndarray:
    """Return a label map in which each pixel has its own number."""
    return np.arange(height * width, dtype=np.int32).reshape(height, width)


def drawn(seed: int, height: int, width: int, **options: object) -> aug.Parameters:
    return aug.Augmentation(**options).draw(np.random.default_rng(seed), height, width)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [(90, 120), (61, 47)])
def test_image_and_label_come_from_the_same_place(seed: int, size: tuple[int, int]) -> None:
    height, width = size
    parameters = drawn(seed, height, width, crop_size=(64, 80), base_size=110)
    image = aug.warp_image(coordinate_image(height, width), parameters, [-1.0, -1.0, 0.0])
    label = aug.warp_label(coordinate_label(height, width), parameters, -1)
    inside = (image[:, :, 2] > 0.999) & (label >= 0)
    assert inside.mean() > 0.1
    from_label = np.stack([label % width, label // width], axis=2)[inside]
    # Bilinear and nearest sampling of a point differ by at most half a pixel (OpenCV rounds to 1/32).
    assert np.abs(from_label - image[:, :, :2][inside]).max() <= 0.5 + 1 / 16


@pytest.mark.parametrize("seed", range(6))
def test_pixels_lie_where_the_matrix_says(seed: int) -> None:
    height, width = 70, 100
    parameters = drawn(seed, height, width, crop_size=(50, 60))
    image = aug.warp_image(coordinate_image(height, width), parameters, [-1.0, -1.0, 0.0])
    v, u = np.mgrid[:50, :60]
    wanted = parameters.matrix @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
    inside = image[:, :, 2].ravel() > 0.999
    assert np.abs(image[:, :, :2].reshape(-1, 2)[inside] - wanted.T[inside]).max() < 1 / 16


@given(seed=st.integers(0, 10_000), height=st.integers(5, 60), width=st.integers(5, 60), flip=st.booleans())
@settings(max_examples=60, deadline=None)
def test_without_scale_and_rotation_the_crop_is_a_slice(seed: int, height: int, width: int, flip: bool) -> None:
    options = {"crop_size": (24, 32), "scale": (1.0, 1.0), "rotate": 0.0, "flip": flip}
    parameters = drawn(seed, height, width, **options)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    label = np.random.default_rng(seed).integers(0, 20, (height, width), np.uint8)
    got_image, got_label = aug.apply(image, label, parameters, [9, 9, 9], IGNORE)

    # By hand: paste the source on a large canvas at the offset in the matrix, slice, mirror.
    mirrored = parameters.matrix[0, 0] < 0
    left = parameters.matrix[0, 2] - (31 if mirrored else 0)
    top = parameters.matrix[1, 2]
    assert left == round(left)
    assert top == round(top)
    canvas = np.full((200, 200, 3), 9, np.uint8)
    labels = np.full((200, 200), IGNORE, np.uint8)
    canvas[70 : 70 + height, 70 : 70 + width] = image
    labels[70 : 70 + height, 70 : 70 + width] = label
    window = slice(70 + int(top), 94 + int(top)), slice(70 + int(left), 102 + int(left))
    want_image, want_label = canvas[window], labels[window]
    if mirrored:
        want_image, want_label = want_image[:, ::-1], want_label[:, ::-1]
    assert np.array_equal(got_image, want_image)
    assert np.array_equal(got_label, want_label)
    if height >= 24 and width >= 32:
        assert (got_label != IGNORE).all()  # no pixel from outside the image if it is large enough


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.7])
def test_scaling_agrees_with_resize(scale: float) -> None:
    # 0.8 and 1.7 times these sides are whole numbers, so the canvas is exactly the resized image.
    height, width = 60, 80
    image = cv2.GaussianBlur(np.random.default_rng(0).random((height, width, 3), np.float32), (7, 7), 2)
    canvas = round(height * scale), round(width * scale)
    matrix = aug.crop_to_source((height, width), canvas, scale, 0.0, (0, 0, *canvas))
    got = aug.warp_image(image, aug.Parameters(matrix, canvas), [0.0] * 3)
    want = cv2.resize(image, canvas[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.abs(got - want)[2:-2, 2:-2].max() < 5e-3


def test_rotation_turns_about_the_center() -> None:
    image = np.random.default_rng(0).integers(0, 256, (31, 31, 3), np.uint8)
    matrix = aug.crop_to_source((31, 31), (31, 31), 1.0, math.pi / 2, (0, 0, 31, 31))
    got = aug.warp_image(image, aug.Parameters(matrix, (31, 31)), [0.0] * 3)
    assert np.array_equal(got, np.rot90(image))  # a quarter, counter-clockwise


@given(seed=st.integers(0, 10_000), wide=st.booleans())
@settings(max_examples=40, deadline=None)
def test_labels_are_old_labels_or_ignored_and_never_background(seed: int, wide: bool) -> None:
    parameters = drawn(seed, 40, 50, crop_size=(64, 64))
    ignore = -1 if wide else IGNORE
    # The map contains no 0, so there must be none after the warp.
    label = np.random.default_rng(seed).choice([3, 7, 11], (40, 50)).astype(np.int32 if wide else np.uint8)
    got = aug.warp_label(label, parameters, ignore)
    assert got.dtype == label.dtype
    assert set(np.unique(got)) <= {3, 7, 11, ignore}
    outside = aug.warp_image(np.ones((40, 50, 1), np.float32), parameters, [0.0])[:, :, 0] == 0
    assert (got[outside] == ignore).all()


def test_drawn_parameters_stay_in_their_ranges() -> None:
    scales, angles, flips, lefts = [], [], [], []
    for seed in range(400):
        p = drawn(seed, 100, 200, crop_size=(50, 60), base_size=400, blur=1.5, jitter=0.2)
        (a, b), (c, d) = p.matrix[:, :2]
        scales.append(1 / math.hypot(a, c))
        angles.append(math.degrees(math.atan2(-b, d)))
        flips.append(a * d - b * c < 0)
        lefts.append(p.matrix[0] @ [30, 25, 1])
        assert 0 <= p.blur <= 1.5
        assert all(0.8 <= f <= 1.2 for f in p[3:])
    # The longer side, 200, becomes 0.5 to 2 times 400.
    assert 0.99 < min(scales) < 1.1
    assert 3.8 < max(scales) <= 4.01
    assert -10.01 <= min(angles) < -9
    assert 9 < max(angles) <= 10.01
    assert 0.4 < np.mean(flips) < 0.6
    assert min(lefts) < 40
    assert max(lefts) > 160


def test_switching_one_change_off_leaves_the_others_alone() -> None:
    full = drawn(5, 80, 90, crop_size=(40, 40), blur=1.0, jitter=0.3)
    plain = drawn(5, 80, 90, crop_size=(40, 40))
    assert np.array_equal(full.matrix, plain.matrix)
    assert plain.blur == 0
    assert plain[3:] == (1.0, 1.0, 1.0)


def test_without_a_crop_the_rescaled_image_comes_whole() -> None:
    parameters = drawn(1, 40, 80, base_size=100, scale=(1.0, 1.0), rotate=0.0, flip=False)
    assert parameters.size == (50, 100)
    label = aug.warp_label(np.ones((40, 80), np.uint8), parameters, IGNORE)
    assert label.shape == (50, 100)
    assert (label == 1).all()


@pytest.mark.parametrize(("size", "crop"), [((60, 90), (48, 48)), ((90, 60), (48, 48)), ((40, 41), (64, 80))])
def test_center_crop_brings_the_shorter_side_to_the_crop(size: tuple[int, int], crop: tuple[int, int]) -> None:
    height, width = size
    parameters = aug.center_crop(height, width, crop)
    center = parameters.matrix @ [(crop[1] - 1) / 2, (crop[0] - 1) / 2, 1]
    scale = max(crop[0] / height, crop[1] / width)
    assert np.abs(center - [(width - 1) / 2, (height - 1) / 2]).max() <= 0.5 / scale + 1e-9
    assert parameters.matrix[0, 0] == pytest.approx(1 / scale)
    label = aug.warp_label(np.ones(size, np.uint8), parameters, IGNORE)
    assert (label == 1).all()


def test_more_than_four_channels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 7), np.uint8)
    parameters = drawn(3, 30, 40, crop_size=(50, 50))
    got = aug.warp_image(image, parameters, list(range(7)))
    for channel in range(7):
        alone = aug.warp_image(image[:, :, channel : channel + 1], parameters, [channel])
        assert np.array_equal(got[:, :, channel : channel + 1], alone)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_jitter_is_the_stated_formula(channels: int, dtype: type) -> None:
    top = 255.0 if dtype == np.uint8 else 1.0
    image = (np.random.default_rng(0).random((9, 8, channels)) * top).astype(dtype)
    p = aug.Parameters(np.eye(3)[:2], (9, 8), 0.0, brightness=1.2, contrast=0.8, saturation=0.7)
    x = image.astype(np.float64)
    if channels == 3:
        x = 0.7 * x + 0.3 * (x @ [0.299, 0.587, 0.114])[:, :, None]
    want = np.clip((x * 1.2 - top / 2) * 0.8 + top / 2, 0, top)
    got = aug.jitter(image.copy(), p)
    assert got.dtype == dtype
    assert np.abs(got - want).max() <= (1.0 if dtype == np.uint8 else 1e-6)


def test_blur_keeps_shape_and_mean() -> None:
    image = np.random.default_rng(0).random((40, 40, 1)).astype(np.float32)
    assert aug.blur(image, 0.1) is image
    got = aug.blur(image, 1.0)
    assert got.shape == image.shape
    assert got.mean() == pytest.approx(image.mean(), abs=0.01)
    assert got.std() < 0.5 * image.std()
