"""COCO JSON: polygons and run-length codes, one file or one per split (Lin et al., ECCV 2014)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.prepare import shapes
from dataloaders.prepare.export import Export, Images, Picture, format_errors, json_with, split_of
from utils.errors import listed


def read(source: Path, images: Images) -> Export:
    """Read a file, or all COCO files below a folder: the split is in the name of the file or of a folder."""
    export = Export()
    for file, content in json_with(source, ("images", "annotations", "categories"), "COCO"):
        with format_errors(file, "a COCO file"):
            _add(export, file, content, images, split_of(file, source) if source.is_dir() else None)
    return export


def _add(export: Export, file: Path, content: dict[str, Any], images: Images, split: str | None) -> None:
    for part in ("images", "categories"):
        _refuse_equal_ids(part, [entry["id"] for entry in content[part]])
    names = _categories(content)
    export.take_classes(list(names.values()), file)
    by_image: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in content["images"]}
    strangers = [a["image_id"] for a in content["annotations"] if a["image_id"] not in by_image]
    if strangers and len(strangers) == len(content["annotations"]):
        raise ValueError(
            f"no annotation belongs to an image: their image_id is {strangers[0]!r}, and the ids of the images are "
            f"{listed(map(repr, by_image), 3)}"
        )
    if strangers:
        export.left_out["annotation", "of images that are not in the file"] += len(strangers)
    for annotation in content["annotations"]:
        by_image.get(annotation["image_id"], []).append(annotation)
    for entry in content["images"]:
        path = images.find(entry["file_name"], file.parent)
        if path is None:
            continue
        size = (int(entry["width"]), int(entry["height"]))
        rendered = [(a["category_id"], _render(a, size, export.left_out)) for a in by_image[entry["id"]]]
        found = [(names[category], render) for category, render in rendered if render is not None]
        export.pictures.append(Picture(path, found, size, split))


def _refuse_equal_ids(part: str, ids: list[Any]) -> None:
    twice = [i for i, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"several {part} have the id {twice[0]!r}")


def _categories(content: dict[str, Any]) -> dict[Any, str]:
    """Return id -> name in the order of the ids, without the heading that Roboflow writes as a category."""
    used = {annotation["category_id"] for annotation in content["annotations"]}
    parents = {category.get("supercategory") for category in content["categories"]}
    return {
        category["id"]: category["name"]
        for category in sorted(content["categories"], key=lambda category: category["id"])
        if category["id"] in used or category.get("supercategory") != "none" or category["name"] not in parents
    }


def _render(
    annotation: dict[str, Any], size: tuple[int, int], left_out: Counter[tuple[str, str]]
) -> shapes.Render | None:
    outline = annotation.get("segmentation")
    if not outline:
        left_out["annotation", "without an outline (boxes only)"] += 1
        return None
    if isinstance(outline, dict):
        height, width = outline["size"]
        if (width, height) != size:
            raise ValueError(f"a run-length code is for {width} x {height}, but its image is {size[0]} x {size[1]}")
        code = outline["counts"]
        counts = shapes.coco_counts(code) if isinstance(code, str) else [int(count) for count in code]
        return shapes.window(shapes.runs(counts, height, width, order="F"), 0, 0)
    return shapes.polygons([np.asarray(ring, np.float64).reshape(-1, 2) for ring in outline])
