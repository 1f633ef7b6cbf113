"""The usual kinds of image and label files are read, and broken files are refused."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.images.png import chunk, png
from utils.errors import UserError
from utils.images import formats, read_image, read_label, read_mask, to_pixels, voc_colormap
from utils.images.raster import upright

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


def test_gray_is_repeated_and_color_becomes_luminance(tmp_path: Path) -> None:
    gray = save(tmp_path / "g.png", RGB[:, :, 0])
    assert np.array_equal(read_image(gray), np.repeat(RGB[:, :, :1], 3, axis=2))
    assert np.array_equal(read_image(gray, 1), RGB[:, :, :1])
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


def tag(kind: int, *values: int) -> bytes:
    """Return an EXIF entry for the orientation; kinds: 1 bytes, 3 shorts, 4 longs."""
    body = struct.pack("<" + {1: "B", 3: "H", 4: "I"}[kind] * len(values), *values)
    return struct.pack("<HHI", 0x0112, kind, len(values)) + body.ljust(4, b"\0")[:4]


def exif_data(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
ODD_EXIF = {
    "usual": ({"exif": exif_data(tag(3, 6))}, 6),
    "twice": ({"exif": exif_data(tag(3, 3), tag(3, 6))}, None),  # Pillow 12 takes the last one, Pillow 13 the first
    "a long": ({"exif": exif_data(tag(4, 8))}, 8),
    "a byte": ({"exif": exif_data(tag(1, 6))}, 1),
    "two numbers": ({"exif": exif_data(tag(3, 6, 3))}, 6),
    "unknown": ({"exif": exif_data(tag(3, 9))}, 1),
    "cut off": ({"exif": exif_data(tag(3, 6))[:20]}, 1),
    "only in XMP": ({"xmp": XMP}, 1),
    "also in XMP": ({"exif": exif_data(tag(3, 3)), "xmp": XMP}, 3),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("case", ODD_EXIF)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_every_reader_takes_odd_orientations_alike(tmp_path: Path, case: str, suffix: str) -> None:
    """The decoders disagree about them, but an image and its mask must not be turned differently."""
    options, turn = ODD_EXIF[case]
    if suffix == ".png" and "xmp" in options:
        information = PngInfo()
        information.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options = {key: value for key, value in options.items() if key != "xmp"} | {"pnginfo": information}
    path, gray = tmp_path / f"a{suffix}", SMOOTH[:, :, 0]
    picture = Image.fromarray(np.dstack([gray] * 3))
    picture.save(path, **options, **({"quality": 98} if suffix == ".jpg" else {"lossless": True}))
    data = path.read_bytes()
    turn = formats.orientation(data) if turn is None else turn
    want = upright(gray, turn)
    assert formats.orientation(data) == turn > 0
    assert formats.upright_size(data, path) == want.shape
    for image in (read_image(path), read_image(path, 1), formats.decode(data, path).array):
        assert image.shape[:2] == want.shape
        assert np.abs(image.mean(2) - want).mean() < 3
    if suffix == ".png":
        Image.fromarray(gray).save(path, **options)
        assert np.array_equal(read_label(path), want)


@pytest.mark.parametrize("layout", ["contig", "separate"])
def test_xmp_does_not_turn_a_tif(tmp_path: Path, layout: str) -> None:
    """Pillow reads the first layout, tifffile the second."""
    array = RGB if layout == "contig" else RGB.transpose(2, 0, 1)
    tags = [(700, "B", len(XMP), XMP, True)]
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", planarconfig=layout, metadata=None, extratags=tags)
    data = (tmp_path / "a.tif").read_bytes()
    assert np.array_equal(read_image(tmp_path / "a.tif"), RGB)
    assert formats.orientation(data) == 1
    assert formats.upright_size(data, tmp_path / "a.tif") == RGB.shape[:2]


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
def test_files_that_are_not_images_are_reported(tmp_path: Path, reader) -> None:
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


def test_voc_colors() -> None:
    colors = voc_colormap(256)
    assert colors[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert colors[15] == (192, 128, 128)
    assert colors[20] == (0, 64, 128)
    assert colors[255] == (224, 224, 192)
    assert len(set(colors)) == 256


# ---------------------------------------------------------------------------------- PNG


CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}


@pytest.mark.parametrize("interlaced", [False, True], ids=["rows", "interlaced"])
@pytest.mark.parametrize(
    ("bits", "kind"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (8, 4), (16, 4), (8, 6), (16, 6)]
)
def test_every_kind_of_png(tmp_path: Path, bits: int, kind: int, interlaced: bool) -> None:
    rng = np.random.default_rng(kind)
    array = rng.integers(0, 2**bits, (12, 17, CHANNELS[kind]))
    (tmp_path / "a.png").write_bytes(png(array, bits, kind, interlaced=interlaced))
    share = array / (2**bits - 1)
    colors = share[:, :, :1] if kind in (0, 4) else share[:, :, :3]
    luminance = colors if kind in (0, 4) else colors @ np.array([[0.299], [0.587], [0.114]])
    for channels, want in ((3, np.broadcast_to(colors, (12, 17, 3))), (1, luminance)):
        image = read_image(tmp_path / "a.png", channels)
        assert image.dtype == (np.uint8 if bits <= 8 else np.float32)
        assert np.allclose(image / (255 if bits <= 8 else 1), want, atol=1.01 / 255 if bits <= 8 else 1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_of_png(tmp_path: Path, bits: int, transparent: bool) -> None:
    rng = np.random.default_rng(bits)
    indices, colors = rng.integers(0, 2**bits, (12, 17)), rng.integers(0, 256, (2**bits, 3), np.uint8)
    extra = chunk(b"PLTE", colors.tobytes()) + (chunk(b"tRNS", bytes(range(2**bits))) if transparent else b"")
    (tmp_path / "a.png").write_bytes(png(indices, bits, 3, extra))
    assert np.array_equal(read_image(tmp_path / "a.png"), colors[indices])
    assert np.array_equal(read_label(tmp_path / "a.png"), indices)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_transparent_value_and_color_management_change_no_pixel(
    tmp_path: Path, bits: int, channels: int, capfd
) -> None:
    for kind in (0, 2):
        array = np.random.default_rng(0).integers(0, 2**bits, (12, 17, CHANNELS[kind]))
        (tmp_path / "plain.png").write_bytes(png(array, bits, kind))
        extras = [
            chunk(b"gAMA", struct.pack(">I", 100000)),
            chunk(b"iCCP", b"odd\0\0" + zlib.compress(b"not a profile")),
            chunk(b"tRNS", array[0, 0].astype(">u2").tobytes()),
            chunk(b"sRGB", b"\0"),
            chunk(b"cICP", bytes([9, 16, 0, 1])),
            chunk(b"sBIT", bytes([bits - 1] * CHANNELS[kind])),
        ]
        want = read_image(tmp_path / "plain.png", channels)
        for extra in extras:
            (tmp_path / "a.png").write_bytes(png(array, bits, kind, extra))
            assert np.array_equal(read_image(tmp_path / "a.png", channels), want), extra[4:8]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
def test_orientation_of_png(tmp_path: Path, orientation: int, bits: int) -> None:
    array = np.random.default_rng(0).integers(0, 2**bits, (12, 17, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png(array, bits, 2, chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    (tmp_path / "a.png").write_bytes(data)
    turned = array.transpose(1, 0, 2) if orientation >= 5 else array
    want = {1: turned, 2: turned[:, ::-1], 3: turned[::-1, ::-1], 4: turned[::-1]}
    want |= {5: turned, 6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1]}
    image = read_image(tmp_path / "a.png") / (255 if bits == 8 else 1)
    assert np.allclose(image, want[orientation] / (2**bits - 1), atol=1e-6)


def test_orientation_is_applied_once_however_a_pillow_image_was_opened(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.tif", "a.png", "a.webp"):
        Image.fromarray(RGB).save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
        for load in (False, True):
            with Image.open(tmp_path / name) as image:
                if load:
                    image.load()
                assert np.array_equal(to_pixels(image).image, np.rot90(RGB, -1)), (name, load)


def test_orientation_outside_of_exif_is_ignored(tmp_path: Path) -> None:
    """OpenCV reads most images and Pillow most masks; both must apply the same orientation."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    raw = b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n  32\n" + b"45786966000049492a0008000000010012010300010000000600000000000000"
    )
    indices = np.arange(204).reshape(12, 17) % 4
    for kind, data in ((b"iTXt", text), (b"zTXt", raw)):
        for bits in (8, 16):
            array = np.random.default_rng(0).integers(0, 2**bits, (12, 17, 3))
            (tmp_path / "a.png").write_bytes(png(array, bits, 2, chunk(kind, data)))
            assert read_image(tmp_path / "a.png").shape == (12, 17, 3)
        (tmp_path / "m.png").write_bytes(png(indices, 2, 3, chunk(b"PLTE", RGB[0, :4].tobytes()) + chunk(kind, data)))
        assert np.array_equal(read_label(tmp_path / "m.png"), indices)


