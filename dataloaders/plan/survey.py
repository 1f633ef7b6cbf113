"""Find out the layout of a folder of data, its classes, and how its masks and images are stored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import dataloaders
from base.base_dataset import BaseDataSet
from base.classes import Classes, Color, classes_of, read_classes
from base.entries import Entry, spread
from base.layout import found_tree
from base.text import read_lines
from dataloaders.check.findings import Findings, inspect, likely_largest
from dataloaders.folder import SPLIT_OF_FOLDER
from dataloaders.plan.groups import find_groups
from dataloaders.reading.pairing import find_folder, image_files, subfolders
from utils.errors import UserError, plural
from utils.images import read_mask
from utils.images.formats import decode, read_bytes

SAMPLES = 200
_PROBED = 40
_PROBED_IF_EMPTY = 500  # if the first ones contain only background
_MOST_CLASSES = 60  # that are found without their names
_NEAR = 5  # distance of gray levels from black and white
_WIDE_VOID = 65535  # usually means "unlabeled" in masks of 16 bits
_CLASS_FILES = ("classes.txt", "labelmap.txt", "class_dict.csv", "_classes.csv", "labels.txt", "class_names.txt")
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "photos", "rgb")
_MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "annotation", "segmentationclass", "gt", "segs")
_MARKS = {  # folders by which a public data set is known
    "KvasirSEG": ("images_split",),
    "CityScapes": ("leftImg8bit", "leftImg8bit_trainvaltest"),
    "ADE20K": ("ADEChallengeData2016", "annotations/training"),
    "COCO": ("annotations/train2017",),
}
_APART = 0.1  # distance of a value that means "no data" from the others, as a share of their range
_NO_DATA = -99  # negative numbers from here on usually mean "no data"


@dataclass
class Survey:
    """A folder of data, and the loader that reads it."""

    loader: str
    args: dict[str, Any]  # of the loader, shared by all splits
    why: dict[str, str] = field(default_factory=dict)  # argument (or "loader", "split") -> the reason, as text
    train: dict[str, Any] = field(default_factory=dict)  # further arguments
    val: dict[str, Any] | None = None  # the same; None if there is no such split
    test: dict[str, Any] | None = None
    dataset: BaseDataSet = field(init=False)  # the training data
    findings: Findings = field(init=False)  # of some of its samples

    def take(self, argument: str, value: Any, why: str) -> None:
        """Set an argument of the loader and give the reason."""
        self.args[argument], self.why[argument] = value, why

    @property
    def classes(self) -> Classes | None:
        """Names and colors of the classes; None if they are not known."""
        classes = self.args.get("classes")
        return None if classes is None else classes_of(classes, self.args["data_dir"])


def survey(root: Path, images: str | None = None, masks: str | None = None, classes: str | None = None) -> Survey:
    """Examine a folder of data; the other arguments are those of the command line.

    Raises:
        UserError: the layout is not known, or no file can be read.
    """
    if not root.is_dir():
        raise UserError(f"--data-dir: {root} is not a folder")
    found = (_published(root) if images is None and masks is None else None) or _folder(root, images, masks)
    _take_classes(found, root, classes)
    entries = _entries(found)
    if found.loader == "Folder":
        _take_masks(found, [entry.label for entry in entries if entry.label is not None])
    _take_images(found, [entry.image for entry in entries if entry.image is not None])
    if found.loader == "Folder" and found.val is None:
        _take_fractions(found, root, entries)
    elif "val_split" in found.train:
        found.train["val_split"] = _take_groups(found, entries, found.train["val_split"])
    found.dataset = _open(found, found.train)
    found.findings = inspect(found.dataset, SAMPLES)
    if not found.findings.good:
        raise UserError(f"{root}: no sample can be read. The first problem: {found.findings.problems[0]}")
    return found


def _open(found: Survey, split: dict[str, Any]) -> BaseDataSet:
    return dataloaders.build(found.loader, **found.args, **split, num_workers=0, on_error="skip").dataset


# ---- layout


def _published(root: Path) -> Survey | None:
    """Return the loader of a public data set if the folder has its layout, else None."""
    base = {"data_dir": str(root)}
    voc = next((p for p in (root / "VOCdevkit/VOC2012", root / "VOC2012", root) if (p / "ImageSets").is_dir()), None)
    if voc is not None and (voc / "JPEGImages").is_dir():
        lists = {path.stem: len(read_lines(path, "--data-dir")) for path in voc.glob("ImageSets/Segmentation/*.txt")}
        sizes = {name: lists[name] for name in ("train", "train_aug", "trainval") if name in lists}
        if sizes:
            train = max(sizes, key=lambda name: (name != "trainval", sizes[name], name == "train"))
            why = {
                "loader": "the folder has the layout of Pascal VOC (JPEGImages, SegmentationClass, ImageSets)",
                "split": f"the list in ImageSets/Segmentation, {plural(sizes[train], 'image')}",
            }
            found = Survey("VOC", base, why, {"split": train}, {"split": "val"} if "val" in lists else None)
            return found if found.val else _holding_out(found, "there is no list val.txt")
    for name, marks in _MARKS.items():
        if any((root / mark).is_dir() for mark in marks):
            why = {"loader": f"the folder has the layout of {name}", "split": "its folders"}
            return Survey(name, base, why, {"split": "train"}, {"split": "val"})
    return None


def _folder(root: Path, images: str | None, masks: str | None) -> Survey:
    """Return the arguments of the Folder loader for images and masks below ``root``."""
    parents = [root, *(path for path in subfolders(root) if path.name.lower() in SPLIT_OF_FOLDER)]
    names = [{path.name.lower(): path.name for path in subfolders(parent)} for parent in parents]
    merged = {key: name for level in reversed(names) for key, name in level.items()}
    images = images or next((merged[key] for key in _IMAGE_FOLDERS if key in merged), None)
    masks = masks or next((merged[key] for key in _MASK_FOLDERS if key in merged and merged[key] != images), None)
    if images is None or masks is None:
        what = "images" if images is None else "masks"
        tree = "\n".join("  " + line for line in found_tree(root))
        raise UserError(f"--data-dir: no folder of {what} found; pass it with --{what}. Found in {root}:\n{tree}")
    args: dict[str, Any] = {"data_dir": str(root)}
    args |= {name: given for name, given in (("images", images), ("masks", masks)) if given.lower() != name}
    found = Survey("Folder", args, {"loader": f"images in {images}, masks in {masks}"})
    suffix = _mask_suffix(root, images, masks)
    if suffix:
        found.take("mask_suffix", suffix, "the masks have the names of their images with this suffix")
    below = [path.name.lower() for path in subfolders(root / images)]
    splits = {SPLIT_OF_FOLDER[key] for level in (*names, below) for key in level if key in SPLIT_OF_FOLDER}
    if "train" in splits:
        found.train, found.why["split"] = {"split": "train"}, "its folders"
        found.val = {"split": "val"} if "val" in splits else None
        found.test = {"split": "test"} if "test" in splits else None
        if found.val is None:
            _holding_out(found, "there is no folder of validation data")
    return found


def _holding_out(found: Survey, why: str) -> Survey:
    """Let the training loader hold out a part of its samples; there is no validation loader."""
    found.train["val_split"], found.why["val_split"], found.val = 0.15, why, {}
    return found


def _mask_suffix(root: Path, images: str, masks: str) -> str:
    """Return what mask names have after the name of the image; empty if the names are equal."""
    folders = ((find_folder(parent / images), find_folder(parent / masks)) for parent in (root, *subfolders(root)))
    pairs = [(a, b) for a, b in folders if a.is_dir() and b.is_dir()]
    stems = {path.stem for a, _ in pairs for path in image_files(a)}
    mask_stems = {path.stem for _, b in pairs for path in image_files(b)}
    if images != masks and stems & mask_stems:
        return ""
    endings = Counter(m[len(s) :] for m in mask_stems for s in (m[:k] for k in range(1, len(m))) if s in stems)
    best = endings.most_common(1)
    return best[0][0] if best and best[0][1] >= len(stems) / 2 else ""


# ---- classes, masks, images


def _take_classes(found: Survey, root: Path, given: str | None) -> None:
    if found.loader in ("CityScapes", "ADE20K", "COCO") and given is None:
        return
    if given is not None:
        is_file = (root / given).is_file() or Path(given).is_file()
        names = given if is_file else [name.strip() for name in given.split(",")]
        try:
            classes_of(names, str(root))
        except ValueError as error:
            raise UserError(f"--classes: {error}") from None
        found.take("classes", names, "given on the command line")
        return
    for name in _CLASS_FILES:
        if (root / name).is_file():
            count = len(read_classes(root / name).names)
            found.take("classes", name, f"{name} is in the folder and names {plural(count, 'class')}")
            return


def _entries(found: Survey) -> list[Entry]:
    """Return the training samples that have an image and a mask."""
    args = {name: value for name, value in found.args.items() if name != "classes"}
    if found.loader == "Folder":
        args["classes"] = 255
    train = {name: value for name, value in found.train.items() if name != "val_split"}
    dataset = dataloaders.build(found.loader, **args, **train, num_workers=0, on_error="skip").dataset
    entries = [entry for entry in dataset.entries if entry.image is not None and entry.label is not None]
    if not entries:
        raise UserError(f"--data-dir: no image with a mask found in {found.args['data_dir']}")
    return entries


def _take_masks(found: Survey, paths: list[Path]) -> None:
    """Choose the arguments for how masks are stored."""
    values, colors, problems = _stored(spread(paths, _PROBED))
    if set(values) == {0} and not colors:
        values, colors, problems = _stored(spread(paths, _PROBED_IF_EMPTY))
    lossy = [problem for problem in problems if "lossy compression" in problem]
    if lossy and not colors and (set(values) <= {0, 255} or _has_soft_edges(values)):
        _take_threshold(found, "the masks have lossy compression (JPEG); gray levels above the middle are the object")
    elif lossy:
        raise UserError(f"--data-dir: the masks are stored in different ways: {lossy[0]}")
    elif colors:
        other = [value for value in values if (value, value, value) not in colors]
        if other:
            raise UserError(
                f"--data-dir: some masks are painted in colors, and others contain numbers such as {other[0]}; save "
                "all masks in the same way"
            )
        _take_colors(found, colors)
    elif values:
        _take_values(found, values)
    else:
        raise UserError(f"--data-dir: none of the masks can be read. The first problem: {problems[0]}")


def _stored(paths: Sequence[Path]) -> tuple[Counter[int], Counter[Color], list[str]]:
    """Return the values in gray masks and the colors in others, with counts of pixels, and why files are unusable."""
    values: Counter[int] = Counter()
    colors: Counter[Color] = Counter()
    problems = []
    for path in paths:
        try:
            mask = read_mask(path).values
        except UserError as error:
            problems.append(str(error))
            continue
        if mask.ndim == 3 and (mask[:, :, :1] != mask).any():
            unique, counts = np.unique(mask.reshape(-1, 3), axis=0, return_counts=True)
            colors.update({(r, g, b): count for (r, g, b), count in zip(unique.tolist(), counts.tolist(), strict=True)})
        else:
            unique, counts = np.unique(mask if mask.ndim == 2 else mask[:, :, 0], return_counts=True)
            values.update(dict(zip(unique.tolist(), counts.tolist(), strict=True)))
    return values, colors, problems


def _has_soft_edges(values: Counter[int]) -> bool:
    """Return whether values are gray levels of two classes, as left by interpolation or lossy compression."""
    highest = max((value for value in values if value != 255), default=0)
    extreme = sum(count for value, count in values.items() if value <= _NEAR or value >= 255 - _NEAR)
    return len(values) > 8 and min(values) >= 0 and 235 < highest < 255 and extreme > 0.75 * values.total()


def _take_threshold(found: Survey, why: str) -> None:
    found.take("threshold", 127, why)
    found.args.setdefault("classes", ["background", "object"])


def _take_colors(found: Survey, colors: Counter[Color]) -> None:
    classes = found.classes
    if classes is not None and classes.palette is not None:
        found.why["classes"] += ", with their colors in the masks"
        return
    if len(colors) > _MOST_CLASSES:
        raise UserError(
            f"--data-dir: the masks contain {len(colors)} colors, too many to be classes (soft edges?). Pass a file of "
            "names and colors with --classes (lines R G B name)"
        )
    if classes is not None:
        raise UserError(
            f"--classes: the masks are painted in {len(colors)} colors, and the names do not tell which color is "
            "which class. Pass a file with lines R G B name"
        )
    ordered = [color for color, _ in colors.most_common()]
    why = "the colors found in the masks, most frequent first; name them in `classes`"
    found.take("palette", [list(color) for color in ordered], why)
    found.args["classes"] = ["#{:02x}{:02x}{:02x}".format(*color) for color in ordered]


def _take_values(found: Survey, values: Counter[int]) -> None:
    ids = sorted(value for value in values if value != 255)
    names = None if found.classes is None else len(found.classes.names)
    if set(values) == {0, 255} and names in (None, 1, 2):
        found.args.setdefault("classes", ["background", "object"])
        found.take("mask_values", [0, 255], "the masks contain only 0 and 255: background and object")
        return
    if _has_soft_edges(values) and names in (None, 1, 2):
        why = "the masks have soft edges (most gray levels are near 0 and 255); levels above the middle are the object"
        _take_threshold(found, why)
        return
    void = [value for value in ids if value < 0 or value == _WIDE_VOID]
    if void:
        found.take("ignore_values", void, f"negative values and {_WIDE_VOID} are treated as unlabeled")
        ids = [value for value in ids if value not in void]
    dense = bool(ids) and ids[-1] < max(names or 0, 2 * len(ids), 8) and ids[-1] < max(names or 256, 2)
    if dense:
        count = names or max(ids[-1] + 1, 2)
        if names is None:
            why = f"the masks contain the values 0 to {count - 1}; write your class names here, in this order"
            found.take("classes", ["background", "object"] if count == 2 else count, why)
        if 255 in values:
            found.why["masks"] = "class ids; 255 means unlabeled and is ignored"
        return
    if names is not None and names != len(ids):
        raise UserError(f"--classes: {names} names, but the masks contain the values {ids[:20]}")
    if names is None and len(ids) > _MOST_CLASSES:
        raise UserError(
            f"--data-dir: the masks contain {len(ids)} different values, too many to be classes; are they numbers of "
            "objects, or soft edges? Masks must contain one value per class"
        )
    found.args.setdefault("classes", [f"value {value}" for value in ids])
    found.take("mask_values", ids, "the values found in the masks, one per class")
    if 255 in values:
        found.why["mask_values"] += ". 255 is treated as unlabeled; if it is a class, add it here and to `classes`"


def _take_images(found: Survey, paths: list[Path]) -> None:
    """Choose in_channels, value_range and nodata."""
    channels: Counter[int] = Counter()
    low, high, top, floating, narrow = math.inf, -math.inf, 0, False, False
    problem = ""
    for path in spread(paths, _PROBED):
        try:
            raster = decode(read_bytes(path), path)
        except UserError as error:
            problem = problem or str(error)
            continue
        array = raster.array[:, :, :-1] if raster.alpha else raster.array
        channels[3 if raster.palette is not None else array.shape[2]] += 1
        if raster.palette is not None or array.dtype == np.bool_ or not array.size:
            continue
        finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        smallest = float(finite.min(initial=0))
        others = finite[finite != smallest]
        if smallest <= _NO_DATA and _is_apart(smallest, others):
            found.take("nodata", smallest, "this value means that there is no data; pixels with it are ignored")
            finite = others
        elif finite.size < array.size:
            found.args.setdefault("nodata", "nan")
            found.why["nodata"] = "NaN pixels are ignored"
        floating |= array.dtype.kind == "f"
        narrow |= array.dtype == np.uint8
        top = max(top, raster.largest or (0 if array.dtype.kind == "f" else int(np.iinfo(array.dtype).max)))
        low, high = min(low, float(finite.min(initial=0))), max(high, float(finite.max(initial=0)))
    if not channels:
        raise UserError(f"--data-dir: none of the images can be read. The first problem: {problem}")
    count = 3 if set(channels) <= {1, 3} and 3 in channels else channels.most_common(1)[0][0]
    if count != 3:
        why = "the images are gray" if count == 1 else f"the images have {count} channels"
        found.take("in_channels", count, why)
    _take_range(found, low, high, top, floating, narrow)


def _is_apart(smallest: float, others: np.ndarray) -> bool:
    """Return whether a value is far below all others, unlike the lowest of a range such as Hounsfield units."""
    if not others.size:
        return True
    low, high = float(others.min()), float(others.max())
    return low - smallest > _APART * (high - low)


def _take_range(found: Survey, low: float, high: float, top: int, floating: bool, narrow: bool) -> None:
    if floating and (low < 0 or high > 1):
        usual = [(0, 255), (-1, 1), (0, 10000), (0, 65535)]
        limits = next(((a, b) for a, b in usual if a <= low and b / 4 < high <= b), (math.floor(low), math.ceil(high)))
    elif not floating and low < 0:
        limits = (math.floor(low), math.ceil(high))
    elif not floating and not narrow and top > 255 and 0 < high < top / 3:
        limits = (0, likely_largest(high))
    else:
        return
    found.take("value_range", list(limits), f"the images contain values from {low:.6g} to {high:.6g}")


def _take_fractions(found: Survey, root: Path, entries: list[Entry]) -> None:
    """Choose how many images are held out, and whether samples form groups."""
    count = len(entries)
    if count < 2:
        raise UserError(f"--data-dir: {root} contains {count} sample; training and validation need at least one each")
    fraction = 0.2 if count < 1000 else 0.1
    share = _take_groups(found, entries, round(max(fraction, 1 / count), 4))
    found.take("val_fraction", share, f"of {count} samples; the same ones in every run")
    found.train, found.val = {"split": "train"}, {"split": "val"}


def _take_groups(found: Survey, entries: list[Entry], share: float) -> float:
    """Choose ``group_by`` if the samples form groups; return the share to hold out."""
    groups = find_groups([entry.name for entry in entries], [e.image for e in entries if e.image is not None], share)
    if groups is None:
        return share
    found.take("group_by", groups.pattern, groups.why)
    return groups.share
