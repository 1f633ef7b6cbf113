"""Your own data: folders of images and masks, or lists of files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from base.base_dataset import BaseDataSet
from base.classes import Color, classes_of
from base.entries import Entry, distinct, spread
from base.splits import grouping, split_by_fold, split_by_fraction
from dataloaders.reading.lists import native, read_rows, without_extension
from dataloaders.reading.masks import MaskOptions, MaskReader
from dataloaders.reading.pairing import (
    find_folder,
    image_files,
    index_files,
    pair_folders,
    relative_stem,
    subfolders,
    warn_of_skipped,
)
from utils.bounds import Count, Label, Positive, Seed, ShareBelowOne
from utils.errors import UserError
from utils.files import expand

SPLIT_OF_FOLDER = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_PROBED = 16  # masks that are read when the data set is opened
_PROBED_IF_EMPTY = 500  # if these contain only background


class Folder(BaseDataSet):
    """Images and masks with matching names; docs/datasets.md has examples.

    Images are all that :func:`utils.images.read_image` reads: gray, RGB, 16 bit, TIFF and ``.npy`` with any number of
    channels (``in_channels``). Masks contain class ids (gray or palette PNG, TIFF, ``.npy``), other values
    (``mask_values``), colors (``palette``) or, for two classes, gray levels (``threshold``).

    The splits come from the first of these that exists: ``list_file``; sub-folders ``images/train`` or
    ``train/images`` (and val, test); ``val_fraction`` and ``test_fraction``. Without any, all files are "train".

    Args:
        classes: the class names in the order of their ids. One name: one output channel, labels 0 and 1.
        images, masks: the folders of images and of masks, below data_dir or absolute; sub-folders are included.
        mask_suffix: suffix of mask names: "_mask" for a.jpg and a_mask.png.
        list_file: a text file (below data_dir or absolute; "{split}" in it is replaced by the split) with one sample
            per line: image and mask below data_dir, separated by a tab, a comma or spaces; or one name, which is looked
            up in ``images`` and ``masks``.
        val_fraction, test_fraction: fractions of all files for "val" and "test", chosen by their names; the rest is
            "train".
        split_seed: random seed of the split.
        val_fold: (k, n): cross-validation. "val" is fold k (from 0) of n, and "train" is the other folds. Replaces
            val_fraction. If the data is split by folders, train and val are pooled first.
        group_by: a regular expression; samples with the same match in their names (of the first group, or the whole
            match) stay on the same side of a split: "^([^_]+)_" keeps cam1_0001 and cam1_0002 together.
        mask_values: the value of each class in the masks: [0, 255] for masks with the values 0 and 255.
        ignore_values: mask values of ignored pixels, in addition to 255.
        threshold: for two classes: mask values above this are class 1.
        colors: whether masks are images in the colors of ``palette``: true: always; false: never; None: if the file is
            RGB.
        ignore_colors: colors of ignored pixels.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test", "all")
    label_hint = " If these values stand for classes, list the value of each class in `mask_values`."
    layout = """
data_dir/
  images/<name>.<jpg, png, tif, npy, ...>
  masks/<name>.<png, tif, npy, ...>
or, split by folders,
  images/<split>/..., masks/<split>/...
  <split>/images/..., <split>/masks/...
"""

    def __init__(
        self,
        *,
        images: str = "images",
        masks: str = "masks",
        mask_suffix: str = "",
        list_file: str | None = None,
        val_fraction: ShareBelowOne = 0.0,
        test_fraction: ShareBelowOne = 0.0,
        split_seed: Seed = 0,
        val_fold: tuple[Count, Positive] | None = None,
        group_by: str | None = None,
        mask_values: list[Label] | None = None,
        ignore_values: list[Label] | None = None,
        threshold: Label | None = None,
        colors: bool | None = None,
        ignore_colors: list[Color] | None = None,
        **common: Any,
    ) -> None:
        if common.get("classes") is None:
            raise ValueError("classes is missing: Folder needs the names of your classes, in the order of their ids")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} leave no images for training"
            )
        self._images, self._masks, self._suffix = images, masks, mask_suffix
        self._list_file = list_file
        self._fractions = {"val": val_fraction, "test": test_fraction}
        self._split_seed = split_seed
        if val_fold is not None and val_fraction:
            raise ValueError("val_fold and val_fraction cannot be combined; use one of them")
        grouping(group_by)  # raises an error if it is not a regular expression
        self._val_fold, self.group_by = val_fold, group_by
        facts = self.facts_for(**common)
        painted = "palette" in common or classes_of(common["classes"], common.get("data_dir")).palette is not None
        options = MaskOptions(mask_values, ignore_values, threshold, colors, ignore_colors, painted)
        self._reader = MaskReader(options, facts)
        self.void_label = 255 if self._reader.count <= 255 else None
        super().__init__(**common)

    # ---- listing

    def samples(self) -> list[Entry]:
        """Return the pairs of the split, sorted by name (or in the list's order)."""
        self.alone = []
        if self._list_file is not None and "{split}" in self._list_file:
            self._refuse_fractions("list_file has a list for each split")
            return self._from_list(self._below(self._list_file.replace("{split}", self.split)))
        folders = self._split_folders() if self._list_file is None else None
        if folders is not None:
            return self._of_split_folders(folders)
        if self._list_file is not None:
            entries = self._from_list(self._below(self._list_file))
            if self._val_fold is None and not any(self._fractions.values()):
                return entries  # the list of this split
        else:
            entries = self._from_folders(*self._folders(self.data_dir))
        if self.split == "all":
            return entries
        parts = split_by_fraction((e.name for e in entries), self._fractions, "train", self._split_seed, self.group_by)
        chosen = [entry for entry in entries if entry.name in parts[self.split]]
        if self._val_fold is not None and self.split != "test":
            return self._of_fold([entry for entry in entries if entry.name not in parts["test"]])
        if entries and not chosen:
            key = "test_fraction" if self.split == "test" else "val_fraction"
            raise UserError(
                f"split {self.split!r} of {len(entries)} samples in {self.data_dir} is empty. Set a larger {key}, a "
                f"list_file or folders {self._images}/{self.split} and {self._masks}/{self.split} (or drop this "
                "loader and hold out a part of the training data with train_loader.args.val_split)"
            )
        if len(chosen) < len(entries):
            self.part = f"{len(chosen)} of the {len(entries)} samples in {self.data_dir}"
        if self.split == "train" and self._fractions["val"]:
            self.held_out = [entry for entry in entries if entry.name in parts["val"]]
        return chosen

    def _of_fold(self, entries: list[Entry]) -> list[Entry]:
        """Return the entries of the split under ``val_fold``; for "train", set ``held_out`` to those of the fold."""
        assert self._val_fold is not None
        train, val = split_by_fold((e.name for e in entries), self._val_fold, self.group_by)
        if self.split == "train":
            self.held_out = [entry for entry in entries if entry.name in val]
        return [entry for entry in entries if entry.name in (train if self.split == "train" else val)]

    def _refuse_fractions(self, why: str) -> None:
        if any(self._fractions.values()) or (self._val_fold is not None and self._list_file is not None):
            raise ValueError(f"val_fraction, test_fraction, val_fold: remove them, {why}")

    def _below(self, path: str) -> Path:
        return self.data_dir / expand(path)  # absolute paths stay as they are

    def _folders(self, above: Path) -> tuple[Path, Path]:
        return find_folder(above / expand(self._images)), find_folder(above / expand(self._masks))

    def _split_folders(self) -> dict[str, tuple[Path, Path]] | None:
        """Return the (images, masks) folders of each split; None if the data is not split by folders."""
        images, masks = self._folders(self.data_dir)
        found: dict[str, tuple[Path, Path]] = {}
        for folder in (*subfolders(images), *subfolders(self.data_dir)):
            split = SPLIT_OF_FOLDER.get(folder.name.lower())
            if split is None:
                continue
            if folder.parent == images:
                alike = [f for f in subfolders(masks) if SPLIT_OF_FOLDER.get(f.name.lower()) == split]
                same_name = find_folder(masks / folder.name)
                pair_of_folders = folder, alike[0] if len(alike) == 1 and not same_name.is_dir() else same_name
            else:
                pair_of_folders = self._folders(folder)
            if not pair_of_folders[0].is_dir():
                continue
            if split in found:
                raise UserError(
                    f"{found[split][0]} and {pair_of_folders[0]} both look like split {split!r}; remove or rename one"
                )
            found[split] = pair_of_folders
        return {split: found[split] for split in ("train", "val", "test") if split in found} or None

    def _of_split_folders(self, folders: dict[str, tuple[Path, Path]]) -> list[Entry]:
        self._refuse_fractions(f"{self.data_dir} is split by folders")
        images, used = self._folders(self.data_dir)[0], {folder for pair in folders.values() for folder in pair}
        loose = [path for path in image_files(images) if used.isdisjoint(path.parents)] if images.is_dir() else []
        warn_of_skipped("image", loose, "folder of a split")
        self.alone = [*self.alone, *loose]
        if self._val_fold is not None and self.split in ("train", "val"):
            pool = [folders[split] for split in ("train", "val") if split in folders]
            return self._of_fold(self._from_several(pool))
        if self.split == "all":
            return self._from_several(list(folders.values()))
        if self.split not in folders:
            raise self.layout_error(f"there is no folder for split {self.split!r}, only for {', '.join(folders)}")
        return self._from_folders(*folders[self.split])

    def _from_several(self, folders: list[tuple[Path, Path]]) -> list[Entry]:
        return distinct((entry for pair in folders for entry in self._from_folders(*pair)), self.data_dir)

    def _from_folders(self, images: Path, masks: Path) -> list[Entry]:
        return pair_folders(self, images, masks, suffix=self._suffix, unlabeled=self.split == "test")

    def _from_list(self, path: Path) -> list[Entry]:
        """Return the entries of a list: two columns are files, one is a name in ``images`` and ``masks``."""
        by_name = cache(self._by_name)  # the folders are read only if a line is a name

        def is_name(text: str) -> bool:
            return text in by_name()[0] or without_extension(text) in by_name()[0]

        entries: list[Entry] = []
        for number, columns in read_rows(path, lambda column: self._listed(column).is_file(), is_name):
            if len(columns) == 1:
                entries.append(self._named(columns[0], by_name(), f"{path}, line {number}"))
            else:
                image, mask = (self._listed(column) for column in columns)
                entries.append(Entry(image, mask, image.stem))
        return distinct(entries, self.data_dir)

    def _listed(self, column: str) -> Path:
        path = self._below(column)
        return self._below(native(column)) if "\\" in column and not path.exists() else path

    def _by_name(self) -> tuple[dict[str, Path], dict[str, Path]]:
        images, masks = self._folders(self.data_dir)
        return (
            index_files(image_files(images) if images.is_dir() else [], relative_stem(images)),
            index_files(image_files(masks) if masks.is_dir() else [], relative_stem(masks, self._suffix)),
        )

    def _named(self, name: str, by_name: tuple[dict[str, Path], dict[str, Path]], where: str) -> Entry:
        plain = without_extension(name)
        for key in (name, plain):
            if key in by_name[0] and key in by_name[1]:
                return Entry(by_name[0][key], by_name[1][key], key)
        missing = self._masks if name in by_name[0] or plain in by_name[0] else self._images
        raise UserError(f"{where}: {name!r} has no file in {self._below(missing)}")

    # ---- reading

    def load_label(self, path: Path) -> np.ndarray:
        """Return class ids, or values that are not a class, which the caller rejects."""
        return self._reader.read(path)

    def _probe(self, limit: int) -> tuple[int, set[int]]:
        """Return how many masks were read, at most ``limit``, and the values in them."""
        masks = [entry.label for entry in spread(self.entries, limit) if entry.label is not None]
        return len(masks), self._reader.probe(masks)

    def _check_first(self) -> None:
        probed = self._probe(_PROBED)
        is_unclear = self.label_count == 2 and not self._reader.says_more
        if is_unclear and probed[1] == {0}:
            probed = self._probe(_PROBED_IF_EMPTY)
        super()._check_first()
        count, seen = probed
        if is_unclear and 255 in seen and seen <= {0, 255}:
            raise UserError(
                f"the masks in {self.data_dir} contain only 0 and 255 ({count} were read), and 255 means 'not "
                f"labeled' ({self.ignore_index}, ignore_index). If it means {self.class_names[-1]!r}, set "
                "`mask_values: [0, 255]` in the loader's args; if not, `mask_values: [0, 1]`"
            )