def test_bytes_after_the_end_of_a_png_do_no_harm(tmp_path: Path) -> None:
    for bits in (8, 16):
        array = np.random.default_rng(0).integers(0, 2**bits, (12, 17, 3))
        (tmp_path / "a.png").write_bytes(png(array, bits, 2) + bytes(500))
        image = read_image(tmp_path / "a.png")
        assert image.dtype == (np.uint8 if bits == 8 else np.float32)
        assert np.allclose(image / (255 if bits == 8 else 1), array / (2**bits - 1), atol=1e-6)


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    for bits in (8, 16):
        data = bytearray(png(np.random.default_rng(0).integers(0, 2**bits, (12, 17, 3)), bits, 2))
        data[60] ^= 255
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.png cannot be read"):
            read_image(tmp_path / "a.png")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("kind", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("bits", [1, 8, 16])
def test_missing_rows_are_refused(tmp_path: Path, bits: int, kind: int, interlaced: bool) -> None:
    """Pillow fills them with zeros."""
    if (bits == 16 and kind == 3) or (bits == 1 and kind not in (0, 3)):
        return
    array = np.random.default_rng(0).integers(0, 2**bits, (12, 17, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]))
    array[..., -1] = 2**bits - 1  # constant transparency
    extra = chunk(b"PLTE", bytes(6 if bits == 1 else 768)) if kind == 3 else b""
    array[-1, :, : max(1, array.shape[2] - 1)] = 0  # a black row at the end is none that is missing
    (tmp_path / "a.png").write_bytes(png(array, bits, kind, extra, interlaced))
    assert read_image(tmp_path / "a.png").shape == (12, 17, 3)
    half = png(array[:6], bits, kind, extra, interlaced)
    height = chunk(b"IHDR", half[16:20] + struct.pack(">I", 12) + half[24:29])
    (tmp_path / "a.png").write_bytes(half[:8] + height + half[33:])
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=r"a\.png cannot be read, it is damaged"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("bits", [8, 16])
def test_long_chunks_hide_neither_orientation_nor_animation(tmp_path: Path, bits: int, capfd) -> None:
    long = chunk(b"iCCP", b"x\0\0" + zlib.compress(np.random.default_rng(0).bytes(90000)))
    behind = png(IDS, bits, 0).replace(chunk(b"IEND", b""), chunk(b"tEXt", bytes(70000)) + chunk(b"IEND", b""))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = behind[:33] + long + chunk(b"eXIf", exif.tobytes()[6:]) + behind[33:]
    (tmp_path / "a.png").write_bytes(turned)
    assert np.array_equal(read_label(tmp_path / "a.png"), IDS[::-1, ::-1])
    moving = chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(
        b"fcTL", struct.pack(">IIIIIHHBB", 0, 17, 12, 0, 0, 1, 1, 0, 0)
    )
    (tmp_path / "a.png").write_bytes(behind[:33] + long + moving + behind[33:])
    with pytest.raises(UserError, match="contains 2 pages or frames"):
        read_label(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(png(IDS, bits, 0, chunk(b"tEXt", b"c\0about iCCP profiles")))
    assert np.array_equal(read_label(tmp_path / "a.png"), IDS)
    assert not capfd.readouterr().err


# ---------------------------------------------------------------------------------- PGM and PPM


@pytest.mark.parametrize("largest", [1, 10, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", [b"P2", b"P3", b"P5", b"P6"])
def test_the_largest_value_of_pgm_and_ppm(tmp_path: Path, largest: int, kind: bytes) -> None:
    shape = (12, 17, 3 if kind in (b"P3", b"P6") else 1)
    array = np.random.default_rng(0).integers(0, largest, shape, endpoint=True)
    array[0, 0] = largest
    binary = array.astype(">u2" if largest > 255 else np.uint8).tobytes()
    text = b"# pixels\n" + "\n".join(" ".join(map(str, row)) for row in array.reshape(12, -1)).encode()
    (tmp_path / "a.ppm").write_bytes(
        b"%s\n# made by hand\n17 12\n%d\n" % (kind, largest) + (binary if kind in (b"P5", b"P6") else text)
    )
    image = read_image(tmp_path / "a.ppm", shape[2])
    assert image.dtype == (np.uint8 if largest <= 255 else np.float32)
    share = image / (255 if largest <= 255 else 1)
    assert np.allclose(share, array / largest, atol=0.51 / 255 if largest <= 255 else 1e-5)


def test_one_bit_pbm_and_floating_point_pfm(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (12, 17)).astype(bool)
    (tmp_path / "a.pgm").write_bytes(b"P4\n17 12\n" + np.packbits(bits, axis=1).tobytes())
    assert np.array_equal(read_image(tmp_path / "a.pgm", 1)[:, :, 0], np.where(bits, 0, 255)), "1 is black"
    gray = np.random.default_rng(0).random((12, 17)).astype("<f4")
    (tmp_path / "a.pgm").write_bytes(b"Pf\n17 12\n-1.0\n" + gray[::-1].tobytes())
    assert np.allclose(read_image(tmp_path / "a.pgm", 1)[:, :, 0], gray)


@pytest.mark.parametrize("head", [b"P5\n17 12\n255\n", b"P6\n17 12\n65535\n", b"P2\n17 12\n99\n"])
def test_truncated_pgm_and_ppm_are_refused(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "a.pgm").write_bytes(head + b"7 " * 90)
    with pytest.raises(UserError, match=r"a\.pgm cannot be read"):
        read_image(tmp_path / "a.pgm")


# ---------------------------------------------------------------------------------- others


def test_the_first_frame_of_an_animation_is_read_and_reported_once(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr("utils.images._warned", [])
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    for name, options in (("a.webp", {"lossless": True}), ("a.png", {}), ("b.webp", {"lossless": True})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(read_image(tmp_path / name), RGB)
    assert len(caplog.records) == 1
    assert "contains 2 pages or frames; only the first one is read" in caplog.text


def test_arrays_of_pillow_can_be_written_to(tmp_path: Path) -> None:
    for name in ("a.webp", "a.gif", "a.bmp", "a.tif", "a.ppm"):
        image = read_image(save(tmp_path / name, RGB))
        image[0, 0] = 0
    assert read_image(save(tmp_path / "g.gif", RGB[:, :, 0]), 1).flags.writeable


@pytest.mark.parametrize("bits", [1, 4, 8, 24, 32])
def test_bmp(tmp_path: Path, bits: int) -> None:
    mode = {1: "1", 4: "P", 8: "P", 24: "RGB", 32: "RGBA"}[bits]
    picture = Image.fromarray(RGB)
    picture = picture.quantize(2**bits) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "a.bmp")
    assert np.array_equal(read_image(tmp_path / "a.bmp"), np.asarray(picture.convert("RGB")))
    if mode == "P":
        assert np.array_equal(read_label(tmp_path / "a.bmp"), np.asarray(picture))


def test_two_colors_of_more_than_one_bit_in_a_bmp_are_refused(tmp_path: Path) -> None:
    """Pillow takes each bit of the 8 for a pixel."""
    save(tmp_path / "a.bmp", RGB[:, :, 0] % 2)
    data = bytearray((tmp_path / "a.bmp").read_bytes())
    data[46] = 2  # how many colors the palette has
    data[47:50] = bytes(3)
    data[58:61] = b"\xff\xff\xff"
    (tmp_path / "a.bmp").write_bytes(data)
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match="4 or 8 bits with two colors"):
            read(tmp_path / "a.bmp")


def test_broken_headers_of_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IDS)
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"}", b"("))
    with pytest.raises(UserError, match=r"a\.npy cannot be read as a .npy array"):
        read_label(tmp_path / "a.npy")


