"""Class files as editors and labeling tools write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.classes import Classes, read_classes
from utils.errors import UserError

NAMES = ("background", "road", "street lamp")
COLORS = ((0, 0, 0), (128, 64, 128), (250, 170, 30))
ROADS = Classes(NAMES, COLORS)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("background\nroad\nstreet lamp\n", Classes(NAMES)),
        ("# our classes\n\n  background \r\n\"road\"\r\n'street lamp'", Classes(NAMES)),
        ("Pixel Value, Class\n0, background\n1, road\n2, street lamp\n", Classes(NAMES)),
        ("Pixel Value, Class\n2, street lamp\n0, background\n1, road\n", Classes(NAMES)),
        ("name,r,g,b\nbackground,0,0,0\nroad,128,64,128\nstreet lamp,250,170,30\n", ROADS),
        ("id;name;red;green;blue\n0;background;0;0;0\n1;road;128;64;128\n2;street lamp;250;170;30\n", ROADS),
        (
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\nstreet lamp:250,170,30::\n",
            ROADS,
        ),
        ("  0   0   0 background\n128  64 128 road\n250 170  30 street lamp\n", ROADS),
        ("background 0 0 0\nroad 128 64 128\nstreet lamp 250 170 30\n", ROADS),
        ("background,0,0,0\nroad,128,64,128\nstreet lamp,250,170,30\n", ROADS),
        ("just one", Classes(("just one",))),
        ("2 street lamp\n0: background\n1, road\n", Classes(NAMES)),
        ("1,road,128,64,128\n0,background,0,0,0\n2,street lamp,250,170,30\n", ROADS),
    ],
    ids=["plain", "quotes", "roboflow", "unordered", "class_dict", "semicolons", "cvat", "rgb", "rgb-last", "no-header",
         "one", "ids", "ids-rgb"],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_files(tmp_path: Path, text: str, want: Classes, encoding: str) -> None:
    (tmp_path / "classes").write_text(text, encoding=encoding)
    assert read_classes(tmp_path / "classes") == want


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n# nothing\n", "contains no class name"),
        (b"road\ntree\nroad\n", "lists 'road' twice"),
        (b"Pixel Value,Class\n0,a\n2,b\n", r"ids .* are \[0, 2\][\s\S]*mask_values"),
        (b"name,r,g,b\na,0,0\n", "not a table"),
        (b"name,r,g,b\na,0,0,300\n", "0 to 255"),
        (b"color,what\nred,road\nblue,sky\n", "looks like a table"),
        ("Straße\n".encode("latin-1"), "not UTF-8"),
        (b"\x00\x01\x02", "not UTF-8"),
        ("road\ntree\n".encode("utf-16-le"), "not UTF-8 text .*byte 0"),
        (b"road\ntraffic\xc2\xa0sign\n", r"it contains '\\xa0'"),
        (b"1 road\n2 tree\n", r"ids .* are \[1, 2\], expected 0 to 1"),
        (b"Idx,Name\n1,wall\n2,building\n", r"ids .* are \[1, 2\], expected 0 to 1"),
        (b'["road", "tree"]', "which is not a name. Expected one name per line"),
        (b"names:\n  0: road\n", "which is not a name"),
        (b"road, tree, car", "looks like a table"),
        (b"name,r,g,b\n", "only a header"),
        (b"0 0 300 road\n0 0 0 tree\n", r"classes: .* three numbers from 0 to 255"),
    ],
)
def test_class_files_that_cannot_be_understood(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "classes").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "classes")


def test_a_missing_class_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classes: there is no file"):
        read_classes(tmp_path / "none.txt")
