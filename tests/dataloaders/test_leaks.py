"""Images on both sides of a split, and arguments that belong to the other loader."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import dataloaders
from base.base_dataloader import BaseDataLoader
from dataloaders.check.leaks import in_same_order, shared
from tests.running import run_here
from utils.images import write_png


def write(root: Path, *names: str, seed: int | None = None) -> None:
    for name in names:
        rng = np.random.default_rng(zlib.crc32(name.encode()) if seed is None else seed)
        write_png(root / f"images/{name}.png", rng.integers(0, 256, (32, 32, 3), np.uint8))
        write_png(root / f"masks/{name}.png", rng.integers(0, 2, (32, 32), np.uint8))


def loader(root: Path, split: str = "train", kind: str = "Folder", **args: Any) -> BaseDataLoader:
    where = {"data_dir": str(root), "classes": ["a", "b"]} if kind == "Folder" else {}
    return dataloaders.build(kind, split=split, num_workers=0, batch_size=1, shuffle=split == "train", **where, **args)


def messages(train: BaseDataLoader, val: BaseDataLoader | None) -> str:
    assert val is not None
    return "\n".join(shared({"train": train, "val": val}))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path, *(f"im{i}" for i in range(12)))
    return tmp_path


def test_separate_splits_are_accepted(data: Path) -> None:
    options = {"val_fraction": 0.3}
    assert messages(loader(data, **options), loader(data, "val", **options)) == ""
    whole = loader(data, val_split=0.3)
    assert messages(whole, whole.get_val_loader()) == ""
    assert in_same_order(whole) == []


def test_the_same_files_on_both_sides(data: Path) -> None:
    assert "train and val have 12 images in common" in messages(loader(data), loader(data))
    other_seed = loader(data, "val", val_fraction=0.5, split_seed=1)
    assert "in common, such as" in messages(loader(data, val_fraction=0.5), other_seed)
    (data / "train.txt").write_text("\n".join(f"im{i}" for i in range(8)))
    (data / "val.txt").write_text("\n".join(f"im{i}" for i in range(7, 12)))
    lists = [loader(data, split, list_file="{split}.txt") for split in ("train", "val")]
    assert f"1 image in common, such as {data}/images/im7.png" in messages(*lists)


def test_links_and_copies_of_files(data: Path, tmp_path: Path) -> None:
    train, val = tmp_path / "one", tmp_path / "two"
    write(train, "a", "b", seed=1)
    write(train, "c")
    write(val, "d")
    for kind in ("images", "masks"):
        (val / kind / "x.png").symlink_to(train / kind / "c.png")
    assert "1 image in common" in messages(loader(train), loader(val))
    for kind in ("images", "masks"):
        (val / kind / "x.png").unlink()
        (val / kind / "other.png").write_bytes((train / kind / "c.png").read_bytes())
    found = messages(loader(train), loader(val))
    assert "files with equal content: 1 pair found" in found
    assert str(train / "images/c.png") in found
    assert str(val / "images/other.png") in found


def test_copies_within_what_val_split_divides(data: Path) -> None:
    write(data, *(f"copy_of_{i}" for i in range(12)), seed=3)
    whole = loader(data, val_split=0.5)
    assert "equal content" in messages(whole, whole.get_val_loader())


def test_augmented_copies_of_one_picture(tmp_path: Path) -> None:
    train, val = tmp_path / "train", tmp_path / "val"
    write(train, "street1_jpg.rf.0123456789abcdef0123456789abcdef", "street2_hflip")
    write(val, "street1_jpg.rf.ffffffffabcdef0123456789abcdef01")
    assert "share groups (by their names, augmented copies" in messages(loader(train), loader(val))
    write(val, "p7_slice2")
    write(train, "p7_slice1")
    found = messages(loader(train, group_by="^[a-z0-9]+"), loader(val))
    assert "share groups (group_by '^[a-z0-9]+')" in found


def test_frames_of_one_video_on_both_sides(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 256, (8, 40, 3), np.uint8), (200, 32), interpolation=cv2.INTER_CUBIC)
    for i in range(40):
        write(tmp_path, f"f{i}")
        write_png(tmp_path / f"images/f{i}.png", np.ascontiguousarray(scene[:, 3 * i : 3 * i + 32]))
    options: dict[str, Any] = {"val_fraction": 0.25}
    said = messages(loader(tmp_path, **options), loader(tmp_path, "val", **options))
    assert "train and val: images with consecutive names look alike" in said
    assert "Keep them together with `group_by`" in said
    whole = loader(tmp_path, val_split=0.25)
    assert "look alike" in messages(whole, whole.get_val_loader())
    grouped = options | {"group_by": r"^(.*?)\d?$"}
    assert messages(loader(tmp_path, **grouped), loader(tmp_path, "val", **grouped)) == ""
    # The end of the video is for validation, so only one pair of neighbors is divided.
    for split, part in (("train", range(30)), ("val", range(30, 40))):
        (tmp_path / f"{split}.txt").write_text("\n".join(f"f{i}" for i in part))
    assert messages(*(loader(tmp_path, split, list_file="{split}.txt") for split in ("train", "val"))) == ""


def test_generated_data() -> None:
    options = {"length": 4, "size": 32}
    train = loader(Path(), kind="Shapes", **options)
    assert messages(train, loader(Path(), "val", "Shapes", **options)) == ""
    assert "4 images in common" in messages(train, loader(Path(), "train", "Shapes", **options))
    assert messages(train, loader(Path(), "train", "Shapes", scene_seed=1, **options)) == ""


def test_train_py_says_so_before_it_starts(root: Path, data: Path, tmp_path: Path, capsys) -> None:
    args = {"data_dir": str(data), "classes": ["a", "b"], "batch_size": 4, "num_workers": 0}
    config = {
        "name": "x",
        "arch": {"type": "UNet", "args": {"width": 4}},
        "train_loader": {"type": "Folder", "args": args},
        "val_loader": {"type": "Folder", "args": args},
        "trainer": {"epochs": 1, "save_dir": str(tmp_path / "saved"), "limit_batches": 1, "tensorboard": False},
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert run_here(["train.py", "-c", str(tmp_path / "c.json"), "-d", "cpu"], root) == 0
    said = capsys.readouterr().err
    assert "warning: train and val have 12 images in common" in said
    assert 'warning: train_loader: every epoch shows the images in the same order; set "shuffle": true' in said
