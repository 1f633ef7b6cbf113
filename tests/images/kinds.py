"""Kinds of image files, a small file of each, and the table of docs/datasets.md that says how each is read.

``python -m tests.images.kinds`` writes the table. What it says is measured: every file is read as an image and as a
mask, with and without the optional packages.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import cv2
import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from utils.errors import UserError
from utils.images import read_image, read_mask, tif

PAGE = Path(__file__).resolve().parents[2] / "docs/datasets.md"
BEGIN, END = "<!-- files: begin (python -m tests.images.kinds) -->", "<!-- files: end -->"

SHAPE = (23, 37)
_RNG = np.random.default_rng(0)
GRAY = _RNG.integers(0, 256, SHAPE, np.uint8)
RGB = _RNG.integers(0, 256, (*SHAPE, 3), np.uint8)
MANY = _RNG.integers(0, 256, (*SHAPE, 6), np.uint8)
SMOOTH = cv2.resize(_RNG.integers(0, 256, (3, 4, 3), np.uint8), SHAPE[::-1], interpolation=cv2.INTER_CUBIC)
BITS = GRAY > 127
PALETTE = _RNG.integers(0, 256, (256, 3), np.uint8)


class Kind(NamedTuple):
    """One kind of file: format and description, the file, and the expected intensities (None: refused)."""

    format: str
    kind: str
    suffix: str
    data: bytes
    want: np.ndarray | None = None
    tolerance: float = 1e-4


def pillow(array: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"metadata": None, **options})
    return buffer.getvalue()


def rewritten(data: bytes, tag: int, value: int) -> bytes:
    """Return a TIFF file with another value in an existing tag."""
    buffer = io.BytesIO(data)
    with tifffile.TiffFile(buffer, mode="r+b") as file:
        file.pages[0].tags[tag].overwrite(value)
        buffer.seek(0)
        return buffer.read()


def packed(array: np.ndarray, bits: int, **options: Any) -> bytes:
    """Return a gray TIFF file with other bits per pixel than 8, 16 or 32, which not every imagecodecs can write."""
    digits = array.astype(int)[:, :, None] >> np.arange(bits)[::-1] & 1
    rows = np.packbits(digits.reshape(len(array), -1), axis=1)
    data = tiff(rows, photometric="minisblack", **options)
    return rewritten(rewritten(data, 256, array.shape[1]), 258, bits)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def opencv(array: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, array)[1].tobytes()


def with_palette(array: np.ndarray) -> Image.Image:
    picture = Image.fromarray(array)
    picture.putpalette(PALETTE.ravel().tolist())
    return picture


def share(array: np.ndarray) -> np.ndarray:
    """Return stored integers as intensities from 0 to 1."""
    return array / (1 if array.dtype == np.bool_ else np.iinfo(array.dtype).max)


def kinds() -> Iterator[Kind]:
    """Yield every kind of the table."""
    yield from _usual()
    yield from _arrays()
    yield from _tiffs()


def _usual() -> Iterator[Kind]:
    animated = {"save_all": True, "append_images": [Image.fromarray(RGB[::-1].copy())]}
    deep, alpha = RGB.astype(np.uint16) * 257, np.dstack([RGB, GRAY])
    yield Kind("JPEG", "gray, RGB", ".jpg", pillow(SMOOTH, "JPEG", quality=95), share(SMOOTH), 0.1)
    ink = Image.fromarray(SMOOTH).convert("CMYK")
    yield Kind("JPEG", "CMYK", ".jpg", pillow(ink, "JPEG", quality=95), share(SMOOTH), 0.2)
    twelve = imagecodecs.jpeg8_encode(GRAY.astype(np.uint16) * 16, bitspersample=12)
    yield Kind("JPEG", "12 bits", ".jpg", twelve)
    yield Kind("PNG", "gray, 1 to 8 bits", ".png", pillow(GRAY, "PNG"), share(GRAY))
    yield Kind("PNG", "gray, 16 bits", ".png", opencv(GRAY.astype(np.uint16) * 257, ".png"), share(GRAY))
    yield Kind("PNG", "palette", ".png", pillow(with_palette(GRAY), "PNG"), share(PALETTE[GRAY]))
    yield Kind("PNG", "RGB, 8 bits", ".png", pillow(RGB, "PNG"), share(RGB))
    yield Kind("PNG", "RGB, 16 bits", ".png", opencv(deep[:, :, ::-1], ".png"), share(RGB))
    yield Kind("PNG", "transparency that varies", ".png", pillow(alpha, "PNG"), share(RGB))
    yield Kind("PNG", "animated", ".png", pillow(RGB, "PNG", **animated), share(RGB))
    yield Kind("BMP", "gray, palette, RGB", ".bmp", pillow(GRAY, "BMP"), share(GRAY))
    yield Kind("GIF", "one frame", ".gif", pillow(with_palette(GRAY), "GIF"), share(PALETTE[GRAY]))
    frames = {"save_all": True, "append_images": [with_palette(GRAY[::-1].copy())]}
    yield Kind("GIF", "animated", ".gif", pillow(with_palette(GRAY), "GIF", **frames), share(PALETTE[GRAY]))
    yield Kind("WebP", "lossless", ".webp", pillow(RGB, "WEBP", lossless=True), share(RGB))
    yield Kind("WebP", "lossy", ".webp", pillow(SMOOTH, "WEBP", quality=95), share(SMOOTH), 0.2)
    yield Kind("WebP", "animated", ".webp", pillow(RGB, "WEBP", lossless=True, **animated), share(RGB))
    yield Kind("JPEG 2000", "gray, RGB", ".jp2", pillow(RGB, "JPEG2000"), share(RGB))
    thousand = GRAY.astype(np.uint16) * 3
    data = b"P5\n37 23\n1000\n" + thousand.astype(">u2").tobytes()
    yield Kind("PGM, PPM", "any maximum value", ".pgm", data, thousand / 1000)
    yield Kind("any", "truncated, empty, of another format", ".png", pillow(RGB, "PNG")[:500])
    yield Kind("HDR, EXR, TGA, PSD, AVIF, ...", "all", ".png", pillow(RGB, "TGA"))


def _arrays() -> Iterator[Kind]:
    wide, shares = MANY.astype(np.uint16) * 257, (RGB / 255).astype(np.float32)
    yield Kind("`.npy`", "(H, W), 8 bits", ".npy", npy(GRAY), share(GRAY))
    yield Kind("`.npy`", "(H, W, n), 8 to 64 bits", ".npy", npy(wide), share(wide))
    yield Kind("`.npy`", "floating point in [0, 1]", ".npy", npy(shares), shares)
    whole = (GRAY % 7).astype(np.float32)
    yield Kind("`.npy`", "floating point, whole numbers above 1 (images: set `value_range`)", ".npy", npy(whole))
    yield Kind(
        "`.npy`", "16 to 64 bits, values of 0 to 255 (images: set `value_range`)", ".npy", npy(GRAY.astype(np.int64))
    )
    yield Kind("`.npy`", "NaN, infinity (images: set `nodata`)", ".npy", npy(np.where(shares > 0.5, shares, np.nan)))
    yield Kind("`.npy`", "complex numbers, objects", ".npy", npy(shares.astype(complex)))


def _tiffs() -> Iterator[Kind]:
    def kind(text: str, array: np.ndarray, want: np.ndarray | None, tolerance: float = 1e-4, **options: Any) -> Kind:
        return Kind("TIFF", text, ".tif", tiff(array, **options), want, tolerance)

    deep, rgb, nir = GRAY.astype(np.uint16) * 257, {"photometric": "rgb"}, np.dstack([RGB, GRAY])
    planes = {"planarconfig": "separate", **rgb}
    yield kind("1 bit", BITS, share(BITS), photometric="minisblack")
    yield kind("gray, 8 bits", GRAY, share(GRAY), compression="lzw")
    yield kind("gray, 16 bits", deep, share(deep), compression="deflate", predictor=True)
    yield kind("gray, 32 bit floating point in [0, 1]", (GRAY / 255).astype(np.float32), share(GRAY))
    colors = PALETTE.T.astype(np.uint16) * 257
    yield kind("palette, 8 bits", GRAY, share(PALETTE[GRAY]), photometric="palette", colormap=colors)
    yield kind("RGB, 8 bits", RGB, share(RGB), tile=(16, 16), **rgb)
    yield kind("RGB and transparency, 8 bits", nir, share(RGB), extrasamples="unassalpha", **rgb)
    yield kind("CMYK, 8 bits", 255 - np.dstack([RGB, RGB[:, :, 0] | 255]), share(RGB), photometric="separated")
    jpeg = pillow(SMOOTH, "TIFF", compression="jpeg", quality=95)
    yield Kind("TIFF", "JPEG compression", ".tif", jpeg, share(SMOOTH), 0.2)
    yield kind("RGB and a fourth band (near infrared)", nir, share(RGB), extrasamples="unspecified", **rgb)
    yield kind("RGB, 16 bits", RGB.astype(np.uint16) * 257, share(RGB), **rgb)
    yield kind("several bands, 8 to 64 bits", MANY, share(MANY), photometric="minisblack", planarconfig="contig")
    yield kind("one plane per color", RGB.transpose(2, 0, 1), share(RGB), **planes)
    yield Kind("TIFF", "2 to 15 bits", ".tif", packed(GRAY >> 4, 4), (GRAY >> 4) / 15, 0.01)
    yield kind("signed integers, 0 and above", (GRAY // 2).astype(np.int8), GRAY // 2 / 127)
    yield kind("32 and 64 bit integers, 64 bit floating point", GRAY / 255, share(GRAY))
    yield kind("0 is white, 8 bits and more", GRAY, 1 - share(GRAY), photometric="miniswhite")
    for name in ("zstd", "lzma", "png"):
        yield kind(f"{name.upper()} compression", RGB, share(RGB), compression=name, **rgb)
    level = {"compression": "jpeg2000", "compressionargs": {"level": 50}}
    yield kind("JPEG 2000, JPEG XL, WebP, LERC compression", SMOOTH, share(SMOOTH), 0.2, **level, **rgb)
    pages = MANY.transpose(2, 0, 1)
    yield kind(
        "pages of equal size: bands if there are `in_channels` pages, otherwise only the first is read",
        pages,
        share(MANY),
    )
    picture = io.BytesIO()
    with tifffile.TiffWriter(picture) as file:
        file.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
        file.write(RGB, photometric="rgb")
    yield Kind("TIFF", "picture with previews", ".tif", picture.getvalue(), share(RGB))
    yield kind("several bands of 1 bit", np.dstack([BITS] * 5), None, photometric="minisblack", planarconfig="contig")
    yield kind("CIE L\\*a\\*b\\*, camera raw", RGB, None, photometric="cielab")


def as_image(path: Path, kind: Kind) -> bool:
    """Return whether the file is read; AssertionError if it is read wrong."""
    want = None if kind.want is None else kind.want.reshape(*kind.want.shape[:2], -1)
    try:
        image = read_image(path, 3 if want is None else want.shape[2])
    except UserError:
        return False
    assert want is not None, f"{kind.kind}: must be refused"
    assert image.shape == want.shape, kind.kind
    difference = np.abs(image / (255 if image.dtype == np.uint8 else 1) - want).max()
    assert difference <= max(kind.tolerance, 1e-6), (kind.kind, difference)
    return True


def as_mask(path: Path) -> str:
    """Return how the file is read as a mask: "class ids", "colors" or "refused"."""
    try:
        return "class ids" if read_mask(path).values.ndim == 2 else "colors"
    except UserError:
        return "refused"


def measured(kind: Kind, folder: Path) -> tuple[str, str]:
    """Return the table's words for a kind, as an image and as a mask."""
    path = folder / f"file{kind.suffix}"
    path.write_bytes(kind.data)
    image, mask = as_image(path, kind), as_mask(path)
    with mock.patch.object(tif, "tifffile", None):
        plain_image, plain_mask = as_image(path, kind), as_mask(path)
    assert plain_image in (image, False)
    assert plain_mask in (mask, "refused")
    return (
        ("read" if image else "refused") + (" with the extra" if image and not plain_image else ""),
        mask + (" with the extra" if mask != plain_mask else ""),
    )


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| format | kind | as an image | as a mask |", "| --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds():
            lines.append("| " + " | ".join((kind.format, kind.kind, *measured(kind, Path(folder)))) + " |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with the table between its markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main(write: Callable[[str], object] = PAGE.write_text) -> None:
    """Write the table into the page."""
    argparse.ArgumentParser(prog="python -m tests.images.kinds", description=__doc__).parse_args()
    write(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
