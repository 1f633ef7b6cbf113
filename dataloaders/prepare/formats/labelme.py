"""labelme: one JSON file per image."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from base.text import read_lines
from dataloaders.prepare import shapes
from dataloaders.prepare.export import Export, Images, Picture, format_errors, json_with, split_of


def read(source: Path, images: Images) -> Export:
    """Read a JSON file, or all below a folder. Classes are in the order of ``labels.txt`` if there is one."""
    export = Export()
    for file, content in json_with(source, ("shapes",), "labelme"):
        with format_errors(file, "a labelme file"):
            path = images.find(content["imagePath"], file.parent)
            if path is None:
                continue
            width, height = int(content.get("imageWidth") or 0), int(content.get("imageHeight") or 0)
            rendered = [(shape, _render(shape, export.left_out)) for shape in content["shapes"]]
            found = [(shape["label"], render) for shape, render in rendered if render is not None]
            split = split_of(file, source) if source.is_dir() else None
            export.pictures.append(Picture(path, found, (width, height) if width and height else None, split))
    used = sorted({label for picture in export.pictures for label, _ in picture.shapes})
    listed = _listed(source)
    export.classes = [*listed, *(name for name in used if name not in listed)]
    return export


def _listed(source: Path) -> list[str]:
    folder = source if source.is_dir() else source.parent
    for name in ("labels.txt", "class_names.txt", "classes.txt"):
        if (folder / name).is_file():
            return [line for _, line in read_lines(folder / name, "--from")]
    return []


def _render(shape: dict[str, Any], left_out: Counter[str]) -> shapes.Render | None:
    kind = shape.get("shape_type") or "polygon"
    points = np.asarray(shape["points"], np.float64).reshape(-1, 2)
    if kind == "polygon":
        return shapes.polygons([points])
    if kind == "rectangle":
        left, top = points.min(axis=0)
        width, height = np.ptp(points, axis=0)
        return shapes.box(left, top, width, height)
    if kind == "circle":
        radius = math.dist(points[0], points[1])
        return shapes.ellipse(points[0][0], points[0][1], radius, radius)
    if kind == "mask":
        data = Image.open(io.BytesIO(base64.b64decode(shape["mask"])))
        left, top = np.floor(points.min(axis=0)).astype(int).tolist()
        return shapes.window(np.asarray(data.convert("L")) > 0, left, top)
    left_out[f"shapes without an area ({kind})"] += 1
    return None
