"""`python -m dataloaders check` on good and bad data, and its contact sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dataloaders
from dataloaders.__main__ import main
from dataloaders.check.findings import inspect, is_legal
from dataloaders.check.report import warnings
from dataloaders.check.sheet import contact_sheet
from utils.errors import UserError

CLASSES = ["ground", "tree", "lake"]
SIZE = (20, 30)  # height, width


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight images of two sizes; ground 0.5, tree 0.25, not labeled 0.25 in each; lake nowhere."""
    for i in range(8):
        height, width = SIZE if i else (10, 30)
        label = np.zeros((height, width), np.uint8)
        label[: height // 2, : width // 2] = 1
        label[: height // 2, width // 2 :] = 255
        save(tmp_path / f"images/im{i}.png", np.full((height, width, 3), (51, 102, 204), np.uint8))
        save(tmp_path / f"masks/im{i}.png", label)
    return tmp_path


def config(folder: Path, **args: Any) -> Path:
    loader = {"type": "Folder", "args": {"data_dir": str(folder), "classes": CLASSES, **args}}
    content = {
        "name": "x",
        "arch": {"type": "UNet"},
        "train_loader": loader,
        "trainer": {"val": False, "monitor": "off"},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


def check(folder: Path, *options: str, **args: Any) -> int:
    return main(["check", "--config", str(config(folder, **args)), "--out", str(folder / "sheet.png"), *options])


def test_findings_are_the_true_numbers(data: Path) -> None:
    dataset = dataloaders.build("Folder", data_dir=str(data), classes=CLASSES).dataset
    found = inspect(dataset)
    pixels = 7 * 600 + 300
    assert found.pixels.tolist() == [pixels // 2, pixels // 4, 0, pixels // 4]
    assert found.images.tolist() == [8, 8, 0, 8]
    assert dict(found.sizes) == {(30, 20): 7, (30, 10): 1}
    assert dict(found.stored) == {0: pixels // 2, 1: pixels // 4, 255: pixels // 4}
    assert (found.problems, found.illegal) == ([], {})
    assert np.allclose(found.mean, [0.2, 0.4, 0.8])
    assert np.allclose(found.std, 0, atol=1e-6)
    assert found.weights == pytest.approx(dataset.class_weights().tolist())


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_mean_and_std_agree_with_numpy(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (9, 11, 5)).astype(np.uint8) for _ in range(3)]
    if kind == "float32":
        images = [image.astype(np.float32) / 255 for image in images]
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i, image in enumerate(images):
        np.save(tmp_path / f"images/{i}.npy", image)
        save(tmp_path / f"masks/{i}.png", np.zeros((9, 11), np.uint8))
    dataset = dataloaders.build("Folder", data_dir=str(tmp_path), classes=CLASSES, in_channels=5).dataset
    found = inspect(dataset)
    every = np.stack(images).reshape(-1, 5).astype(np.float64) / (255 if kind == "uint8" else 1)
    assert np.allclose(found.mean, every.mean(0))
    assert np.allclose(found.std, every.std(0))


def test_report_of_good_data(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(data) == 0
    text = capsys.readouterr().out
    assert "pairs           8 (looked at all of them)" in text
    assert "30x20 (7 images), 30x10 (1 image)" in text
    assert "stored values   0, 1, 255" in text
    assert "tree" in text
    assert "25.0000%" in text
    assert '"mean": [0.2, 0.4, 0.8]' in text
    assert "no pixel of lake" in text
    assert '"weight": [' in text
    assert "no file with a problem" in text


def test_samples_are_spread_evenly(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = dataloaders.build("Folder", data_dir=str(data), classes=CLASSES).dataset
    assert inspect(dataset, 3).looked_at == [0, 3, 7]
    assert check(data, "--samples", "3") == 0
    assert "looked at 3 of them" in capsys.readouterr().out
    with pytest.raises(UserError, match="--samples"):
        check(data, "--samples", "-1")


def test_every_problem_is_listed_and_the_rest_still_looked_at(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(data / "masks/im1.png", np.full(SIZE, 7, np.uint8))
    save(data / "masks/im2.png", np.zeros((20, 29), np.uint8))
    (data / "images/im3.png").write_bytes((data / "images/im3.png").read_bytes()[:60])
    save(data / "images/lonely.png", np.zeros((*SIZE, 3), np.uint8))
    save(data / "masks/alone.png", np.zeros(SIZE, np.uint8))
    assert check(data) == 1
    text = capsys.readouterr().out
    assert "7 (ILLEGAL)" in text
    for part in ("im1.png contains label values", "im2.png is 29x20", "im3.png cannot be read"):
        assert part in text, part
    assert text.count("problem: ") == 3
    assert str(data / "images/lonely.png") in text
    assert str(data / "masks/alone.png") in text
    assert "ground" in text, "the other five are counted"
    assert (data / "sheet.png").exists()


def test_similar_problems_are_grouped_and_each_loader_is_summed_up(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(1, 6):
        mask = np.zeros(SIZE, np.uint8)
        mask[:i] = 7
        save(data / f"masks/im{i}.png", mask)
    (data / "images/im6.png").write_bytes(b"junk")
    path = config(data)
    content = json.loads(path.read_text())
    loader = content["train_loader"]
    for part in ("train", "val"):
        (data / f"{part}.txt").write_text("im7\n" if part == "val" else "\n".join(f"im{i}" for i in range(7)))
    loader["args"]["list_file"] = "{split}.txt"
    content["val_loader"] = {**loader, "args": {**loader["args"], "split": "val"}}
    path.write_text(json.dumps(content))
    assert main(["check", "--config", str(path), "--out", str(data / "sheet.png")]) == 1
    text = capsys.readouterr().out
    assert text.count("\nproblem: ") == 2
    assert "im1.png contains label values" in text
    assert "         5 files have this problem: im1, im2, im3, ...\n" in text
    assert text.endswith("\ntrain_loader: 6 files with a problem, see above\nval_loader: no file with a problem\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        # Seven images of 30 x 20 and one of 30 x 10 have 562.5 pixels on average.
        ({"crop_size": 64, "scale": (1.0, 1.0)}, "crop_size 64 is larger than every image seen (30 x 20): 86% of a "),
        ({"crop_size": 128, "scale": (1.0, 1.0), "base_size": 100},
         "crop_size 128 is larger than every image seen at base_size 100 (100 x 67): 62% of a training crop is "
         "padding; try 96"),
        ({"crop_size": [48, 64], "scale": (1.0, 1.0)}, "crop_size 48 x 64 (height x width) is larger"),
        ({"crop_size": 30}, None),
        ({"crop_size": 64, "augment": False, "val": True}, None),
    ],
)  # fmt: skip
def test_a_crop_larger_than_all_images(data: Path, args: dict[str, Any], message: str | None) -> None:
    loader = dataloaders.build("Folder", data_dir=str(data), classes=CLASSES, **{"augment": True, **args})
    text = " ".join(warnings(loader.dataset, inspect(loader.dataset)))
    assert (message in text) if message else ("crop_size" not in text)


def test_files_that_a_list_names_but_are_not_there(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "list.txt").write_text("images/im1.png masks/im1.png\nimages/none.png masks/im2.png\n")
    assert check(data, list_file="list.txt") == 1
    assert f"there is no file {data}/images/none.png" in capsys.readouterr().out


def test_no_readable_image(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (data / "images").iterdir():
        path.write_bytes(b"junk")
    assert check(data) == 1
    assert "unknown: no image could be read" in capsys.readouterr().out
    assert not (data / "sheet.png").exists()


def test_wrong_folder_shows_both_trees(data: Path) -> None:
    with pytest.raises(UserError, match=r"train_loader\.args\.data_dir: [\s\S]*expected:[\s\S]*data_dir/") as error:
        check(data, "--set", f"train_loader.args.data_dir={data / 'nowhere'}")
    assert "nearest existing folder" in str(error.value)
    with pytest.raises(UserError, match=r"train_loader\.args: clases: .* no such argument; did you mean classes"):
        check(data, clases=["a"])


def test_ignore_index_that_is_a_class_and_labels_mostly_void(data: Path) -> None:
    dataset = dataloaders.build("Folder", data_dir=str(data), classes=CLASSES, ignore_index=0).dataset
    text = " ".join(warnings(dataset, inspect(dataset)))
    assert "ignore_index 0 is also the id of 'ground'" in text
    assert "75% of all pixels are unlabeled" in text


def test_legality_is_the_data_set_s_own() -> None:
    table = {"CityScapes": ([-1, 34, 200], [0, 7, 33, 255])}
    for name, (illegal, legal) in table.items():
        cls = dataloaders.LOADERS[name]
        dataset = object.__new__(cls)
        assert not any(is_legal(dataset, value) for value in illegal)
        assert all(is_legal(dataset, value) for value in legal)


def test_images_in_train_and_val_are_reported(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(data, split="train", val_fraction=0.25)
    content = json.loads(path.read_text())
    content["val_loader"] = json.loads(json.dumps(content["train_loader"]))
    content["val_loader"]["args"]["split"] = "val"
    path.write_text(json.dumps(content))
    out = ["--out", str(data / "sheet.png")]
    assert main(["check", "-c", str(path), *out]) == 0
    text = capsys.readouterr().out
    assert "== train_loader" in text
    assert "== val_loader" in text
    assert "in common" not in text
    assert main(["check", "-c", str(path), "--set", "val_loader.args.split=all", *out]) == 0
    assert "train and val have 6 images in common" in capsys.readouterr().out
    assert main(["check", "-c", str(path), "--loader", "val", *out]) == 0
    assert "== train_loader" not in capsys.readouterr().out


def test_files_on_disk_are_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        save(tmp_path / f"images/deep{i}.png", rng.integers(0, 4095, SIZE).astype(np.uint16))
        save(tmp_path / f"masks/deep{i}.png", np.zeros(SIZE, np.uint8))
    save(tmp_path / "images/a.png", rng.integers(0, 256, (*SIZE, 4)).astype(np.uint8))
    save(tmp_path / "masks/a.png", np.zeros(SIZE, np.uint8))
    assert check(tmp_path) == 0
    text = capsys.readouterr().out
    assert "stored as       1 channel of uint16, " in text
    assert "                3 channels and transparency of uint8, 0 to 255 (1 image)" in text
    assert "gray images among color images: 4 images, such as deep0.png" in text
    assert "with transparency, which is dropped: 1 image, such as a.png" in text
    assert '"value_range"' not in text, "it would make the 8-bit image black"
    assert "so they are dark (4 images, such as deep0.png). Other images have another type" in text
    assert "convert them to 8 bits, or multiply them by 65535 / 4095" in text
    assert "mean and std do not fit" in text
    assert check(tmp_path, in_channels=1, value_range=[0, 4095], mean="auto", std="auto") == 0
    text = capsys.readouterr().out
    assert "mean and std do not fit" not in text
    assert "so they are dark" not in text
    assert "value_range applies to all images, but they have different types: uint16 (such as deep0.png), " in text
    assert "uint8 (such as a.png)" in text
    (tmp_path / "images/a.png").unlink()
    assert check(tmp_path) == 0
    assert 'so they are dark. If they have fewer bits, set "value_range": [0, 4095]' in capsys.readouterr().out


def test_images_turned_by_exif_otherwise_than_their_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = Image.Exif()
    for name, orientation, said in (("a", 3, True), ("b", 6, False), ("c", 1, False)):
        turned[0x0112] = orientation
        size = SIZE[::-1] if orientation == 6 else SIZE
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / f"images/{name}.jpg", exif=turned)
        save(tmp_path / f"masks/{name}.png", np.zeros(SIZE, np.uint8))
        check(tmp_path)
        text = capsys.readouterr().out
        assert (
            "EXIF data turns 1 image otherwise" in text and f"{name}.jpg (orientation 3, its mask 1)" in text
        ) == said
        (tmp_path / f"images/{name}.jpg").unlink()


def test_sheet_shows_images_masks_and_void(data: Path) -> None:
    palette = [[10, 20, 30], [240, 0, 0], [0, 0, 240]]
    dataset = dataloaders.build("Folder", data_dir=str(data), classes=CLASSES, palette=palette).dataset
    sheet = contact_sheet([("title", [dataset[1], dataset[2]], dataset)])
    assert sheet.dtype == np.uint8
    colors = {tuple(c) for c in sheet.reshape(-1, 3)}
    photo = np.array([51, 102, 204])
    assert tuple(photo) in colors, "the image"
    for color in (palette[0], palette[1]):
        mixed = (photo + color) / 2
        assert any(np.abs(mixed - c).max() <= 1 for c in map(np.array, colors)), "the mask laid over"
    assert (240, 0, 0) in colors, "the legend"


def test_sheet_is_augmented_as_training_is(data: Path) -> None:
    assert check(data, augment=True, crop_size=64, base_size=40) == 0
    sheet = np.asarray(Image.open(data / "sheet.png"))
    fill = [round(255 * m) for m in dataloaders.LOADERS["Folder"].mean]
    assert (sheet == fill).all(-1).sum() > 1000, "the border of rotated and shrunk images"


def test_sheet_of_one_class_and_of_many(data: Path) -> None:
    for path in (data / "masks").iterdir():
        save(path, (np.asarray(Image.open(path)) == 1).astype(np.uint8))
    for classes in (["tree"], 150):
        dataset = dataloaders.build("Folder", data_dir=str(data), classes=classes, ignore_index=-1).dataset
        assert contact_sheet([("t" * 300, [dataset[0]], dataset)]).shape[2] == 3


def test_generated_data_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = {"type": "Shapes", "args": {}}
    content = {
        "name": "x",
        "arch": {"type": "UNet"},
        "train_loader": loader,
        "trainer": {"val": False, "monitor": "off"},
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    args = ["check", "-c", str(tmp_path / "c.json"), "--samples", "8", "--out", str(tmp_path / "sheet.png")]
    assert main(args) == 0
    assert "generated" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists()


def test_real_data(shared_dir: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CamVid's shares, image counts, mean and std are those recorded with the data."""
    folder = shared_dir / "data" / "camvid"
    args = ["check", "-c", str(root / "configs" / "camvid.json"), "--out", str(tmp_path / "sheet.png")]
    for stage in ("train", "val"):
        args += ["--set", f"{stage}_loader.args.data_dir={folder}"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "pairs           367 (looked at all of them)" in text
    assert "pairs           101 (looked at all of them)" in text
    assert '"mean": [0.4116, 0.4249, 0.4321], "std": [0.3068, 0.3111, 0.3068]' in text
    lines = [line.split() for line in text.splitlines()]
    assert ["9", "Pedestrian", "0.6392%", "317"] in [line[:4] for line in lines]
    assert ["10", "Bicyclist", "2.2175%", "101"] in [line[:4] for line in lines]
