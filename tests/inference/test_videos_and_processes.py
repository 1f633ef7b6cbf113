"""inference.py on videos and cameras, and in several processes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import inference
from tests.inference.running import Script, files, write
from tests.small_checkpoint import photo
from utils.inference import outputs, pipeline, sources
from utils.predictor import Predictor


def write_video(path: str, frames: int = 5) -> None:
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    if not writer.isOpened():
        pytest.skip("this build of OpenCV writes no video")
    for seed in range(frames):
        writer.write(photo(48, 64, seed=seed))
    writer.release()


def test_a_video_becomes_masks_and_an_overlay_video(script: Script, model: Path) -> None:
    write_video("clip.avi")
    code, out, err = script("-i", "clip.avi", "--overlay", "-p", "max")
    assert code == 0, err
    assert files("masks") == [*(f"clip/frame_{i:06d}.png" for i in range(5)), "clip_overlay.mp4"]
    frame = next(iter(cv2_frames("clip.avi")))
    expected = Predictor(model, mode="single", predict="max")(frame[:, :, ::-1].copy())
    np.testing.assert_array_equal(np.asarray(Image.open("masks/clip/frame_000000.png")), expected.labels)
    shown = list(cv2_frames("masks/clip_overlay.mp4"))
    assert len(shown) == 5
    assert shown[0].shape == (48, 64, 3)


def cv2_frames(path: str) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(path), []
    while True:
        ok, frame = capture.read()
        if not ok:
            return frames
        frames.append(frame)


def test_a_video_that_breaks_off_fails(script: Script) -> None:
    write_video("clip.avi", 20)
    whole = Path("clip.avi").read_bytes()
    Path("clip.avi").write_bytes(whole[: len(whole) // 2])
    frames = len(cv2_frames("clip.avi"))
    assert 0 < frames < 20
    code, out, err = script("-i", "clip.avi", "--overlay", "-p", "max")
    assert code == 2
    assert f"clip.avi: ends at frame {frames} of 20" in out
    assert len(files("masks")) == frames + 1
    assert script("-i", "clip.avi", "--limit", "2", "-p", "max")[0] == 0


def test_frames_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video("clip.avi")
    parts = [[item.name for item in sources.Video("clip.avi", (rank, 2))] for rank in range(2)]
    assert parts[0] == [f"clip/frame_{i:06d}" for i in (0, 2, 4)]
    assert parts[1] == [f"clip/frame_{i:06d}" for i in (1, 3)]


def test_a_camera_is_asked_for_frames(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Camera:
        def __init__(self, number: int) -> None:
            assert number == 3

        isOpened = grab = lambda self: True  # noqa: N815 - OpenCV's names

        def get(self, _: int) -> float:
            return 0.0

        def retrieve(self) -> tuple[bool, np.ndarray]:
            return True, photo(24, 32)

        def release(self) -> None:
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    code, _, err = script("-i", "camera:3", "--limit", "4", "-p", "max")
    assert code == 0, err
    assert files("masks") == [f"camera3/frame_{i:06d}.png" for i in range(4)]


def test_several_processes_share_a_folder(model: Path, tmp_path: Path) -> None:
    """Processes as torchrun starts them: each takes every n-th file, with one summary and one table for all."""
    for seed in range(5):
        write(tmp_path / f"photos/{seed}.png", photo(30, 30, seed=seed))
    Path(tmp_path / "photos/bad.png").touch()
    root = Path(inference.__file__).parent
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(root / "inference.py"), "-m", str(model), "-i", "photos", "-o", "masks", "-mo", "single", "-d", "cpu"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0  # one file failed
    assert done.stdout.count("segmented 5 images") == 1, done.stdout + done.stderr
    assert done.stdout.count("1 failed") == 1
    assert files(tmp_path / "masks") == [*(f"{i}.png" for i in range(5)), "expected_dice.csv"]
    with (tmp_path / "masks/expected_dice.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 6


def test_reading_ahead_is_bounded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as many images are in memory as the bound allows, but at least one."""
    live, most = [0], [0]

    def item(index: int, pixels: int) -> sources.Item:
        class Counted(sources.Item):
            def pixels(self) -> int:
                return pixels

        return Counted(source=f"{index}", name=f"{index}", image=photo(30, 30, seed=index))

    def counting(image: np.ndarray) -> object:
        live[0] += 1
        most[0] = max(most[0], live[0])
        return read(image)

    def finished(item: sources.Item, problem: str | None) -> None:
        assert problem is None
        live[0] -= 1

    predictor = Predictor(model, mode="single", predict="max", keep_masks=False)
    read = predictor.read
    monkeypatch.setattr(predictor, "read", counting)
    wanted = outputs.Outputs(tmp_path / "masks", predictor.facts, outputs.Decoding("max"))
    for pixels, bound in ((pipeline.PIXELS_IN_FLIGHT, 1), (pipeline.PIXELS_IN_FLIGHT // 2, 2)):
        most[0] = 0
        report = pipeline.Pipeline(predictor, wanted, finished).run(item(i, pixels) for i in range(6))
        assert report.done == 6
        assert most[0] <= bound
