"""Conversion of labeling tools' exports, which are written by hand after the documentation of the formats."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dataloaders
from dataloaders.__main__ import main
from dataloaders.plan import choices
from tests.dataloaders.exports import (
    INNER,
    SIZE,
    SQUARE,
    area,
    classes,
    coco,
    expected,
    label_studio_code,
    mask,
    photo,
    prepare,
    write,
)
from tests.running import run_here
from utils.errors import UserError


def test_coco_polygons_and_what_overlaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "export/a.jpg")
    source = write(tmp_path / "export/annotations.json", coco())
    prepare("coco", source, tmp_path / "out")
    assert np.array_equal(mask(tmp_path / "out", "a"), expected())
    assert classes(tmp_path / "out") == ["background", "square", "box"]
    text = capsys.readouterr().out
    assert "box over square: 20 pixels in 1 image" in text
    assert f"plan --data-dir {tmp_path / 'out'} --out out.json" in text
    assert "1 square: 6.67% of the pixels" in text  # 80 of 1200
    assert (tmp_path / "out/images/a.jpg").read_bytes() == (tmp_path / "export/a.jpg").read_bytes()
    dataset = dataloaders.build("Folder", data_dir=str(tmp_path / "out"), classes="classes.txt", num_workers=0).dataset
    assert np.array_equal(dataset[0].label.numpy(), expected())
    assert dataset.class_names == ("background", "square", "box")


@pytest.mark.parametrize("compressed", [False, True])
def test_coco_run_length_codes_and_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str], compressed: bool) -> None:
    photo(tmp_path / "photos/sub/a.jpg")
    changes = np.flatnonzero(np.diff(area(SQUARE).ravel(order="F").astype(int), prepend=0)).tolist()
    counts: Any = np.diff([0, *changes, SIZE[0] * SIZE[1]]).tolist()
    if compressed:
        coder = pytest.importorskip("pycocotools.mask")
        counts = coder.encode(np.asfortranarray(area(SQUARE).astype(np.uint8)))["counts"].decode()
    annotations = [
        {"image_id": 7, "category_id": 3, "iscrowd": 1, "segmentation": {"counts": counts, "size": [30, 40]}},
        {"image_id": 7, "category_id": 5, "segmentation": [], "bbox": [1, 2, 3, 4]},
    ]
    source = write(tmp_path / "a.json", coco(annotations=annotations))
    prepare("coco", source, tmp_path / "out", "--images", str(tmp_path / "photos"))
    assert np.array_equal(mask(tmp_path / "out", "a"), area(SQUARE))
    assert "left out: 1 annotation without an outline (boxes only)" in capsys.readouterr().out


def test_coco_with_a_file_per_split_as_roboflow_exports_it(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "things", "supercategory": "none"},
        {"id": 1, "name": "square", "supercategory": "things"},
    ]
    annotations = [{"image_id": 7, "category_id": 1, "segmentation": [np.ravel(SQUARE).tolist()]}]
    for split in ("train", "valid"):
        photo(tmp_path / f"export/{split}/a.jpg")
        write(tmp_path / f"export/{split}/_annotations.coco.json", coco(categories=categories, annotations=annotations))
    prepare("coco", tmp_path / "export", tmp_path / "out")
    for split in ("train", "val"):
        assert np.array_equal(mask(tmp_path / "out", f"{split}/a"), area(SQUARE))
    assert classes(tmp_path / "out") == ["background", "square"]
    parts = [
        dataloaders.build("Folder", data_dir=str(tmp_path / "out"), classes="classes.txt", split=split, num_workers=0)
        for split in ("train", "val")
    ]
    assert [len(part.dataset) for part in parts] == [1, 1]


def test_labelme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = io.BytesIO()
    Image.fromarray(np.ones((4, 10), np.uint8) * 255).save(png, "PNG")
    content = {
        "imagePath": "..\\photos\\a.jpg",
        "imageWidth": SIZE[0],
        "imageHeight": SIZE[1],
        "shapes": [
            {"label": "square", "points": [[5, 4], [15, 14]], "shape_type": "rectangle"},
            {
                "label": "box",
                "points": [[10, 8], [19, 11]],
                "shape_type": "mask",
                "mask": base64.b64encode(png.getvalue()).decode(),
            },
            {"label": "__ignore__", "points": [[30, 0], [40, 0], [40, 30], [30, 30]], "shape_type": "polygon"},
            {"label": "box", "points": [[1, 1], [2, 2]], "shape_type": "line"},
        ],
    }
    photo(tmp_path / "export/photos/a.jpg")
    write(tmp_path / "export/json/a.json", content)
    write(tmp_path / "export/labels.txt", "__ignore__\n_background_\nsquare\nbox\n")
    prepare("labelme", tmp_path / "export", tmp_path / "out")
    want = expected()
    want[:, 30:] = 255
    assert np.array_equal(mask(tmp_path / "out", "a"), want)
    assert classes(tmp_path / "out") == ["_background_", "square", "box"]
    text = capsys.readouterr().out
    assert "left out: 1 shape without an area (line)" in text
    assert "255 void (__ignore__), ignored: 25.00%" in text


def test_labelme_with_images_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files in two folders, with the images' original bytes or as PNG, and one file without an image."""
    bytes_of = {kind: photo(tmp_path / f"elsewhere/a.{kind}").read_bytes() for kind in ("jpg", "png")}
    shapes_of_all = [{"label": "square", "points": SQUARE}]
    for name, image, kind in (("x/1", "a.jpg", "jpg"), ("x/2", "..\\b\\a.jpg", "jpg"), ("y/1", "a.tif", "png")):
        data = base64.b64encode(bytes_of[kind]).decode()
        write(tmp_path / f"in/{name}.json", {"imagePath": image, "imageData": data, "shapes": shapes_of_all})
    write(tmp_path / "in/y/2.json", {"imagePath": "c.jpg", "imageData": None, "shapes": shapes_of_all})
    prepare("labelme", tmp_path / "in", tmp_path / "out", "--link")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out/images").iterdir() if not path.is_symlink()}
    assert written == {"x_a.jpg": bytes_of["jpg"], "2_a.jpg": bytes_of["jpg"], "y_a.png": bytes_of["png"]}
    for name in ("x_a", "2_a", "y_a"):
        assert np.array_equal(mask(tmp_path / "out", name), area(SQUARE))
    assert "1 annotated image (not found): c.jpg. Give their folder with --images" in capsys.readouterr().out
    write(tmp_path / "in/y/2.json", {"imagePath": "c.jpg", "imageData": "bm90aGluZw==", "shapes": shapes_of_all})
    with pytest.raises(UserError, match=r"2\.json: imageData is not an image"):
        prepare("labelme", tmp_path / "in", tmp_path / "bad")
    photo(tmp_path / "in/c.jpg")
    prepare("labelme", tmp_path / "in", tmp_path / "good")
    assert (tmp_path / "good/images/c.jpg").read_bytes() == (tmp_path / "in/c.jpg").read_bytes(), "the file comes first"


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><labels>
    <label><name>square</name><color>#fa3253</color></label>
    <label><name>box</name><color>#33ddff</color></label>
  </labels></task></meta>
  <image id="0" name="day/a.jpg" width="40" height="30">
    <mask label="box" source="manual" occluded="0" rle="0, 10, 10, 10, 10" left="10" top="8" width="10" height="4"
      z_order="2"></mask>
    <polygon label="square" occluded="0" points="5.00,4.00;15.00,4.00;15.00,14.00;5.00,14.00" z_order="0"></polygon>
    <box label="box" occluded="0" xtl="10.0" ytl="8.0" xbr="20.0" ybr="12.0" z_order="1"></box>
    <polyline label="box" occluded="0" points="1.00,1.00;2.00,2.00" z_order="0"></polyline>
    <tag label="box"></tag>
  </image>
