"""inference.py with damaged images, a full disk and unreadable folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from tests.inference.running import Script, errors_of, files, write
from tests.small_checkpoint import photo
from utils.inference import outputs
from utils.predictor import Predictor


def test_ten_bad_files_among_good_ones(script: Script, tmp_path: Path) -> None:
    """Each unusable file gives one clear line; the others are segmented; the exit code is 2."""
    good = photo(40, 50)
    write("photos/good.jpg", good)
    Path("photos/zero.png").touch()
    whole = write("whole.jpg", good).read_bytes()
    Path("photos/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    Path("photos/truncated.png").write_bytes(write("whole.png", good).read_bytes()[:300])
    Path("photos/text.jpg").write_text("no image at all")
    Path("photos/wrong_extension.png").write_bytes(whole)  # a JPEG, by its content
    write("photos/one_pixel.png", photo(1, 1))
    write("photos/panorama.jpg", photo(20, 3000))
    Image.fromarray(photo(40, 50, 1)[:, :, 0].astype(np.uint16) * 257).save("photos/sixteen.png")
    clear = Image.fromarray(good).quantize(8)
    clear.info["transparency"] = 3
    clear.save("photos/clear_palette.png", transparency=3)
    frames = [Image.fromarray(photo(40, 50, seed=s)) for s in range(3)]
    frames[0].save("photos/moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(good).convert("CMYK").save("photos/cmyk.jpg")
    Image.fromarray(good).convert("RGBA").save("photos/rgba.png")
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    Image.fromarray(good).save("photos/upright.jpg", exif=exif)
    Path("photos/folder.jpg").mkdir()
    os.symlink("nowhere.png", "photos/dangling.png")
    os.symlink("circle.png", "photos/circle.png")
    np.save("photos/channels.npy", np.zeros((5, 5, 7), np.uint8))
    code, out, err = script("-p", "max")
    assert code == 2
    bad = ["channels.npy", "circle.png", "dangling.png", "text.jpg", "truncated.jpg", "truncated.png", "zero.png"]
    lines = errors_of(err)
    assert len(lines) == len(bad), lines
    for name in bad:
        assert sum(name in line for line in lines) == 1, (name, lines)
        assert name in out
    assert "7 failed" in out
    masks = {Path(name).stem: Image.open(f"masks/{name}").size for name in files("masks")}
    assert masks == {
        "good": (50, 40), "wrong_extension": (50, 40), "one_pixel": (1, 1), "panorama": (3000, 20),
        "sixteen": (50, 40), "clear_palette": (50, 40), "moving": (50, 40), "cmyk": (50, 40), "rgba": (50, 40),
        "upright": (40, 50),
    }  # fmt: skip


def test_a_full_disk_fails_images_one_by_one(model: Path, tmp_path: Path) -> None:
    """In a process of its own, the kernel refuses to write more than a few bytes, so each write really fails."""
    write(tmp_path / "photos/small.png", photo(8, 8))
    write(tmp_path / "photos/a.png", np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8))
    command = (
        "import resource, signal, sys, torch; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "torch.optim.SGD([torch.zeros(1)], lr=1.0);"  # torch 2.6 writes a file here
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500));"
        f"sys.argv = ['inference.py', '-m', {str(model)!r}, '-i', 'photos', '-o', 'masks', '-mo', 'single'];"
        "import inference; from utils.errors import run; run(inference.main)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(inference.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    lines = errors_of(done.stderr)
    assert len(lines) == 1, done.stderr
    assert "photos/a.png" in lines[0]
    assert "could not be written" in lines[0]
    assert "Traceback" not in done.stderr
    assert files(tmp_path / "masks") == ["expected_dice.csv", "small.png"]


def test_outputs_of_a_failed_image_do_not_stay(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    write("photos/a.png", photo(40, 50))
    write("photos/b.png", photo(40, 50, seed=1))
    write_mask = outputs.write_mask

    def full(path: Path, *arguments: object) -> None:
        if path.stem == "a":
            raise OSError(28, "No space left on device")
        write_mask(path, *arguments)

    monkeypatch.setattr(outputs, "write_mask", full)
    code, out, err = script("--overlay", "--json", "--probs")
    assert code == 2
    assert errors_of(err) == ["error: photos/a.png: its outputs could not be written: the disk is full"]
    assert files("masks") == ["b.json", "b.npz", "b.png", "b_overlay.jpg", "expected_dice.csv", "probs.json"]
    assert script("--probs", "png", "-o", "other")[0] == 2
    assert sorted(p.name for p in Path("other").iterdir()) == ["b.png", "b_probs", "expected_dice.csv"]


def test_an_unreadable_folder_is_reported(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    write("photos/a.png", photo(20, 20))
    write("photos/locked/b.png", photo(20, 20))
    scandir = os.scandir

    def refusing(path: str | Path) -> object:  # chmod would not stop root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    code, out, err = script("-p", "max")
    assert code == 2
    assert errors_of(err) == ["error: photos/locked: the folder cannot be read: Permission denied"]
    assert files("masks") == ["a.png"]


def test_one_bad_image_of_a_batch_fails_alone(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        write(f"photos/{seed}.png", photo(40, 50, seed=seed))
    marked = photo(40, 50, seed=1)
    segment = Predictor.segment

    def fussy(self: Predictor, images: list) -> list:
        if any(np.array_equal(pixels.image, marked) for pixels in images):
            raise MemoryError
        return segment(self, images)

    monkeypatch.setattr(Predictor, "segment", fussy)
    code, out, err = script("-p", "max")
    assert code == 2
    assert len(errors_of(err)) == 1
    assert "photos/1.png: out of memory; try --mode sliding" in err
    assert files("masks") == ["0.png", "2.png"]
