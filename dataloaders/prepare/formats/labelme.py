"""labelme: one JSON file per image."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from base.text import read_lines
from dataloaders.prepare import shapes
from dataloaders.prepare.export import Export, Images, Picture, format_errors, json_with, split_of
from utils.errors import UserError


def read(source: Path, images: Images) -> Export:
    """Read a JSON file, or all below a folder. Classes are in the order of ``labels.txt`` if there is one."""
    export = Export()
    for file, content in json_with(source, ("shapes",), "labelme"):
        with format_errors(file, "a labelme file"):
            name, stored = content["imagePath"], content.get("imageData") or ""
            # With the image inside, a file of the same name in another folder may be another image.
            path = images.at(name, file.parent) if stored else images.look_for(name, file.parent)
            embedded = path is None and bool(stored)
            if embedded:
                path = _unpack(stored, name, file, images.unpacked)
            if path is None:
                images.missing.append(name)
                continue
            width, height = int(content.get("imageWidth") or 0), int(content.get("imageHeight") or 0)
            rendered = [(shape, _render(shape, export.left_out)) for shape in content["shapes"]]
            found = [(shape["label"], render) for shape, render in rendered if render is not None]
            split = split_of(file, source) if source.is_dir() else None
            size = (width, height) if width and height else None
            export.pictures.append(Picture(path, found, size, split, embedded=embedded))
    used = sorted({label for picture in export.pictures for label, _ in picture.shapes})
    listed = _listed(source)
    export.classes = [*listed, *(name for name in used if name not in listed)]
    return export


def _unpack(stored: str, name: str, file: Path, folder: Path) -> Path:
    """Write ``imageData`` of a JSON file to a file below ``folder``, with the name of the image; return its path."""
    data = base64.b64decode(stored)
    plain = PurePosixPath(name.replace("\\", "/"))
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or ""
    except OSError as error:
        raise UserError(
            f"{file}: imageData is not an image: {error}. Pass the folder of the images with --images"
        ) from None
    if Image.registered_extensions().get(plain.suffix.lower()) != kind:
        plain = plain.with_suffix(f".{kind.lower()}")  # labelme stores most formats as PNG
    place = file.parent.resolve()
    path = folder / place.relative_to(place.anchor) / plain.name
    if path.exists():  # images of equal names from several folders, annotated in one
        path = path.parent / file.stem / plain.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _listed(source: Path) -> list[str]:
    folder = source if source.is_dir() else source.parent
    for name in ("labels.txt", "class_names.txt", "classes.txt"):
        if (folder / name).is_file():
            return [line for _, line in read_lines(folder / name, "--from")]
    return []


def _render(shape: dict[str, Any], left_out: Counter[tuple[str, str]]) -> shapes.Render | None:
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
        try:
            mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))).convert("L")) > 0
        except OSError:
            raise ValueError("the mask of a shape is not an image") from None
        (left, top), box = np.floor(points.min(axis=0)).astype(int).tolist(), np.ptp(points, axis=0) + 1
        if (np.abs(box - mask.shape[::-1]) > 1).any():
            raise ValueError(
                f"the mask of a shape is {mask.shape[1]} x {mask.shape[0]}, its box {box[0]:g} x {box[1]:g}"
            )
        return shapes.window(mask, left, top)
    left_out["shape", f"without an area ({kind})"] += 1
    return None
