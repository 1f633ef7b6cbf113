"""Conversion of exports: options, names, and how images are found."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.dataloaders.exports import (
    SIZE,
    SQUARE,
    area,
    classes,
    coco,
    expected,
    mask,
    photo,
    prepare,
    write,
)
from utils.errors import UserError


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


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_images_turned_by_exif(tmp_path: Path, kind: str) -> None:
    """Annotations of the stored image are rotated with it; those of the image as viewers show it are unchanged."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "a.jpg", SIZE, format=kind, exif=exif)
    prepare("coco", write(tmp_path / "a.json", coco()), tmp_path / "stored")
    assert np.array_equal(mask(tmp_path / "stored", "a"), np.rot90(expected(), -1))
    photo(tmp_path / "a.jpg", SIZE[::-1], format=kind, exif=exif)  # viewers show 40 x 30
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
