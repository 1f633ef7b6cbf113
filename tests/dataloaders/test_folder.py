"""The Folder loader: pairs, splits, folds, kinds of images, and mistakes in them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import dataloaders
from tests.dataloaders.folders import CLASSES, IDS, folder, label, names, photo, save
from utils.errors import UserError

# ---- pairs


def test_files_are_matched_by_stem_and_sorted(plain: Path) -> None:
    dataset = folder(plain)
    assert names(dataset) == [f"im{i}" for i in range(10)]
    for i in range(10):
        assert np.array_equal(label(dataset, i), np.roll(IDS, i))
        assert abs(float(dataset[i].image.float().mean()) - 20 * i) < 2
    assert (dataset.num_classes, dataset.class_names) == (3, tuple(CLASSES))


def test_files_without_partner_are_reported(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    lonely = [photo(plain / "images/extra.png"), save(plain / "masks/other.png", IDS)]
    with caplog.at_level(logging.WARNING):
        dataset = folder(plain)
    assert len(dataset) == 10
    assert dataset.alone == lonely
    assert "1 image has no mask and is skipped" in caplog.text
    assert "1 mask has no image" in caplog.text


def test_two_images_of_one_name_are_refused(plain: Path) -> None:
    photo(plain / "images/im3.png")
    with pytest.raises(UserError, match=r"im3.* have the same name"):
        folder(plain)


def test_names_that_never_match_show_an_example_of_each(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a_seg.png", IDS)
    with pytest.raises(UserError, match=r"a\.jpg and a_seg\.png.*mask_suffix"):
        folder(tmp_path)
    assert names(folder(tmp_path, mask_suffix="_seg")) == ["a"]


def test_images_and_masks_in_one_folder_by_suffix(tmp_path: Path) -> None:
    photo(tmp_path / "all/a.png")
    save(tmp_path / "all/a_mask.png", IDS)
    dataset = folder(tmp_path, images="all", masks="all", mask_suffix="_mask")
    assert names(dataset) == ["a"]
    assert dataset.alone == []


def test_nested_folders_and_hidden_files(tmp_path: Path) -> None:
    for name in ("day1/a", "day2/a"):
        photo(tmp_path / f"images/{name}.JPG")
        save(tmp_path / f"masks/{name}.png", IDS)
    (tmp_path / "images/.DS_Store").touch()
    (tmp_path / "images/._x.jpg").touch()
    assert names(folder(tmp_path)) == ["day1/a", "day2/a"]


# ---- splits


def test_split_by_folders_either_way_round(tmp_path: Path) -> None:
    for name, split in (("a", "train"), ("b", "validation"), ("c", "test")):
        photo(tmp_path / f"one/images/{split}/{name}.png")
        save(tmp_path / f"one/masks/{split}/{name}.png", IDS)
        photo(tmp_path / f"two/{split}/images/{name}.png")
        save(tmp_path / f"two/{split}/masks/{name}.png", IDS)
    for root in (tmp_path / "one", tmp_path / "two"):
        found = {split: names(folder(root, split)) for split in ("train", "val", "test", "all")}
        assert found == {"train": ["a"], "val": ["b"], "test": ["c"], "all": ["a", "b", "c"]}
        with pytest.raises(ValueError, match="split by folders"):
            folder(root, val_fraction=0.1)


def test_a_split_whose_folder_is_missing_shows_the_tree(tmp_path: Path) -> None:
    photo(tmp_path / "images/train/a.png")
    save(tmp_path / "masks/train/a.png", IDS)
    with pytest.raises(UserError, match=r"split 'val', only for train[\s\S]*expected"):
        folder(tmp_path, "val")


def test_test_images_need_no_masks(tmp_path: Path) -> None:
    photo(tmp_path / "images/test/a.png")
    assert set(label(folder(tmp_path, "test")).flat) == {255}


def test_split_by_fraction_is_disjoint_and_complete(plain: Path) -> None:
    parts = {s: names(folder(plain, s, val_fraction=0.3, test_fraction=0.2)) for s in ("train", "val", "test")}
    assert [len(parts[s]) for s in ("train", "val", "test")] == [5, 3, 2]
    assert sorted(sum(parts.values(), [])) == names(folder(plain, "all"))
    assert names(folder(plain, "val", val_fraction=0.3, split_seed=1)) != parts["val"]
    assert folder(plain, "val", val_fraction=0.3).part == f"3 of the 10 samples in {plain}"
    assert folder(plain, "all", val_fraction=0.3).part is None


def test_a_missing_val_split_says_what_can_be_done(plain: Path) -> None:
    with pytest.raises(UserError, match=r"val_fraction[\s\S]*list_file[\s\S]*val_split"):
        folder(plain, "val")


def test_list_of_two_columns(plain: Path) -> None:
    (plain / "fold0_train.txt").write_text(
        "# a comment\nimages/im3.jpg\tmasks/im3.png\n\nimages/im1.jpg, masks/im1.png\n"
    )
    (plain / "fold0_val.txt").write_text("images/im5.jpg masks/im5.png\n")
    assert names(folder(plain, list_file="fold0_{split}.txt")) == ["im3", "im1"], "the list's order"
    assert names(folder(plain, "val", list_file=str(plain / "fold0_{split}.txt"))) == ["im5"]


def test_list_of_names(plain: Path) -> None:
    (plain / "train.txt").write_text("im7\nim2.jpg\n")
    dataset = folder(plain, list_file="train.txt")
    assert names(dataset) == ["im7", "im2"]
    assert np.array_equal(label(dataset, 1), np.roll(IDS, 2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("im1 im2 im3", "line 2: 3 columns"),
        ("im99", "line 2: 'im99' has no file in .*images"),
        ("only", "line 2: 'only' has no file in .*masks"),
        ("im1.5", r"line 2: 'im1\.5' has no file in .*images"),
    ],
)
def test_mistakes_in_lists_name_the_line(plain: Path, line: str, message: str) -> None:
    photo(plain / "images/only.jpg")
    (plain / "train.txt").write_text(f"im1\n{line}\n")
    with pytest.raises(UserError, match=message):
        folder(plain, list_file="train.txt")
    with pytest.raises(UserError, match="list_file: there is no file .*none.txt"):
        folder(plain, list_file="none.txt")
    (plain / "train.txt").write_text("im1\nim2\n", encoding="utf-16-le")  # without a byte order mark
    with pytest.raises(UserError, match=r"train\.txt is not UTF-8 text"):
        folder(plain, list_file="train.txt")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffim1\nim2\n",
        "  im1  \r\n\r\nim2\r\n",
        "'im1'\n\"im2.jpg\"\n",
        "im1\nim2\nim1\n",
        '"images/im1.jpg","masks/im1.png"\nimages/im2.jpg , masks/im2.png\n',
        "image,mask\nimages/im1.jpg,masks/im1.png\nimages/im2.jpg,masks/im2.png\n",
        "images\\im1.jpg\tmasks\\im1.png\nimages\\im2.jpg\tmasks\\im2.png\n",
        "images/im1.jpg;masks/im1.png\nimages/im2.jpg;masks/im2.png\n",
    ],
    ids=["bom", "blanks", "quotes", "doubled", "csv", "header", "windows", "semicolon"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lists_from_any_editor(plain: Path, text: str, encoding: str) -> None:
    (plain / "list.txt").write_text(text.removeprefix("\ufeff") if encoding == "utf-16" else text, encoding=encoding)
    assert names(folder(plain, list_file="list.txt")) == ["im1", "im2"]


def test_lists_with_blanks_in_names(tmp_path: Path) -> None:
    for name in ("my photo", "my"):
        photo(tmp_path / f"images/{name}.jpg")
        save(tmp_path / f"masks/{name}.png", IDS)
    for line in ("my photo", "images/my photo.jpg masks/my photo.png", "'images/my photo.jpg' 'masks/my photo.png'"):
        (tmp_path / "list.txt").write_text(f"{line}\nmy\n")
        assert names(folder(tmp_path, list_file="list.txt")) == ["my photo", "my"], line


def test_equal_stems_in_different_folders_keep_different_names(tmp_path: Path) -> None:
    for part in ("a", "b"):
        photo(tmp_path / f"{part}/1.jpg", 10)
        save(tmp_path / f"{part}/1.png", IDS)
    (tmp_path / "list.txt").write_text("a/1.jpg a/1.png\nb/1.jpg b/1.png\nb/1.jpg a/1.png\n")
    assert names(folder(tmp_path, list_file="list.txt")) == ["a/1", "b/1", "b/1_2"]
    for part in ("train", "val"):
        photo(tmp_path / f"images/{part}/1.jpg")
        save(tmp_path / f"masks/{part}/1.png", IDS)
    assert names(folder(tmp_path, "all")) == ["images/train/1", "images/val/1"]


def test_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    photo(tmp_path / f"images/{name}.png")
    save(tmp_path / f"masks/{name}.png", IDS)
    (tmp_path / "list.txt").write_bytes(b"caf\xe9\n")
    for options in ({}, {"list_file": "list.txt"}):
        dataset = folder(tmp_path, **options)
        assert names(dataset) == ["caf%E9"]
        assert dataset[0].name.encode() == b"caf%E9"
        assert np.array_equal(label(dataset), IDS)


def test_folders_linked_into_each_other_are_read_once(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("images", "masks"):
        (plain / kind / "again").symlink_to(plain / kind, target_is_directory=True)
        (plain / kind / "day1").mkdir()
        (plain / kind / "day2").mkdir()
        (plain / kind / "day1/link").symlink_to(plain / kind / "day2", target_is_directory=True)
        (plain / kind / "day2/link").symlink_to(plain / kind / "day1", target_is_directory=True)
    photo(plain / "images/day1/x.jpg")
    save(plain / "masks/day1/x.png", IDS)
    with caplog.at_level(logging.WARNING):
        assert names(folder(plain)) == ["day1/x", *(f"im{i}" for i in range(10))]
    assert "is already read" in caplog.text


def test_links_that_lead_nowhere(plain: Path) -> None:
    (plain / "images/im1.jpg").unlink()
    (plain / "images/im1.jpg").symlink_to("im1.jpg")
    (plain / "images/im2.jpg").unlink()
    (plain / "images/im2.jpg").symlink_to("none.jpg")
    dataset = folder(plain, on_error="skip")
    for index in (1, 2):
        with pytest.raises(UserError, match=rf"im{index}\.jpg"):
            dataset.load(index)


def test_images_outside_of_the_folders_of_splits_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/a", "loose", "other/b"):
        photo(tmp_path / f"images/{name}.png")
        save(tmp_path / f"masks/{name}.png", IDS)
    dataset = folder(tmp_path)
    assert names(dataset) == ["a"]
    assert [path.name for path in dataset.alone] == ["loose.png", "b.png"]
    assert "2 images have no folder of a split and are skipped" in caplog.text


def test_split_folders_in_capitals(tmp_path: Path) -> None:
    for split, name in (("Train", "a"), ("VAL", "b"), ("Test", "c")):
        photo(tmp_path / f"one/Images/{split}/{name}.png")
        save(tmp_path / f"one/Masks/{split.lower()}/{name}.png", IDS)
        photo(tmp_path / f"two/{split}/Images/{name}.png")
        save(tmp_path / f"two/{split}/masks/{name}.png", IDS)
    for root in (tmp_path / "one", tmp_path / "two"):
        assert {s: names(folder(root, s)) for s in ("train", "val", "test")} == {
            "train": ["a"],
            "val": ["b"],
            "test": ["c"],
        }
    photo(tmp_path / "one/Images/validation/b.png")
    with pytest.raises(UserError, match="both look like split 'val'"):
        folder(tmp_path / "one")


# ---- folds and groups


def test_folds_of_folder(tmp_path: Path) -> None:
    for patient in range(6):
        for i in range(4):
            photo(tmp_path / f"images/p{patient}_{i}.jpg")
            save(tmp_path / f"masks/p{patient}_{i}.png", IDS)
    group_by = "^(p[0-9])_"
    seen = []
    for k in range(3):
        options = {"val_fold": [k, 3], "group_by": group_by}
        train, val = (names(folder(tmp_path, split, **options)) for split in ("train", "val"))
        assert len(val) == 8
        assert sorted(train + val) == names(folder(tmp_path, "all"))
        assert not {name[:2] for name in train} & {name[:2] for name in val}
        loader = dataloaders.build(
            "Folder", data_dir=str(tmp_path), classes=CLASSES, split="train", num_workers=0, **options
        )
        assert names(loader.get_val_loader().dataset) == val, "without a val_loader the fold is held out"
        seen += val
    assert sorted(seen) == names(folder(tmp_path, "all"))
    parts = {s: names(folder(tmp_path, s, val_fraction=0.3, group_by=group_by)) for s in ("train", "val")}
    assert not {name[:2] for name in parts["train"]} & {name[:2] for name in parts["val"]}
    with pytest.raises(ValueError, match="cannot be combined"):
        folder(tmp_path, val_fold=[0, 3], val_fraction=0.1)


def test_a_fold_is_held_out_of_any_data_set_and_of_a_test_set(tmp_path: Path) -> None:
    for i in range(10):
        photo(tmp_path / f"images/{'test' if i > 7 else 'train'}/{i}.jpg")
        save(tmp_path / f"masks/{'test' if i > 7 else 'train'}/{i}.png", IDS)
    val = [names(folder(tmp_path, "val", val_fold=[k, 4])) for k in range(4)]
    assert sorted(sum(val, [])) == [str(i) for i in range(8)]
    loader = dataloaders.build(
        "Shapes", length=20, size=32, endless=False, num_workers=0, val_fold=[1, 4], batch_size=5
    )
    held_out = loader.get_val_loader()
    assert len(loader) == 3
    assert len(held_out) == 1
    shown = [{n for batch in part for n in batch.names} for part in (loader, held_out)]
    assert not shown[0] & shown[1]


# ---- kinds of images


@pytest.mark.parametrize(
    ("file", "array", "channels", "kind"),
    [
        ("a.png", np.full((3, 4), 51, np.uint8), 3, torch.uint8),
        ("a.png", np.full((3, 4), 51, np.uint8), 1, torch.uint8),
        ("a.png", np.full((3, 4, 4), 51, np.uint8), 4, torch.uint8),
        ("a.png", np.full((3, 4), 13107, np.uint16), 1, torch.float32),
        ("a.tif", np.full((3, 4), 13107, np.uint16), 3, torch.float32),
        ("a.npy", np.full((3, 4, 7), 0.2, np.float32), 7, torch.float32),
        ("a.npy", np.full((3, 4, 5), 51, np.uint8), 5, torch.uint8),
    ],
    ids=["gray-as-rgb", "gray", "rgba", "png16", "tiff16-as-rgb", "npy-float", "npy-uint8"],
)
def test_images_of_every_kind(tmp_path: Path, file: str, array: np.ndarray, channels: int, kind: torch.dtype) -> None:
    save(tmp_path / "images" / file, array)
    save(tmp_path / "masks/a.png", IDS)
    sample = folder(tmp_path, in_channels=channels)[0]
    assert sample.image.shape == (channels, 3, 4)
    assert sample.image.dtype == kind
    value = sample.image.float() / (255 if kind == torch.uint8 else 1)
    assert torch.allclose(value, torch.tensor(0.2), atol=1e-4)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_multichannel_tiff_with_npy_masks(tmp_path: Path, dtype: type, top: int) -> None:
    bands = (np.random.default_rng(0).random((3, 4, 6)) * top).astype(dtype)
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images/a.tif", bands, photometric="minisblack", planarconfig="contig")
    (tmp_path / "masks").mkdir()
    np.save(tmp_path / "masks/a.npy", IDS.astype(np.int64))
    sample = folder(tmp_path, in_channels=6)[0]
    assert sample.image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    value = sample.image.double().numpy() / (top if dtype == np.uint8 else 1)
    assert np.allclose(value, bands.transpose(2, 0, 1) / top, atol=1e-6)
    assert np.array_equal(sample.label.numpy(), IDS)
    with pytest.raises(UserError, match="6 channels, but .*`in_channels` is 5"):
        folder(tmp_path, in_channels=5)


# ---- the documentation


def test_documented_examples_are_accepted(root: Path) -> None:
    text = (root / "docs" / "datasets.md").read_text(encoding="utf-8")
    lines = [line for block in text.split("```json\n")[1:] for line in block.split("```")[0].splitlines()]
    examples = [json.loads(line[line.index("{") :]) for line in lines]
    assert len(examples) >= 9
    for example in examples:
        assert dataloaders.LOADERS.problems("train_loader", example["type"], example["args"]) == []


def test_an_empty_data_folder_is_named_before_its_class_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_dir: the folder .* is empty; expected the data, and classes\.txt"):
        dataloaders.build("Folder", data_dir=str(tmp_path), classes="classes.txt")
