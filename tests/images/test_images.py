"""Reading every usual kind of image and label file, and refusing broken ones."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.images import read_image, read_label, voc_colormap

RGB = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
SMOOTH = cv2.resize(RGB, (170, 120), interpolation=cv2.INTER_CUBIC)
IDS = np.random.default_rng(1).integers(0, 11, (12, 17), np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def test_lossless_rgb(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "a.tif", "a.ppm"):
        image = read_image(save(tmp_path / name, RGB))
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert np.array_equal(image, RGB)


def test_jpeg_agrees_with_pillow(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", SMOOTH, quality=95)
    with Image.open(path) as image:
        want = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(read_image(path) - want).max() <= 3


def test_grey_is_repeated_and_colour_becomes_luminance(tmp_path: Path) -> None:
    grey = save(tmp_path / "g.png", RGB[:, :, 0])
    assert np.array_equal(read_image(grey), np.repeat(RGB[:, :, :1], 3, axis=2))
    assert np.array_equal(read_image(grey, 1), RGB[:, :, :1])
    luminance = read_image(save(tmp_path / "c.png", RGB), 1)[:, :, 0]
    assert np.abs(luminance - RGB @ [0.299, 0.587, 0.114]).max() <= 1


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "PA"])
def test_other_modes_agree_with_pillow(tmp_path: Path, mode: str) -> None:
    suffix = ".tif" if mode == "PA" else ".png"
    picture = Image.fromarray(RGB).convert("L" if mode == "1" else "RGB").convert("P" if mode == "PA" else mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(RGB[:, :, 0]))
    picture.save(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = np.asarray(image.convert("RGB"))
    assert np.array_equal(read_image(tmp_path / f"a{suffix}"), want)


def test_transparency_is_kept_when_four_channels_are_wanted(tmp_path: Path) -> None:
    rgba = np.dstack([RGB, RGB[:, :, 0]])
    assert np.array_equal(read_image(save(tmp_path / "a.png", rgba), 4), rgba)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(SMOOTH).convert("CMYK").save(path, quality=98)
    with Image.open(path) as image:
        want = np.asarray(image.convert("RGB")).astype(int)
    got = read_image(path)
    assert got.shape == want.shape
    assert np.abs(got - want).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".png"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(SMOOTH).save(path, exif=exif, **({"quality": 98} if suffix == ".jpg" else {}))
    upright = {
        1: SMOOTH,
        2: SMOOTH[:, ::-1],
        3: SMOOTH[::-1, ::-1],
        4: SMOOTH[::-1],
        5: SMOOTH.transpose(1, 0, 2),
        6: np.rot90(SMOOTH, -1),
        7: SMOOTH[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(SMOOTH),
    }[orientation]
    got = read_image(path)
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 6


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_come_as_floats(tmp_path: Path, suffix: str) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (12, 17), np.uint16)
    cv2.imwrite(str(tmp_path / f"a{suffix}"), deep)
    image = read_image(tmp_path / f"a{suffix}", 1)
    assert image.dtype == np.float32
    assert np.allclose(image[:, :, 0], deep / 65535, atol=1e-6)
    rgb = np.random.default_rng(0).integers(0, 65536, (12, 17, 3), np.uint16)
    cv2.imwrite(str(tmp_path / f"b{suffix}"), rgb[:, :, ::-1])
    assert np.allclose(read_image(tmp_path / f"b{suffix}"), rgb / 65535, atol=1e-6)


def test_arrays(tmp_path: Path) -> None:
    many = np.random.default_rng(0).integers(0, 256, (12, 17, 6), np.uint8)
    np.save(tmp_path / "a.npy", many)
    assert np.array_equal(read_image(tmp_path / "a.npy", 6), many)
    np.save(tmp_path / "f.npy", many / 255)
    assert read_image(tmp_path / "f.npy", 6).dtype == np.float32
    np.save(tmp_path / "d.npy", many.astype(np.uint16) * 257)
    assert np.allclose(read_image(tmp_path / "d.npy", 6), many / 255, atol=1e-6)


def test_channels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 6), np.uint8))
    with pytest.raises(UserError, match=r"a\.npy has 6 channels.*`in_channels` is 3"):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(buffer, format={".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper()))
    data = buffer.getvalue()
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=f"broken{suffix}"):
        read_image(path)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", SMOOTH, quality=95)
    want = read_image(path)
    path.write_bytes(path.read_bytes() + bytes(500))
    assert np.array_equal(read_image(path), want)


@pytest.mark.parametrize("reader", [read_image, read_label])
def test_what_is_no_image_is_told(tmp_path: Path, reader) -> None:
    with pytest.raises(UserError, match="there is no file .*gone.png"):
        reader(tmp_path / "gone.png")
    (tmp_path / "zero.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"zero.png is empty \(0 bytes\)"):
        reader(tmp_path / "zero.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="text.png is not an image"):
        reader(tmp_path / "text.png")
    (tmp_path / "bad.npy").write_text("hello")
    with pytest.raises(UserError, match="bad.npy cannot be read"):
        reader(tmp_path / "bad.npy")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot read .*folder.png"):
        reader(tmp_path / "folder.png")


def test_pickled_arrays_are_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="a.npy cannot be read"):
        read_image(tmp_path / "a.npy")


def test_voc_colours() -> None:
    colours = voc_colormap(256)
    assert colours[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert colours[15] == (192, 128, 128)
    assert colours[20] == (0, 64, 128)
    assert colours[255] == (224, 224, 192)
    assert len(set(colours)) == 256