def test_archives_of_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", IDS)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(UserError, match=r"a\.npy cannot be read as a .npy array: it is an archive"):
        read_label(tmp_path / "a.npy")


def test_jpeg_2000(tmp_path: Path) -> None:
    save(tmp_path / "a.jp2", RGB)  # lossless by default
    assert np.array_equal(read_image(tmp_path / "a.jp2"), RGB)
    deep = np.random.default_rng(0).integers(0, 65536, (12, 17), np.uint16)
    save(tmp_path / "d.jp2", deep)
    assert np.allclose(read_image(tmp_path / "d.jp2", 1)[:, :, 0], deep / 65535, atol=1e-6)


def test_formats_that_are_not_tested_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", format="ICO", sizes=[(16, 16)])
    Image.fromarray(RGB).save(tmp_path / "b.png", format="TGA")
    cv2.imwrite(str(tmp_path / "c.hdr"), RGB.astype(np.float32))
    for name in ("a.png", "b.png", "c.hdr"):
        with pytest.raises(UserError, match="is not an image file"):
            read_image(tmp_path / name)


def test_names_do_not_matter(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", RGB, format="PNG")
    assert np.array_equal(read_image(tmp_path / "a.jpg"), RGB)
    with open(tmp_path / "a.png", "wb") as file:
        np.save(file, RGB)
    assert np.array_equal(read_image(tmp_path / "a.png"), RGB)


def test_jpeg_of_twelve_bits_is_refused(tmp_path: Path) -> None:
    import imagecodecs

    deep = np.random.default_rng(0).integers(0, 4096, (32, 32), np.uint16)
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpeg8_encode(deep, bitspersample=12))
    with pytest.raises(UserError, match="12-bit.*convert it to PNG"):
        read_image(tmp_path / "a.jpg")
