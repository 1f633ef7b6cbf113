"""Images and label maps on disk: reading every usual kind, writing PNG files whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError
from utils.files import atomic
from utils.images import tiff
from utils.images.values import BY_TYPE, Pixels, ValueRange

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif", ".npy")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_PNG_GREY, _PNG_RGB, _PNG_RGBA = 0, 2, 6
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_TIFF_SIGNATURES = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


def read_image(path: str | Path, channels: int = 3, values: ValueRange = BY_TYPE) -> np.ndarray:
    """Read an image with the wanted number of channels, whatever it is on disk.

    Grey, RGB, RGBA, palette, CMYK, 1, 8 and 16 bit files of any format that OpenCV or Pillow know, TIFF with
    many channels, and ``.npy`` arrays ``(H, W)`` or ``(H, W, C)``. EXIF orientation is applied, transparency is
    dropped, grey is repeated for RGB and RGB becomes luminance for one channel.

    Args:
        path: the file.
        channels: how many channels the result has.
        values: how stored numbers become intensities; without it the type of the numbers decides.

    Returns:
        ``(H, W, channels)``, C-contiguous: uint8 for data of up to 8 bits, else float32 in [0, 1].

    Raises:
        UserError: the file is missing, empty, truncated or no image, or its channels or values do not fit.
    """
    return read_pixels(path, channels, values).image


def read_pixels(path: str | Path, channels: int = 3, values: ValueRange = BY_TYPE) -> Pixels:
    """Read an image as :func:`read_image` does, and learn which pixels have no data (``values.nodata``).

    A data set fills the missing pixels with its mean colour, ``pixels.filled(mean)``, and ignores them:
    ``label[pixels.missing] = ignore_index``.
    """
    path = Path(path)
    data = _read_bytes(path)
    if path.suffix.lower() == ".npy":
        image = _decode_npy(data, path)
    else:
        image = _decode_image(data, path, channels)
    if image.ndim == 2:
        image = image[:, :, None]
    pixels = values.apply(image, str(path), largest=65535 if image.dtype == np.int32 else None)
    return pixels._replace(image=np.ascontiguousarray(_adapt_channels(pixels.image, channels, path)))


def read_label(path: str | Path, *, allow_colour: bool = False) -> np.ndarray:
    """Read a label map: the numbers as stored (a palette's indices, not its colours).

    Returns:
        ``(H, W)`` uint8, or int32 where values above 255 or below 0 can occur. With ``allow_colour`` an RGB file
        comes back as ``(H, W, 3)`` uint8.

    Raises:
        UserError: the file is missing, empty, truncated, no image, or in colour without ``allow_colour``.
    """
    path = Path(path)
    data = _read_bytes(path)
    if path.suffix.lower() == ".npy":
        label = _decode_npy(data, path)
    else:
        label = _decode_label(data, path)
    if label.ndim == 3 and label.shape[2] == 1:
        label = label[:, :, 0]
    if label.ndim == 3 and not allow_colour:
        raise UserError(
            f"{path} is a colour image, but a label map must hold one class id per pixel. For masks painted in "
            "colours use the Folder loader with a `palette` (one RGB colour per class)."
        )
    if label.dtype == np.uint8:
        return label
    if label.dtype == np.bool_:
        return label.astype(np.uint8)
    if not np.issubdtype(label.dtype, np.integer):
        raise UserError(f"{path} holds {label.dtype} values; a label map must hold integers (class ids)")
    return label.astype(np.int32)


def write_png(path: str | Path, array: np.ndarray, palette: Sequence[Sequence[int]] | None = None) -> None:
    """Write ``array`` as a PNG file, whole or not at all.

    Args:
        path: where to; its folder is created.
        array: uint8 ``(H, W)`` (grey, or indices with ``palette``) or ``(H, W, 3)`` RGB; uint16 ``(H, W)``.
        palette: up to 256 RGB triples: colours of the indices 0, 1, ...
    """
    image = Image.fromarray(array)
    if palette is not None:
        image = image.convert("L") if image.mode != "L" else image
        image.putpalette([int(v) for colour in palette for v in colour])
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def voc_colormap(n: int = 256) -> tuple[tuple[int, int, int], ...]:
    """Return the first ``n`` colours of the Pascal VOC colour map (index 255 is its void colour)."""

    def colour(index: int) -> tuple[int, int, int]:
        channels = [0, 0, 0]
        for bit in range(8):
            # Three bits of the index at a time become the next lower bit of red, green and blue.
            for channel in range(3):
                channels[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        return channels[0], channels[1], channels[2]

    return tuple(colour(index) for index in range(n))


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not data:
        raise UserError(f"{path} is empty (0 bytes)")
    return data


def _decode_npy(data: bytes, path: Path) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read as a .npy array: {error}") from None
    if array.ndim not in (2, 3):
        raise UserError(f"{path} has shape {array.shape}; expected (H, W) or (H, W, channels)")
    return array


def _is_whole_jpeg(data: bytes) -> bool:
    # libjpeg fills what is missing of a truncated file with grey and says so only on stderr. Files without the end
    # marker in their last bytes go to Pillow, which refuses the truncated ones.
    return data.startswith(_JPEG_SIGNATURE) and _JPEG_END in data[-64:]


def _is_whole_png(data: bytes) -> bool:
    return data.startswith(_PNG_SIGNATURE) and data.endswith(_PNG_END)


def _decode_image(data: bytes, path: Path, channels: int) -> np.ndarray:
    """Return the image as stored or already in ``channels`` channels, RGB order, any depth."""
    image = None
    if channels in (1, 3) and (_is_whole_jpeg(data) or (_is_whole_png(data) and data[24] <= 8)):
        # The usual case: OpenCV decodes faster, applies EXIF orientation and converts the colours.
        image = _opencv(data, cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR)
    elif data.startswith(_TIFF_SIGNATURES) and tiff.is_multiband(data):
        return tiff.decode(data, path)
    elif data.startswith(_TIFF_SIGNATURES) or (_is_whole_png(data) and data[24] == 16):
        # Depths and channel counts that Pillow does not know.
        image = _opencv(data, cv2.IMREAD_UNCHANGED)
    return _pillow_image(data, path) if image is None else image


def _opencv(data: bytes, flag: int) -> np.ndarray | None:
    """Decode with OpenCV into RGB(A) order; None where it cannot."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        return None
    if image is None:
        return None
    if image.ndim == 3 and image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if image.ndim == 3 and image.shape[2] == 4:
        return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)
    return image


