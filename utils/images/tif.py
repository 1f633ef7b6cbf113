"""TIFF files: Pillow reads the layouts that tests show it reads correctly; tifffile (an extra) reads all others."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import UserError, not_installed, plural
from utils.images.raster import DAMAGED, ORIENTATION, Raster, from_pillow, named_colors, upright

try:
    import tifffile
except ImportError:
    tifffile = None  # type: ignore[assignment]  # the package is not installed
else:
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it warns about unusual metadata in every file
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # the same, about unknown layouts

_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _PLANAR = 254, 258, 259, 262, 266, 284
_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES = 273, 279, 324, 325
_PREDICTOR, _SUB_IFDS, _EXTRA, _FORMAT, _DEPTH = 317, 330, 338, 339, 32997

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_KNOWN = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR)
_JPEG, _APERIO = 7, 33003
_ALPHA = (1, 2)  # extra channels that are transparency: premultiplied or not
_REDUCED, _MASK = 1, 4  # kinds of pages that are not pictures

_PLAIN, _FAX, _PREDICTED = (1, 32773), (3, 4), (5, 8, 32946)  # none and PackBits; fax; LZW and deflate (two numbers)
# What Pillow reads correctly, as tests/images/test_tif.py shows: (photometric interpretation, bits of each channel,
# number format, extra channels) -> compressions.
_PILLOW_LAYOUTS: dict[tuple, tuple[int, ...]] = {
    (_WHITE_IS_ZERO, (1,), 1, ()): (*_PLAIN, *_FAX, *_PREDICTED),
    (_BLACK_IS_ZERO, (1,), 1, ()): (*_PLAIN, *_FAX, *_PREDICTED),
    (_BLACK_IS_ZERO, (8,), 1, ()): (*_PLAIN, *_PREDICTED, _JPEG),
    (_BLACK_IS_ZERO, (16,), 1, ()): (*_PLAIN, *_PREDICTED),
    (_BLACK_IS_ZERO, (32,), 3, ()): (*_PLAIN, *_PREDICTED),
    (_PALETTE, (8,), 1, ()): (*_PLAIN, *_PREDICTED),
    (_RGB, (8, 8, 8), 1, ()): (*_PLAIN, *_PREDICTED, _JPEG),
    (_RGB, (8, 8, 8, 8), 1, (2,)): (*_PLAIN, *_PREDICTED),
    (_CMYK, (8, 8, 8, 8), 1, ()): (*_PLAIN, *_PREDICTED),
    (_YCBCR, (8, 8, 8), 1, ()): (_JPEG,),
}
# JPEG, JPEG 2000, JPEG XL, JPEG XR, WebP, LERC. Some have a lossless form as well; the file does not say which.
_LOSSY = (6, _JPEG, 22610, 33003, 33004, 33005, 33007, 34712, 34887, 34892, 34927, 34934, 50001, 50002, 52546)


def decode(data: bytes, path: Path, channels: int) -> Raster:
    """Decode a TIFF file.

    Of several pages, it reads the picture, and skips previews and masks. Pages are bands if the file says so, or if the
    requested number of channels is the number of pages of equal size (but not 1 or 3, because these may be a stack).

    Raises:
        UserError: see :func:`utils.images.formats.decode`.
    """
    image = _open_pillow(data)
    if image is not None:
        _refuse_truncated(*_segments(image), len(data), path)
        lossy = image.tag_v2.get(_COMPRESSION, 1) in _LOSSY
        image.info.pop("xmp", None)  # Pillow would follow an orientation there
        try:
            image.load()
        except Exception as error:  # Pillow's parsers raise all kinds on broken files
            raise UserError(f"{path} {DAMAGED}: {error}") from None
        raster = from_pillow(image, path)
        raster.lossy = lossy
        return raster
    if tifffile is None:
        raise _needs_packages(path, "a TIFF file with an uncommon layout")
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return _by_tifffile(file, path, channels, len(data))
    except UserError:
        raise
    except Exception as error:  # its parsers raise many kinds of errors on broken files
        if "imagecodecs" in str(error):
            raise _needs_packages(path, str(error)) from None
        raise UserError(f"{path} {DAMAGED}, or of a kind that is not supported: {error}") from None


def _needs_packages(path: Path, why: str) -> UserError:
    return UserError(f"{not_installed(f'{path} ({why})', 'tifffile', 'imagecodecs')}. Or convert it to PNG or .npy")


def _open_pillow(data: bytes) -> Any:
    """Open the file if it is one picture in a layout that Pillow reads correctly; otherwise return None."""
    try:
        image: Any = Image.open(io.BytesIO(data), formats=("TIFF",))
        tag = image.tag_v2.get
        (number_format,) = set(tag(_FORMAT, (1,)))
        layout = (tag(_PHOTOMETRIC), tuple(tag(_BITS, (1,))), number_format, tuple(tag(_EXTRA, ())))
        compression = tag(_COMPRESSION, 1)
        proven = (
            compression in _PILLOW_LAYOUTS.get(layout, ())
            and tag(_PLANAR, 1) == tag(_FILL_ORDER, 1) == tag(_DEPTH, 1) == 1
            and not (tag(_SUBFILE, 0) or tag(_SUB_IFDS))
            and (tag(_PREDICTOR, 1) == 1 or compression in _PREDICTED)  # libtiff ignores the tag elsewhere
            and (number_format == 1 or data.startswith(b"II"))  # Pillow does not swap the bytes of compressed floats
            and all(map(all, _segments(image)))  # 0 means that a tile is left out
            and image.n_frames == 1
        )
        return image if proven else None
    except Exception:  # a layout that Pillow does not know, or a broken file
        return None


def _segments(image: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the offsets of the strips or tiles, and their sizes in bytes."""
    tag = image.tag_v2.get
    return tag(_TILE_OFFSETS, tag(_STRIP_OFFSETS, ())), tag(_TILE_BYTES, tag(_STRIP_BYTES, ()))


