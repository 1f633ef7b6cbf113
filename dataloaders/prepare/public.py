"""Download public data sets and unpack them into the layout that their loaders read."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.prepare.download import Archive, Unreachable, fetch, unpack, verify
from dataloaders.reading.matlab import load_mat
from utils.errors import UserError, plural
from utils.files import expand, write_text
from utils.images import voc_colormap, write_png
from utils.progress import progress_bar

DOWNLOADS = "downloads"
VOC_ROOT = Path("VOCdevkit/VOC2012")


@dataclass(frozen=True)
class Recipe:
    """How a data set is downloaded."""

    archives: tuple[Archive, ...]
    config: str  # one in configs/
    page: str  # of the publisher, with the terms of use and the files
    note: str  # printed first: size, license
    finish: Callable[[Path], None] | None = None  # called with the folder after unpacking


def run(args: argparse.Namespace) -> None:
    """Download the data set that the command line names."""
    if args.aug and args.name != "voc":
        raise UserError(f"--aug: only voc has augmented lists, not {args.name}")
    editions = {"voc": "_aug" if args.aug else "", "coco_stuff": args.partition.removeprefix("CocoStuff")}
    recipe = RECIPES[args.name + editions.get(args.name, "")]
    print(recipe.note)
    prepare(recipe, expand(args.dir), args.mirror, not args.no_verify, args.delete_archives)
    print(
        f"\nready: {args.dir}\nlook at it:  python -m dataloaders check --config {recipe.config} "
        f"--set train_loader.args.data_dir={args.dir} --set val_loader.args.data_dir={args.dir}"
    )


def prepare(
    recipe: Recipe, folder: Path, mirror: str | None = None, check: bool = True, delete_archives: bool = False
) -> None:
    """Download missing archives, verify and unpack them into ``folder``, then call ``finish`` of the recipe.

    Archives that are already in ``folder/downloads`` are used. A second call does only what is still missing.
    ``mirror``: a base URL to download from, instead of the publisher's; ``check``: compare checksums.
    """
    for archive in recipe.archives:
        file = folder / DOWNLOADS / archive.filename
        done = file.with_name(file.name + ".unpacked")
        if done.exists():
            print(f"{archive.filename}: already unpacked")
            continue
        checksum = archive.checksum if check else None
        if file.exists():
            verify(file, checksum)
        else:
            _get(recipe, archive, file, mirror, checksum)
        unpack(file, folder / archive.into)
        done.touch()
        if delete_archives:
            file.unlink()
    if recipe.finish is not None:
        recipe.finish(folder)


def _get(recipe: Recipe, archive: Archive, file: Path, mirror: str | None, checksum: str | None) -> None:
    url = f"{mirror.rstrip('/')}/{archive.filename}" if mirror else archive.url
    if url is None:
        raise UserError(
            f"{archive.filename}: the publisher requires an account, so this program cannot download it.\n"
            + by_hand(recipe, file.parent)
        )
    try:
        fetch(url, file, checksum)
    except Unreachable as error:
        raise UserError(f"{error}\n{by_hand(recipe, file.parent)}") from error


def by_hand(recipe: Recipe, downloads: Path) -> str:
    """Return instructions for users without a connection: which files to get, and where to put them."""
    lines = [f"By hand: get these files (terms and addresses: {recipe.page})"]
    for archive in recipe.archives:
        state = "there" if (downloads / archive.filename).exists() else "missing"
        checksum = f"  {archive.checksum.replace(':', ' ')}" if archive.checksum else ""
        lines.append(f"  [{state}] {archive.url or recipe.page + ' -> ' + archive.filename}{checksum}")
    lines.append(f"put them into {downloads}/ and run the same command again. --mirror URL downloads from a mirror.")
    return "\n".join(lines)


# Pascal VOC's augmented training set (Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011)


def augment_voc(folder: Path) -> None:
    """Write ``SegmentationClassAug`` and the ``*_aug`` lists from SBD's .mat files.

    As published: images with a mask of VOC keep it, the others get SBD's. train_aug has all images with a mask except
    VOC's val images (10582 in the full data), and val_aug is VOC's val.
    """
    voc = folder / VOC_ROOT
    contours = folder / "benchmark_RELEASE" / "dataset"
    for needed in (voc / "SegmentationClass", contours / "cls"):
        if not needed.is_dir():
            raise UserError(
                f"{needed}: this folder is missing after unpacking the archives; remove "
                f"{folder / DOWNLOADS}/*.unpacked and run the command again"
            )
    target = voc / "SegmentationClassAug"
    target.mkdir(exist_ok=True)
    own = {path.stem: path for path in (voc / "SegmentationClass").glob("*.png")}
    added = {path.stem: path for path in (contours / "cls").glob("*.mat")}
    for name in progress_bar(sorted(own.keys() | added.keys()), desc="SegmentationClassAug", unit="mask"):
        output = target / f"{name}.png"
        if output.exists():
            continue
        if name in own:
            shutil.copyfile(own[name], output)
        else:
            write_png(output, read_contours(added[name]), voc_colormap())
    _write_lists(voc, own.keys() | added.keys())


def read_contours(path: Path) -> np.ndarray:
    """Return the class ids (uint8, (H, W)) of one of SBD's .mat files."""
    content = load_mat(path)
    try:
        return np.asarray(content["GTcls"]["Segmentation"][0][0], dtype=np.uint8)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path}: there is no GTcls.Segmentation, which SBD's files have ({error})") from error


