"""Each config in configs/ can be built: data set, network, loss, optimizer and schedule, with small files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dataloaders
import models
from models.backbones import common
from utils import config as configs
from utils.batch import Batch, equal_sizes
from utils.config import building
from utils.config.schema import Component, Config

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH, IMAGES = 60, 80, 8  # images, so that a tenth is at least one
SEED = 7


def our_configs() -> list[str]:
    files = [ROOT / "config.json", *(p for p in ROOT.glob("configs/**/*.json") if p.name != "schema.json")]
    return sorted(str(p.relative_to(ROOT)) for p in files)


# -- small trees of files in the layouts of the public data sets --------------------------------------------------


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(SEED).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(drawn).save(path)


def _mask(path: Path, values: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.resize(np.array(values, np.uint8), WIDTH)
    Image.fromarray(np.tile(stripes, (HEIGHT, 1))).save(path)


def _voc(root: Path, args: dict[str, Any], classes: int) -> None:
    devkit = root / "VOCdevkit" / "VOC2012"
    two_columns = args["split"].endswith("_aug")
    labels = "SegmentationClassAug" if two_columns else "SegmentationClass"
    lines = []
    for i in range(IMAGES):
        name = f"{args['split']}_{i}"
        _image(devkit / "JPEGImages" / f"{name}.jpg")
        _mask(devkit / labels / f"{name}.png", [*range(classes), 255])
        lines.append(f"/JPEGImages/{name}.jpg /{labels}/{name}.png" if two_columns else name)
    listing = devkit / "ImageSets" / "Segmentation" / f"{args['split']}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(lines) + "\n")


def _cityscapes(root: Path, args: dict[str, Any], classes: int) -> None:
    for i in range(IMAGES):
        stem = f"ulm_00000{i}_000019"
        _image(root / "leftImg8bit" / args["split"] / "ulm" / f"{stem}_leftImg8bit.png")
        _mask(root / "gtFine" / args["split"] / "ulm" / f"{stem}_gtFine_labelIds.png", list(range(34)))


def _ade20k(root: Path, args: dict[str, Any], classes: int) -> None:
    for i in range(IMAGES):
        _image(root / "images" / args["split"] / f"ADE_{args['split']}_{i:08d}.jpg")
        _mask(root / "annotations" / args["split"] / f"ADE_{args['split']}_{i:08d}.png", [0, 1, classes])


def _coco(root: Path, args: dict[str, Any], classes: int) -> None:
    for i in range(IMAGES):
        _image(root / "images" / args["split"] / f"{i:012d}.jpg")
        _mask(root / "annotations" / args["split"] / f"{i:012d}.png", [0, 1, 181, 255])


def _kvasir(root: Path, args: dict[str, Any], classes: int) -> None:
    for split in ("train", "val"):
        for i in range(IMAGES):
            _image(root / "images" / f"{split}_{i}.jpg")
            _mask(root / "masks" / f"{split}_{i}.jpg", [0] * 40 + [255] * 40)
        (root / f"{split}.txt").write_text("".join(f"{split}_{i}\n" for i in range(IMAGES)))


def _kvasir_split(root: Path, args: dict[str, Any], classes: int) -> None:
    for i in range(IMAGES):
        _image(root / "images_split" / args["split"] / "jpg_images" / f"{i}.jpg")
        _mask(root / "masks_split" / args["split"] / "jpg_masks" / f"{i}.jpg", [0] * 40 + [255] * 40)


def _deepscene(root: Path, args: dict[str, Any], classes: int) -> None:
    part = "train" if args["split"] == "train" else "test"
    for i in range(IMAGES):
        _image(root / part / "rgb" / f"{i}_Clipped.jpg")
        _mask(root / part / "GT_index" / f"{i}_mask.png", list(range(classes)))


def _folder(root: Path, args: dict[str, Any], classes: int) -> None:
    values = args.get("mask_values", list(range(max(2, classes))))
    if "list_file" in args:
        listing = root / args["list_file"].replace("{split}", args["split"])
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"images/{i}.png\tmasks/{i}.png\n" for i in range(IMAGES)))
    by_name = {"list_file", "val_fraction", "test_fraction", "val_fold"} & set(args)
    part = "" if by_name else args.get("split", "")  # otherwise each split has its own folders
    for i in range(24):  # enough for each split to get some
        _image(root / args.get("images", "images") / part / f"{i}.png")
        _mask(root / args.get("masks", "masks") / part / f"{i}{args.get('mask_suffix', '')}.png", values)


TREES: dict[str, Callable[[Path, dict[str, Any], int], None]] = {
    "VOC": _voc,
    "CityScapes": _cityscapes,
    "ADE20K": _ade20k,
    "COCO": _coco,
    "KvasirSEG": _kvasir,
    "DeepScene": _deepscene,
    "Folder": _folder,
}


def grow(component: Component, folder: Path) -> None:
    """Write a small tree of files for a loader, and let it read two images at a time in this process."""
    kind = dataloaders.LOADERS.canonical(component.type)
    args = component.args
    args.update(num_workers=0, batch_size=2)
    if kind == "Shapes":
        args.update(length=4)
    else:
        args["data_dir"] = str(folder)
        known = {k: v for k, v in args.items() if k in ("classes", "data_dir")}
        TREES[kind](folder, args, dataloaders.LOADERS[kind].facts_for(**known).num_classes)


# -- the configs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=our_configs())
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return a config of configs/ with a few small files as its data."""
    folder = tmp_path_factory.mktemp("data")
    raw = configs.read(ROOT / request.param)
    sections = [s for s in ("train_loader", "val_loader", "test_loader") if raw.get(s)]
    written = [f"{s}.args.data_dir={folder}" for s in sections if raw[s]["type"] != "Shapes"]
    config = configs.load(ROOT / request.param, written, models=models.MODELS, loaders=dataloaders.LOADERS)
    for section in sections:
        component = getattr(config, section)
        original = raw[section].get("args", {}).get("data_dir", "")
        shared = folder / original.replace("/", "_")
        grow(component, shared)
    return config


