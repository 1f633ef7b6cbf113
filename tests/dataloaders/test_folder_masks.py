"""The Folder loader: all ways to store masks, and mistakes in them."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataloaders
from dataloaders.reading.colors import ColorTable
from tests.dataloaders.folders import CLASSES, IDS, folder, label, photo, save
from utils.errors import UserError
from utils.images import write_png

# ---- kinds of masks


def test_palette_masks_are_read_by_index(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    write_png(tmp_path / "masks/a.png", IDS, [(i, 200, 0) for i in range(256)])
    assert np.array_equal(label(folder(tmp_path)), IDS)


PALETTE = [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
VOID = (255, 255, 255)


def painted() -> np.ndarray:
    return np.array([*PALETTE, VOID], np.uint8)[np.where(IDS == 255, 3, IDS)]


def test_masks_painted_in_the_palette_are_found_out(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", painted())
    dataset = folder(tmp_path, palette=PALETTE, ignore_colors=[VOID])
    assert np.array_equal(label(dataset), IDS)
    assert dataset.palette == tuple(PALETTE)
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again[0].label.numpy(), IDS)


def test_painted_masks_with_transparency_or_as_palette_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photo(tmp_path / f"images/{name}.jpg")
    save(tmp_path / "masks/a.png", np.dstack([painted(), np.full(IDS.shape, 255, np.uint8)]))
    # Indices in another order than the classes: only the colors tell.
    write_png(tmp_path / "masks/b.png", np.where(IDS == 255, 0, 3 - IDS).astype(np.uint8), [VOID, *PALETTE[::-1]])
    dataset = folder(tmp_path, palette=PALETTE, ignore_colors=[VOID], colors=True)
    assert np.array_equal(label(dataset, 0), IDS)
    assert np.array_equal(label(dataset, 1), IDS)


def test_unknown_colors_are_reported_with_counts(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", painted())
    with pytest.raises(UserError, match=r"masks/a.png .*\[255, 255, 255\] \(1 pixel\)[\s\S]*ignore_colors"):
        folder(tmp_path, palette=PALETTE)


def test_a_color_of_two_classes_is_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", painted())
    (tmp_path / "classes.txt").write_text("0 0 0 background\n255 0 0 cell\n255 0 0 dirt\n")
    for args in (
        {"classes": "classes.txt"},
        {"palette": [*PALETTE[:2], PALETTE[1]], "ignore_colors": [VOID, PALETTE[2]]},
        {"palette": PALETTE, "ignore_colors": [VOID, PALETTE[1]]},
    ):
        with pytest.raises(UserError, match=r"a\.png: it is unclear .* stands for both"):
            folder(tmp_path, **args)


def test_colors_are_matched_exactly_not_nearly(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    nearly = painted()
    nearly[0, 0] = (1, 0, 0)
    save(tmp_path / "masks/a.png", nearly)
    with pytest.raises(UserError, match=r"\[1, 0, 0\]"):
        folder(tmp_path, palette=PALETTE, ignore_colors=[VOID])


def test_painted_masks_without_palette_ask_for_one(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", painted())
    with pytest.raises(UserError, match="painted in colors: set `palette`"):
        folder(tmp_path)
    with pytest.raises(ValueError, match="different color"):
        folder(tmp_path, palette=[(0, 0, 0), (1, 1, 1), (1, 1, 1)], colors=True)


def test_gray_masks_saved_as_rgb_are_class_ids(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", np.repeat(IDS[:, :, None], 3, 2))
    assert np.array_equal(label(folder(tmp_path)), IDS)


def test_color_tables_may_be_used_by_threads_at_once() -> None:
    mask = np.array([(i, j, 7) for i in range(16) for j in range(16)], np.uint8).reshape(16, 16, 3)
    for _ in range(12):
        table = ColorTable((tuple(color), 1) for color in mask.reshape(-1, 3).tolist())
        start = threading.Barrier(4)

        def decode(table: ColorTable = table, start: threading.Barrier = start) -> int:
            start.wait()
            return int(table.decode(mask, "a.png").sum())

        with ThreadPoolExecutor(4) as pool:
            assert [future.result() for future in [pool.submit(decode) for _ in range(4)]] == [256] * 4


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=2, max_size=12, unique=True), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_color_tables_agree_with_a_search_pixel_by_pixel(colors: list[tuple[int, int, int]], seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, len(colors), (5, 7))
    table = ColorTable((color, i) for i, color in enumerate(colors))
    decoded = table.decode(np.array(colors, np.uint8)[ids], "a.png")
    assert np.array_equal(decoded, ids)


def test_painted_masks_that_a_program_saved_again(tmp_path: Path) -> None:
    """Among RGB masks, palette files are read by their colors, and gray files only if they cannot mean class ids."""
    for name in ("a", "b", "c"):
        photo(tmp_path / f"images/{name}.jpg")
    save(tmp_path / "masks/a.png", painted())
    permuted = np.where(IDS == 255, 0, 3 - IDS).astype(np.uint8)
    write_png(tmp_path / "masks/b.png", permuted, [VOID, *PALETTE[::-1]])
    write_png(tmp_path / "masks/c.png", np.where(IDS == 255, 255, 0).astype(np.uint8))
    dataset = folder(tmp_path, palette=PALETTE, ignore_colors=[VOID])
    assert np.array_equal(label(dataset, 0), IDS)
    assert np.array_equal(label(dataset, 1), IDS)
    assert np.array_equal(label(dataset, 2), np.where(IDS == 255, 255, 0))
    write_png(tmp_path / "masks/c.png", IDS)
    with pytest.raises(UserError, match=r"c\.png contains colors that are not a class: .*\[1, 1, 1\]"):
        folder(tmp_path, palette=PALETTE, ignore_colors=[VOID])
    write_png(tmp_path / "masks/c.png", np.where(IDS == 2, 1, 0).astype(np.uint8))
    with pytest.raises(UserError, match=r"c\.png is gray, but other masks are painted"):
        folder(tmp_path, palette=[(1, 1, 1), (255, 0, 0), (0, 0, 0)], ignore_colors=[VOID, (0, 0, 255)])


def test_palettes_that_contradict_the_config_or_each_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photo(tmp_path / f"images/{name}.jpg")
    ids = np.minimum(IDS, 2)
    write_png(tmp_path / "masks/a.png", ids, PALETTE)
    write_png(tmp_path / "masks/b.png", 2 - ids, PALETTE[::-1])
    with pytest.raises(UserError, match=r"b\.png has a different palette from .*a\.png: value 0 is \[0, 0, 255\] here"):
        folder(tmp_path)
    assert np.array_equal(label(folder(tmp_path, colors=False), 1), 2 - ids)
    assert np.array_equal(label(folder(tmp_path, colors=True, palette=PALETTE), 1), ids)
    write_png(tmp_path / "masks/a.png", 2 - ids, PALETTE[::-1])
    with pytest.raises(UserError, match="the colors of `palette` in another order"):
        folder(tmp_path, palette=PALETTE)


def test_palettes_without_the_unused_colors(tmp_path: Path) -> None:
    """An optimizer removed the color of class 1 from a mask that does not contain it."""
    for name in ("a", "b"):
        photo(tmp_path / f"images/{name}.jpg")
    there = (IDS == 2).astype(np.uint8)
    for names, values in ((("a", "b"), (2, 1)), (("b", "a"), (2, 1))):
        for name, value in zip(names, values, strict=True):
            write_png(tmp_path / f"masks/{name}.png", value * there, PALETTE if value == 2 else PALETTE[::2])
        with pytest.raises(UserError, match=r"palette from .*: \[0, 0, 255\] is value [12] here, and [12] there"):
            folder(tmp_path)
    # The same colors in the palettes of both, one of them twice: nothing was moved.
    for name, value in (("a", 2), ("b", 1)):
        write_png(tmp_path / f"masks/{name}.png", value * there, [PALETTE[0], PALETTE[2], PALETTE[2]])
    assert np.array_equal(label(folder(tmp_path), 1), there)


def test_class_files_with_colors_say_what_masks_mean(tmp_path: Path) -> None:
    """As CVAT exports segmentation masks."""
    photo(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", np.array(PALETTE, np.uint8)[np.minimum(IDS, 2)])
    lines = ["# label:color_rgb:parts:actions"]
    lines += [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(CLASSES, PALETTE, strict=True)]
    (tmp_path / "labelmap.txt").write_text("\n".join(lines))
    dataset = folder(tmp_path, classes="labelmap.txt")
    assert np.array_equal(label(dataset), np.minimum(IDS, 2))
    assert (dataset.class_names, dataset.palette) == (tuple(CLASSES), tuple(PALETTE))


# ---- two classes


def two(root: Path, values: tuple[int, int], dtype: type = np.uint8, suffix: str = ".png") -> np.ndarray:
    ids = (np.arange(64 * 48).reshape(48, 64) // 64 > 20).astype(int)
    save(root / "images/a.png", np.zeros((48, 64, 3), np.uint8))
    options = {"quality": 80} if suffix == ".jpg" else {}
    save(root / f"masks/a{suffix}", np.array(values, dtype)[ids], **options)
    return ids


BINARY = ["background", "tumor"]


@pytest.mark.parametrize("classes", [BINARY, ["tumor"]])
def test_masks_of_0_and_255_are_explained(tmp_path: Path, classes: list[str]) -> None:
    ids = two(tmp_path, (0, 255))
    with pytest.raises(UserError, match=r"only 0 and 255[\s\S]*tumor[\s\S]*mask_values: \[0, 255\]"):
        folder(tmp_path, classes=classes)
    dataset = folder(tmp_path, classes=classes, mask_values=[0, 255])
    assert dataset.num_classes == len(classes)
    assert np.array_equal(label(dataset), ids)
    assert dataset[0].label.dtype == torch.uint8


def test_masks_of_0_and_255_among_many_empty_ones(tmp_path: Path) -> None:
    for i in range(60):
        photo(tmp_path / f"images/{i:02}.png")
        save(tmp_path / f"masks/{i:02}.png", np.full(IDS.shape, 255 * (i == 1), np.uint8))
    with pytest.raises(UserError, match=r"only 0 and 255 \(60 were read\)"):
        folder(tmp_path, classes=BINARY)


def test_void_may_be_255_if_requested(tmp_path: Path) -> None:
    two(tmp_path, (0, 255))
    assert set(label(folder(tmp_path, classes=BINARY, mask_values=[0, 1])).flat) == {0, 255}


def test_masks_of_0_1_and_255_are_not_changed(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    save(tmp_path / "masks/a.png", np.minimum(IDS, 1) + np.where(IDS == 255, 254, 0).astype(np.uint8))
    assert set(label(folder(tmp_path, classes=BINARY)).flat) == {0, 1, 255}


def test_jpeg_masks_need_a_threshold(tmp_path: Path) -> None:
    ids = two(tmp_path, (0, 255), suffix=".jpg")
    with pytest.raises(UserError, match="JPEG[\\s\\S]*threshold: 127"):
        folder(tmp_path, classes=BINARY)
    assert np.array_equal(label(folder(tmp_path, classes=BINARY, threshold=127)), ids)
    with pytest.raises(ValueError, match="two classes"):
        folder(tmp_path, classes=CLASSES, threshold=127)


def test_black_and_white_rgb_masks(tmp_path: Path) -> None:
    ids = two(tmp_path, (0, 255))
    save(tmp_path / "masks/a.png", np.repeat(ids[:, :, None] * 255, 3, 2).astype(np.uint8))
    for args in ({"mask_values": [0, 255]}, {"palette": [(0, 0, 0), (255, 255, 255)]}, {"threshold": 0}):
        assert np.array_equal(label(folder(tmp_path, classes=BINARY, **args)), ids), args
    one = folder(tmp_path, classes=["tumor"], palette=[(255, 255, 255)])
    assert np.array_equal(label(one), ids), "one class stands against black"


# ---- values


def test_mask_values_map_by_position_and_refuse_the_rest(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    wide = np.array([5, 300, 1000, 7], np.uint16)[np.where(IDS == 255, 3, IDS)]
    save(tmp_path / "masks/a.png", wide)
    args = {"mask_values": [5, 300, 1000]}
    assert np.array_equal(label(folder(tmp_path, ignore_values=[7], **args)), IDS)
    assert (label(folder(tmp_path, ignore_values=[7], ignore_index=-1, **args)) == -1).sum() == 1
    with pytest.raises(UserError, match=r"contains values \[7\] \(1 pixel\)"):
        folder(tmp_path, **args)


def test_negative_values_of_geographic_data(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    np.save(tmp_path / "masks/a.npy", np.where(IDS == 255, -9999, IDS.astype(np.float32)))
    assert np.array_equal(label(folder(tmp_path, ignore_values=[-9999])), IDS)
    with pytest.raises(UserError, match="-9999"):
        folder(tmp_path)


@pytest.mark.parametrize("values", [[0, 1], [0, 1, 1], [2**40, 0, 1]])
def test_impossible_mask_values(plain: Path, values: list[int]) -> None:
    with pytest.raises(ValueError, match="mask_values"):
        folder(plain, mask_values=values)


def test_values_out_of_range_name_file_value_and_key(plain: Path) -> None:
    with pytest.raises(
        UserError, match=r"im0\.png contains label values that are not a class: 2 .*classes.*mask_values"
    ):
        folder(plain, classes=BINARY)


def test_labels_next_to_255_classes(tmp_path: Path) -> None:
    """With more than 255 classes, 255 is one of them and the ignore index must lie elsewhere."""
    photo(tmp_path / "images/a.png")
    save(tmp_path / "masks/a.png", np.where(IDS == 255, 255, 299 * IDS.astype(int)).astype(np.uint16))
    dataset = folder(tmp_path, classes=600, ignore_index=-1)
    assert set(label(dataset).flat) == {0, 255, 299, 598}


def test_classes_are_required_and_may_come_from_a_file(plain: Path) -> None:
    with pytest.raises(ValueError, match="classes is missing"):
        folder(plain, classes=None)
    (plain / "classes.txt").write_text("\n".join(CLASSES))
    assert folder(plain, classes="classes.txt").class_names == tuple(CLASSES)


def test_sizes_that_differ_name_both_files(plain: Path) -> None:
    save(plain / "masks/im0.png", IDS[:2])
    with pytest.raises(UserError, match=r"images/im0\.jpg is 4x3, .*masks/im0\.png is 4x2"):
        folder(plain)


def test_batches_come_augmented(plain: Path) -> None:
    loader = dataloaders.build(
        "Folder",
        data_dir=str(plain),
        classes=CLASSES,
        crop_size=8,
        augment=True,
        shuffle=True,
        batch_size=4,
        num_workers=0,
    )
    batch = next(iter(loader))
    assert batch.images.shape == (4, 3, 8, 8)
    assert set(batch.labels.unique().tolist()) <= {0, 1, 2, 255}
