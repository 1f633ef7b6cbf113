"""The contents of an export of a labeling tool, independent of its format: classes, and shapes or masks of images."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np

from base.classes import Color
from dataloaders.reading.pairing import image_files
from utils.errors import UserError

_SPLIT = re.compile(r"(?<![a-z])(train|val|valid|validation|test)(?:ing)?(?=\d|[^a-z]|$)", re.IGNORECASE)


# The label of an annotated area, and a function (height, width) -> bool (height, width) that renders it.
Shape = tuple[str, Callable[[int, int], np.ndarray]]


@dataclass
class Picture:
    """An annotated image.

    If the export has masks instead of shapes, ``ids`` returns indices into ``Export.classes``, ``(H, W)``.
    """

    image: Path
    shapes: list[Shape] = field(default_factory=list)  # in the order in which they are drawn
    size: tuple[int, int] | None = None  # (width, height) of the image that was annotated, if the export contains it
    split: str | None = None  # train, val or test, if the export is split
    ids: Callable[[], np.ndarray] | None = None
    embedded: bool = False  # the image was in the export's JSON; its file is temporary


@dataclass
class Export:
    """An export: class names in order, images, colors of classes (if any), and counts of what was left out."""

    classes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    colors: dict[str, Color] = field(default_factory=dict)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)  # (noun in the singular, which ones): count

    def take_classes(self, names: list[str], file: Path) -> None:
        """Set the classes; UserError if an earlier file had others."""
        names = [plain_name(name) for name in names]
        if self.classes and self.classes != names:
            raise UserError(
                f"{file}: its classes are {names}, but those of another file are {self.classes}; they must be the same"
            )
        self.classes = names

    def strip_names(self) -> None:
        """Remove blanks around all class names, so that "car" and "car " are one class."""
        self.classes = [plain_name(name) for name in self.classes]
        self.colors = {plain_name(name): color for name, color in self.colors.items()}
        for picture in self.pictures:
            picture.shapes = [(plain_name(label), render) for label, render in picture.shapes]


class Images:
    """Finds the images that an export names, in a folder and below."""

    def __init__(self, folder: Path, unpacked: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"--images: {folder} is not a folder")
        self.folder, self.unpacked = folder, unpacked  # unpacked: for images that are inside annotation files
        self.files = image_files(folder)
        self.missing: list[str] = []
        self.elsewhere: dict[str, Path] = {}  # images found in a folder with another name than in the export
        self._by_name: dict[str, list[Path]] = {}
        for path in self.files:
            self._by_name.setdefault(path.name, []).append(path)

    def find(self, name: str, near: Path | None = None) -> Path | None:
        """Return the file of a name, path or URL in an export; add it to ``missing`` if there is none."""
        path = self.look_for(name, near)
        if path is None:
            self.missing.append(name)
        return path

    def at(self, name: str, near: Path | None = None) -> Path | None:
        """Return the file whose path below ``near`` or the folder is ``name``; None if there is none."""
        for path in (PurePosixPath(name), _plain_path(name)):  # a file's own name may contain % or ?
            for parent in (near, self.folder):
                if parent is not None and os.path.isfile(parent / path):  # false for a name that is too long
                    return parent / path
        return None

    def look_for(self, name: str, near: Path | None = None) -> Path | None:
        """Return the file of a name, path or URL in an export; None if there is none.

        It may be a path as in :meth:`at`. Otherwise the file with this name is used, see :meth:`closest`; if it lies in
        a folder with another name than the export says, it is also added to ``elsewhere``.
        """
        exact = self.at(name, near)
        if exact is not None:
            return exact
        plain = _plain_path(name)
        # Label Studio adds eight characters and a hyphen to the start of the names of uploaded files.
        candidates = self._by_name.get(plain.name) or self._by_name.get(re.sub(r"^[0-9a-f]{8}-", "", plain.name), [])
        if not candidates:
            return None
        found = self.closest(candidates, name, near)
        is_relative = len(plain.parts) > 1 and plain.parts[0] != "/" and ":" not in plain.parts[0]
        if is_relative and plain.parent.name not in ("..", found.parent.name):
            self.elsewhere[name] = found
        return found

    @staticmethod
    def closest(candidates: Sequence[Path], name: str, near: Path | None = None) -> Path:
        """Return the file whose folders agree most with those of ``name``, preferably below ``near``.

        Raises:
            UserError: several files match equally well.
        """
        folders = _plain_path(name).parent.parts[::-1]
        fits = [len(os.path.commonprefix([path.parent.parts[::-1], folders])) for path in candidates]
        best = [path for path, fit in zip(candidates, fits, strict=True) if fit == max(fits)]
        if len(best) > 1 and near is not None:
            best = [path for path in best if path.is_relative_to(near)] or best
        if len(best) > 1:
            raise UserError(f"{name!r} could be {best[0]} or {best[1]}; pass the folder of the images with --images")
        return best[0]


def _plain_path(name: str) -> PurePosixPath:
    """Return a path or URL in an export as a path."""
    return PurePosixPath(unquote(name.partition("?d=")[2] or name.partition("?")[0]).replace("\\", "/"))


def plain_name(name: object) -> str:
    """Return a class name without blanks around it and with single ones inside; UserError if nothing is left."""
    plain = "" if name is None else " ".join(str(name).split())
    if not plain:
        raise UserError("the export has a class without a name; name it in the labeling tool and export again")
    return plain


def split_of(path: Path, root: Path) -> str | None:
    """Return train, val or test if a folder or the file in the path below ``root`` has it in its name."""
    inside = path.relative_to(root) if path.is_relative_to(root) and path != root else Path(path.name)
    for part in inside.parts:
        match = _SPLIT.search(part)
        if match:
            word = match.group(1).lower()
            return "val" if word.startswith("val") else word
    return None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


def json_with(source: Path, keys: Sequence[str], what: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the JSON files, ``source`` or all below it, that are objects with these keys, with their contents.

    One at a time, because the files can contain whole images.
    """
    found = False
    for file in [source] if source.is_file() else image_files(source, (".json",)):
        content = read_json(file)
        if isinstance(content, dict) and set(keys) <= set(content):
            found = True
            yield file, content
    if not found:
        raise UserError(f"{source}: there is no {what} file (JSON with {', '.join(keys)})")


@contextmanager
def format_errors(path: Path, what: str) -> Iterator[None]:
    """Turn errors about missing or wrong contents into a message that ``path`` cannot be read as ``what``."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, SyntaxError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__} "
        raise UserError(f"{path} cannot be read as {what}: {kind}{error}") from None
