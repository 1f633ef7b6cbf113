"""Reading every usual kind of image and label file, and refusing broken ones."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.images import read_image, read_label, voc_colormap, write_png

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


def tiff(array: np.ndarray, *, order: str = "<", planar: int = 1, rows: int = 5, deflate: bool = False) -> bytes:
    """Write a TIFF of any number of bands by hand, in strips, as the specification says."""
    height, width, bands = array.shape
    array = array.astype(array.dtype.newbyteorder(order))
    planes = [array] if planar == 1 else [array[:, :, b : b + 1] for b in range(bands)]
    strips = [plane[top : top + rows] for plane in planes for top in range(0, height, rows)]
    if deflate:
        differences = [np.diff(s, axis=1, prepend=np.zeros_like(s[:, :1])).astype(s.dtype) for s in strips]
        packed = [zlib.compress(s.tobytes()) for s in differences]
    else:
        packed = [s.tobytes() for s in strips]
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    fields = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [array.dtype.itemsize * 8] * bands),
        259: (3, [8 if deflate else 1]),
        262: (3, [1]),
        273: (4, [0] * len(packed)),
        277: (3, [bands]),
        278: (4, [rows]),
        279: (4, [len(p) for p in packed]),
        284: (3, [planar]),
        317: (3, [2 if deflate else 1]),
        339: (3, [kind] * bands),
    }
    behind = 8 + 2 + 12 * len(fields) + 4
    room = sum(len(v) * (2 if t == 3 else 4) for t, v in fields.values() if len(v) * (2 if t == 3 else 4) > 4)
    start, offsets = behind + room, []
    for p in packed:
        offsets.append(start)
        start += len(p)
    fields[273] = (4, offsets)
    directory, extra = b"", b""
    for tag, (letter, values) in fields.items():
        body = struct.pack(f"{order}{len(values)}{'H' if letter == 3 else 'I'}", *values)
        if len(body) > 4:
            place, extra = struct.pack(order + "I", behind + len(extra)), extra + body
        else:
            place = body.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, letter, len(values)) + place
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(fields))
    return head + directory + bytes(4) + extra + b"".join(packed)


@pytest.mark.parametrize("bands", [2, 4, 5, 8])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize(
    "options", [{}, {"planar": 2}, {"order": ">"}, {"deflate": True}, {"deflate": True, "planar": 2}, {"rows": 100}]
)
def test_tiffs_of_many_bands(tmp_path: Path, bands: int, dtype: str, options: dict) -> None:
    if options.get("deflate") and dtype == "float32":
        options = {**options, "deflate": False}  # the predictor is for integers
    top = {"uint8": 1, "uint16": 65535, "int16": 32767, "float32": 1}[dtype]
    many = np.random.default_rng(0).random((12, 17, bands)).astype(dtype) if dtype == "float32" else None
    many = np.random.default_rng(0).integers(0, max(top, 255), (12, 17, bands)).astype(dtype) if many is None else many
    (tmp_path / "a.tif").write_bytes(tiff(many, **options))
    image = read_image(tmp_path / "a.tif", bands)
    assert image.dtype == (np.uint8 if dtype == "uint8" else np.float32)
    assert np.allclose(image, many / top, atol=1e-6)


def test_pages_of_a_tiff_are_bands(tmp_path: Path) -> None:
    many = np.random.default_rng(0).integers(0, 256, (12, 17, 6), np.uint8)
    for name, compression in (("plain", None), ("deflated", "tiff_adobe_deflate"), ("lzw", "tiff_lzw")):
        pages = [Image.fromarray(many[:, :, b]) for b in range(6)]
        pages[0].save(tmp_path / f"{name}.tif", save_all=True, append_images=pages[1:], compression=compression)
        assert np.array_equal(read_image(tmp_path / f"{name}.tif", 6), many)


def test_a_preview_page_is_no_band(tmp_path: Path) -> None:
    large, small = (Image.fromarray(RGB[::step, ::step, 0]) for step in (1, 2))
    large.save(tmp_path / "a.tif", save_all=True, append_images=[small])
    assert np.array_equal(read_image(tmp_path / "a.tif", 1), RGB[:, :, :1])


def test_truncated_tiffs_of_many_bands_are_refused(tmp_path: Path) -> None:
    data = tiff(np.zeros((30, 30, 6), np.uint8))
    (tmp_path / "cut.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.tif cannot be read.*truncated"):
        read_image(tmp_path / "cut.tif", 6)


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


def test_labels_are_the_stored_numbers(tmp_path: Path) -> None:
    write_png(tmp_path / "palette.png", IDS, voc_colormap(256))
    write_png(tmp_path / "grey.png", IDS)
    np.save(tmp_path / "array.npy", IDS.astype(np.int64))
    Image.fromarray(IDS).save(tmp_path / "a.tif")
    for name in ("palette.png", "grey.png", "array.npy", "a.tif"):
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
    _write_grey_png(tmp_path / "a.png", small, bits)
    assert np.array_equal(read_label(tmp_path / "a.png"), small)


def _write_grey_png(path: Path, array: np.ndarray, bits: int) -> None:
    """Write a grey PNG of 1, 2 or 4 bits by hand: Pillow writes no 2 and 4."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = array.shape
    digits = ((array[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8)
    packed = np.packbits(digits.reshape(height, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_labels_above_255(tmp_path: Path) -> None:
    wide = (IDS.astype(np.uint16) * 100).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), wide)
    label = read_label(tmp_path / "a.png")
    assert label.dtype == np.int32
    assert np.array_equal(label, wide)


def test_colour_labels_only_where_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RGB)
    with pytest.raises(UserError, match="a.png is a colour image.*Folder loader"):
        read_label(path)
    assert np.array_equal(read_label(path, allow_colour=True), RGB)
    np.save(tmp_path / "f.npy", np.zeros((3, 3)))
    with pytest.raises(UserError, match="must hold integers"):
        read_label(tmp_path / "f.npy")


def test_voc_colours() -> None:
    colours = voc_colormap(256)
    assert colours[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert colours[15] == (192, 128, 128)
    assert colours[20] == (0, 64, 128)
    assert colours[255] == (224, 224, 192)
    assert len(set(colours)) == 256
