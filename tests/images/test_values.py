"""From stored numbers to intensities: the same rule for files, arrays and all number types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import UserError
from utils.images import read_image, read_pixels
from utils.images.values import BY_TYPE, Pixels, ValueRange

SHARES = np.random.default_rng(0).random((6, 7, 3))
SHARES[0, 0], SHARES[0, 1] = 0, 1


def test_bytes_stay_as_they_are() -> None:
    stored = np.rint(SHARES * 255).astype(np.uint8)
    assert BY_TYPE.apply(stored, "x").image is stored
    assert ValueRange.of([0, 255]).apply(stored, "x").image is stored


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i2", "u4", "i4", "u8", "i8", "i1"])
def test_integers_are_divided_by_the_largest_value_of_their_type(dtype: str) -> None:
    top = np.iinfo(dtype).max
    stored = (SHARES * (top - 2048 if top > 2**53 else top)).astype(dtype)  # the sum of float64 must not overflow
    image = BY_TYPE.apply(stored, "x").image
    assert image.dtype == np.float32
    assert np.allclose(image, SHARES, atol=1e-2 if top == 127 else 1e-4)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_floats_in_range_stay(dtype: str) -> None:
    image = BY_TYPE.apply(SHARES.astype(dtype), "x").image
    assert image.dtype == np.float32
    assert np.allclose(image, SHARES, atol=1e-3)


def test_rounding_errors_are_clipped() -> None:
    image = BY_TYPE.apply(SHARES * 1.0002 - 0.0001, "x").image
    assert image.min() == 0
    assert image.max() == 1


@pytest.mark.parametrize(
    ("stored", "advice"),
    [
        (SHARES * 255, r"0 to 255.*for instance \[0, 255\]"),
        (SHARES * 9000, r"for instance \[0, 10000\]"),
        (SHARES * 2 - 1, r"from -1 to 1.*for instance \[-1, 1\]"),
        (SHARES * 6 - 3, r"for instance \[-3, 3\]"),
        (np.where(SHARES > 0.5, SHARES, -9999), r"for instance \[0, 1\].*set `nodata: -9999`"),
        (np.where(SHARES > 0.5, SHARES, np.nan), 'not finite.*`nodata: "nan"`'),
        (np.where(SHARES > 0.5, SHARES, np.inf), "not finite"),
        (
            (SHARES * 255).astype(np.uint16),
            r"uint16 values from 0 to 255, expected the full range 0 to 65535.*\[0, 255\]",
        ),
        ((SHARES * 255).astype(np.int64), r"\[0, 255\]"),
        ((SHARES * 65535).astype(np.int32), r"\[0, 65535\]"),
        ((SHARES * 200 - 100).astype(np.int8), r"from -100 to 100"),
        (SHARES.astype(complex), "complex128"),
    ],
)
def test_values_that_do_not_fit_name_the_setting(stored: np.ndarray, advice: str) -> None:
    with pytest.raises(UserError, match=f"x.npy contains.*{advice}"):
        BY_TYPE.apply(stored, "x.npy")


def test_black_pictures_are_no_error() -> None:
    for dtype in ("u2", "i8", "f4"):
        assert BY_TYPE.apply(np.zeros((2, 2, 1), dtype), "x").image.max() == 0


@given(
    low=st.floats(-1e4, 1e4), width=st.floats(1e-2, 1e5), dtype=st.sampled_from(["u1", "u2", "i4", "f4", "f8"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_range_is_a_straight_line_and_clipped(low: float, width: float, dtype: str, seed: int) -> None:
    stored = np.random.default_rng(seed).integers(0, 200, (3, 4, 2)).astype(dtype)
    image = ValueRange.of([low, low + width]).apply(stored, "x").image
    want = np.clip((stored.astype(np.float64) - low) / width, 0, 1)
    assert np.allclose(image / (255 if image.dtype == np.uint8 else 1), want, atol=1e-3)


def test_fewer_bits_than_a_byte_are_stretched() -> None:
    stored = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    assert BY_TYPE.apply(stored, "x", largest=3).image.ravel().tolist() == [0, 85, 170, 255]


def test_missing_pixels() -> None:
    stored = np.array([[[-9999, -9999], [-9999, 0.5], [0.5, np.nan], [0.2, 0.4]]])
    pixels = ValueRange.of(nodata=-9999).apply(stored, "x")
    assert pixels.missing is not None
    assert pixels.missing.tolist() == [[True, True, True, False]], "one channel is enough where it cannot be a value"
    assert pixels.filled([0.25, 0.75])[0, 0].tolist() == [0.25, 0.75]
    assert np.allclose(pixels.image[0, 3], [0.2, 0.4])
    black = np.array([[[0, 0, 0], [0, 9, 9], [7, 7, 7]]], np.uint8)
    pixels = ValueRange.of(nodata=0).apply(black, "x")
    assert pixels.missing is not None
    assert pixels.missing.tolist() == [[True, False, False]], "a value of the range must fill all channels"
    assert pixels.filled([1, 1, 1])[0, 0].tolist() == [255, 255, 255]
    assert ValueRange.of(nodata="nan").apply(black, "x").missing is None
    assert Pixels(black).filled([1, 1, 1]) is black


@pytest.mark.parametrize("value_range", [[1], [0, 0], [2, 1], [0, float("inf")], [0, 1, 2]])
def test_impossible_ranges_are_refused(value_range: list[float]) -> None:
    with pytest.raises(ValueError, match=r"value_range must be \[low, high\]"):
        ValueRange.of(value_range)


def test_impossible_nodata_is_refused() -> None:
    with pytest.raises(ValueError, match='nodata must be a number or "nan"'):
        ValueRange.of(nodata="black")


def test_npy_and_tiff_agree(tmp_path: Path) -> None:
    stored = np.where(SHARES > 0.9, -9999, SHARES * 10000).astype(np.float32)
    np.save(tmp_path / "a.npy", stored)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb")
    values = ValueRange.of([0, 10000], -9999)
    first, second = (read_pixels(tmp_path / name, 3, values) for name in ("a.npy", "a.tif"))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.missing, (SHARES > 0.9).any(axis=2))
    for name in ("a.npy", "a.tif"):
        with pytest.raises(UserError, match=r"\[0, 10000\].*nodata: -9999"):
            read_image(tmp_path / name)


def test_bands_that_are_not_read_do_not_matter(tmp_path: Path) -> None:
    bands = np.dstack([SHARES, np.full((6, 7), np.nan)]).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", bands, photometric="rgb", extrasamples="unspecified")
    assert np.allclose(read_image(tmp_path / "a.tif"), SHARES)
    with pytest.raises(UserError, match="not finite"):
        read_image(tmp_path / "a.tif", 4)
