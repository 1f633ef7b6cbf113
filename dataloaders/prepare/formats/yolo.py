"""YOLO segmentation: one text file per image, one polygon per line (class, then x y as fractions of the image size)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from base.text import read_lines
from dataloaders.prepare import shapes
from dataloaders.prepare.export import Export, Images, Picture, Shape, split_of
from utils.errors import UserError, not_installed


def read(source: Path, images: Images) -> Export:
    """Read a folder with ``images``, ``labels`` and ``data.yaml`` (or ``classes.txt``), split or not."""
    root = source if source.is_dir() else source.parent
    names = _names(source, root)
    export = Export(names)
    labels = {_key(path): path for path in sorted(root.rglob("*.txt")) if "labels" in path.parts}
    if not labels:
        raise UserError(f"{root}: there are no text files in a folder labels")
    for path in images.files:
        file = labels.pop(_key(path), None)
        if file is None:
            export.left_out["image", "without a label file"] += 1
            continue
        picture = Picture(path, split=split_of(path, root))
        for number, line in read_lines(file, "--from"):
            picture.shapes.append(_shape(line, names, f"{file}, line {number}"))
        export.pictures.append(picture)
    images.missing += [str(path) for path in labels.values()]
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
    if number != int(number) or not 0 <= number < len(names):
        raise UserError(f"{where}: class {number:g} is not one of the {len(names)} in data.yaml")
    ring = np.array(values).reshape(-1, 2)
    return names[int(number)], lambda height, width: shapes.polygons([ring * (width, height)])(height, width)


def _names(source: Path, root: Path) -> list[str]:
    files = [source] if source.is_file() else [*sorted(root.glob("*.yaml")), *sorted(root.glob("*.yml"))]
    if not files:
        if (root / "classes.txt").is_file():
            return [line for _, line in read_lines(root / "classes.txt", "--from")]
        raise UserError(f"{root}: there is neither data.yaml nor classes.txt with the names of the classes")
    try:
        import yaml  # an extra
    except ImportError:
        raise not_installed(f"{files[0]}: reading YAML", "pyyaml") from None
    try:
        names = yaml.safe_load(files[0].read_text(encoding="utf-8"))["names"]
        return [str(names[i]) for i in sorted(names)] if isinstance(names, dict) else [str(name) for name in names]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{files[0]}: it does not contain the class names (names: [...]): {error}") from None