def _write_lists(voc: Path, masks: Iterable[str]) -> None:
    lists = voc / "ImageSets" / "Segmentation"
    validation = lists.joinpath("val.txt").read_text(encoding="utf-8").split()
    images = {path.stem for path in (voc / "JPEGImages").glob("*.jpg")}
    known = sorted(set(masks) & images)
    train = [name for name in known if name not in set(validation)]
    splits = {"train_aug": train, "val_aug": validation, "trainval_aug": [*train, *validation]}
    for split, names in splits.items():
        lines = (f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in names)
        write_text(lists / f"{split}.txt", "".join(lines))
        print(f"{split}: {plural(len(names), 'image')}")


# Addresses and MD5 sums of VOC and SBD are torchvision's.

_VOC = Archive(
    "VOCtrainval_11-May-2012.tar",
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "md5:6cd6e144f989b92b3379bac3b3de84fd",
)
_CONTOURS = Archive(
    "benchmark.tgz",
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    "md5:82b4d87ceb2ed10f6038a1cba92111cb",
)
_ADE20K = Archive(
    "ADEChallengeData2016.zip",
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
)
_COCO = "http://images.cocodataset.org/zips"
_COCO_STUFF = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset"
_STUFF_MAPS, _STUFF_10K = "stuffthingmaps_trainval2017.zip", "cocostuff-10k-v1.1.zip"

RECIPES = {
    "voc": Recipe(
        (_VOC,),
        "configs/voc.json",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        "Pascal VOC 2012 (2 GB). Images from Flickr: its terms of use apply.",
    ),
    "voc_aug": Recipe(
        (_VOC, _CONTOURS),
        "configs/voc_aug.json",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        "Pascal VOC 2012 (2 GB) and SBD (1.4 GB). Images from Flickr: its terms of use apply.",
        augment_voc,
    ),
    "ade20k": Recipe(
        (_ADE20K,),
        "configs/ade20k.json",
        "http://sceneparsing.csail.mit.edu/",
        "ADE20K scene parsing (0.9 GB): for non-commercial research and education only.",
    ),
    "coco_stuff164k": Recipe(
        (
            Archive("val2017.zip", f"{_COCO}/val2017.zip", "md5:442b8da7639aecaf257c1dceb8ba8c80", "images"),
            Archive(_STUFF_MAPS, f"{_COCO_STUFF}/{_STUFF_MAPS}", None, "annotations"),
            Archive("train2017.zip", f"{_COCO}/train2017.zip", "md5:cced6f7f71b7629ddf16f17bbcfab6b2", "images"),
        ),
        "configs/coco_stuff.json",
        "https://github.com/nightrome/cocostuff",
        "COCO-Stuff 164k (20 GB). Annotations CC BY 4.0; images from Flickr, its terms of use apply.",
    ),
    "coco_stuff10k": Recipe(
        (Archive(_STUFF_10K, f"{_COCO_STUFF}/{_STUFF_10K}"),),
        "configs/coco_stuff.json",
        "https://github.com/nightrome/cocostuff10k",
        "COCO-Stuff 10k (2 GB). Annotations CC BY 4.0; images from Flickr, its terms of use apply.",
    ),
    "cityscapes": Recipe(
        (Archive("gtFine_trainvaltest.zip", None), Archive("leftImg8bit_trainvaltest.zip", None)),
        "configs/cityscapes.json",
        "https://www.cityscapes-dataset.com/downloads/",
        "Cityscapes (12 GB): for non-commercial use, after registration with the publisher.",
    ),
}
