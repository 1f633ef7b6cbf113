"""Conversion of labeling tools' exports, which are written by hand after the documentation of the formats."""

from __future__ import annotations

import base64
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataloaders
from dataloaders.__main__ import EXPORTS, main
from dataloaders.plan import choices
from dataloaders.prepare import shapes
from dataloaders.prepare.formats import FORMATS
from tests.running import run_here
from utils.errors import UserError

SIZE = (40, 30)  # width, height
SQUARE = [[5, 4], [15, 4], [15, 14], [5, 14]]  # 10 x 10 pixels
INNER = [[10, 8], [20, 8], [20, 12], [10, 12]]  # 10 x 4, half of it over the square


def photo(path: Path, size: tuple[int, int] = SIZE, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, len(path.name))).save(path, **options)
    return path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def prepare(kind: str, source: Path, out: Path, *options: str) -> None:
    assert main(["prepare", kind, "--from", str(source), "--dir", str(out), *options]) == 0


def mask(out: Path, name: str) -> np.ndarray:
    with Image.open(out / f"masks/{name}.png") as image:
        return np.asarray(image)


def expected(square: int = 1, inner: int = 2, rest: int = 0) -> np.ndarray:
    """Return the mask of the square with the inner box drawn over it."""
    ids = np.full(SIZE[::-1], rest, np.uint8)
    ids[4:14, 5:15] = square
    ids[8:12, 10:20] = inner
    return ids


def classes(out: Path) -> list[str]:
    return [line.split(maxsplit=3)[3] for line in (out / "classes.txt").read_text().splitlines()]


def area(ring: list[list[int]]) -> np.ndarray:
    return shapes.polygons([np.array(ring)])(SIZE[1], SIZE[0])


# ---- shapes


@given(st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 25)), min_size=3, max_size=8))
@settings(max_examples=60, deadline=None)
def test_polygons_cover_the_pixels_whose_centers_lie_inside(ring: list[tuple[float, float]]) -> None:
    found = shapes.polygons([np.array(ring)])(20, 20)
    for row in range(20):
        for column in range(20):
            x, y, inside = column + 0.5, row + 0.5, False
            for (x1, y1), (x2, y2) in zip(ring, [*ring[1:], ring[0]], strict=True):
                if (y1 <= y) != (y2 <= y) and x1 + (y - y1) / (y2 - y1) * (x2 - x1) <= x:
                    inside = not inside
            assert found[row, column] == inside, (row, column)


def test_boxes_and_ellipses() -> None:
    assert np.array_equal(shapes.box(5, 4, 10, 10)(30, 40), area(SQUARE))
    # Turned by 90 degrees about the upper left corner, a box lies to the left of it; about the center it stays.
    turned = shapes.box(15, 4, 10, 6, 90)(30, 40)
    assert np.argwhere(turned).min(0).tolist() == [4, 9]
    assert np.argwhere(turned).max(0).tolist() == [13, 14]
    assert np.array_equal(shapes.box(5, 4, 10, 10, 90, centered=True)(30, 40), area(SQUARE))
    disc = shapes.ellipse(20, 15, 10, 5, 0)(30, 40)
    assert abs(int(disc.sum()) - np.pi * 50) < 4
    assert np.array_equal(shapes.ellipse(20, 15, 5, 10, 90)(30, 40), disc)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_run_length_codes_of_coco_agree_with_pycocotools(height: int, width: int, seed: int) -> None:
    coder = pytest.importorskip("pycocotools.mask")
    drawn = np.random.default_rng(seed).random((height, width)) < 0.3
    code = coder.encode(np.asfortranarray(drawn.astype(np.uint8)))
    assert np.array_equal(shapes.runs(shapes.coco_counts(code["counts"]), height, width, order="F"), drawn)


def test_polygons_nearly_agree_with_pycocotools() -> None:
    coder = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        angles = np.sort(rng.random(9) * 2 * np.pi)
        ring = 100 + 80 * np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.5, 1, (9, 1))
        ours = shapes.polygons([ring])(200, 200)
        theirs = coder.decode(coder.frPyObjects([ring.ravel().tolist()], 200, 200))[:, :, 0] > 0
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.98


