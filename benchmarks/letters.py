"""Write *Letters*, a many-class data set for ``docs/results.md``: 62 letters and digits on noisy scenes.

    python -m benchmarks.letters FOLDER

Each scene shows 3 to 9 characters in OpenCV's stroke fonts, at random sizes, angles, colors and contrasts, some on top
of others. The class of a pixel is the character whose stroke it belongs to. Most classes are missing from most scenes,
rare characters from nearly all of them, and some characters look like others (O and 0, s and S). The scenes only depend
on the seed; the layout is that of the ``Folder`` loader with sub-folders for the splits.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
LENGTHS = {"train": 1200, "val": 200, "test": 300}
SIZE = 128
FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
)

Image = NDArray[np.uint8]


def scene(rng: np.random.Generator) -> tuple[Image, Image]:
    """Return an image uint8 ``(SIZE, SIZE, 3)`` and its labels uint8 ``(SIZE, SIZE)``: 0, or 1 + the character."""
    coarse = rng.uniform(40, 215, (4, 4, 3)).astype(np.float32)
    image = np.asarray(cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC), np.float32)
    label = np.zeros((SIZE, SIZE), np.uint8)
    # The characters occur about as often as words do: the n-th in proportion to 1 / (n + 10).
    chances = 1 / (np.random.default_rng(0).permutation(len(CHARACTERS)) + 10)
    for index in rng.choice(len(CHARACTERS), rng.integers(3, 10), p=chances / chances.sum()):
        stroke = _stroke(CHARACTERS[index], rng)
        color = image[stroke > 0].mean(0) + rng.choice([-1, 1]) * rng.uniform(15, 90) + rng.normal(0, 15, 3)
        color = np.asarray(color, np.float32)
        alpha = cv2.GaussianBlur(stroke, (0, 0), rng.uniform(0.4, 1.2))[..., None].astype(np.float32) / 255
        image = image * (1 - alpha) + alpha * color
        label[stroke > 127] = 1 + index
    image += rng.normal(0, rng.uniform(4, 20), image.shape).astype(np.float32)
    return image.clip(0, 255).astype(np.uint8), label


def _stroke(character: str, rng: np.random.Generator) -> Image:
    """Return a character somewhere in the scene, uint8 ``(SIZE, SIZE)``."""
    scale, thickness = float(rng.uniform(0.9, 2.2)), int(rng.integers(3, 7))
    font = int(rng.choice(FONTS))
    (width, height), _ = cv2.getTextSize(character, font, scale, thickness)
    drawn = np.zeros((SIZE, SIZE), np.uint8)
    corner = ((SIZE - width) // 2, (SIZE + height) // 2)
    cv2.putText(drawn, character, corner, font, scale, 255, thickness, cv2.LINE_AA)
    turn = cv2.getRotationMatrix2D((SIZE / 2, SIZE / 2), float(rng.uniform(-20, 20)), 1.0)
    shift = np.zeros((2, 3))
    shift[:, 2] = rng.uniform(-SIZE / 2 + 16, SIZE / 2 - 16, 2)
    return np.asarray(cv2.warpAffine(drawn, turn + shift, (SIZE, SIZE)), np.uint8)


def write(folder: Path) -> None:
    """Write all scenes; files that exist are kept."""
    for number, (split, length) in enumerate(LENGTHS.items()):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(length):
            name = f"{split}/{i:04d}.png"
            if not (folder / "masks" / name).exists():
                image, label = scene(np.random.default_rng([number, i]))
                cv2.imwrite(str(folder / "images" / name), image)
                cv2.imwrite(str(folder / "masks" / name), label)


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.letters", description="Write the data set Letters.")
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