def _open_pillow(data: bytes, path: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image file (unknown format)") from None
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet in broken files
        raise UserError(f"{path} cannot be read, it is damaged or truncated: {error}") from None
    return image


def _pillow_image(data: bytes, path: Path) -> np.ndarray:
    image = ImageOps.exif_transpose(_open_pillow(data, path))
    if image.mode in ("L", "RGB", "RGBA", "F") or image.mode.startswith("I"):
        return np.asarray(image)
    if image.mode in ("1", "LA", "La"):
        return np.asarray(image.convert("L"))
    if image.mode in ("P", "PA") and ("transparency" in image.info or image.mode == "PA"):
        # Via RGBA: Pillow warns when byte transparency meets a direct conversion.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _decode_label(data: bytes, path: Path) -> np.ndarray:
    if _is_whole_png(data) and data[25] == _PNG_GREY and data[24] >= 8:
        label = _opencv(data, cv2.IMREAD_UNCHANGED)
        if label is not None:
            return label
    image = ImageOps.exif_transpose(_open_pillow(data, path))
    if image.mode in ("P", "1", "L") or image.mode.startswith("I"):
        label = np.asarray(image)
        if _is_whole_png(data) and data[25] == _PNG_GREY and data[24] in (2, 4):
            # Grey PNGs of 2 and 4 bits are stretched to 0..255 by decoders: back to the stored numbers.
            label = label // (255 // (2 ** data[24] - 1))
        return label
    if image.mode in ("LA", "PA"):
        return np.asarray(image.getchannel(0))
    return np.asarray(image.convert("RGB"))


def _adapt_channels(image: np.ndarray, channels: int, path: Path) -> np.ndarray:
    if image.ndim == 2:
        image = image[:, :, None]
    have = image.shape[2]
    if have == channels:
        return image
    if have in (2, 4) and channels in (1, 3):
        # The last channel is transparency.
        image, have = image[:, :, : have - 1], have - 1
    if have == channels:
        return image
    if have == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if have == 3 and channels == 1:
        return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[:, :, None]
    raise UserError(
        f"{path} has {have} channels, but the data set's `in_channels` is {channels}; set `in_channels` of the "
        "loader and of the model to the same number, or convert the file"
    )
