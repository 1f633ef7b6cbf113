"""TIFF files in many layouts, written by tifffile, Pillow and OpenCV, are read correctly or refused."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.images.kinds import packed, rewritten
from tests.images.kinds import tiff as written
from utils.errors import UserError
from utils.images import read_image, read_label, tif
from utils.images.tif import decode

H, W = 23, 37
NAMES = ["miniswhite", "minisblack", "rgb", "palette", None, "separated"]
COMPRESSIONS = {1: None, 5: "lzw", 8: "deflate", 32773: "packbits", 7: "jpeg"}
PATH = Path("x.tif")


def numbers(dtype: str, channels: int = 1) -> np.ndarray:
    rng = np.random.default_rng(channels)
    shape = (H, W) if channels == 1 else (H, W, channels)
    if dtype.startswith("f"):
        return rng.random(shape).astype(dtype)
    if dtype == "?":
        return rng.integers(0, 2, shape).astype(bool)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


@pytest.fixture
def no_tifffile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tif, "tifffile", None)


# ---------------------------------------------------------------------------------- what the plain installation reads


@pytest.mark.usefixtures("no_tifffile")
@pytest.mark.parametrize("layout", sorted(tif._PILLOW_LAYOUTS), ids=str)
def test_layouts_of_the_plain_installation(layout: tuple) -> None:
    meaning, bits, kind, extra = layout
    if meaning == 6:
        pytest.skip("lossy, below")
    dtype = {(1, 1): "?", (8, 1): "u1", (16, 1): "u2", (32, 3): "f4"}[bits[0], kind]
    array = numbers(dtype, len(bits))
    options: dict = {"photometric": NAMES[meaning]}
    if extra:
        options["extrasamples"] = ["unspecified", "assocalpha", "unassalpha"][extra[0]]
    if meaning == 3:
        options["colormap"] = numbers("u2", 768).reshape(-1, 768)[0].reshape(3, 256)
    want = array if array.ndim == 3 else array[:, :, None]
    want = ~want if meaning == 0 else tif._from_cmyk(want) if meaning == 5 else want
    read, refused = 0, []
    for compression in (1, 5, 8, 32773):
        for shape in ({}, {"rowsperstrip": 5}, {"tile": (16, 32)}):
            for predictor in (False, True):
                for order in "<>":
                    how = {"compression": COMPRESSIONS[compression], "predictor": predictor, "byteorder": order}
                    try:
                        data = written(array, **options, **shape, **how)
                    except (ValueError, NotImplementedError):
                        continue  # no prediction for bits
                    try:
                        found = decode(data, PATH, 1)
                    except UserError as error:
                        refused.append(str(error))
                        continue
                    read += 1
                    difference = np.abs(found.array.astype(float) - want).max()
                    assert difference <= (1 if meaning == 5 else 0), (shape, how)
    assert read >= 12
    assert all("pip install tifffile imagecodecs" in message for message in refused)


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr"])
def test_jpeg_compression_is_read_alike_by_both(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.linspace(0, 255, H * W).reshape(H, W)
    picture = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], 2).astype(np.uint8))
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, "TIFF", compression="jpeg", quality=95)
    first = decode(buffer.getvalue(), PATH, 1)
    monkeypatch.setattr(tif, "_open_pillow", lambda data: None)
    second = decode(buffer.getvalue(), PATH, 1)
    assert first.lossy
    assert second.lossy
    assert np.array_equal(first.array, second.array)
    want = np.asarray(picture.convert("L" if mode == "L" else "RGB")).astype(int).reshape(H, W, -1)
    assert np.abs(first.array - want).mean() < 3


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_fax(compression: str) -> None:
    bits = numbers("?")
    buffer = io.BytesIO()
    Image.fromarray(bits).save(buffer, "TIFF", compression=compression)
    assert np.array_equal(decode(buffer.getvalue(), PATH, 1).array[:, :, 0], bits)


@pytest.mark.usefixtures("no_tifffile")
@pytest.mark.parametrize(
    ("dtype", "channels", "options"),
    [
        ("u1", 4, {"photometric": "rgb", "extrasamples": "unspecified"}),
        ("u1", 4, {"photometric": "rgb", "extrasamples": "assocalpha"}),
        ("u1", 2, {"photometric": "minisblack"}),
        ("u1", 5, {"photometric": "minisblack"}),
        ("u2", 3, {"photometric": "rgb"}),
        ("u2", 1, {"photometric": "miniswhite"}),
        ("i2", 1, {}),
        ("u4", 1, {}),
        ("f8", 1, {}),
        ("f4", 1, {"byteorder": ">", "compression": "deflate"}),
        ("u1", 1, {"compression": "zstd"}),
        ("u1", 1, {"compression": "lzma"}),
        ("u1", 1, {"compression": "png"}),
    ],
)
def test_other_layouts_name_the_extra(dtype: str, channels: int, options: dict) -> None:
    with pytest.raises(UserError, match=r"x\.tif.*pip install tifffile imagecodecs"):
        decode(written(numbers(dtype, channels), **options), PATH, channels)


@pytest.mark.usefixtures("no_tifffile")
def test_several_pages_name_the_extra() -> None:
    with pytest.raises(UserError, match="pip install tifffile"):
        decode(written(numbers("u1", 5).transpose(2, 0, 1), photometric="minisblack"), PATH, 1)


def test_tifffile_alone_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(numbers("u2", 3), photometric="rgb", compression="zstd")

    def absent(*_: object, **__: object) -> None:
        raise ValueError("<COMPRESSION.ZSTD: 50000> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", absent)
    with pytest.raises(UserError, match="pip install tifffile imagecodecs"):
        decode(data, PATH, 3)


# ---------------------------------------------------------------------------------- what tifffile reads


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_types_and_channel_counts(dtype: str, channels: int) -> None:
    array = numbers(dtype, channels)
    options = {"planarconfig": "contig"} if channels > 1 else {}
    for order in "<>":
        found = decode(written(array, photometric="minisblack", byteorder=order, **options), PATH, channels)
        assert np.array_equal(found.array.reshape(array.shape), array)
        assert found.colors == {1: 1, 3: 3, 4: 3}.get(channels, 0)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd", "lzma", "png", "lerc"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("tile", [None, (16, 32)], ids=["strips", "tiles"])
def test_compressions_planes_and_tiles(compression: str | None, planar: str, tile: tuple | None) -> None:
    for dtype, channels, meaning in (("u1", 3, "rgb"), ("u2", 3, "rgb"), ("u2", 4, "minisblack")):
        array = numbers(dtype, channels)
        stored = array.transpose(2, 0, 1) if planar == "separate" else array
        for predictor in (False, True) if compression in ("lzw", "deflate", "zstd") else (False,):
            options = {"photometric": meaning, "planarconfig": planar, "compression": compression, "tile": tile}
            data = written(stored, predictor=predictor, bigtiff=predictor, **options)
            assert np.array_equal(decode(data, PATH, channels).array, array)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_prediction_of_floats(dtype: str) -> None:
    array = numbers(dtype, 3)
    data = written(array, photometric="rgb", compression="deflate", predictor=True)
    assert np.array_equal(decode(data, PATH, 3).array, array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_orientation(tmp_path: Path, orientation: int, dtype: str) -> None:
    array = numbers(dtype, 3)
    data = written(array, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    (tmp_path / "a.tif").write_bytes(data)
    upright = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array),
    }[orientation]
    assert np.allclose(read_image(tmp_path / "a.tif"), upright / (1 if dtype == "u1" else 65535), atol=1e-6)


@pytest.mark.parametrize("value", [0, 9, 255])
def test_orientations_that_do_not_exist_mean_nothing(tmp_path: Path, value: int) -> None:
    array = numbers("u1", 3)
    for options in ({}, {"compression": "zstd"}):  # Pillow, tifffile
        data = written(array, photometric="rgb", extratags=[(274, "H", 1, value, True)], **options)
        (tmp_path / "a.tif").write_bytes(data)
        assert np.array_equal(read_image(tmp_path / "a.tif"), array)


@pytest.mark.parametrize("bits", [2, 4, 9, 10, 12, 14])
def test_bits_between_the_types_are_scaled_by_their_own_largest_value(tmp_path: Path, bits: int) -> None:
    array = np.random.default_rng(0).integers(0, 2**bits, (H, W)).astype("u1" if bits <= 8 else "u2")
    (tmp_path / "a.tif").write_bytes(packed(array, bits))
    image = read_image(tmp_path / "a.tif", 1)[:, :, 0]
    if bits <= 8:
        assert image.dtype == np.uint8
        assert np.array_equal(image, np.rint(array * (255 / (2**bits - 1))))
    else:
        assert np.allclose(image, array / (2**bits - 1), atol=1e-6)
    assert np.array_equal(read_label(tmp_path / "a.tif"), array)


@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "u4"])
def test_white_is_zero(tmp_path: Path, dtype: str) -> None:
    array = numbers(dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
    top = 1 if dtype == "?" else np.iinfo(dtype).max
    image = read_image(tmp_path / "a.tif", 1)[:, :, 0] / (255 if dtype in "?u1" else 1)
    assert np.allclose(image, 1 - array / top, atol=1e-6)


def test_one_bit_is_read_alike_by_both(tmp_path: Path) -> None:
    for meaning in ("miniswhite", "minisblack"):
        found = []
        for compression in (None, "zstd"):  # Pillow, tifffile
            tifffile.imwrite(tmp_path / "a.tif", numbers("?"), photometric=meaning, compression=compression)
            found += [read_label(tmp_path / "a.tif"), read_image(tmp_path / "a.tif", 1)[:, :, 0] // 255]
        assert all(np.array_equal(other, found[0]) for other in found)


def test_the_fourth_band_does_not_touch_the_colors(tmp_path: Path) -> None:
    array = numbers("u1", 4)
    array[:10, :, 3] = 0
    for extra in ("unspecified", "assocalpha", "unassalpha"):
        tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=extra)
        assert np.array_equal(read_image(tmp_path / "a.tif"), array[:, :, :3])
        assert np.array_equal(read_image(tmp_path / "a.tif", 4), array)


def test_two_bands_keep_both_unless_one_is_transparency(tmp_path: Path) -> None:
    array = numbers("u1", 2)
    tifffile.imwrite(tmp_path / "bands.tif", array, photometric="minisblack", planarconfig="contig")
    assert np.array_equal(read_image(tmp_path / "bands.tif", 2), array)
    for channels in (1, 3):
        with pytest.raises(UserError, match="has 2 channels"):
            read_image(tmp_path / "bands.tif", channels)
    options = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": "unassalpha"}
    tifffile.imwrite(tmp_path / "alpha.tif", array, **options)
    assert np.array_equal(read_image(tmp_path / "alpha.tif", 1), array[:, :, :1])


def test_cmyk_of_more_bits_and_palettes(tmp_path: Path) -> None:
    ink = numbers("u2", 4)
    tifffile.imwrite(tmp_path / "a.tif", ink, photometric="separated")
    share = ink / 65535
    assert np.allclose(read_image(tmp_path / "a.tif"), (1 - share[..., :3]) * (1 - share[..., 3:]), atol=1e-4)
    colors, indices = numbers("u2", 768)[0, 0].reshape(3, 256), numbers("u1")
    tifffile.imwrite(tmp_path / "p.tif", indices, photometric="palette", colormap=colors, compression="zstd")
    assert np.array_equal(read_image(tmp_path / "p.tif"), (colors.T >> 8)[indices])


@pytest.mark.parametrize("bits", [1, 4, 16])
def test_palettes_of_other_bits(tmp_path: Path, bits: int) -> None:
    colors = np.random.default_rng(0).integers(0, 65536, (3, 2**bits)).astype(np.uint16)
    indices = np.random.default_rng(0).integers(0, 2**bits, (H, W)).astype({1: "?", 4: "u1", 16: "u2"}[bits])
    extra = [(320, "H", colors.size, colors.ravel().tolist(), True)]
    data = packed(indices, bits, extratags=extra) if bits < 8 else written(indices, extratags=extra)
    (tmp_path / "a.tif").write_bytes(rewritten(data, 262, 3))
    if bits > 8:
        with pytest.raises(UserError, match="PALETTE, 16 bits.*convert it to RGB"):
            read_image(tmp_path / "a.tif")
        return
    assert np.array_equal(read_image(tmp_path / "a.tif"), (colors.T >> 8)[indices.astype(int)])
    assert np.array_equal(read_label(tmp_path / "a.tif"), indices)


def test_strips_that_are_left_out_are_black_or_no_data() -> None:
    array = numbers("u1", 3)
    for tags, want in (([], 0), ([(42113, "s", 0, "7", True)], 7)):
        buffer = io.BytesIO(written(array, photometric="rgb", rowsperstrip=8, extratags=tags))
        with tifffile.TiffFile(buffer, mode="r+b") as file:
            for number in (273, 279):
                tag = file.pages[0].tags[number]
                tag.overwrite((tag.value[0], 0, tag.value[2]))
            buffer.seek(0)
            found = decode(buffer.read(), PATH, 3).array
        assert (found[8:16] == want).all()
        assert np.array_equal(np.delete(found, slice(8, 16), 0), np.delete(array, slice(8, 16), 0))


# ---------------------------------------------------------------------------------- pages


def pages(path: Path, *arrays: np.ndarray, **options: object) -> Path:
    with tifffile.TiffWriter(path) as file:
        for number, array in enumerate(arrays):
            subfile = options.get(f"subfile{number}", 0)
            file.write(
                array, photometric="rgb" if array.ndim == 3 else "minisblack", metadata=None, subfiletype=subfile
            )
    return path


def test_pages_are_bands_where_as_many_are_wanted(tmp_path: Path) -> None:
    many = numbers("u1", 6)
    path = pages(tmp_path / "a.tif", *many.transpose(2, 0, 1))
    assert np.array_equal(read_image(path, 6), many)
    assert np.array_equal(read_image(path, 1), many[:, :, :1])
    assert np.array_equal(read_image(path, 3), np.repeat(many[:, :, :1], 3, axis=2))


def test_a_stack_of_three_pages_is_no_picture_in_color(tmp_path: Path) -> None:
    many = numbers("u1", 3)
    path = pages(tmp_path / "a.tif", *many.transpose(2, 0, 1))
    assert np.array_equal(read_image(path, 3), np.repeat(many[:, :, :1], 3, axis=2))
    tifffile.imwrite(tmp_path / "c.tif", many.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"})
    assert np.array_equal(read_image(tmp_path / "c.tif", 3), many), "the file says that these are channels"
    tifffile.imwrite(tmp_path / "z.tif", many.transpose(2, 0, 1), imagej=True, metadata={"axes": "ZYX"})
    assert np.array_equal(read_image(tmp_path / "z.tif", 3), np.repeat(many[:, :, :1], 3, axis=2))


@pytest.mark.parametrize("flag", [0, 1])
@pytest.mark.parametrize("first", [False, True], ids=["behind", "first"])
def test_a_preview_is_not_the_picture(tmp_path: Path, flag: int, first: bool) -> None:
    picture = numbers("u1", 3)[:22, :36]
    preview = np.zeros((11, 18, 3), np.uint8)
    order = (preview, picture) if first else (picture, preview)
    path = pages(tmp_path / "a.tif", *order, **{f"subfile{0 if first else 1}": flag})
    assert np.array_equal(read_image(path), picture)


def test_masks_behind_the_picture_are_passed_over(tmp_path: Path) -> None:
    picture, mask = numbers("u1", 3), numbers("u1")
    path = pages(tmp_path / "a.tif", picture, mask)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[1].tags[254].overwrite(4)
    assert np.array_equal(read_image(path), picture)


def test_pages_without_a_picture_among_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="previews and masks only"):
        read_image(pages(tmp_path / "a.tif", numbers("u1", 3), subfile0=1))
    with pytest.raises(UserError, match="pages of different sizes"):
        read_image(pages(tmp_path / "b.tif", numbers("u1")[:10, :10], numbers("u1")))


def test_sub_images_are_passed_over(tmp_path: Path) -> None:
    picture = numbers("u1", 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(picture, photometric="rgb", subifds=1)
        file.write(picture[::2, ::2] * 0, photometric="rgb", subfiletype=1)
    assert np.array_equal(read_image(tmp_path / "a.tif"), picture)


# ---------------------------------------------------------------------------------- damaged and unknown


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("compression", [None, "deflate", "lzw"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_files_are_refused(channels: int, compression: str | None, share: float, capfd) -> None:
    array = numbers("u1", channels)
    # The directory comes before the pixels.
    options = {"planarconfig": "contig"} if channels > 1 else {}
    data = written(array, photometric="rgb" if channels == 3 else "minisblack", compression=compression, **options)
    with pytest.raises(UserError, match=r"x\.tif"):
        decode(data[: int(len(data) * share)], PATH, channels)
    assert capfd.readouterr() == ("", ""), "libraries do not print"


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("compression", ["deflate", "lzw", "zstd"])
def test_garbage_in_compressed_data_is_refused(dtype: str, compression: str) -> None:
    array = numbers(dtype, 3)
    data = bytearray(written(array, photometric="rgb", compression=compression, rowsperstrip=8))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        start, count = file.pages[0].dataoffsets[1], file.pages[0].databytecounts[1]
    data[start : start + count] = bytes([129]) * count
    with pytest.raises(UserError, match=r"x\.tif"):
        decode(bytes(data), PATH, 3)


@pytest.mark.parametrize("meaning", [4, 8, 9, 32803, 34892])
def test_other_kinds_of_pictures_are_refused(meaning: int) -> None:
    data = rewritten(written(numbers("u1", 3), photometric="rgb"), 262, meaning)
    with pytest.raises(UserError, match="not supported|cannot be read"):
        decode(data, PATH, 3)


@pytest.mark.parametrize("plain", [True, False])
def test_volumes_in_one_page_are_refused(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads the first slice."""
    if plain:
        monkeypatch.setattr(tif, "tifffile", None)
    data = written(np.zeros((5, 20, 30), np.uint8), photometric="minisblack", volumetric=True, tile=(1, 16, 16))
    with pytest.raises(UserError, match="uncommon layout" if plain else "not supported .*, 5 slices"):
        decode(data, PATH, 1)


def test_files_of_another_library(tmp_path: Path) -> None:
    array = numbers("u2", 3)
    cv2.imwrite(str(tmp_path / "a.tif"), array)
    assert np.allclose(read_image(tmp_path / "a.tif"), array[:, :, ::-1] / 65535, atol=1e-6)


def test_nothing_is_printed_about_odd_metadata(tmp_path: Path, capfd, recwarn, caplog) -> None:
    tags = [(50000, "s", 0, "odd", True), (33550, "d", 3, (1.0, 1.0, 0.0), True), (42113, "s", 0, "-9999", True)]
    for number, options in enumerate(
        ({}, {"predictor": True, "compression": "packbits"}, {"planarconfig": "separate"})
    ):
        array = numbers("u2", 3) if "planarconfig" not in options else numbers("u2", 3).transpose(2, 0, 1)
        tifffile.imwrite(tmp_path / f"{number}.tif", array, photometric="rgb", extratags=tags, **options)
        read_image(tmp_path / f"{number}.tif")
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
    assert not caplog.records
