"""The loader: order, ranks, epochs, workers, batches of any size, broken files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

import dataloaders
from base.base_dataloader import BaseDataLoader, EpochBatches
from base.base_dataset import BaseDataSet
from base.entries import Entry, available_cores
from utils.batch import Batch, equal_sizes
from utils.errors import UserError
from utils.images import write_png


class Numbered(BaseDataSet):
    """Images filled with their number and the epoch; every fifth has another size, and some are broken."""

    class_names = ("a", "b")
    num_classes = 2
    palette = ((0, 0, 0), (9, 9, 9))

    def __init__(
        self, count: int = 20, broken: tuple[int, ...] = (), mixed: bool = False, wide: bool = False, **common: object
    ) -> None:
        self.count, self.broken, self.mixed, self.wide = count, broken, mixed, wide
        super().__init__(**common)

    def samples(self) -> list[Entry]:
        return [Entry(None, None, str(i)) for i in range(self.count)]

    def read(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        if index in self.broken:
            raise UserError(f"file {index} is broken")
        size = (6, 8) if self.mixed and index % 5 == 0 else (8, 8)
        image = np.full((*size, 3), index, np.uint8)
        image[0, 0] = epoch
        if self.wide and index % 2:
            image = image.astype(np.float32) / 255
        return image, np.full(size, int(index % 7 == 0), np.uint8)


def loader(count: int = 20, *, data: dict | None = None, **options: object) -> BaseDataLoader:
    options.setdefault("num_workers", 0)
    return BaseDataLoader(Numbered(count, **(data or {})), **options)


def names(batches) -> list[int]:
    return [int(name) for batch in batches for name in batch.names]


def test_batches() -> None:
    batches = list(loader(10, batch_size=4))
    assert [len(b.names) for b in batches] == [4, 4, 2]
    assert all(isinstance(b, Batch) for b in batches)
    assert batches[0].images.shape == (4, 3, 8, 8)
    assert batches[0].images.dtype == torch.uint8
    assert batches[0].labels.shape == (4, 8, 8)
    assert batches[1].images[2, 0, 4, 4] == 6
    assert names(batches) == list(range(10))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    one, two = (loader(batch_size=4, shuffle=True, seed=5) for _ in range(2))
    one.set_epoch(0)
    first = names(one)
    assert sorted(first) == list(range(20))
    assert first != list(range(20))
    one.set_epoch(3)
    two.set_epoch(3)
    assert names(one) == names(two)
    assert names(one) != first
    one.set_epoch(0)
    assert names(one) == first
    assert names(loader(batch_size=4, shuffle=True, seed=6)) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_begin_in_the_middle(workers: int) -> None:
    whole = loader(batch_size=3, shuffle=True, num_workers=workers)
    whole.set_epoch(2)
    everything = names(whole)
    whole.set_epoch(2, start_batch=4)
    assert names(whole) == everything[12:]
    assert len(whole) == 7
    whole.set_epoch(2)
    assert names(whole) == everything


def test_persistent_workers_see_the_epoch() -> None:
    live = loader(batch_size=4, num_workers=1)
    for epoch in (0, 1, 5):
        live.set_epoch(epoch)
        assert all((batch.images[:, :, 0, 0] == epoch).all() for batch in live)
    assert live._iterator is not None  # always the same processes
    (process,) = live._iterator._workers
    live.close()
    assert not process.is_alive()
    assert len(list(live)) == len(live)  # in a new one
    live.close()


@pytest.mark.skipif(available_cores() < 2, reason="needs two cores for two workers")
def test_augmentation_is_the_same_for_any_number_of_workers() -> None:
    def run(workers: int) -> list[Batch]:
        made = dataloaders.build(
            "Shapes",
            length=10,
            size=48,
            crop_size=32,
            augment=True,
            jitter=True,
            batch_size=4,
            shuffle=True,
            num_workers=workers,
            seed=1,
        )
        made.set_epoch(3)
        return list(made)

    for batches in (run(1), run(2)):
        for got, want in zip(batches, run(0), strict=True):
            assert got.names == want.names
            assert torch.equal(got.images, want.images)
            assert torch.equal(got.labels, want.labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_different_sizes_come_as_lists(workers: int) -> None:
    batches = list(loader(10, data={"mixed": True}, batch_size=6, num_workers=workers))
    assert isinstance(batches[0].images, list)
    parts = list(equal_sizes(batches[0]))
    assert sorted(tuple(p.images.shape) for p in parts) == [(2, 3, 6, 8), (4, 3, 8, 8)]
    assert sorted(names(parts)) == list(range(6))


def test_depths_that_differ_are_brought_together() -> None:
    batch = next(iter(loader(4, data={"wide": True}, batch_size=4)))
    assert batch.images.dtype == torch.float32
    assert torch.allclose(batch.images[:, 0, 4, 4], torch.arange(4) / 255)


@pytest.mark.parametrize(
    ("count", "options", "sizes"),
    [
        (9, {"shuffle": True}, [4, 4]),  # a single image is left, which batch norm cannot use
        (10, {"shuffle": True}, [4, 4, 2]),
        (10, {"shuffle": True, "drop_last": True}, [4, 4]),
        (9, {}, [4, 4, 1]),  # evaluation uses all images
        (3, {"shuffle": True, "batch_size": 1}, [1, 1, 1]),
    ],
)
def test_last_batch(count: int, options: dict, sizes: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made = loader(count, **{"batch_size": 4, **options})
    assert [len(b.names) for b in made] == sizes
    assert len(made) == len(sizes)
    assert ("would contain only one image" in caplog.text) == (sizes == [4, 4] and "drop_last" not in options)


def test_no_batch_at_all_is_an_error() -> None:
    with pytest.raises(UserError, match="batch_size"):
        loader(1, batch_size=4, shuffle=True)
    with pytest.raises(UserError, match="batch_size"):
        loader(3, batch_size=4, shuffle=True, drop_last=True)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("batch_size", 0), ("num_workers", -1), ("val_split", 1.5), ("sampler", "balanced")],
)
def test_impossible_arguments_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        dataloaders.build("Shapes", shuffle=True, **{argument: value})


def test_val_split_always_holds_out_the_same_samples() -> None:
    made = loader(20, batch_size=4, shuffle=True, val_split=0.25, seed=2)
    held_out = made.get_val_loader()
    inner, outer = names(made), names(held_out)
    assert len(inner) == 15 or len(inner) == 14
    assert len(outer) == 5
    assert outer == sorted(outer)
    assert not set(inner) & set(outer)
    made.set_epoch(7)
    assert not set(names(made)) & set(outer)
    assert names(loader(20, val_split=0.25, seed=2).get_val_loader()) == outer
    assert loader().get_val_loader() is None


def test_held_out_samples_are_not_augmented() -> None:
    made = dataloaders.build(
        "Shapes", length=8, size=48, crop_size=32, augment=True, val_split=0.5, shuffle=True, num_workers=0
    )
    held_out = made.get_val_loader()
    assert held_out.dataset.augmentation is None
    assert made.dataset.augmentation is not None
    first, again = next(iter(held_out)), next(iter(held_out))
    assert torch.equal(first.images, again.images)
    assert first.images.shape[-2:] == (32, 32)
    whole = next(iter(made.get_val_loader(whole=True)))
    assert whole.names == first.names
    assert whole.images.shape[-2:] == (48, 48)  # as test.py and inference.py see them


def test_weighted_sampler_shows_rare_classes_more_often() -> None:
    made = loader(70, batch_size=10, shuffle=True, sampler="weighted")
    share = []
    for epoch in range(30):
        made.set_epoch(epoch)
        share.append(np.mean([n % 7 == 0 for n in names(made)]))
    # One image in 7 contains only the rare class; class 0 is in 6 of 7, so the median share is 1/2.
    factor = (0.5 / (1 / 7)) ** 0.5
    assert np.mean(share) == pytest.approx(factor / (factor + 6), abs=0.03)
    with pytest.raises(ValueError, match="needs shuffle"):
        loader(sampler="weighted")
    with pytest.raises(ValueError, match="sampler"):
        dataloaders.build("Shapes", length=4, sampler="weighted", shuffle=True, num_workers=0)


# ---- broken files


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_are_left_out_of_evaluation(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    data = {"broken": (1, 2, 3, 8, 9), "on_error": "skip"}
    made = loader(10, data=data, batch_size=2, num_workers=workers)
    assert names(made) == [0, 4, 5, 6, 7]  # without the batches (2, 3) and (8, 9)
    assert made.skipped == {f"file {i} is broken": 1 for i in data["broken"]}
    assert "file 8 is broken" in caplog.text


def test_broken_files_are_replaced_in_training() -> None:
    made = loader(10, data={"broken": (1, 2), "on_error": "skip"}, batch_size=5, shuffle=True)
    seen = names(made)
    assert len(seen) == 10
    assert sorted(set(seen)) == [0, 3, 4, 5, 6, 7, 8, 9]
    assert len(made.skipped) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_stop_by_default(workers: int) -> None:
    # Only the message, without the worker's traceback.
    with pytest.raises(UserError, match=r"^file 3 is broken\n\(python -m dataloaders check .*skip.*\)$"):
        list(loader(10, data={"broken": (3,)}, batch_size=2, num_workers=workers))


# ---- several processes


def shares(monkeypatch: pytest.MonkeyPatch, world: int, count: int, **options: object) -> list[EpochBatches]:
    made = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "get_world_size", lambda: world)
        made.append(EpochBatches(np.arange(count), 3, **options))
    return made


@pytest.mark.parametrize(("world", "count"), [(2, 11), (3, 20), (4, 9)])
def test_evaluation_counts_every_sample_once(monkeypatch: pytest.MonkeyPatch, world: int, count: int) -> None:
    seen = [index for share in shares(monkeypatch, world, count) for _, index in share.keys(0)]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(("world", "count"), [(2, 11), (3, 20), (4, 9)])
def test_training_shares_are_equal_and_apart(monkeypatch: pytest.MonkeyPatch, world: int, count: int) -> None:
    parts = shares(monkeypatch, world, count, shuffle=True)
    orders = [[index for _, index in part.keys(4)] for part in parts]
    assert {len(order) for order in orders} == {count // world}
    assert len({len(part) for part in parts}) == 1
    assert len({i for order in orders for i in order}) == world * (count // world)


def test_an_index_drawn_again_in_an_epoch_is_augmented_differently(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        write_png(tmp_path / "images" / f"{i}.png", rng.integers(0, 256, (24, 24, 3), np.uint8))
        write_png(tmp_path / "masks" / f"{i}.png", np.full((24, 24), int(i == 0), np.uint8))
    loader = dataloaders.build(
        "Folder",
        data_dir=str(tmp_path),
        classes=["a", "b"],
        crop_size=20,
        augment=True,
        shuffle=True,
        sampler="weighted",
        num_workers=0,
    )
    repeats = 0
    for epoch in range(8):
        keys = loader.batches.keys(epoch)
        assert len(set(keys)) == 6
        for key in keys:
            repeats += len(key) == 3
            earlier = [loader.dataset[k].image for k in keys[: keys.index(key)] if k[1] == key[1]]
            assert len(earlier) == (key[2] if len(key) == 3 else 0)
            assert not any(torch.equal(loader.dataset[key].image, image) for image in earlier)
    assert repeats > 5


# ---- building by name


def test_build_names_unknown_arguments() -> None:
    with pytest.raises(ValueError, match="batchsize: Shapes takes no such argument; did you mean batch_size"):
        dataloaders.build("Shapes", batchsize=3)
    with pytest.raises(UserError, match="did you mean Shapes"):
        dataloaders.build("Shape")
    assert dataloaders.LOADERS.canonical("kvasirSEG") == "KvasirSEG"


@pytest.mark.parametrize("name", list(dataloaders.LOADERS))
def test_every_data_set_states_its_facts_and_arguments(name: str) -> None:
    dataset = dataloaders.LOADERS[name]
    assert issubclass(dataset, BaseDataSet)
    facts = dataset.facts_for()
    assert facts.num_classes == dataset.num_classes == len(facts.class_names) == len(facts.palette)
    assert len(facts.mean) == len(facts.std) == 3
    fields = dataloaders.LOADERS.arguments(name).model_fields
    documented = "split batch_size crop_size base_size augment scale flip rotate blur jitter shuffle val val_split"
    for argument in f"data_dir {documented} num_workers in_channels classes palette cache on_error".split():
        assert argument in fields
        assert fields[argument].annotation is not Any


def test_only_standard_library_is_imported_before_a_name_is_asked_for(root: Path) -> None:
    import subprocess
    import sys

    code = "import sys, dataloaders; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
