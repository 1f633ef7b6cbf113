"""CVAT: "CVAT for images 1.1" (XML) and "Segmentation mask 1.1" (painted masks with labelmap.txt)."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from base.classes import read_classes
from base.text import read_lines
from dataloaders.prepare import shapes
from dataloaders.prepare.export import Export, Images, Picture, format_errors, split_of
from dataloaders.reading.colors import ColorTable
from dataloaders.reading.pairing import image_files
from utils.errors import UserError
from utils.images import read_mask


def read(source: Path, images: Images) -> Export:
    """Read ``annotations.xml``, or a folder with it, or a folder with ``labelmap.txt`` and ``SegmentationClass``."""
    if source.is_dir() and (source / "labelmap.txt").is_file():
        return _masks(source, images)
    files = [source] if source.is_file() else image_files(source, (".xml",))
    if not files:
        raise UserError(f"{source}: found neither annotations.xml nor labelmap.txt; expected an export of CVAT")
    export = Export()
    for file in files:
        with format_errors(file, "an XML file as CVAT writes it"):
            _add(export, file, images)
    return export


def _add(export: Export, file: Path, images: Images) -> None:
    root = ElementTree.parse(file).getroot()
    if root.find("track") is not None:
        raise UserError(f"{file} contains tracks of a video; export as 'CVAT for images'")
    for label in root.iterfind("meta//labels/label"):
        name, color = label.findtext("name") or "", label.findtext("color") or ""
        if name not in export.classes:
            export.classes.append(name)
        if len(color) == 7:
            red, green, blue = bytes.fromhex(color[1:])
            export.colors[name] = (red, green, blue)
    for image in root.iterfind("image"):
        path = images.find(image.attrib["name"], file.parent)
        if path is None:
            continue
        size = (int(image.attrib["width"]), int(image.attrib["height"]))
        picture = Picture(path, [], size, split_of(Path(image.get("subset") or image.attrib["name"]), Path()))
        # A stable sort: equal depths stay in the order of the file.
        for element in sorted(image, key=lambda element: int(element.get("z_order", "0"))):
            render = _render(element, export.left_out)
            if render is not None:
                picture.shapes.append((element.attrib["label"], render))
                if element.attrib["label"] not in export.classes:
                    export.classes.append(element.attrib["label"])
        export.pictures.append(picture)


def _render(element: ElementTree.Element, left_out: Counter[tuple[str, str]]) -> shapes.Render | None:
    value = element.attrib
    if element.tag == "polygon":
        points = [[float(part) for part in point.split(",")] for point in value["points"].split(";")]
        return shapes.polygons([np.array(points)])
    if element.tag == "box":
        left, top, right, bottom = (float(value[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        turn = float(value.get("rotation", 0))
        return shapes.box(left, top, right - left, bottom - top, turn, centered=True)
    if element.tag == "ellipse":
        x, y, radius_x, radius_y = (float(value[key]) for key in ("cx", "cy", "rx", "ry"))
        return shapes.ellipse(x, y, radius_x, radius_y, float(value.get("rotation", 0)))
    if element.tag == "mask":
        left, top, width, height = (int(float(value[key])) for key in ("left", "top", "width", "height"))
        counts = [int(part) for part in value["rle"].split(",")]
        if len(counts) % 2 == 0:
            counts.append(height * width - sum(counts))  # the last run of 0 may be missing
        return shapes.window(shapes.runs(counts, height, width), left, top)
    if element.tag != "tag":
        left_out["shape", f"without an area ({element.tag})"] += 1
    return None


def _masks(source: Path, images: Images) -> Export:
    classes = read_classes(source / "labelmap.txt")
    if classes.palette is None:
        raise UserError(f"{source / 'labelmap.txt'} contains no colors; expected the format of CVAT (name:R,G,B::)")
    folder = source / "SegmentationClass"
    if not folder.is_dir():
        raise UserError(f"{source}: there is no folder SegmentationClass")
    table = ColorTable(zip(classes.palette, count()), "The colors are those of labelmap.txt.")
    splits: dict[str, str | None] = {}
    for file in sorted((source / "ImageSets" / "Segmentation").glob("*.txt")):
        names = (line for _, line in read_lines(file, "--from"))
        splits |= dict.fromkeys(names, split_of(Path(file.name), Path()))
    by_stem: dict[str, list[Path]] = {}
    for path in images.files:
        if not path.is_relative_to(folder) and "SegmentationObject" not in path.parts:
            by_stem.setdefault(path.stem, []).append(path)
    export = Export(list(classes.names), [], dict(zip(classes.names, classes.palette, strict=True)))
    for mask in image_files(folder, (".png",)):
        name = mask.relative_to(folder).with_suffix("").as_posix()
        if mask.stem not in by_stem:
            images.missing.append(name)
            continue
        decoded = partial(_ids, mask, table, len(classes.names))
        image = images.closest(by_stem[mask.stem], name)
        export.pictures.append(Picture(image, ids=decoded, split=splits.get(name)))
    return export


def _ids(path: Path, table: ColorTable, classes: int) -> np.ndarray:
    mask = read_mask(path)
    if mask.values.ndim == 3 or mask.palette is not None:
        return table.decode(mask.colors(), path)
    if mask.values.max(initial=0) >= classes:
        raise UserError(f"{path} contains the value {mask.values.max()}, but labelmap.txt has {classes} lines")
    return mask.values  # CVAT: gray masks contain the number of the line
