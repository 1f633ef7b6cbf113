"""All data sets: facts, listing, reading, checks, augmentation, counts."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import dataloaders
from base.base_dataset import BaseDataSet
from base.entries import Entries, Entry, Sample, Skipped
from utils.errors import UserError
from utils.images import write_png

SIZES = [(24, 32), (30, 20), (24, 32), (16, 48), (40, 40), (24, 32)]


class Tiny(BaseDataSet):
    """Pairs below images/ and labels/, with two classes and a rare third one."""

    class_names = ("ground", "tree", "sign")
    num_classes = 3
    palette = ((0, 0, 0), (0, 200, 0), (200, 0, 0))
    mean = (0.5, 0.4, 0.3)
    std = (0.2, 0.2, 0.2)
    layout: ClassVar[str] = "data_dir/\n  images/<id>.png\n  labels/<id>.png"

    def samples(self) -> list[Entry]:
        images = sorted((self.data_dir / "images").glob("*.png"))
        return [Entry(p, self.data_dir / "labels" / p.name, p.stem) for p in images]


class WithOwnArgument(Tiny):
    def __init__(self, *, every: int = 1, **common: object) -> None:
        self.every = every
        super().__init__(**common)

    def samples(self) -> list[Entry]:
        return super().samples()[:: self.every]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        label = rng.integers(0, 2, (height, width), np.uint8)
        label[:3] = 255
        if i == 4:
            label[5:7, 5:9] = 2
        write_png(tmp_path / "images" / f"s{i}.png", rng.integers(0, 256, (height, width, 3), np.uint8))
        write_png(tmp_path / "labels" / f"s{i}.png", label)
    return tmp_path


def stored(folder: Path, kind: str, index: int) -> np.ndarray:
    from PIL import Image

    with Image.open(folder / kind / f"s{index}.png") as image:
        return np.asarray(image)


# ---- items


def test_an_item_has_the_content_of_the_file(folder: Path) -> None:
    data = Tiny(str(folder))
    assert len(data) == 6
    for index in range(6):
        sample = data[index]
        assert isinstance(sample, Sample)
        assert sample.image.dtype == torch.uint8
        assert sample.label.dtype == torch.uint8
        assert sample.name == f"s{index}"
        assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), stored(folder, "images", index))
        assert np.array_equal(sample.label.numpy(), stored(folder, "labels", index))


def test_augmented_items_depend_on_seed_epoch_and_index_alone(folder: Path) -> None:
    options = {"crop_size": 24, "augment": True, "blur": True, "jitter": True}
    data, twin = Tiny(str(folder), seed=3, **options), Tiny(str(folder), seed=3, **options)
    first = data[(2, 4)]
    data[(0, 1)]  # independent of what happened in between
    assert torch.equal(first.image, data[(2, 4)].image)
    assert torch.equal(first.image, twin[(2, 4)].image)
    assert torch.equal(first.label, twin[(2, 4)].label)
    assert not torch.equal(first.image, data[(3, 4)].image)
    assert not torch.equal(first.image, Tiny(str(folder), seed=4, **options)[(2, 4)].image)
    assert torch.equal(data[4].image, data[(0, 4)].image)


@pytest.mark.parametrize(("crop", "shape"), [(20, (20, 20)), ((18, 26), (18, 26)), ([18, 26], (18, 26))])
@pytest.mark.parametrize("how", [{"augment": True}, {"val": True}])
def test_crops_have_the_asked_size(folder: Path, crop, shape, how) -> None:
    data = Tiny(str(folder), crop_size=crop, **how)
    for sample in data:
        assert sample.image.shape == (3, *shape)
        assert sample.label.shape == shape
        assert set(sample.label.unique().tolist()) <= {0, 1, 2, 255}


def test_images_that_are_too_large_to_be_augmented_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("base.augmentation.LARGEST_SIDE", 10)
    for how in ({"augment": True}, {"val": True, "crop_size": 8}):
        with pytest.raises(UserError, match="work for images of up to 10 pixels a side. Cut it into tiles"):
            Tiny(str(folder), **how)[0]
    assert Tiny(str(folder))[0].image.shape[1:] == SIZES[0]


def test_outside_of_the_image_is_mean_color_and_ignored(folder: Path) -> None:
    data = Tiny(str(folder), crop_size=64, augment=True, scale=False, rotate=False)
    for index in range(len(data)):
        sample = data[index]
        height, width = SIZES[index]
        outside = (sample.image == torch.tensor([128, 102, 76], dtype=torch.uint8)[:, None, None]).all(0)
        assert int((~outside).sum()) <= height * width
        assert (sample.label[outside] == 255).all()
        # Each id is as frequent as in the file.
        for value in (0, 1, 2):
            assert int((sample.label == value).sum()) == int((stored(folder, "labels", index) == value).sum())


def test_sizes_without_crop_are_the_images_own(folder: Path) -> None:
    assert [tuple(s.label.shape) for s in Tiny(str(folder))] == SIZES


# ---- facts


def test_facts_and_overrides(folder: Path) -> None:
    assert Tiny(str(folder)).facts == Tiny.facts_for()
    assert Tiny.facts_for().class_names == ("ground", "tree", "sign")
    (folder / "classes.txt").write_text("# three\nroad\n\nbush\nplate\n")
    for classes in ("classes.txt", str(folder / "classes.txt"), ["road", "bush", "plate"]):
        data = Tiny(str(folder), classes=classes)
        assert data.class_names == ("road", "bush", "plate")
        assert data.num_classes == 3
        assert data.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))  # the VOC colors
    data = Tiny(str(folder), classes=4, palette=[(1, 2, 3)] * 4, mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    assert data.num_classes == 4
    assert data.palette == ((1, 2, 3),) * 4
    assert data.mean == (0.1, 0.2, 0.3)
    assert Tiny.num_classes == 3  # the class has not changed
    assert Tiny.facts_for(classes=1).palette == ((128, 0, 0),)


def test_other_channel_counts(folder: Path) -> None:
    data = Tiny(str(folder), in_channels=1)
    assert data[0].image.shape == (1, 24, 32)
    assert data.mean == pytest.approx((0.4,))
    assert len(Tiny.facts_for(in_channels=6).std) == 6


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("split", "tain"),
        ("crop_size", 0),
        ("base_size", 0),
        ("scale", (2.0, 1.0)),
        ("rotate", -1.0),
        ("blur", -0.5),
        ("palette", [(0, 0, 0)]),
        ("palette", [(0, 0, 300)] * 3),
        ("mean", [0.5]),
        ("std", [0.0, 1.0, 1.0]),
        ("classes", 0),
        ("classes", ["a", "a"]),
        ("cache", "disk"),
        ("on_error", "ignore"),
        ("in_channels", 0),
    ],
)
def test_impossible_arguments_are_named(folder: Path, argument: str, value: object) -> None:
    def build() -> None:
        dataloaders.Loaders("data set", {"Tiny": Tiny}).check("Tiny", {argument: value})
        Tiny(str(folder), augment=True, **{argument: value})

    with pytest.raises(ValueError, match=argument):
        build()


def test_options_without_effect_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, cropped = Tiny(str(folder), val=True), Tiny(str(folder))
    assert torch.equal(whole[0].image, cropped[0].image)  # val without crop_size: images stay whole
    with caplog.at_level(logging.WARNING):
        Tiny(str(folder), crop_size=20)
        Tiny(str(folder), crop_size=20, val=True, augment=True)
    assert "crop_size has no effect" in caplog.text
    assert "augment has no effect" in caplog.text


def test_own_arguments_go_first_and_unknown_ones_are_refused(folder: Path) -> None:
    assert len(WithOwnArgument(every=2, data_dir=str(folder))) == 3
    with pytest.raises(TypeError, match="evry"):
        WithOwnArgument(evry=2, data_dir=str(folder))


# ---- labels


def test_labels_out_of_range_name_file_values_and_key(folder: Path) -> None:
    label = stored(folder, "labels", 3).copy()
    label[10, :5] = 7
    label[11, 0] = 9
    write_png(folder / "labels" / "s3.png", label)
    with pytest.raises(UserError, match=r"s3\.png.*7, 9 \(6 pixels\).*0 to 2.*255.*`classes`.*`ignore_index`"):
        [Tiny(str(folder))[i] for i in range(6)]


def test_wrong_labels_everywhere_are_found_at_start(folder: Path) -> None:
    for i, size in enumerate(SIZES):
        write_png(folder / "labels" / f"s{i}.png", np.full(size, 5, np.uint8))
    with pytest.raises(UserError, match="not a class: 5"):
        Tiny(str(folder))


@pytest.mark.parametrize("ignore", [255, 254, -1, 300, 1])
def test_void_becomes_the_configs_ignore_index(folder: Path, ignore: int) -> None:
    data = Tiny(str(folder), ignore_index=ignore)
    for index in (0, 4):
        label = data[index].label
        want = stored(folder, "labels", index).astype(int)
        assert np.array_equal(label.numpy(), np.where(want == 255, ignore, want))
        assert label.dtype == (torch.uint8 if 0 <= ignore <= 255 else torch.int32)
    cropped = Tiny(str(folder), ignore_index=ignore, crop_size=64, augment=True)[0].label
    assert cropped[0, 0] == ignore or cropped[-1, -1] == ignore


def test_void_that_is_no_void_is_an_error(folder: Path) -> None:
    class Strict(Tiny):
        void_label = None

    with pytest.raises(UserError, match="not a class: 255"):
        Strict(str(folder), ignore_index=254)


def test_label_table(folder: Path) -> None:
    class Mapped(Tiny):
        lut = np.array([2, 0], np.uint8)

    for dtype in (np.uint8, np.int32):
        got = Mapped(str(folder)).label_table.translate(np.array([[0, 1], [1, 255]], dtype), "x")
        assert got.tolist() == [[2, 0], [0, 255]]
        assert got.dtype == np.uint8
    with pytest.raises(UserError, match="x contains.*not a class: 77"):
        Mapped(str(folder)).label_table.translate(np.array([[77]], np.int32), "x")


def test_one_channel_takes_background_and_class(folder: Path) -> None:
    data = Tiny(str(folder), classes=["tree"], on_error="skip")
    assert data.num_classes == 1
    assert set(data[0].label.unique().tolist()) == {0, 1, 255}
    assert isinstance(data[4], Skipped)  # 2 is not a class of it


def test_sizes_that_differ_are_reported(folder: Path) -> None:
    write_png(folder / "labels" / "s1.png", np.zeros((20, 30), np.uint8))
    with pytest.raises(UserError, match=r"differ in size.*s1\.png is 20x30.*s1\.png is 30x20"):
        [Tiny(str(folder))[i] for i in range(6)]


def test_sizes_that_differ_by_exif_orientation_alone(folder: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored(folder, "images", 1)).save(folder / "images" / "s1.png", exif=exif)
    with pytest.raises(UserError, match=r"Only s1\.png is rotated by its EXIF orientation"):
        [Tiny(str(folder))[i] for i in range(6)]
    Image.fromarray(stored(folder, "labels", 1)).save(folder / "labels" / "s1.png", exif=exif)
    sample = Tiny(str(folder))[1]
    assert sample.image.shape[1:] == sample.label.shape == (30, 20)[::-1]
    assert np.array_equal(sample.label.numpy(), np.rot90(stored(folder, "labels", 1), -1))


def test_without_label_file_everything_is_ignored(folder: Path) -> None:
    class Unlabeled(Tiny):
        def samples(self) -> list[Entry]:
            return [e._replace(label=None) for e in super().samples()]

    assert (Unlabeled(str(folder))[0].label == 255).all()


# ---- folders and broken files


def test_missing_folder_shows_what_was_expected_and_what_is_there(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        Tiny(str(folder / "nowhere"))
    message = str(caught.value)
    assert "nowhere does not exist" in message
    assert "labels/<id>.png" in message
    assert f"nearest existing folder: {folder}" in message
    assert message.endswith("| labels/")


def test_empty_split_shows_both_trees_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError) as caught:
        Tiny(str(tmp_path))
    lines = str(caught.value).splitlines()
    assert "has no images" in lines[0]
    assert any("images/<id>.png" in line and "|" in line for line in lines)
    assert any(line.endswith("| pictures/") for line in lines)


def test_broken_files_raise_or_are_skipped(folder: Path) -> None:
    (folder / "images" / "s1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"s1\.png is empty"):
        [Tiny(str(folder))[i] for i in range(6)]
    data = Tiny(str(folder), on_error="skip")
    skipped = data[1]
    assert isinstance(skipped, Skipped)
    assert "s1.png is empty" in skipped.reasons[0]
    assert skipped.replacement is None  # evaluation does not replace it
    training = Tiny(str(folder), on_error="skip", augment=True, crop_size=16)
    assert training[(0, 1)].replacement.name == "s2"
    assert isinstance(data[2], Sample)


def test_cache_gives_the_same_and_reads_nothing_more(folder: Path) -> None:
    plain = Tiny(str(folder), crop_size=24, augment=True)
    cached = Tiny(str(folder), crop_size=24, augment=True, cache="ram")
    counts = cached.class_pixel_counts()
    for path in folder.rglob("*.png"):
        plain_bytes = path.read_bytes()
        path.write_bytes(b"gone")
        path.with_suffix(".keep").write_bytes(plain_bytes)
    again = [cached[(1, i)] for i in range(6)]
    assert np.array_equal(counts, cached.class_pixel_counts())
    for path in folder.rglob("*.keep"):
        path.rename(path.with_suffix(".png"))
    for i in range(6):
        assert torch.equal(again[i].image, plain[(1, i)].image)
        assert torch.equal(again[i].label, plain[(1, i)].label)


def test_what_a_user_does_to_a_sample_does_not_reach_the_cache(folder: Path) -> None:
    cached = Tiny(str(folder), cache="ram")
    cached[0].image.zero_()
    cached[0].label.zero_()
    assert np.array_equal(cached[0].image.permute(1, 2, 0).numpy(), stored(folder, "images", 0))
    assert np.array_equal(cached[0].label.numpy(), stored(folder, "labels", 0))


def test_data_sets_can_be_sent_to_other_processes(folder: Path) -> None:
    data = pickle.loads(pickle.dumps(Tiny(str(folder), crop_size=24, augment=True, cache="ram")))
    assert data[0].image.shape == (3, 24, 24)


# ---- what the labels hold


def test_pixel_counts(folder: Path) -> None:
    counts = Tiny(str(folder)).class_pixel_counts()
    for index in range(6):
        want = [int((stored(folder, "labels", index) == c).sum()) for c in range(3)]
        assert counts[index].tolist() == want
    assert Tiny(str(folder)).class_pixel_counts(limit=2).shape == (2, 3)


def test_class_weights_are_median_frequency_balancing(folder: Path) -> None:
    counts = Tiny(str(folder)).class_pixel_counts().astype(float)
    frequency = []
    for c in range(3):
        where = counts[:, c] > 0
        frequency.append(counts[:, c].sum() / counts[where].sum())
    want = np.median(frequency) / frequency
    weights = Tiny(str(folder)).class_weights()
    assert weights.dtype == torch.float32
    assert np.allclose(weights.numpy(), want, rtol=1e-6)
    # A class that does not occur gets the weight 1.
    assert Tiny(str(folder), classes=5).class_weights()[3:].tolist() == [1, 1]


def test_sample_weights_favor_rare_classes(folder: Path) -> None:
    weights = Tiny(str(folder)).sample_weights()
    assert weights.sum() == pytest.approx(1)
    # Class 2 is in one image of six, the median class in all: sqrt(1 / (1/6)).
    assert weights[4] / weights[0] == pytest.approx(6**0.5)


def test_mean_and_std_are_measured(folder: Path) -> None:
    data = Tiny(str(folder), mean="auto", std="auto")
    pixels = np.concatenate([stored(folder, "images", i).reshape(-1, 3) for i in range(6)]) / 255
    assert np.allclose(data.mean, pixels.mean(0))
    assert np.allclose(data.facts.std, pixels.std(0))
    assert Tiny(str(folder), mean="auto").std == Tiny.std
    for path in (folder / "images").iterdir():
        write_png(path, np.full((24, 32, 3), 7, np.uint8))
    with pytest.raises(UserError, match='"std": "auto": channel 0 has only one value'):
        Tiny(str(folder), std="auto", on_error="skip")


def test_mean_of_0_to_255_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"mean must be for intensities in \[0, 1\].*did you mean \[0.4824,"):
        Tiny(str(folder), mean=[123, 116, 103])
    with pytest.raises(ValueError, match="std must be"):
        Tiny(str(folder), std=[58, 57, 57])


def test_value_range_and_pixels_without_data(tmp_path: Path) -> None:
    image = np.full((8, 9, 3), 5000, np.float32)
    image[0], image[1, 0] = -9999, np.nan
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", image)
    write_png(tmp_path / "labels" / "a.png", np.ones((8, 9), np.uint8))

    class Arrays(Tiny):
        def samples(self) -> list[Entry]:
            return [Entry(self.data_dir / "images/a.npy", self.data_dir / "labels/a.png", "a")]

    with pytest.raises(UserError, match="value_range"):
        Arrays(str(tmp_path))
    data = Arrays(str(tmp_path), value_range=[0, 10000], nodata=-9999)
    image, label = data.read(0)
    assert np.allclose(image[2:], 0.5)
    assert np.allclose(image[0], data.mean)
    assert np.allclose(image[1, 0], data.mean)
    assert (label[0] == 255).all()
    assert label[1].tolist() == [255] + [1] * 8
    assert data.facts.value_range == (0, 10000)
    assert np.allclose(data.measure()[0], 0.5)


def test_entries_survive_odd_names(tmp_path: Path) -> None:
    listed = [Entry(Path("/a/Straße 1.png"), None, "Straße 1"), Entry(None, Path("b"), ""), Entry(None, None, "x")]
    entries = Entries(listed)
    assert list(entries) == listed
    assert entries[-1] == listed[-1]
    with pytest.raises(IndexError):
        entries[3]