def _refuse_truncated(offsets: Sequence[int], counts: Sequence[int], size: int, path: Path) -> None:
    """Raise UserError if parts of the file are missing: decoders would fill them with black."""
    if any(offset + count > size for offset, count in zip(offsets, counts, strict=False)):
        raise UserError(f"{path} {DAMAGED}: its last bytes are missing")


def _by_tifffile(file: Any, path: Path, channels: int, size: int) -> Raster:
    pages = [page for page in file.pages if not int(page.subfiletype or 0) & (_REDUCED | _MASK)]
    if not pages:
        raise UserError(
            f"{path} contains previews and masks only; expected a picture (camera raw files must be converted)"
        )
    page = _largest_page(pages, path)
    alike = [p for p in pages if (p.shape, p.dtype) == (page.shape, page.dtype)]
    raster = _page(page, path, size)
    raster.pages = len(pages)
    if len(alike) > 1 and raster.array.shape[2] == 1 and _are_bands(file, len(alike), channels):
        arrays = [raster.array, *(_page(p, path, size).array for p in alike[1:])]
        raster.array = np.concatenate(arrays, axis=2)
        raster.colors, raster.pages = named_colors(len(alike)), 1
    return raster


def _largest_page(pages: Sequence[Any], path: Path) -> Any:
    """Return the picture: the first page, unless it is a preview of a larger one of the same proportions."""
    first = pages[0]
    largest = max(pages, key=lambda page: page.imagewidth * page.imagelength)
    if largest.imagewidth <= first.imagewidth and largest.imagelength <= first.imagelength:
        return first
    if abs(largest.imagewidth * first.imagelength / (largest.imagelength * first.imagewidth) - 1) < 0.03:
        return largest
    raise UserError(
        f"{path} contains pages of different sizes, and the first ({first.imagewidth}x{first.imagelength}) is not "
        f"the largest ({largest.imagewidth}x{largest.imagelength}, width x height); save the picture in a file with "
        "one page"
    )


def _are_bands(file: Any, pages: int, channels: int) -> bool:
    if pages != channels:
        return False
    if channels not in (1, 3):
        return True
    try:
        series = file.series[0]
        return dict(zip(series.axes, series.shape, strict=True)).get("C") == channels
    except Exception:  # metadata that tifffile does not understand is ignored
        return False


def _page(page: Any, path: Path, size: int) -> Raster:
    meaning, samples = int(page.photometric), page.samplesperpixel
    bits = page.bitspersample
    known = meaning in _KNOWN and isinstance(bits, int) and page.imagedepth == 1
    if not known or (bits < 8 and samples > 1) or (meaning == _PALETTE and bits > 8):
        kind = f"{getattr(page.photometric, 'name', meaning)}, {bits} bits, {plural(page.imagedepth, 'slice')}"
        raise UserError(f"{path} contains a kind of picture that is not supported ({kind}); convert it to RGB")
    compressed = int(page.compression)
    # tifffile turns luminance and chroma into RGB only where JPEG stores them side by side.
    chroma = compressed == _APERIO or (meaning == _YCBCR and (compressed != _JPEG or page.planarconfig != 1))
    if chroma or (meaning == _CMYK and (compressed in _LOSSY or samples != 4)):
        raise UserError(f"{path} has {page.photometric.name} colors in a form that is not supported; convert to RGB")
    _refuse_truncated(page.dataoffsets, page.databytecounts, size, path)
    array = np.asarray(page.asarray())
    if "S" in page.axes and page.axes.index("S") == 0:
        array = np.moveaxis(array, 0, 2)
    array = array if array.ndim == 3 else array[:, :, None]
    if array.ndim != 3 or array.shape != (page.imagelength, page.imagewidth, samples):
        raise UserError(f"{path} contains an array of shape {array.shape}; expected (height, width, {samples})")
    white_is_zero = meaning == _WHITE_IS_ZERO
    if white_is_zero and array.dtype == np.bool_:  # as Pillow reads them
        white_is_zero, array = False, ~array
    raster = Raster(
        upright(array, page.tags.valueof(ORIENTATION, 1)),
        colors=3 if meaning in (_RGB, _YCBCR) else named_colors(samples),
        alpha=any(int(extra) in _ALPHA for extra in page.extrasamples[-1:]),
        largest=2**bits - 1 if array.dtype.kind == "u" and bits < 8 * array.itemsize else None,
        inverted=white_is_zero,
        lossy=compressed in _LOSSY,
    )
    if meaning == _PALETTE:
        raster.palette, raster.largest = _palette(page.colormap), None
        raster.array = raster.array.astype(np.uint8)  # one bit comes as bool
    if meaning == _CMYK:
        raster.array = _from_cmyk(raster.array)
        raster.colors = 3
    return raster


def _palette(colormap: np.ndarray) -> np.ndarray:
    """Return uint8 ``(256, 3)`` of a color map ``(3, N)`` in 16 bits (some writers use 8)."""
    colors = np.asarray(colormap).T[:256] >> (8 if np.max(colormap, initial=0) > 255 else 0)
    return np.pad(colors, ((0, 256 - len(colors)), (0, 0))).astype(np.uint8)


def _from_cmyk(array: np.ndarray) -> np.ndarray:
    ink = array.astype(np.float32) / np.iinfo(array.dtype).max
    rgb = (1 - ink[:, :, :3]) * (1 - ink[:, :, 3:])
    return np.rint(rgb * np.iinfo(array.dtype).max).astype(array.dtype)
