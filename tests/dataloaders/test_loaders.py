"""Each public data set in its directory layout: files are found and paired, labels translated, facts complete."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataloaders
from base.base_dataset import BaseDataSet
from dataloaders import LOADERS
from dataloaders.labels import labels
from utils.errors import UserError

SIZE = (6, 8)  # height, width


def put(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))
    return path


def image(path: Path, level: int = 128) -> Path:
    return put(path, np.full((*SIZE, 3), level, np.uint8))


def mask(path: Path, *values: int) -> Path:
    """Write a label map with the given values one after another; the last one fills the rest."""
    flat = np.full(SIZE[0] * SIZE[1], values[-1], np.uint8)
    flat[: len(values)] = values
    return put(path, flat.reshape(SIZE))


def label(dataset: BaseDataSet, index: int = 0) -> np.ndarray:
    return dataset[index].label.numpy()


def names(dataset: BaseDataSet) -> list[str]:
    return [entry.name for entry in dataset.entries]


# ---- facts of all


@pytest.mark.parametrize("name", list(LOADERS))
def test_facts_are_complete_and_plain(name: str) -> None:
    cls = LOADERS[name]
    if name == "Folder":
        assert cls.class_names == (), "the user names the classes"
        return
    assert cls.num_classes == len(cls.class_names) == len(cls.palette) >= 2
    assert len(set(cls.class_names)) == cls.num_classes
    assert all(len(c) == 3 and all(0 <= v <= 255 for v in c) for c in cls.palette)
    assert len(cls.mean) == len(cls.std) == 3
    assert all(0 < v < 1 for v in (*cls.mean, *cls.std))
    assert cls.ignore_index == 255


@pytest.mark.parametrize(
    ("file", "count", "some"),
    [
        ("voc", 21, {0: "background", 15: "person", 20: "tvmonitor"}),
        ("cityscapes", 19, {0: "road", 11: "person", 18: "bicycle"}),
        ("ade20k", 150, {0: "wall", 12: "person", 149: "flag"}),
        ("coco_stuff", 182, {0: "person", 90: "hair brush", 91: "banner", 181: "wood"}),
        ("kvasir", 2, {1: "polyp"}),
        ("deepscene", 6, {0: "void", 3: "vegetation", 5: "obstacle"}),
        ("camvid", 11, {0: "Sky", 10: "Bicyclist"}),
    ],
)
def test_label_files(file: str, count: int, some: dict[int, str]) -> None:
    names, palette = labels(file)
    assert len(names) == len(palette) == count
    assert {i: names[i] for i in some} == some
    # In ADE20K's published colors, road and skyscraper have the same gray.
    assert len(set(palette)) >= count - (file == "ade20k")


def test_published_means_and_deviations() -> None:
    assert LOADERS["CityScapes"].mean == (0.28689529, 0.32513294, 0.28389176)
    assert LOADERS["KvasirSEG"].std == LOADERS["ADE20K"].std == (0.22861765, 0.22948039, 0.24054667)
    assert LOADERS["COCO"].mean == (0.43931922, 0.41310471, 0.37480941)


@pytest.mark.parametrize("name", ["CityScapes", "ADE20K", "COCO", "KvasirSEG", "DeepScene", "Folder"])
def test_wrong_folders_show_the_expected_tree(name: str, tmp_path: Path) -> None:
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "else.txt").touch()
    args = {"classes": ["a", "b"]} if name == "Folder" else {}
    split = {"ADE20K": "training", "COCO": "train2017"}.get(name, "train")
    with pytest.raises(UserError) as error:
        dataloaders.build(name, data_dir=str(tmp_path), split=split, **args)
    message = str(error.value)
    assert "expected:" in message
    assert "data_dir/" in message
    assert "else.txt" in message, "what is there is shown beside it"


# ---- Cityscapes


def cityscapes(root: Path, images: str, masks: str, kind: str, split: str = "train") -> None:
    for city, number in (("ulm", 1), ("aachen", 2)):
        stem = f"{city}_00000{number}_000019"
        image(root / images / split / city / f"{stem}_leftImg8bit.png", 40 * number)
        mask(root / masks / split / city / f"{stem}_{kind}_labelIds.png", *range(34))
        for other in ("color", "instanceIds"):
            mask(root / masks / split / city / f"{stem}_{kind}_{other}.png", 0)


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("leftImg8bit", "gtFine"),
        ("leftImg8bit_trainvaltest/leftImg8bit", "gtFine_trainvaltest/gtFine"),
        ("leftImg8bit_trainvaltest/leftImg8bit", "gtFine"),
    ],
    ids=["bare", "zip-named", "mixed"],
)
def test_cityscapes_fine(tmp_path: Path, images: str, masks: str) -> None:
    cityscapes(tmp_path, images, masks, "gtFine")
    dataset = dataloaders.build("CityScapes", data_dir=str(tmp_path), split="train").dataset
    assert names(dataset) == ["aachen_000002_000019", "ulm_000001_000019"], "sorted by city"
    assert dataset[0].image.float().mean() == 80, "each image with its own label"
    # The publisher's table: trainId of labelId 0..33.
    expected = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    expected += [255, 255, 16, 17, 18]
    assert label(dataset).flatten()[:34].tolist() == expected
    assert dataset[0].label.dtype == torch.uint8


def test_cityscapes_coarse(tmp_path: Path) -> None:
    cityscapes(tmp_path, "leftImg8bit_trainextra/leftImg8bit", "gtCoarse/gtCoarse", "gtCoarse", "train_extra")
    cityscapes(tmp_path, "leftImg8bit_trainvaltest/leftImg8bit", "gtCoarse/gtCoarse", "gtCoarse", "val")
    for split in ("train_extra", "val"):
        loader = dataloaders.build("CityScapes", data_dir=str(tmp_path), split=split, mode="coarse")
        assert len(loader.dataset) == 2
    with pytest.raises(UserError, match="no fine annotations"):
        dataloaders.build("CityScapes", data_dir=str(tmp_path), split="train_extra")
    with pytest.raises(ValueError, match="mode"):
        dataloaders.build("CityScapes", data_dir=str(tmp_path), split="val", mode="rough")


def test_unknown_label_ids_are_refused(tmp_path: Path) -> None:
    cityscapes(tmp_path, "leftImg8bit", "gtFine", "gtFine")
    mask(tmp_path / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png", 7, 40)
    with pytest.raises(UserError, match=r"ulm_000001_000019_gtFine_labelIds.png .*: 40"):
        dataloaders.build("CityScapes", data_dir=str(tmp_path), split="train")


def test_files_without_partner_are_left_out_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cityscapes(tmp_path, "leftImg8bit", "gtFine", "gtFine")
    lonely = image(tmp_path / "leftImg8bit/train/ulm/ulm_000009_000019_leftImg8bit.png")
    with caplog.at_level(logging.WARNING):
        dataset = dataloaders.build("CityScapes", data_dir=str(tmp_path), split="train").dataset
    assert len(dataset) == 2
    assert dataset.alone == [lonely]
    assert "1 image has no mask and is skipped" in caplog.text
    assert lonely.name in caplog.text


# ---- ADE20K


@pytest.mark.parametrize("inner", ["", "ADEChallengeData2016"])
@pytest.mark.parametrize("split", ["training", "train"])
def test_ade20k(tmp_path: Path, inner: str, split: str) -> None:
    root = tmp_path / inner
    image(root / "images/training/ADE_train_00000001.jpg")
    mask(root / "annotations/training/ADE_train_00000001.png", 0, 1, 2, 150)
    dataset = dataloaders.build("ADE20K", data_dir=str(tmp_path), split=split).dataset
    assert label(dataset).flatten()[:4].tolist() == [255, 0, 1, 149]
    assert dataset[0].name == "ADE_train_00000001"


def test_ade20k_with_the_published_ignore_index(tmp_path: Path) -> None:
    """Published configs say ``ignore_index: -1``."""
    image(tmp_path / "images/validation/ADE_val_1.jpg")
    mask(tmp_path / "annotations/validation/ADE_val_1.png", 0, 150)
    dataset = dataloaders.build("ADE20K", data_dir=str(tmp_path), split="validation", ignore_index=-1).dataset
    assert label(dataset).flatten()[:2].tolist() == [-1, 149]
    mask(tmp_path / "annotations/validation/ADE_val_1.png", 151)
    with pytest.raises(UserError, match="151"):
        dataloaders.build("ADE20K", data_dir=str(tmp_path), split="validation")


def test_ade20k_testing_has_images_only(tmp_path: Path) -> None:
    image(tmp_path / "images/testing/ADE_test_1.jpg")
    dataset = dataloaders.build("ADE20K", data_dir=str(tmp_path), split="testing").dataset
    assert set(label(dataset).flat) == {255}


# ---- COCO-Stuff


def coco_10k(root: Path, values: list[int]) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    for i in (3, 1, 2):
        image(root / f"images/COCO_train2014_{i}.jpg", 50 * i)
        matrix = np.zeros(SIZE, np.uint8)
        matrix.flat[: len(values)] = values
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        scipy_io.savemat(root / f"annotations/COCO_train2014_{i}.mat", {"S": matrix, "names": ["x"]})
    (root / "imageLists").mkdir()
    (root / "imageLists/train.txt").write_text("COCO_train2014_3\nCOCO_train2014_1\n")
    (root / "imageLists/test.txt").write_text("COCO_train2014_2\n")


def test_coco_10k(tmp_path: Path) -> None:
    coco_10k(tmp_path, [0, 1, 13, 92, 182])
    build = dataloaders.build("COCO", data_dir=str(tmp_path), split="train", partition="CocoStuff10k").dataset
    assert names(build) == ["COCO_train2014_3", "COCO_train2014_1"], "the list's order"
    assert label(build).flatten()[:5].tolist() == [255, 0, 12, 91, 181]
    assert build.num_classes == 182
    with pytest.raises(ValueError, match="split must be one of train, test, all"):
        dataloaders.build("COCO", data_dir=str(tmp_path), split="train2017", partition="CocoStuff10k")


def test_coco_10k_without_scipy_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco_10k(tmp_path, [0, 1])
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install scipy"):
        dataloaders.build("COCO", data_dir=str(tmp_path), split="train", partition="CocoStuff10k")


def test_coco_10k_broken_mat(tmp_path: Path) -> None:
    coco_10k(tmp_path, [0, 1])
    broken = tmp_path / "annotations/COCO_train2014_3.mat"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=r"COCO_train2014_3.mat: cannot be read"):
        dataloaders.build("COCO", data_dir=str(tmp_path), split="train", partition="CocoStuff10k")


@pytest.mark.parametrize("split", ["val2017", "val"])
def test_coco_164k(tmp_path: Path, split: str) -> None:
    image(tmp_path / "images/val2017/000000000139.jpg")
    mask(tmp_path / "annotations/val2017/000000000139.png", 0, 12, 91, 181, 255)
    dataset = dataloaders.build("COCO", data_dir=str(tmp_path), split=split).dataset
    assert label(dataset).flatten()[:5].tolist() == [0, 12, 91, 181, 255]


def test_coco_compact_numbers_the_171_classes_that_occur(tmp_path: Path) -> None:
    image(tmp_path / "images/val2017/1.jpg")
    # person; stop sign after the skipped street sign; banner after all skipped things; wood; a skipped one.
    mask(tmp_path / "annotations/val2017/1.png", 0, 12, 91, 181, 11)
    dataset = dataloaders.build("COCO", data_dir=str(tmp_path), split="val2017", compact=True).dataset
    assert dataset.num_classes == len(dataset.class_names) == len(dataset.palette) == 171
    found = label(dataset).flatten()[:5].tolist()
    assert found == [0, 11, 80, 170, 255]
    assert [dataset.class_names[i] for i in found[:4]] == ["person", "stop sign", "banner", "wood"]
    assert dataset.palette[80] == labels("coco_stuff")[1][91]


# ---- Kvasir-SEG


def gray_jpeg(path: Path) -> Path:
    """Write a three-channel JPEG mask with levels around 0, 127 and 255."""
    levels = np.repeat(np.array([0, 3, 120, 135, 250, 255], np.uint8)[:, None], 48, 1).repeat(8, 0)
    return put(path, np.repeat(levels[:, :, None], 3, 2))


def kvasir(root: Path, count: int = 25) -> None:
    for i in range(count):
        put(root / f"images/c{i:02d}.jpg", np.full((48, 48, 3), i, np.uint8))
        gray_jpeg(root / f"masks/c{i:02d}.jpg")


def test_kvasir_masks_are_thresholded_never_dithered(tmp_path: Path) -> None:
    kvasir(tmp_path)
    dataset = dataloaders.build("KvasirSEG", data_dir=str(tmp_path), split="train").dataset
    expected = np.repeat([0, 0, 0, 1, 1, 1], 8)[:, None].repeat(48, 1)
    assert np.array_equal(label(dataset), expected)
    assert dataset.class_names == ("background", "polyp")


def test_kvasir_split_is_disjoint_complete_and_the_same_everywhere(tmp_path: Path) -> None:
    kvasir(tmp_path)
    train, val, everything = (
        names(dataloaders.build("KvasirSEG", data_dir=str(tmp_path), split=split).dataset)
        for split in ("train", "val", "all")
    )
    assert sorted(train + val) == everything
    assert val == ["c16", "c18", "c19"], "0.12 of 25; fixed for ever"
    assert train == sorted(train)


def test_kvasir_split_beforehand_can_be_joined(tmp_path: Path) -> None:
    for part, name in (("train", "a"), ("train", "c"), ("val", "b")):
        put(tmp_path / f"images_split/{part}/jpg_images/{name}.jpg", np.zeros((48, 48, 3), np.uint8))
        gray_jpeg(tmp_path / f"masks_split/{part}/jpg_masks/{name}.jpg")
    for split, expected in (("train", ["a", "c"]), ("val", ["b"]), ("all", ["a", "c", "b"])):
        assert names(dataloaders.build("KvasirSEG", data_dir=str(tmp_path), split=split).dataset) == expected


def test_kvasir_published_lists_are_used_where_they_are(tmp_path: Path) -> None:
    kvasir(tmp_path, 4)
    (tmp_path / "val.txt").write_text("c01\nc03\n")
    (tmp_path / "train.txt").write_text("c00\nc02\n")
    assert names(dataloaders.build("KvasirSEG", data_dir=str(tmp_path), split="val").dataset) == ["c01", "c03"]
    (tmp_path / "val.txt").write_text("c01.jpg\nc03.jpg\n")
    assert names(dataloaders.build("KvasirSEG", data_dir=str(tmp_path), split="val").dataset) == ["c01", "c03"]
    (tmp_path / "train.txt").unlink()
    with pytest.raises(
        UserError, match=r"there is no file .*train\.txt"
    ):  # the other split would overlap with the list
        dataloaders.build("KvasirSEG", data_dir=str(tmp_path), split="train")
    (tmp_path / "val.txt").write_text("c01\nc07\n")
    with pytest.raises(UserError, match=r"val\.txt: 'c07' has no image with a mask"):
        dataloaders.build("KvasirSEG", data_dir=str(tmp_path), split="val")


def test_kvasir_with_one_class_is_binary(tmp_path: Path) -> None:
    kvasir(tmp_path, 4)
    dataset = dataloaders.build("kvasirSEG", data_dir=str(tmp_path), split="all", classes=["polyp"]).dataset
    assert dataset.num_classes == 1
    assert set(label(dataset).flat) == {0, 1}


def test_kvasir_split_beforehand(shared_dir: Path) -> None:
    """DRIVE's vessels in this layout: the shares of both classes are those of its README."""
    folder = str(shared_dir / "data" / "medical")
    for split, count, share in (("train", 20, 0.0863), ("val", 12, 0.0909)):
        loader = dataloaders.build(
            "kvasirSEG", data_dir=folder, split=split, classes=["background", "vessel"], num_workers=0
        )
        assert len(loader.dataset) == count
        counts = loader.dataset.class_pixel_counts().sum(0)
        assert counts[1] / counts.sum() == pytest.approx(share, abs=5e-5)
        assert tuple(loader.dataset[0].image.shape) == (3, 584, 565)