def label_studio_code(drawn: np.ndarray) -> list[int]:
    """Encode a mask as Label Studio does: RGBA values, words of 8 bits, run lengths of 3, 4, 8 and 16 bits."""
    values = np.repeat(drawn.ravel().astype(int) * 255, 4).tolist()
    sizes = (3, 4, 8, 16)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    at = 0
    while at < len(values):
        stop = at
        while stop < len(values) and values[stop] == values[at] and stop - at < 1 << sizes[-1]:
            stop += 1
        if stop - at == 1:  # a run of single values
            bits += f"000{0:03b}{values[at]:08b}"
        else:
            kind = next(i for i, size in enumerate(sizes) if stop - at - 1 < 1 << size)
            bits += f"1{kind:02b}{stop - at - 1:0{sizes[kind]}b}{values[at]:08b}"
        at = stop
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_brush_strokes_of_label_studio(height: int, width: int, seed: int) -> None:
    drawn = np.random.default_rng(seed).random((height, width)) < 0.4
    code = label_studio_code(drawn)
    assert np.array_equal(shapes.label_studio_mask(code, height, width), drawn)
    with pytest.raises(ValueError, match="values"):
        shapes.label_studio_mask(code, height, width + 1)


# ---- formats


def coco(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": SIZE[0], "height": SIZE[1]}],
        "categories": [{"id": 3, "name": "square"}, {"id": 5, "name": "box"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "segmentation": [np.ravel(SQUARE).tolist()]},
            {"image_id": 7, "category_id": 5, "segmentation": [np.ravel(INNER).tolist()]},
        ],
    } | changes


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


# ---- what all share


