"""Label Studio: the JSON export with polygons, brushes, rectangles and ellipses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.prepare import shapes
from dataloaders.prepare.export import Export, Images, Picture, format_errors, read_json
from utils.errors import UserError, listed


def read(source: Path, images: Images) -> Export:
    """Read the exported JSON file, or all in a folder. Classes are sorted by name, because the export has no order."""
    files = [source] if source.is_file() else sorted(source.glob("*.json"))
    export = Export()
    for file in files:
        tasks = read_json(file)
        if not isinstance(tasks, list) or not all(isinstance(task, dict) and "annotations" in task for task in tasks):
            raise UserError(f"{file}: expected a list of tasks with annotations; export as JSON, not as JSON-MIN")
        for task in tasks:
            with format_errors(file, "a JSON export of Label Studio"):
                _add(export, task, images)
    if not files:
        raise UserError(f"{source}: there is no JSON file")
    export.classes = sorted({label for picture in export.pictures for label, _ in picture.shapes})
    return export


def _add(export: Export, task: dict[str, Any], images: Images) -> None:
    annotations = [a for a in task["annotations"] if not a.get("was_cancelled")]
    if not annotations:
        export.left_out["task", "without an annotation"] += 1
        return
    if len(annotations) > 1:
        export.left_out["further annotation", "of a task (the first is used)"] += len(annotations) - 1
    texts = [value for value in task["data"].values() if isinstance(value, str)]
    names = [text for text in texts if Path(text.partition("?")[0]).suffix or "?d=" in text]
    found = list(dict.fromkeys(path for name in names if (path := images.look_for(name)) is not None))
    if len(found) > 1:
        raise ValueError(f"a task has several images ({listed(found, 3)}); export one image per task")
    if not found:
        images.missing += names[:1]
        return
    picture = Picture(found[0])
    for result in annotations[0]["result"]:
        area = _area(result, picture.image.name, export.left_out)
        if area is None:
            continue
        label, size, render = area
        if size != (picture.size or size):
            raise ValueError(f"the areas of {picture.image.name} are for images of different sizes")
        picture.size = size
        picture.shapes.append((label, render))
    export.pictures.append(picture)


def _area(
    result: dict[str, Any], image: str, left_out: Counter[tuple[str, str]]
) -> tuple[str, tuple[int, int], shapes.Render] | None:
    """Return label, size of the image (width, height) and the area of a result; None if it has no area."""
    kind = str(result.get("type", "")).removesuffix("labels")
    labels = result.get("value", {}).get(f"{kind}labels")
    if not labels or kind not in ("polygon", "brush", "rectangle", "ellipse"):
        left_out["result", f"without a labeled area ({result.get('type')})"] += 1
        return None
    if result.get("image_rotation"):
        raise UserError(f"{image} was rotated in Label Studio; export it without rotation, or label it again")
    if not isinstance(labels, list) or len(labels) > 1 or not isinstance(labels[0], str):
        raise ValueError(f"an area of {image} has the labels {labels!r}; expected a list with one name")
    size = (int(result["original_width"]), int(result["original_height"]))
    return labels[0], size, _render(kind, result["value"], *size)


def _render(kind: str, value: dict[str, Any], width: int, height: int) -> shapes.Render:
    scale = np.array((width, height)) / 100  # coordinates are in percent of the image
    if kind == "brush":
        if value.get("format") != "rle":
            raise ValueError(f"brush strokes in format {value.get('format')!r}, expected 'rle'")
        # Decoded when it is drawn, because the mask is much larger than its code.
        return lambda *size: shapes.window(shapes.label_studio_mask(value["rle"], height, width), 0, 0)(*size)
    if kind == "polygon":
        return shapes.polygons([np.array(value["points"], np.float64) * scale])
    x, y = np.array((value["x"], value["y"])) * scale
    turn = float(value.get("rotation", 0))
    if kind == "rectangle":
        wide, high = np.array((value["width"], value["height"])) * scale
        return shapes.box(x, y, wide, high, turn)
    radius_x, radius_y = np.array((value["radiusX"], value["radiusY"])) * scale
    return shapes.ellipse(x, y, radius_x, radius_y, turn)
