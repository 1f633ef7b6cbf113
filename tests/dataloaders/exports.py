"""Small exports of labeling tools, for the tests of their conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataloaders.__main__ import main
from dataloaders.prepare import shapes

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


def coco(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": SIZE[0], "height": SIZE[1]}],
        "categories": [{"id": 3, "name": "square"}, {"id": 5, "name": "box"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "segmentation": [np.ravel(SQUARE).tolist()]},
            {"image_id": 7, "category_id": 5, "segmentation": [np.ravel(INNER).tolist()]},
        ],
    } | changes
