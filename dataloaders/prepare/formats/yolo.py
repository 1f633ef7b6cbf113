"""YOLO segmentation: one text file per image, one polygon per line (class, then x y as fractions of the image size)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from base.text import read_lines
from dataloaders.prepare import shapes
from dataloaders.prepare.export import Export, Images, Picture, Shape, split_of
from dataloaders.reading.pairing import image_files
from utils.errors import UserError, import_extra


def read(source: Path, images: Images) -> Export:
    """Read a folder with ``images``, ``labels`` and ``data.yaml`` (or ``classes.txt``), split or not."""
    root = source if source.is_dir() else source.parent
    names = _names(source, root)
    export = Export(names)
    labels = {_key(path): path for path in image_files(root, (".txt",)) if "labels" in path.parts}
    if not labels:
        raise UserError(f"{root}: there are no text files in a folder labels")
    taken: dict[Path, Path] = {}  # label file -> its image
    for path in images.files:
        file = labels.get(_key(path))
        if file is None:
            export.left_out["image", "without a label file"] += 1
            continue
        if taken.setdefault(file, path) != path:
            raise UserError(f"{taken[file]} and {path} have the same label file, {file}; keep one of them")
        picture = Picture(path, split=split_of(path, root))
        for number, line in read_lines(file, "--from"):
            picture.shapes.append(_shape(line, names, f"{file}, line {number}"))
        export.pictures.append(picture)
    images.missing += [str(file) for file in labels.values() if file not in taken]
    return export


def _key(path: Path) -> str:
    """Return what an image and its label file have in common: the path with ``images`` and ``labels`` replaced."""
    return "/".join("*" if part in ("images", "labels") else part for part in path.with_suffix("").parts)


def _shape(line: str, names: list[str], where: str) -> Shape:
    try:
        number, *values = (float(part) for part in line.split())
    except ValueError:
        raise UserError(f"{where}: expected a class and coordinates, found {line[:60]!r}") from None
    if len(values) == 4:
        raise UserError(f"{where} is a box, not a polygon; export segmentation labels")
    if len(values) < 6 or len(values) % 2:
        raise UserError(f"{where}: a polygon needs at least three points, found {len(values)} numbers")
    if not -1 <= min(values) <= max(values) <= 2:  # annotators also click slightly outside of the image
        raise UserError(
            f"{where}: found coordinates up to {max(values):g}; expected fractions of the image size, 0 to 1"
        )
    if not number.is_integer() or not 0 <= number < len(names):
        raise UserError(f"{where}: class {number:g} is not one of the {len(names)} in data.yaml")
    ring = np.array(values).reshape(-1, 2)
    return names[int(number)], lambda height, width: shapes.polygons([ring * (width, height)])(height, width)


def _names(source: Path, root: Path) -> list[str]:
    files = [source] if source.is_file() else [path for path in root.iterdir() if path.suffix in (".yaml", ".yml")]
    files.sort(key=lambda path: (path.stem != "data", path))
    if not files:
        if (root / "classes.txt").is_file():
            return [line for _, line in read_lines(root / "classes.txt", "--from")]
        raise UserError(f"{root}: there is neither data.yaml nor classes.txt with the names of the classes")
    yaml = import_extra("yaml", f"{files[0]}: reading YAML", "pyyaml")
    try:
        names = yaml.safe_load(files[0].read_text(encoding="utf-8"))["names"]
        by_id = {int(i): name for i, name in (names.items() if isinstance(names, dict) else enumerate(names))}
        if sorted(by_id) != list(range(len(names))):
            raise ValueError(f"the ids are {sorted(by_id)}, expected 0 to {len(names) - 1}")
        if isinstance(names, str) or any(isinstance(name, bool) for name in by_id.values()):
            raise ValueError(f"found {names}; put names such as yes and no in quotes")
        return [str(by_id[i]) for i in sorted(by_id)]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{files[0]}: it does not contain the class names (names: [...]): {error}") from None
