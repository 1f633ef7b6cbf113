"""What an export of a labelling tool says, whatever its format: classes, and shapes or masks of images."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np

from base.classes import Colour
from dataloaders.reading.pairing import image_files
from utils.errors import UserError

_SPLIT = re.compile(r"(?<![a-z])(train|val|valid|validation|test)(?:ing)?(?=\d|[^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Shape:
    """An annotated area: ``render(height, width)`` returns it as bool ``(height, width)``."""

    label: str
    render: Callable[[int, int], np.ndarray]


@dataclass
class Picture:
    """An annotated image.

    Attributes:
        image: the image's file.
        shapes: what is annotated, in the order in which it is drawn.
        size: (width, height) that the annotations are for, if the export says so.
        split: train, val or test, if the export is split.
        ids: returns indices into ``Export.classes``, ``(H, W)``, for exports that hold masks instead of shapes.
    """

    image: Path
    shapes: list[Shape] = field(default_factory=list)
    size: tuple[int, int] | None = None
    split: str | None = None
    ids: Callable[[], np.ndarray] | None = None


@dataclass
class Export:
    """An export: class names in order, their colours if it gives any, the images, and what could not be used."""

    classes: list[str]
    pictures: list[Picture]
    colours: dict[str, Colour] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


class Images:
    """Finds the images that an export names, in a folder and below.

    Args:
        folder: where images may lie.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"--images: {folder} is not a folder")
        self.folder = folder
        self.files = image_files(folder)
        self.missing: list[str] = []
        self._by_name: dict[str, list[Path]] = {}
        for path in self.files:
            self._by_name.setdefault(path.name, []).append(path)

    def find(self, name: str, near: Path | None = None) -> Path | None:
        """Return the file of a name, path or address in an export; remember it as missing if there is none.

        It may be a path below ``near`` or the folder. Else, of several files with this name, the one is taken whose
        path ends like ``name``, and the one below ``near`` of those.

        Raises:
            UserError: several files fit equally well.
        """
        plain = PurePosixPath(unquote(name.partition("?d=")[2] or name.partition("?")[0]).replace("\\", "/"))
        for parent in (near, self.folder):
            if parent is not None and (parent / plain).is_file():
                return parent / plain
        # Label Studio puts eight characters and a hyphen in front of uploaded files.
        candidates = self._by_name.get(plain.name) or self._by_name.get(re.sub(r"^[0-9a-f]{8}-", "", plain.name), [])
        if not candidates:
            self.missing.append(name)
            return None
        fits = [_common_end(path, plain) for path in candidates]
        best = [path for path, fit in zip(candidates, fits, strict=True) if fit == max(fits)]
        if len(best) > 1 and near is not None:
            inside = [path for path in best if path.is_relative_to(near)]
            best = inside or best
        if len(best) > 1:
            raise UserError(f"{name!r} could be {best[0]} or {best[1]}; give the folder of the images with --images")
        return best[0]


def _common_end(path: Path, name: PurePosixPath) -> int:
    pairs = zip(reversed(path.parts), reversed(name.parts), strict=False)
    count = 0
    for a, b in pairs:
        if a != b:
            break
        count += 1
    return count


def split_of(path: Path, root: Path) -> str | None:
    """Return train, val or test if the path below ``root`` has it in the name of a folder or of the file."""
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


def malformed(path: Path, what: str, error: Exception) -> UserError:
    """Return the error for a file that does not hold what its format asks for."""
    return UserError(f"{path}: this is not {what}: {type(error).__name__} {error}")
