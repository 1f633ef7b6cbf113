"""Conversion of exports: those that could be misread or are damaged are refused."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataloaders.__main__ import EXPORTS, main
from dataloaders.prepare.formats import FORMATS
from tests.dataloaders.exports import (
    SQUARE,
    classes,
    coco,
    mask,
    photo,
    prepare,
    write,
)
from utils.errors import UserError


def coco_of(**changes: Any) -> dict[str, Any]:
    return coco(annotations=[{"image_id": 7, "category_id": 3, "segmentation": [np.ravel(SQUARE).tolist()], **changes}])


_LABELME = {"imagePath": "a.jpg"}
_STUDIO = {"type": "polygonlabels", "original_width": 40, "original_height": 30}
_TRIANGLE = [[0, 0], [50, 0], [50, 50]]


def brush(code: list[int]) -> dict[str, Any]:
    return {**_STUDIO, "type": "brushlabels", "value": {"format": "rle", "rle": code, "brushlabels": ["square"]}}


def studio(*results: dict[str, Any], **data: str) -> list[dict[str, Any]]:
    return [{"data": data or {"image": "a.jpg"}, "annotations": [{"result": list(results)}]}]


def drawn(labels: list[str], **changes: Any) -> dict[str, Any]:
    return {**_STUDIO, "value": {"points": _TRIANGLE, "polygonlabels": labels}, **changes}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("coco", coco_of(segmentation={"size": [15, 20], "counts": [10, 20, 270]}), "run-length code is for 20 x 15"),
        ("coco", coco_of(image_id="7"), "no annotation belongs to an image: their image_id is '7'"),
        ("coco", coco_of(segmentation=[[float("nan"), 1, 5, 5, 1, 7]]), "a shape of class .* not finite"),
        ("coco", {**coco(), "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "several categories .* 1"),
        ("coco", coco(images=[{"id": 7, "file_name": name} for name in "ab"]), "several images have the id 7"),
        ("labelme", {**_LABELME, "shapes": [{"label": None, "points": SQUARE}]}, "a class without a name"),
        (
            "labelme",
            {**_LABELME, "shapes": [{"label": "a", "shape_type": "mask", "points": SQUARE, "mask": "AAAA"}]},
            "the mask of a shape is not an image",
        ),
        ("label_studio", studio(brush([0, 0, 1, 2, 3])), "a shape of class 'square' cannot be drawn: the code has 258"),
        (
            "label_studio",
            studio(drawn(["square", "inner"])),
            r"has the labels \['square', 'inner'\]; expected a list with one name",
        ),
        ("label_studio", studio(drawn([None])), "expected a list with one name"),
        (
            "label_studio",
            studio({**brush([]), "value": {"format": "rle", "brushlabels": ["a"]}}),
            "cannot be drawn: 'rle'",
        ),
        ("label_studio", studio(drawn(["a"], original_width=float("inf"))), "infinity"),
        (
            "coco",
            coco(images=[{"id": 7, "file_name": "a.jpg", "width": -4, "height": 30}]),
            "annotations are for -4 x 30",
        ),
        ("label_studio", studio(drawn(["a"]), drawn(["a"], original_width=80)), "for images of different sizes"),
        ("label_studio", studio(drawn(["a"]), one="a.jpg", two="b.jpg"), "a task has several images"),
    ],
)
def test_annotations_that_could_be_misread_are_refused(tmp_path: Path, kind: str, content: Any, message: str) -> None:
    for name in "ab":
        photo(tmp_path / f"{name}.jpg")
    with pytest.raises(UserError, match=message):
        prepare(kind, write(tmp_path / "a.json", content), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mask_of_labelme_with_another_size_than_its_box(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    stored = base64.b64encode(photo(tmp_path / "mask.png", (20, 20)).read_bytes()).decode()
    shape = {"label": "a", "shape_type": "mask", "points": [[1, 1], [5, 5]], "mask": stored}
    with pytest.raises(UserError, match="20 x 20, its box 5 x 5"):
        prepare("labelme", write(tmp_path / "a.json", {**_LABELME, "shapes": [shape]}), tmp_path / "out")


def yolo(folder: Path, line: str, names: str = "names: [a, b]") -> Path:
    pytest.importorskip("yaml")
    photo(folder / "images/a.jpg")
    write(folder / "labels/a.txt", f"{line}\n")
    write(folder / "data.yaml", names)
    write(folder / "args.yaml", "lr: 1")  # another file, before it in the alphabet
    return folder


@pytest.mark.parametrize(
    ("line", "names", "message"),
    [
        ("1 .1 .1 .5 .1 .5 .5", "names: {1: a, 2: b}", r"the ids are \[1, 2\], expected 0 to 1"),
        ("1 .1 .1 .5 .1 .5 .5", "names: [yes, no]", "in quotes"),
        ("1 .1 .1 .5 .1 .5 .5", "names: ab", "found ab"),
        ("inf .1 .1 .5 .1 .5 .5", "names: [a, b]", "class inf is not one of the 2"),
        ("1 5 4 15 4 15 14", "names: [a, b]", "found coordinates up to 15; expected fractions of the image size"),
        ("1 nan 4 15 4 15 14", "names: [a, b]", "expected fractions of the image size"),
    ],
)
def test_labels_of_yolo_that_could_be_misread_are_refused(tmp_path: Path, line: str, names: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare("yolo", yolo(tmp_path / "export", line, names), tmp_path / "out")


def test_class_ids_of_yolo_as_text_are_numbers(tmp_path: Path) -> None:
    names = "names: {" + ", ".join(f"'{i}': n{i}" for i in range(12)) + "}"
    prepare("yolo", yolo(tmp_path / "export", "2 .1 .1 .5 .1 .5 .5", names), tmp_path / "out")
    assert classes(tmp_path / "out")[mask(tmp_path / "out", "a").max()] == "n2"
    photo(tmp_path / "export/images/a.png")
    with pytest.raises(UserError, match="have the same label file"):
        prepare("yolo", tmp_path / "export", tmp_path / "again")


def test_archives_that_cannot_be_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.json", json.dumps(coco()))
    data = (tmp_path / "a.zip").read_bytes()
    encrypted = bytearray(data)
    encrypted[6] |= 1
    encrypted[data.index(b"PK\1\2") + 8] |= 1
    for broken in (data.replace(b"categories", b"category_s"), bytes(encrypted)):
        (tmp_path / "a.zip").write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.zip: cannot be unpacked"):
            prepare("coco", tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", EXPORTS)
def test_mistakes_get_one_message(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="--from is missing"):
        main(["prepare", kind, "--dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--from: there is no file or folder"):
        prepare(kind, tmp_path / "none", tmp_path / "out")
    photo(tmp_path / "export/a.jpg")
    with pytest.raises(UserError, match="export"):
        prepare(kind, tmp_path / "export", tmp_path / "out")
    photo(tmp_path / "full/images/a.jpg")
    with pytest.raises(UserError, match="already contains files"):
        prepare(kind, tmp_path / "export", tmp_path / "full")
    with pytest.raises(UserError, match="--aug is for public data sets"):
        prepare(kind, tmp_path / "export", tmp_path / "out", "--aug")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    for text in ("{", '{"images": [{}], "annotations": [], "categories": []}'):
        with pytest.raises(UserError, match=r"a\.json"):
            prepare("coco", write(tmp_path / "a.json", text), tmp_path / "out")
    wrong = [{"image_id": 7, "category_id": 3, "segmentation": {"counts": [1, 2], "size": [30, 40]}}]
    write(tmp_path / "a.json", coco(annotations=wrong))
    with pytest.raises(UserError, match="runs have 3 pixels, expected 40 x 30"):
        prepare("coco", tmp_path / "a.json", tmp_path / "out")


def test_the_command_line_knows_every_format() -> None:
    assert set(EXPORTS) == set(FORMATS)
    with pytest.raises(UserError, match="--from is for exports"):
        main(["prepare", "voc", "--dir", "x", "--from", "y"])


def test_a_void_label_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "a.jpg")
    prepare("coco", write(tmp_path / "a.json", coco()), tmp_path / "out", "--void", "bax", "--void", "Box")
    text = capsys.readouterr().err
    assert "--void: the export has no label 'bax', only square, box" in text
    assert "'Box'" not in text