def test_the_options(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    source = write(tmp_path / "a.json", coco())
    prepare("coco", source, tmp_path / "void", "--rest", "void")
    assert np.array_equal(mask(tmp_path / "void", "a"), expected(0, 1, rest=255))
    prepare("coco", source, tmp_path / "linked", "--link", "--void", "square")
    assert np.array_equal(mask(tmp_path / "linked", "a"), expected(255, 1))
    assert (tmp_path / "linked/images/a.jpg").is_symlink()
    reverse = coco()
    reverse["annotations"].reverse()
    source = write(tmp_path / "b.json", reverse)
    prepare("coco", source, tmp_path / "file")
    assert (mask(tmp_path / "file", "a")[8:12, 10:15] == 1).all(), "the square is drawn last"
    prepare("coco", source, tmp_path / "area", "--order", "area")
    assert np.array_equal(mask(tmp_path / "area", "a"), expected()), "the small one is drawn last"


def test_images_turned_by_exif(tmp_path: Path) -> None:
    """Annotations of the stored image are rotated with it; those of the image as viewers show it are unchanged."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "a.jpg", SIZE, exif=exif)
    prepare("coco", write(tmp_path / "a.json", coco()), tmp_path / "stored")
    assert np.array_equal(mask(tmp_path / "stored", "a"), np.rot90(expected(), -1))
    photo(tmp_path / "a.jpg", SIZE[::-1], exif=exif)  # viewers show 40 x 30
    prepare("coco", tmp_path / "a.json", tmp_path / "seen")
    assert np.array_equal(mask(tmp_path / "seen", "a"), expected())
    photo(tmp_path / "a.jpg", (41, 30))
    with pytest.raises(UserError, match="is 41 x 30.*annotations are for 40 x 30"):
        prepare("coco", tmp_path / "a.json", tmp_path / "other")


@pytest.mark.parametrize("kind", ["labelme", "coco", "cvat", "label_studio"])
def test_blanks_around_names_are_removed_and_similar_names_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    labels = ["Car", "Car ", "car"]
    photo(tmp_path / "a.jpg")
    if kind == "labelme":
        drawn = [{"label": label, "points": SQUARE} for label in labels]
        source = write(tmp_path / "a.json", {"imagePath": "a.jpg", "shapes": drawn})
    elif kind == "coco":
        outlines = [np.ravel(SQUARE).tolist()]
        found = [{"image_id": 7, "category_id": i, "segmentation": outlines} for i in range(3)]
        names = [{"id": i, "name": label} for i, label in enumerate(labels)]
        source = write(tmp_path / "a.json", coco(categories=names, annotations=found))
    elif kind == "cvat":
        boxes = "".join(f'<box label="{label}" xtl="5" ytl="4" xbr="15" ybr="14"/>' for label in labels)
        image = f'<annotations><image name="a.jpg" width="40" height="30">{boxes}</image></annotations>'
        source = write(tmp_path / "a.xml", image)
    else:
        area = {"x": 12.5, "y": 13, "width": 25, "height": 33}
        results = [
            {"type": "rectanglelabels", "value": {"rectanglelabels": [label], **area}}
            | {"original_width": 40, "original_height": 30}
            for label in labels
        ]
        source = write(tmp_path / "a.json", [{"data": {"image": "a.jpg"}, "annotations": [{"result": results}]}])
    prepare(kind, source, tmp_path / "out")
    assert classes(tmp_path / "out") == ["background", "Car", "car"]
    text = capsys.readouterr().err
    assert "differ only in case, blanks or underscores: 'Car' (2 shapes), 'car' (1 shape)" in text
    empty = source.read_text().replace("Car ", " ").replace('"name": "a.jpg"', "")
    with pytest.raises(UserError, match="class without a name"):
        prepare(kind, write(source, empty), tmp_path / "empty")


@pytest.mark.parametrize(
    ("orientation", "size", "said"),
    [(1, SIZE, False), (2, SIZE, True), (3, SIZE, True), (4, SIZE, True), (6, SIZE, False), (6, (40, 40), True)],
)
def test_an_exif_turn_that_the_size_does_not_show_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], orientation: int, size: tuple[int, int], said: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(tmp_path / "a.jpg", size, exif=exif)
    images = [{"id": 7, "file_name": "a.jpg", "width": size[0], "height": size[1]}]
    prepare("coco", write(tmp_path / "a.json", coco(images=images)), tmp_path / "out")
    text = capsys.readouterr().err
    assert (f"1 image, such as {tmp_path / 'a.jpg'} (orientation {orientation})" in text) == said
    assert ("Assumed: after" in text) == said


def test_an_exif_turn_of_annotations_without_a_size_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    photo(tmp_path / "a.jpg", SIZE[::-1], exif=exif)
    drawn = [{"label": "square", "points": SQUARE}]
    prepare("labelme", write(tmp_path / "a.json", {"imagePath": "a.jpg", "shapes": drawn}), tmp_path / "out")
    assert np.array_equal(mask(tmp_path / "out", "a"), area(SQUARE))
    assert "(orientation 8)" in capsys.readouterr().err


def test_images_of_equal_names_and_missing_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("one", "two"):
        photo(tmp_path / f"{part}/a.jpg")
    images = [
        {"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
        for i, name in enumerate(("one/a.jpg", "two/a.jpg", "three/b.jpg"))
    ]
    source = write(tmp_path / "a.json", coco(images=images, annotations=[]))
    prepare("coco", source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == ["one_a.png", "two_a.png"]
    text = capsys.readouterr().out
    assert "1 annotated image (not found): three/b.jpg" in text
    assert "2 images without any annotation: all their pixels are background" in text
    images[0]["file_name"] = "a.jpg"
    with pytest.raises(UserError, match=r"'a.jpg' could be .*a\.jpg or .*a\.jpg; pass the folder"):
        prepare("coco", write(tmp_path / "a.json", coco(images=images, annotations=[])), tmp_path / "again")


def test_an_image_found_in_another_folder_than_the_export_says_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path / "export/val/a.jpg")
    images = [{"id": 7, "file_name": "train/a.jpg", "width": 40, "height": 30}]
    prepare("coco", write(tmp_path / "export/a.json", coco(images=images)), tmp_path / "out")
    assert "1 image found in a folder with another name than in the export, such as " in capsys.readouterr().err
    images[0]["file_name"] = "/data/upload/a.jpg"  # the path on another machine
    prepare("coco", write(tmp_path / "export/a.json", coco(images=images)), tmp_path / "out2")
    assert "another name" not in capsys.readouterr().err


def test_names_of_images_that_look_like_parts_of_urls(tmp_path: Path) -> None:
    for number, name in enumerate(("a b.jpg", "a%20b.jpg", "what?.jpg")):
        photo(tmp_path / name, (40 + number, 30))
    images = [
        {"id": number, "file_name": name, "width": 41 + number, "height": 30}
        for number, name in enumerate(("a%20b.jpg", "what?.jpg"))
    ]
    prepare("coco", write(tmp_path / "a.json", coco(images=images, annotations=[])), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["a%20b.jpg", "what?.jpg"]


def test_files_that_a_mac_adds_to_archives_are_skipped(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.write(tmp_path / "a.jpg", "a.jpg")
        archive.writestr("a.json", json.dumps(coco()))
        for name in ("__MACOSX/._a.json", "__MACOSX/._a.jpg"):
            archive.writestr(name, b"\0\5\x16\7")
    prepare("coco", tmp_path / "export.zip", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == ["a.png"]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg", (11, 11))
    images = [
        {"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for i, name in ((7, "a.jpg"), (8, "b.jpg"))
    ]
    source = write(tmp_path / "a.json", coco(images=images))
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "out", tmp_path / "there"):
        with pytest.raises(UserError, match=r"b\.jpg is 11 x 11"):
            prepare("coco", source, out)
    assert not (tmp_path / "out").exists()
    assert not any((tmp_path / "there").iterdir())


def test_embedded_images_are_not_replaced_by_others_of_their_name(tmp_path: Path) -> None:
    stored = base64.b64encode(photo(tmp_path / "photo.png").read_bytes()).decode()
    content = {"imagePath": "a.png", "imageData": stored, "shapes": [{"label": "square", "points": SQUARE}]}
    write(tmp_path / "export/one/a.json", content)
    Image.new("RGB", SIZE, "white").save(photo(tmp_path / "export/two/a.png"))
    prepare("labelme", tmp_path / "export", tmp_path / "out")
    with Image.open(tmp_path / "out/images/a.png") as image:
        assert image.getpixel((0, 0))[:2] == (90, 120)


def test_masks_of_cvat_find_their_images_by_folder(tmp_path: Path) -> None:
    write(tmp_path / "export/labelmap.txt", "background:0,0,0::\nsquare:255,0,0::\n")
    colors = np.zeros((30, 40, 3), np.uint8)
    (tmp_path / "export/SegmentationClass/two").mkdir(parents=True)
    Image.fromarray(colors).save(tmp_path / "export/SegmentationClass/two/a.png")
    photo(tmp_path / "export/JPEGImages/one/a.jpg", (8, 8))
    photo(tmp_path / "export/JPEGImages/two/a.jpg")
    lists = tmp_path / "export/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_bytes(b"\xef\xbb\xbftwo/a\r\n")
    prepare("cvat", tmp_path / "export", tmp_path / "out")
    assert (tmp_path / "out/masks/val/a.png").is_file()
    photo(tmp_path / "export/JPEGImages/two/a.png")
    with pytest.raises(UserError, match=r"'two/a' could be .*a\.jpg or .*a\.png"):
        prepare("cvat", tmp_path / "export", tmp_path / "again")


def test_images_of_roboflow_with_equal_names(tmp_path: Path) -> None:
    write(tmp_path / "train/_classes.csv", "Pixel Value, Class\n0, background\n1, square\n")
    for number, part in enumerate(("one", "two")):
        photo(tmp_path / "train" / part / "a.jpg")
        Image.fromarray(np.full((30, 40), number, np.uint8)).save(tmp_path / "train" / part / "a_mask.png")
    prepare("roboflow", tmp_path, tmp_path / "out")
    assert mask(tmp_path / "out", "train/one_a").max() == 0
    assert mask(tmp_path / "out", "train/two_a").min() == 1
    photo(tmp_path / "train/one/a.png")
    with pytest.raises(UserError, match="have the same name apart from the extension"):
        prepare("roboflow", tmp_path / "train", tmp_path / "again")


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
        ("label_studio", studio(drawn(["square", "inner"])), r"several labels \(square, inner\)"),
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