def first_batch(config: Config, stage: str) -> tuple[Any, Batch]:
    held_out = stage == "val" and config.val_loader is None
    loader = building.build_loader(dataloaders.build, config, "train" if held_out else stage)
    if held_out:
        loader = loader.get_val_loader()
    loader.set_epoch(1)
    return loader.dataset, next(iter(loader))


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_batches_contain_images_and_labels_of_the_data_sets_classes(config: Config, stage: str) -> None:
    dataset, batch = first_batch(config, stage)
    for part in equal_sizes(batch):
        assert part.images.shape[1] == dataset.in_channels
        assert part.images.shape[2:] == part.labels.shape[1:]
        legal = (part.labels < dataset.label_count) | (part.labels == dataset.ignore_index)
        assert legal.all()
        assert (part.labels != dataset.ignore_index).any()


def test_training_batches_are_of_one_size_that_the_network_takes(config: Config) -> None:
    """On the meta device: the shapes of a training step, without computing it."""
    dataset, batch = first_batch(config, "train")
    assert isinstance(batch.images, torch.Tensor), "give a crop_size: images differ in size"
    args = dict(config.arch.args)
    pretrained = args.pop("pretrained", False)
    with torch.device("meta"):
        model = models.build(config.arch.type, dataset.num_classes, **args)
        outputs = model.train()(torch.zeros(batch.images.shape))
        for logits in outputs.values() if isinstance(outputs, dict) else (outputs,):
            assert logits.shape == (len(batch.names), dataset.num_classes, *batch.images.shape[2:])
    assert "/" not in str(pretrained), "a config we ship names no file of weights that others do not have"
    optimizer = building.build_optimizer(config, model)
    schedule = building.build_schedule(config, optimizer, steps_per_epoch=10, epochs=1)
    rates = []
    for _ in range(10):
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        schedule.step()
    assert max(rates) <= config.optimizer.args.get("lr", 1.0) + 1e-9
    assert rates[-1] < max(rates)


def test_pretrained_weights_exist_in_torchvision(config: Config, monkeypatch) -> None:
    if config.arch.args.get("pretrained") is not True:
        pytest.skip("trains from scratch")

    class Asked(Exception):
        pass

    def ask(name: str) -> None:
        raise Asked(name)

    monkeypatch.setattr(common, "_from_torchvision", ask)
    with torch.device("meta"), pytest.raises(Asked):
        models.build(config.arch.type, 3, **config.arch.args)


def test_the_loss_takes_the_labels(config: Config) -> None:
    dataset, batch = first_batch(config, "train")
    loss = building.build_loss(config, dataset, dataset.ignore_index)
    labels = next(equal_sizes(batch)).labels[:, ::8, ::8].long()
    logits = torch.zeros(len(labels), dataset.num_classes, *labels.shape[1:], requires_grad=True)
    value = loss(logits, labels)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_every_layout_can_be_written_here() -> None:
    assert set(TREES) | {"Shapes"} == set(dataloaders.LOADERS)
