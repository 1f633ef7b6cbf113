"""Pascal VOC on its real layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dataloaders
from utils.errors import UserError
from utils.images import voc_colormap, write_png

VOC = dataloaders.LOADERS["VOC"]


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """A small tree: 3 train images, 2 val, 1 test without label; the augmented lists have two columns."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    rng = np.random.default_rng(0)
    names = [f"2007_00000{i}" for i in range(6)]
    for i, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        if i < 5:
            label = np.full((20, 30), i + 1, np.uint8)
            label[0] = 255
            write_png(root / "SegmentationClass" / f"{name}.png", label, voc_colormap(256))
            write_png(root / "SegmentationClassAug" / f"{name}.png", label + (label < 255) * np.uint8(10))
    (lists / "train.txt").write_text("\n".join(names[:3]) + "\n")
    (lists / "val.txt").write_text("\n".join(names[3:5]) + "\n\n")
    (lists / "trainval.txt").write_text("\n".join(names[:5]) + "\n")
    (lists / "test.txt").write_text(names[5] + "\n")
    rows = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in names[:5]]
    (lists / "train_aug.txt").write_text("\n".join(rows[:3]))
    (lists / "val_aug.txt").write_text("\n".join(rows[3:]))
    (lists / "trainval_aug.txt").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.parametrize(("split", "count"), [("train", 3), ("val", 2), ("trainval", 5), ("test", 1)])
def test_splits(devkit: Path, split: str, count: int) -> None:
    data = VOC(str(devkit), split)
    assert len(data) == count
    assert data[0].image.shape == (3, 20, 30)


def test_labels_are_palette_indices(devkit: Path) -> None:
    for index, sample in enumerate(VOC(str(devkit), "trainval")):
        assert sample.name == f"2007_00000{index}"
        assert (sample.label[0] == 255).all()
        assert (sample.label[1:] == index + 1).all()


def test_augmented_lists_use_their_own_labels(devkit: Path) -> None:
    assert [len(VOC(str(devkit), f"{s}_aug")) for s in ("train", "val", "trainval")] == [3, 2, 5]
    sample = VOC(str(devkit), "val_aug")[0]
    assert sample.name == "2007_000003"
    assert (sample.label[1:] == 14).all()


def test_unlabeled_test_images_are_ignored(devkit: Path) -> None:
    assert (VOC(str(devkit), "test")[0].label == 255).all()


@pytest.mark.parametrize("inner", ["VOCdevkit", "VOCdevkit/VOC2012"])
def test_data_dir_may_be_an_inner_folder(devkit: Path, inner: str) -> None:
    assert len(VOC(str(devkit / inner), "train")) == 3


def test_facts() -> None:
    assert VOC.num_classes == 21
    assert len(VOC.class_names) == len(VOC.palette) == 21
    assert VOC.class_names[15] == "person"
    assert VOC.palette[15] == (192, 128, 128)


def test_missing_list_and_wrong_folder(devkit: Path) -> None:
    (devkit / "VOCdevkit/VOC2012/ImageSets/Segmentation/val_aug.txt").unlink()
    with pytest.raises(UserError, match=r"no list .*val_aug\.txt"):
        VOC(str(devkit), "val_aug")
    with pytest.raises(UserError, match="contains no folder ImageSets"):
        VOC(str(devkit / "VOCdevkit/VOC2012/JPEGImages"), "train")


def test_missing_image_is_named(devkit: Path) -> None:
    (devkit / "VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg").unlink()
    with pytest.raises(UserError, match=r"no file .*2007_000001\.jpg"):
        VOC(str(devkit), "train")


def test_odd_list_lines_are_refused(devkit: Path) -> None:
    (devkit / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text("a b c\n")
    with pytest.raises(UserError, match="3 columns"):
        VOC(str(devkit), "train")


@pytest.mark.parametrize("suffix", ["", "_aug"])
def test_real_photographs(shared_dir: Path, suffix: str) -> None:
    camvid = shared_dir / "data" / "camvid"
    data = VOC(str(camvid), f"val{suffix}", classes="classes.txt")
    assert len(data) == 101
    assert data.class_names[3] == "Road"
    counts = data.class_pixel_counts()
    pixels = 101 * 480 * 360
    # Shares and occurrences are those in the description of the folder.
    assert counts[:, 3].sum() / pixels == pytest.approx(0.2895, abs=1e-4)
    assert counts[:, 10].sum() / pixels == pytest.approx(0.0222, abs=1e-4)
    assert 1 - counts.sum() / pixels == pytest.approx(0.0170, abs=1e-4)
    assert ((counts > 0).sum(0) == 101).all()
    assert data[0].image.shape == (3, 360, 480)


def test_too_few_classes_are_found_at_start(shared_dir: Path) -> None:
    with pytest.raises(UserError, match=r"\.png contains label values that are not a class: 10 .*`classes`"):
        VOC(str(shared_dir / "data" / "camvid"), "val", classes=10)
