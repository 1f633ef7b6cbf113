"""Label maps on disk: the stored numbers; files that contain anything else are refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from base.labels import PaletteReference
from tests.images.png import png
from utils.errors import UserError
from utils.images import read_label, read_levels, read_mask, voc_colormap, write_png
from utils.images.labels import Mask

RGB = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
IDS = np.random.default_rng(1).integers(0, 11, (12, 17), np.uint8)


def test_labels_are_the_stored_numbers(tmp_path: Path) -> None:
    write_png(tmp_path / "palette.png", IDS, voc_colormap(256))
    write_png(tmp_path / "gray.png", IDS)
    np.save(tmp_path / "array.npy", IDS.astype(np.int64))
    Image.fromarray(IDS).save(tmp_path / "a.tif")
    for name in ("palette.png", "gray.png", "array.npy", "a.tif"):
        label = read_label(tmp_path / name)
        assert label.ndim == 2
        assert np.array_equal(label, IDS)
    assert read_label(tmp_path / "palette.png").dtype == np.uint8
    with Image.open(tmp_path / "palette.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image.convert("RGB")), np.array(voc_colormap(256))[IDS])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_not_stretched(tmp_path: Path, bits: int) -> None:
    small = IDS % 2**bits
    (tmp_path / "a.png").write_bytes(png(small, bits, 0))
    assert np.array_equal(read_label(tmp_path / "a.png"), small)


def test_labels_above_255(tmp_path: Path) -> None:
    wide = (IDS.astype(np.uint16) * 100).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), wide)
    label = read_label(tmp_path / "a.png")
    assert label.dtype == np.int32
    assert np.array_equal(label, wide)


def test_color_labels_only_where_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    with pytest.raises(UserError, match="a.png is a color image.*Folder loader"):
        read_label(path)
    assert np.array_equal(read_mask(path).values, RGB)
    np.save(tmp_path / "f.npy", np.full((3, 3), 0.5))
    with pytest.raises(UserError, match="must contain integers"):
        read_label(tmp_path / "f.npy")


# ---------------------------------------------------------------------------------- masks that hold more than ids


def test_palettes_come_with_the_mask(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", IDS, voc_colormap(256))
    mask = read_mask(tmp_path / "a.png")
    assert np.array_equal(mask.values, IDS)
    assert np.array_equal(mask.palette, voc_colormap(256))
    assert np.array_equal(mask.colors(), np.array(voc_colormap(256), np.uint8)[IDS])
    write_png(tmp_path / "g.png", IDS)
    assert read_mask(tmp_path / "g.png").palette is None
    assert np.array_equal(read_mask(tmp_path / "g.png").colors()[:, :, 1], IDS)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_in_masks(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(IDS).convert(mode)
    picture.save(tmp_path / "opaque.png")
    label = read_mask(tmp_path / "opaque.png").values
    assert np.array_equal(label if label.ndim == 2 else label[:, :, 0], IDS)
    picture.putalpha(Image.fromarray(IDS * 20))
    picture.save(tmp_path / "varied.png")
    for reader in (read_label, read_levels):
        with pytest.raises(UserError, match=r"varied\.png has transparency that differs"):
            reader(tmp_path / "varied.png")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.webp", {"quality": 50}),
        ("a.tif", {"compression": "jpeg"}),
        ("a.jp2", {}),
        ("a.png", {"format": "JPEG"}),
    ],
)
def test_lossy_masks_are_recognized_by_content(tmp_path: Path, name: str, options: dict) -> None:
    Image.fromarray(np.dstack([IDS] * 3)).save(tmp_path / name, **options)
    with pytest.raises(UserError, match=r"lossy compression.*`threshold: 127`"):
        read_mask(tmp_path / name)


def test_lossless_webp_is_a_mask(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([IDS] * 3)).save(tmp_path / "a.webp", lossless=True)
    assert np.array_equal(read_mask(tmp_path / "a.webp").values[:, :, 0], IDS)
    Image.fromarray(np.dstack([IDS] * 3)).save(tmp_path / "b.webp", lossless=True, exif=Image.Exif().tobytes())
    assert np.array_equal(read_mask(tmp_path / "b.webp").values[:, :, 0], IDS)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_several_frames_are_refused(tmp_path: Path, name: str) -> None:
    frames = [Image.fromarray(IDS), Image.fromarray(IDS[::-1].copy())]
    frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {})
    )
    with pytest.raises(UserError, match="contains 2 pages or frames"):
        read_mask(tmp_path / name)


def test_more_channels_are_refused(tmp_path: Path) -> None:
    for channels in (2, 5):
        tifffile.imwrite(
            tmp_path / "a.tif", np.dstack([IDS] * channels), planarconfig="contig", photometric="minisblack"
        )
        np.save(tmp_path / "a.npy", np.dstack([IDS] * channels))
        for name in ("a.tif", "a.npy"):
            with pytest.raises(UserError, match=f"has {channels} channels; a label map must have one"):
                read_label(tmp_path / name)
    tifffile.imwrite(tmp_path / "a.tif", np.dstack([IDS] * 4), photometric="rgb", extrasamples="unspecified")
    with pytest.raises(UserError, match="has 4 channels"):
        read_mask(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_float_masks_of_whole_numbers_are_read_and_others_refused(tmp_path: Path, suffix: str) -> None:
    def save(array: np.ndarray) -> Path:
        path = tmp_path / f"a.{suffix}"
        tifffile.imwrite(path, array) if suffix == "tif" else np.save(path, array)
        return path

    whole = IDS.astype(np.float32)
    whole[0, 0], whole[0, 1] = -9999, 1000
    label = read_label(save(whole))
    assert label.dtype == np.int32
    assert np.array_equal(label, whole), "what is no class stays visible to the check of labels"
    whole[0, 0] = np.nan
    with pytest.raises(UserError, match="not finite.*as 255"):
        read_label(save(whole))
    with pytest.raises(UserError, match="non-integer"):
        read_label(save(IDS / np.float32(10)))
    with pytest.raises(UserError, match="must fit in 32 bits"):
        read_label(save(IDS.astype(np.float64) * 1e12))


def test_masks_of_half_precision(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    np.save(tmp_path / "a.npy", IDS.astype(np.float16))
    assert np.array_equal(read_label(tmp_path / "a.npy"), IDS)
    assert not recwarn.list


def test_pgm_masks_keep_their_numbers(tmp_path: Path) -> None:
    binary = IDS.tobytes()
    text = " ".join(map(str, IDS.ravel())).encode()
    for head, body in ((b"P5", binary), (b"P2 # classes\n", text)):
        (tmp_path / "a.pgm").write_bytes(head + b"\n17 12\n10\n" + body)
        assert np.array_equal(read_label(tmp_path / "a.pgm"), IDS)
    (tmp_path / "a.pgm").write_bytes(b"P5\n17 12\n9\n" + binary)
    with pytest.raises(UserError, match="damaged"):
        read_label(tmp_path / "a.pgm")


def test_orientation_of_masks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (("a.png", {}), ("p.png", {}), ("a.tif", {})):
        picture = Image.fromarray(IDS)
        if name == "p.png":
            picture.putpalette([v for c in voc_colormap(256) for v in c])
        picture.save(tmp_path / name, exif=exif, **options)
        assert np.array_equal(read_label(tmp_path / name), np.rot90(IDS, -1)), name


def test_white_is_zero_is_unclear_in_a_mask(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", IDS, photometric="miniswhite")
    with pytest.raises(UserError, match="stores 0 as white"):
        read_label(tmp_path / "a.tif")


# ---------------------------------------------------------------------------------- gray levels for a threshold


SHAPE = np.zeros((12, 17), bool)
SHAPE[3:8, 4:11] = True


@pytest.mark.parametrize(
    "kind", ["1bit", "1bit.tif", "fax", "palette", "rgb", "rgba", "gray", "16bit", "jpeg", "webp", "float"]
)
def test_gray_levels_of_every_kind(tmp_path: Path, kind: str) -> None:
    gray = SHAPE.astype(np.uint8) * 255
    path = tmp_path / {"jpeg": "a.jpg", "webp": "a.webp", "1bit.tif": "a.tif", "fax": "a.tif", "float": "a.npy"}.get(
        kind, "a.png"
    )
    if kind == "palette":
        picture = Image.fromarray(SHAPE.astype(np.uint8))
        picture.putpalette([0, 0, 0, 255, 255, 255])
    elif kind in ("1bit", "1bit.tif", "fax"):
        picture = Image.fromarray(SHAPE)
    else:
        picture = Image.fromarray(gray.astype(np.uint16) * 257 if kind == "16bit" else gray)
        picture = picture.convert({"rgb": "RGB", "rgba": "RGBA", "webp": "RGB"}.get(kind, picture.mode))
    if kind == "float":
        np.save(path, SHAPE.astype(np.float32))
    else:
        picture.save(path, **({"compression": "group4"} if kind == "fax" else {}))
    levels = read_levels(path)
    assert levels.dtype == np.uint8
    assert levels.shape == SHAPE.shape
    assert np.array_equal(levels > 127, SHAPE)


def test_masks_that_a_threshold_does_not_split_are_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "ids.png", SHAPE.astype(np.uint8))
    with pytest.raises(UserError, match="only the values 0 and 1, which are already class ids: .* without `threshold`"):
        read_levels(tmp_path / "ids.png")
    red = np.zeros((12, 17, 3), np.uint8)
    red[SHAPE] = (255, 0, 0)
    for name, advice in (("red.png", "set `palette`"), ("red.jpg", "Save masks as PNG")):
        Image.fromarray(red).save(tmp_path / name)
        with pytest.raises(UserError, match=f"painted in colors.*{advice}"):
            read_levels(tmp_path / name)
    np.save(tmp_path / "red.npy", red / 256)  # colors that integers do not show
    with pytest.raises(UserError, match="painted in colors"):
        read_levels(tmp_path / "red.npy")
    np.save(tmp_path / "red.npy", red + 0j)
    with pytest.raises(UserError, match="complex128 values"):
        read_levels(tmp_path / "red.npy")
    cv2.imwrite(str(tmp_path / "wide.png"), SHAPE.astype(np.uint16) * 255)
    with pytest.raises(UserError, match="save the mask with 8 bits"):
        read_levels(tmp_path / "wide.png")


def test_a_palette_that_another_thread_adds_meanwhile_is_no_contradiction() -> None:
    reference = PaletteReference()
    colors = np.asarray(voc_colormap(256), np.uint8)

    class Meanwhile(np.ndarray):
        """Lets another thread read a mask of value 1 while the colors are compared."""

        def __array_ufunc__(self, ufunc, method, *inputs, **options):  # type: ignore[no-untyped-def]
            result = getattr(ufunc, method)(*(np.asarray(item) for item in inputs), **options)
            if ufunc is np.equal:
                reference.check(Mask(np.ones((2, 2), np.uint8), colors), "b.png")
            return result

    reference.check(Mask(np.zeros((2, 2), np.uint8), colors.view(Meanwhile)), "a.png")
    reference.check(Mask(np.arange(2, dtype=np.uint8)[None], colors), "c.png")
    with pytest.raises(UserError):  # both colors are known now
        reference.check(Mask(np.arange(2, dtype=np.uint8)[None], colors[::-1]), "d.png")