# ---- DeepScene

COLORS = {0: (255, 255, 255), 1: (170, 170, 170), 2: (0, 255, 0), 3: (102, 102, 51), 4: (0, 120, 255), 5: (0, 0, 0)}


def deepscene(root: Path, *colors: tuple[int, int, int]) -> None:
    for part, name in (("train", "b1-2"), ("train", "b1-10"), ("test", "b9-1")):
        image(root / part / "rgb" / f"{name}_Clipped.jpg")
        painted = np.zeros((*SIZE, 3), np.uint8)
        painted.reshape(-1, 3)[: len(colors)] = colors
        put(root / part / "GT_color" / f"{name}_mask.png", painted)


@pytest.mark.parametrize("inner", ["", "freiburg_forest_annotated"])
def test_deepscene_decodes_colors(tmp_path: Path, inner: str) -> None:
    deepscene(tmp_path / inner, *COLORS.values(), (0, 60, 0))
    train = dataloaders.build("DeepScene", data_dir=str(tmp_path), split="train").dataset
    assert names(train) == ["b1-10", "b1-2"]
    assert label(train).flatten()[:7].tolist() == [0, 1, 2, 3, 4, 5, 3], "trees are vegetation"
    assert len(dataloaders.build("DeepScene", data_dir=str(tmp_path), split="val").dataset) == 1
    no_void = dataloaders.build("DeepScene", data_dir=str(tmp_path), split="test", ignore_void=True).dataset
    assert label(no_void).flatten()[:3].tolist() == [255, 1, 2]


