"""Stamps: each kind of output has one, other programs still read the file, and a changed file has none."""

from __future__ import annotations

import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from utils import stamps
from utils.errors import UserError
from utils.images.palette import write_mask
from utils.inference.outputs import overlay_video
from utils.predict.files import read_probs, write_probs

RUN = stamps.digest({"model": "a", "flip": True})
LABELS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def test_a_digest_identifies_the_settings() -> None:
    assert stamps.digest({"flip": True, "model": "a"}) == RUN
    assert stamps.digest({"flip": False, "model": "a"}) != RUN


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_mask(path, LABELS.astype(dtype), software=stamps.text(RUN))
    assert stamps.stamp_of(path) == RUN
    assert np.array_equal(np.asarray(Image.open(path)), LABELS)
    Image.open(path).save(path)
    assert stamps.stamp_of(path) is None
    with pytest.raises(UserError, match=r"1 file is in the way .*a\.png"):
        stamps.refuse_foreign([path, tmp_path / "missing.png"], tmp_path)


def test_jpeg(tmp_path: Path) -> None:
    path, image = tmp_path / "a.jpg", np.full((40, 50, 3), 90, np.uint8)
    path.write_bytes(stamps.jpeg(cv2.imencode(".jpg", image)[1].tobytes(), RUN))
    assert stamps.stamp_of(path) == RUN
    assert np.asarray(Image.open(path)).shape == cv2.imread(str(path)).shape == (40, 50, 3)


def test_npz(tmp_path: Path) -> None:
    path, probs = tmp_path / "a.npz", torch.rand(3, 40, 50)
    write_probs(path, probs, RUN)
    assert stamps.stamp_of(path) == RUN
    assert torch.equal(read_probs(path), probs)
    assert zipfile.ZipFile(path).testzip() is None


def test_mp4(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with overlay_video(path, 10, RUN) as append:
        for value in range(3):
            append(np.full((48, 64, 3), 80 * value, np.uint8))
    assert stamps.stamp_of(path) == RUN
    capture = cv2.VideoCapture(str(path))
    assert [capture.read()[0] for _ in range(4)] == [True, True, True, False]
