"""COCO JSON: polygons and run-length codes, one file or one per split (Lin et al., ECCV 2014)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.prepare import shapes
from dataloaders.prepare.export import Export, Images, Picture, format_errors, json_with, split_of


def read(source: Path, images: Images) -> Export:
    """Read a file, or all COCO files below a folder: the split is in the name of the file or of a folder."""
    export = Export()
    for file, content in json_with(source, ("images", "annotations", "categories"), "COCO"):
        with format_errors(file, "a COCO file"):
            _add(export, file, content, images, split_of(file, source) if source.is_dir() else None)
    return export


def _add(export: Export, file: Path, content: dict[str, Any], images: Images, split: str | None) -> None:
    names = _categories(content)
    export.take_classes(list(names.values()), file)
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    for entry in content["images"]:
        path = images.find(entry["file_name"], file.parent)
        if path is None:
            continue
        rendered = [(a["category_id"], _render(a, export.left_out)) for a in by_image.get(entry["id"], ())]
        found = [(names[category], render) for category, render in rendered if render is not None]
        export.pictures.append(Picture(path, found, (int(entry["width"]), int(entry["height"])), split))


def _categories(content: dict[str, Any]) -> dict[Any, str]:
    """Return id -> name in the order of the ids, without the heading that Roboflow writes as a category."""
    used = {annotation["category_id"] for annotation in content["annotations"]}
    parents = {category.get("supercategory") for category in content["categories"]}
    return {
        category["id"]: category["name"]
        for category in sorted(content["categories"], key=lambda category: category["id"])
        if category["id"] in used or category.get("supercategory") != "none" or category["name"] not in parents
    }


def _render(annotation: dict[str, Any], left_out: Counter[tuple[str, str]]) -> shapes.Render | None:
    outline = annotation.get("segmentation")
    if not outline:
        left_out["annotation", "without an outline (boxes only)"] += 1
        return None
    if isinstance(outline, dict):
        height, width = outline["size"]
        code = outline["counts"]
        counts = shapes.coco_counts(code) if isinstance(code, str) else [int(count) for count in code]
        return shapes.window(shapes.runs(counts, height, width, order="F"), 0, 0)
    return shapes.polygons([np.asarray(ring, np.float64).reshape(-1, 2) for ring in outline])