def test_deepscene_reports_unknown_colors(tmp_path: Path) -> None:
    deepscene(tmp_path, (1, 2, 3), (1, 2, 3), (9, 9, 9))
    with pytest.raises(UserError, match=r"_mask.png .*\[1, 2, 3\] \(2 pixels\), \[9, 9, 9\] \(1 pixel\)"):
        dataloaders.build("DeepScene", data_dir=str(tmp_path), split="train")


def test_deepscene_index_masks(tmp_path: Path) -> None:
    image(tmp_path / "train/rgb/a_Clipped.jpg")
    mask(tmp_path / "train/GT_index/a_mask.png", 0, 5, 3)
    dataset = dataloaders.build("DeepScene", data_dir=str(tmp_path), split="train").dataset
    assert label(dataset).flatten()[:3].tolist() == [0, 5, 3]


# ---- VOC written by `prepare`


def test_voc_masks_written_with_the_palette_are_read_back(tmp_path: Path) -> None:
    from utils.images import write_png

    root = tmp_path / "VOCdevkit/VOC2012"
    image(root / "JPEGImages/1.jpg")
    write_png(root / "SegmentationClassAug/1.png", np.full(SIZE, 20, np.uint8), labels("voc")[1])
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("/JPEGImages/1.jpg /SegmentationClassAug/1.png\n")
    dataset = dataloaders.build("VOC", data_dir=str(tmp_path), split="train_aug").dataset
    assert set(label(dataset).flat) == {20}
    assert labels("voc") == (dataset.class_names, dataset.palette)


# ---- the configs to start from


@pytest.mark.parametrize("file", ["voc", "voc_aug", "cityscapes", "ade20k", "coco_stuff", "kvasir", "camvid", "folder"])
def test_configs_are_valid_and_describe_themselves(file: str, root: Path, tmp_path: Path) -> None:
    from models import MODELS
    from utils.config import load

    folders = [f"{stage}_loader.args.data_dir={tmp_path}" for stage in ("train", "val")]
    config = load(root / "configs" / f"{file}.json", folders, models=MODELS, loaders=LOADERS)
    assert f"--config configs/{file}.json" in config.about
    train, val = config.train_loader.args, config.val_loader.args
    assert train["split"] != val["split"] or "val_fraction" in val
    assert "crop_size" not in val, "scored whole"
    if file == "camvid":
        assert tuple(train["classes"]) == labels("camvid")[0]
        assert [tuple(color) for color in train["palette"]] == list(labels("camvid")[1])
        assert (val["classes"], val["palette"]) == (train["classes"], train["palette"])