</annotations>
"""


def test_cvat_xml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "export/images/day/a.jpg")
    write(tmp_path / "export/annotations.xml", CVAT)
    prepare("cvat", tmp_path / "export", tmp_path / "out")
    assert np.array_equal(mask(tmp_path / "out", "a"), expected())
    assert (tmp_path / "out/classes.txt").read_text().splitlines()[1:] == ["128   0   0  square", "  0 128   0  box"]
    assert "left out: 1 shape without an area (polyline)" in capsys.readouterr().out
    write(tmp_path / "export/annotations.xml", CVAT.replace("<image", "<track/><image", 1))
    with pytest.raises(UserError, match="CVAT for images"):
        prepare("cvat", tmp_path / "export", tmp_path / "out2")


def test_the_archive_that_a_tool_exports(tmp_path: Path) -> None:
    photo(tmp_path / "export/images/day/a.jpg")
    write(tmp_path / "export/annotations.xml", CVAT)
    archive = shutil.make_archive(str(tmp_path / "task"), "zip", tmp_path / "export")
    with pytest.raises(UserError, match=r"--link: .*task\.zip is an archive; unpack it and pass its folder to --from"):
        prepare("cvat", archive, tmp_path / "out", "--link")
    prepare("cvat", archive, tmp_path / "out")
    assert np.array_equal(mask(tmp_path / "out", "a"), expected())
    assert (tmp_path / "out/images/a.jpg").is_file()


def test_cvat_masks(tmp_path: Path) -> None:
    colors = {"background": (0, 0, 0), "square": (250, 50, 83), "box": (51, 221, 255), "void": (9, 9, 9)}
    lines = ["# label:color_rgb:parts:actions", *(f"{n}:{r},{g},{b}::" for n, (r, g, b) in colors.items())]
    export = tmp_path / "export"
    write(export / "labelmap.txt", "\n".join(lines))
    write(export / "ImageSets/Segmentation/Train.txt", "a\n")
    write(export / "ImageSets/Segmentation/Validation.txt", "b\n")
    ids = expected()
    ids[0] = 3
    for name in "ab":
        photo(export / f"JPEGImages/{name}.jpg")
        (export / "SegmentationClass").mkdir(exist_ok=True)
        Image.fromarray(np.array(list(colors.values()), np.uint8)[ids]).save(export / f"SegmentationClass/{name}.png")
    Image.fromarray(ids).save(export / "SegmentationClass/b.png")  # gray: the number of the line
    prepare("cvat", export, tmp_path / "out")
    want = np.where(ids == 3, 255, ids)
    assert np.array_equal(mask(tmp_path / "out", "train/a"), want)
    assert np.array_equal(mask(tmp_path / "out", "val/b"), want)
    assert (tmp_path / "out/classes.txt").read_text().splitlines()[1] == "250  50  83  square"


def test_label_studio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def result(kind: str, label: str, **value: Any) -> dict[str, Any]:
        size = {"original_width": SIZE[0], "original_height": SIZE[1], "image_rotation": 0}
        return {"type": f"{kind}labels", "value": {f"{kind}labels": [label], **value}, **size}

    percent = [[100 * x / SIZE[0], 100 * y / SIZE[1]] for x, y in SQUARE]
    tasks = [
        {
            "data": {"image": "/data/upload/1/0123abcd-my%20photo.jpg"},
            "annotations": [
                {"was_cancelled": True, "result": []},
                {
                    "result": [
                        result("polygon", "square", points=percent),
                        result("brush", "box", format="rle", rle=label_studio_code(area(INNER))),
                        result("keypoint", "box", x=1, y=1, width=1),
                    ]
                },
            ],
        },
        {
            "data": {"image": "/data/local-files/?d=photos/b.jpg"},
            "annotations": [
                {
                    "result": [
                        result("rectangle", "square", x=12.5, y=100 * 4 / 30, width=25, height=100 / 3, rotation=0),
                        result("rectangle", "box", x=25, y=100 * 8 / 30, width=25, height=100 * 4 / 30),
                    ]
                }
            ],
        },
        {"data": {"image": "c.jpg"}, "annotations": []},
    ]
    for name in ("my photo", "b"):
        photo(tmp_path / f"export/photos/{name}.jpg")
    write(tmp_path / "export/project.json", tasks)
    prepare("label_studio", tmp_path / "export", tmp_path / "out")
    for name in ("my photo", "b"):
        # Sorted by name: box is 1, square is 2.
        assert np.array_equal(mask(tmp_path / "out", name), expected(2, 1)), name
    text = capsys.readouterr().out
    assert "left out: 1 task without an annotation" in text
    assert "left out: 1 result without a labeled area (keypointlabels)" in text


def test_roboflow_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "valid", "test"):
        folder = tmp_path / f"export/{split}"
        write(folder / "_classes.csv", "Pixel Value, Class\n0, background\n1, square\n2, box\n3, unlabeled\n")
        photo(folder / "a_jpg.rf.0123.jpg")
        ids = expected()
        ids[0] = 3
        Image.fromarray(ids).save(folder / "a_jpg.rf.0123_mask.png")
    prepare("roboflow", tmp_path / "export", tmp_path / "out")
    for split in ("train", "val", "test"):
        assert np.array_equal(mask(tmp_path / "out", f"{split}/a_jpg.rf.0123"), np.where(ids == 3, 255, ids))
    assert "void (unlabeled)" in capsys.readouterr().out
    prepare("roboflow", tmp_path / "export", tmp_path / "kept", "--void", "nothing")
    assert classes(tmp_path / "kept")[3] == "unlabeled"


@pytest.mark.parametrize(
    "names", ["names: [square, box]", "names:\n  0: square\n  1: box\n", "names:\n- square\n- box\n"]
)
def test_yolo_polygons(tmp_path: Path, names: str) -> None:
    pytest.importorskip("yaml")

    def line(number: int, ring: list[list[int]]) -> str:
        return f"{number} " + " ".join(f"{x / SIZE[0]:.6f} {y / SIZE[1]:.6f}" for x, y in ring)

    for split in ("train", "val"):
        photo(tmp_path / f"export/images/{split}/a.jpg")
        write(tmp_path / f"export/labels/{split}/a.txt", f"{line(0, SQUARE)}\n{line(1, INNER)}\n")
    write(tmp_path / "export/data.yaml", f"path: x\ntrain: images/train\n{names}")
    prepare("yolo", tmp_path / "export", tmp_path / "out")
    for split in ("train", "val"):
        assert np.array_equal(mask(tmp_path / "out", f"{split}/a"), expected())
    write(tmp_path / "export/labels/val/a.txt", "0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(UserError, match=r"a\.txt, line 1 is a box, not a polygon"):
        prepare("yolo", tmp_path / "export", tmp_path / "boxes")


def test_an_export_becomes_a_training_in_three_commands(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        photo(tmp_path / f"export/{i}.jpg")
    images = [{"id": i, "file_name": f"{i}.jpg", "width": SIZE[0], "height": SIZE[1]} for i in range(6)]
    annotations = [{**a, "image_id": i} for i in range(6) for a in coco()["annotations"]]
    source = write(tmp_path / "export/all.json", coco(images=images, annotations=annotations))
    prepare("coco", source, tmp_path / "data")
    monkeypatch.setattr(choices, "find_spec", lambda name: None)
    out = tmp_path / "mine.json"
    assert main(["plan", "--data-dir", str(tmp_path / "data"), "--out", str(out)]) == 0
    small = (
        "arch.args.width=4",
        "trainer.epochs=1",
        f"trainer.save_dir={tmp_path / 'saved'}",
        "trainer.tensorboard=false",
    )
    assert run_here(["train.py", "-c", str(out), "-d", "cpu", *(w for s in small for w in ("--set", s))], root) == 0
    assert list((tmp_path / "saved").rglob("best_model.pth"))
