"""Write Shapes to files in the layout of Pascal VOC: ``python -m dataloaders.shapes --out DIR --n N``."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2

from dataloaders.shapes import scene
from utils.cli import Parser
from utils.errors import UserError, run
from utils.files import expand, write_bytes, write_text
from utils.images import voc_colormap, write_png


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = Parser(
        prog="python -m dataloaders.shapes",
        description="Write scenes of the built-in data set as image and mask files in the layout of Pascal VOC. "
        "Three quarters of the N scenes are in the list train, the others in val; test has N/10 further scenes. The "
        'VOC loader reads them with "classes": "classes.txt".',
    )
    top.add_argument("--out", required=True, help="folder that VOCdevkit/VOC2012 and classes.txt are written to")
    top.add_argument("--n", type=int, required=True, help="number of scenes in train and val together (2 or more)")
    top.add_argument("--size", type=int, default=128, help="side of the scenes in pixels (default: 128)")
    top.add_argument("--seed", type=int, default=0, help="seed of the scenes (default: 0)")
    return top


def main() -> int:
    """Write the files."""
    args = parser().parse_args()
    for name, value, least in (("n", args.n, 2), ("size", args.size, scene.SMALLEST), ("seed", args.seed, 0)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    out = expand(args.out)
    counts = write_voc(out, args.n, args.size, args.seed)
    print(f"{out}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    print(
        f'load it with {{"type": "VOC", "args": {{"data_dir": "{out}", "split": "train", "classes": "classes.txt"}}}}'
    )
    return 0


def write_voc(out: Path, n: int, size: int = 128, seed: int = 0) -> dict[str, int]:
    """Write ``n`` scenes of train and val and some of test below ``out``; return how many each split has."""
    root = out / "VOCdevkit" / "VOC2012"
    val = max(1, n // 4)
    counts = {"train": n - val, "val": val, "test": max(1, n // 10)}
    # Class colors, and VOC's own for what is ignored.
    palette = (*scene.PALETTE, *voc_colormap(256)[len(scene.PALETTE) :])
    names: dict[str, list[str]] = {}
    for split, count in counts.items():
        names[split] = [f"{split}_{number:06d}" for number in range(count)]
        for number, name in enumerate(names[split]):
            image, label, _ = scene.numbered(seed, split, number, size, size)
            _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
            write_bytes(root / "JPEGImages" / f"{name}.jpg", data.tobytes())
            for folder in ("SegmentationClass", "SegmentationClassAug"):
                write_png(root / folder / f"{name}.png", label, palette)
    names["trainval"] = names["train"] + names["val"]
    for split, listed in names.items():
        lists = root / "ImageSets" / "Segmentation"
        write_text(lists / f"{split}.txt", "".join(f"{name}\n" for name in listed))
        rows = (f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in listed)
        write_text(lists / f"{split}_aug.txt", "".join(rows))
    write_text(out / "classes.txt", "".join(f"{name}\n" for name in scene.CLASS_NAMES))
    return {split: len(listed) for split, listed in names.items()}


if __name__ == "__main__":
    run(main)
