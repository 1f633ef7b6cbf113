"""Match images and masks, and find files without a partner."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from base.base_dataset import BaseDataSet
from base.entries import Entry
from utils.errors import UserError, listed, plural
from utils.images import IMAGE_EXTENSIONS

log = logging.getLogger("data")

_SHOWN = 5


_warn = functools.cache(log.warning)  # once per message, because several splits may list the same folder


def image_files(folder: Path, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> list[Path]:
    """Return the files with one of the extensions (any case) in ``folder`` and below, sorted; without hidden files.

    Links to folders are followed. A folder that is found several times is read once, if possible under its own name.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    folders: list[Path] = [folder]
    links: list[Path] = []  # read last, so that folders are first found under their own names
    while folders or links:
        parent = folders.pop() if folders else links.pop(0)
        status = parent.stat()
        if (status.st_dev, status.st_ino) in seen:
            _warn(f"{parent} links to a folder that is already read; skipped")
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            # isdir() also takes links in a circle; entry.is_dir() needs no further call of the system.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            elif entry.name.lower().endswith(tuple(extensions)):
                found.append(Path(entry.path))
    return sorted(found)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted; none if it does not exist."""
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def find_folder(path: Path) -> Path:
    """Return the folder; if it does not exist, the one whose name differs only in upper and lower case."""
    if path.exists() or not path.parent.is_dir():
        return path
    alike = [other for other in path.parent.iterdir() if other.name.lower() == path.name.lower() and other.is_dir()]
    return alike[0] if len(alike) == 1 else path


def relative_stem(folder: Path, suffix: str = "") -> Callable[[Path], str]:
    """Return a key function for files below ``folder``: their path from there, without extension and ``suffix``."""

    def key(path: Path) -> str:
        return path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)

    return key


def pair_folders(
    data: BaseDataSet,
    images: Path,
    masks: Path,
    key: Callable[[Path], str] | None = None,
    suffix: str = "",
    unlabeled: bool = False,
) -> list[Entry]:
    """Return the pairs of a data set that are in two folders, and warn about files without a partner.

    Args:
        data: the data set; the files without a partner are added to its ``alone``.
        images, masks: the folders, or one folder with both.
        key: returns what an image and its mask have in common; None: their path below the folder.
        suffix: what the names of masks have at their end.
        unlabeled: whether the folder of masks may be missing.

    Raises:
        UserError: a folder is missing, no names match, or two files have the same key.
    """
    image_key, mask_key = key or relative_stem(images), key or relative_stem(masks, suffix)
    if unlabeled and images.is_dir() and not masks.is_dir():
        return [Entry(path, None, image_key(path)) for path in image_files(images)]
    for folder in (images, masks):
        if not folder.is_dir():
            raise data.layout_error(f"there is no folder {folder}")
    mask_files = [path for path in image_files(masks) if path.stem.endswith(suffix)]
    own = set(mask_files) if images == masks else set()
    by_key = index_files((path for path in image_files(images) if path not in own), image_key)
    masks_by_key = index_files(mask_files, mask_key)
    both = sorted(by_key.keys() & masks_by_key.keys())
    images_alone = sorted(path for key, path in by_key.items() if key not in masks_by_key)
    masks_alone = sorted(path for key, path in masks_by_key.items() if key not in by_key)
    if not both and images_alone and masks_alone:
        raise UserError(
            f"no image in {images} has a mask with the same name in {masks}; for instance, there are "
            f"{images_alone[0].name} and {masks_alone[0].name}. If the mask names have a "
            "suffix, set mask_suffix of the Folder loader; otherwise give it a list_file"
        )
    warn_of_skipped("image", images_alone, "mask")
    warn_of_skipped("mask", masks_alone, "image")
    data.alone = [*data.alone, *images_alone, *masks_alone]
    return [Entry(by_key[key], masks_by_key[key], key) for key in both]


def warn_of_skipped(what: str, files: Sequence[Path], missing: str) -> None:
    """Warn about files (``what`` in the singular) that are not used because they have no ``missing``."""
    if files:
        left_out = f"has no {missing} and is" if len(files) == 1 else f"have no {missing} and are"
        _warn(f"{plural(len(files), what)} {left_out} skipped: {listed(files, _SHOWN)}")


def index_files(files: Iterable[Path], key: Callable[[Path], str]) -> dict[str, Path]:
    """Return the files by their keys; raise UserError if two have the same key."""
    result: dict[str, Path] = {}
    for file in files:
        other = result.setdefault(key(file), file)
        if other is not file:
            raise UserError(
                f"{other} and {file} have the same name apart from the extension ({key(file)!r}), by which files are "
                "matched; keep one of them"
            )
    return result
