"""The export formats of labeling tools by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dataloaders.prepare.export import Export, Images
from dataloaders.prepare.formats import coco, cvat, label_studio, labelme, roboflow, yolo

# Each function reads an exported file or folder, and finds the images with its second argument.
FORMATS: dict[str, Callable[[Path, Images], Export]] = {
    "coco": coco.read,
    "labelme": labelme.read,
    "cvat": cvat.read,
    "label_studio": label_studio.read,
    "roboflow": roboflow.read,
    "yolo": yolo.read,
}
