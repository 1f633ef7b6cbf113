"""Your own data: folders of images and masks, or a list of files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from base.base_dataset import BaseDataSet
from base.classes import Colour, classes_of
from base.entries import Entry, distinct
from base.splits import grouping, split_by_fold, split_by_fraction
from dataloaders.reading.colours import ColourTable
from dataloaders.reading.lists import native, read_rows
from dataloaders.reading.pairing import Pairs, find_folder, image_files, index_files, pair, relative_stem
from utils.errors import UserError, plural
from utils.images import read_levels, read_mask

_SPLIT_OF_FOLDER = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_LARGEST_VALUE = 65535
_PROBED = 16  # masks that are looked at for the 0/255 trap


class Folder(BaseDataSet):
    """Images and masks that belong together by their names; see docs/datasets.md for examples.

    Images are whatever :func:`utils.images.read_image` reads: grey, RGB, 16 bit, TIFF and ``.npy`` with any number
    of channels (``in_channels``). Masks hold class ids (grey or palette PNG, TIFF, ``.npy``), other values
    (``mask_values``), colours (``palette``) or, for two classes, grey levels (``threshold``).

    The split is taken from the first of these that is there: ``list_file``; sub-folders ``images/train`` or
    ``train/images`` (val, test alike); ``val_fraction`` and ``test_fraction``. Without any, all files are "train".

    Args:
        classes: the class names in the order of their ids. One name: one output channel, labels 0 and 1.
        images, masks: the two folders, below data_dir or absolute. They are read with all their sub-folders.
        mask_suffix: what mask names have after the image's name: "_mask" for a.jpg and a_mask.png.
        list_file: a text file (below data_dir or absolute; "{split}" in it becomes the split) with one sample a
            line: image and mask, separated by a tab, a comma or blanks, below data_dir; or one name that is
            looked up in ``images`` and ``masks``.
        val_fraction, test_fraction: shares of all files, dealt out by name; the rest is "train".
        split_seed: another number gives another split.
        val_fold: (k, n): cross-validation. "val" is fold k (from 0) of n, "train" the other folds; instead of
            val_fraction. Of data split by folders, train and val are pooled.
        group_by: a regular expression; samples whose names match it alike (its first group, or all that it matches)
            stay on the same side of a split: "^([^_]+)_" keeps the frames of cam1_0001, cam1_0002 together.
        mask_values: the mask's value of each class: [0, 255] for masks of 0 and 255.
        ignore_values: mask values that count nowhere, besides 255.
        threshold: for two classes: mask values above are class 1.
        colors: true: masks are painted in ``palette``'s colours, whatever the file holds; false: never; None: where
            the file is RGB.
        ignore_colors: colours that count nowhere.
        common: see :class:`base.base_dataset.BaseDataSet`.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test", "all")
    label_hint = " If these values stand for classes, give the mask's value of each class as `mask_values`."
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
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        val_fold: tuple[int, int] | None = None,
        group_by: str | None = None,
        mask_values: list[int] | None = None,
        ignore_values: list[int] | None = None,
        threshold: int | None = None,
        colors: bool | None = None,
        ignore_colors: list[Colour] | None = None,
        **common: Any,
    ) -> None:
        if common.get("classes") is None:
            raise ValueError("classes is missing: Folder needs the names of your classes, in the order of their ids")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on")
        self._images, self._masks, self._suffix = images, masks, mask_suffix
        self._list_file = list_file
        self._fractions = {"val": val_fraction, "test": test_fraction}
        self._split_seed = split_seed
        if val_fold is not None and val_fraction:
            raise ValueError("val_fold and val_fraction exclude each other: give one of them")
        grouping(group_by)  # refuses what is not a regular expression
        self._val_fold, self.group_by = val_fold, group_by
        facts = self.facts_for(
            **{k: common[k] for k in ("data_dir", "classes", "palette", "in_channels", "ignore_index") if k in common}
        )
        count = max(2, facts.num_classes)
        if threshold is not None and (count != 2 or mask_values or colors):
            raise ValueError(
                "threshold is for two classes in grey masks, without mask_values and colors; "
                f"classes has {len(facts.class_names)} names"
            )
        self._threshold = threshold
        self._colors = colors
        of_file = classes_of(common["classes"], common.get("data_dir")).palette
        self._has_palette = common.get("palette") is not None or of_file is not None
        if colors and len(set(facts.palette)) < len(facts.palette):
            raise ValueError("palette must have a different colour for each class where masks are painted in it")
        self._values = _ValueTable(count, mask_values, ignore_values, facts.ignore_index)
        self._colours = _colour_table(facts.palette, count, ignore_colors or (), facts.ignore_index)
        self.void_label = 255 if count <= 255 else None
        super().__init__(**common)

    # ---- listing

    def samples(self) -> list[Entry]:
        """Return the pairs of the split, sorted by name (or in the list's order)."""
        self.alone: list[Path] = []
        if self._list_file is not None and "{split}" in self._list_file:
            self._refuse_fractions("list_file has a list for each split")
            return self._from_list(self._below(self._list_file.replace("{split}", self.split)))
        folders = self._split_folders() if self._list_file is None else None
        if folders is not None:
            return self._of_split_folders(folders)
        if self._list_file is not None:
            entries = self._from_list(self._below(self._list_file))
            if self._val_fold is None and not any(self._fractions.values()):
                return entries  # a list for this loader alone
        else:
            entries = self._from_folders(find_folder(self._below(self._images)), find_folder(self._below(self._masks)))
        if self.split == "all":
            return entries
        parts = split_by_fraction((e.name for e in entries), self._fractions, "train", self._split_seed, self.group_by)
        chosen = [entry for entry in entries if entry.name in parts[self.split]]
        if self._val_fold is not None and self.split != "test":
            return self._of_fold([entry for entry in entries if entry.name not in parts["test"]])
        if entries and not chosen:
            key = "test_fraction" if self.split == "test" else "val_fraction"
            raise UserError(
                f"split {self.split!r} of {len(entries)} samples in {self.data_dir} is empty. Give a larger {key}, a "
                f"list_file or folders {self._images}/{self.split} and {self._masks}/{self.split} (or drop this loader "
                "and hold out a part of the training data with train_loader.args.val_split)"
            )
        if self.split == "train" and self._fractions["val"]:
            self.held_out = [entry for entry in entries if entry.name in parts["val"]]
        return chosen

    def _of_fold(self, entries: list[Entry]) -> list[Entry]:
        """Return the entries of the split under ``val_fold``, and keep those of the fold for ``held_out``."""
        assert self._val_fold is not None
        train, val = split_by_fold((e.name for e in entries), self._val_fold, self.group_by)
        if self.split == "train":
            self.held_out = [entry for entry in entries if entry.name in val]
        return [entry for entry in entries if entry.name in (train if self.split == "train" else val)]

    def _refuse_fractions(self, why: str) -> None:
        if any(self._fractions.values()) or (self._val_fold is not None and self._list_file is not None):
            raise ValueError(f"val_fraction, test_fraction, val_fold: remove them, {why}")

    def _below(self, path: str) -> Path:
        return self.data_dir / Path(path).expanduser()  # an absolute path stays what it is

    def _split_folders(self) -> dict[str, tuple[Path, Path]] | None:
        """Return the (images, masks) folders of each split; None if the data is not split by folders."""
        images, masks = find_folder(self._below(self._images)), find_folder(self._below(self._masks))
        found: dict[str, tuple[Path, Path]] = {}
        candidates = [(folder, masks) for folder in _subfolders(images)]
        candidates += [(folder, None) for folder in _subfolders(self.data_dir)]
        for folder, masks_above in candidates:
            split = _SPLIT_OF_FOLDER.get(folder.name.lower())
            if split is None:
                continue
            if masks_above is None:
                pair_of_folders = find_folder(folder / self._images), find_folder(folder / self._masks)
            else:
                alike = [f for f in _subfolders(masks_above) if _SPLIT_OF_FOLDER.get(f.name.lower()) == split]
                same_name = find_folder(masks_above / folder.name)
                pair_of_folders = folder, alike[0] if len(alike) == 1 and not same_name.is_dir() else same_name
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
        if not images.is_dir():
            raise self.layout_error(f"there is no folder {images}")
        if not masks.is_dir() and self.split == "test":
            return [Entry(path, None, relative_stem(images)(path)) for path in image_files(images)]
        if not masks.is_dir():
            raise self.layout_error(f"there is no folder {masks}")
        mask_files = [path for path in image_files(masks) if path.stem.endswith(self._suffix)]
        own = set(mask_files) if images == masks else set()
        pairs = pair(
            (path for path in image_files(images) if path not in own),
            mask_files,
            relative_stem(images),
            relative_stem(masks, self._suffix),
        )
        self._complain(pairs, images, masks)
        self.alone += pairs.warn()
        return pairs.entries

    def _complain(self, pairs: Pairs, images: Path, masks: Path) -> None:
        if not pairs.entries and pairs.images_alone and pairs.masks_alone:
            raise UserError(
                f"no image in {images} has a mask of its name in {masks}: there are, for instance, "
                f"{pairs.images_alone[0].name} and {pairs.masks_alone[0].name}. If mask names only have something "
                "added at the end, set mask_suffix; else give a list_file"
            )

    def _from_list(self, path: Path) -> list[Entry]:
        """Return the entries of a list: two columns are files, one is a name in ``images`` and ``masks``."""
        by_name = cache(self._by_name)  # the folders are read only if a line is a name

        def is_name(text: str) -> bool:
            return text in by_name()[0] or Path(text).with_suffix("").as_posix() in by_name()[0]

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
        images, masks = find_folder(self._below(self._images)), find_folder(self._below(self._masks))
        return (
            index_files(image_files(images) if images.is_dir() else [], relative_stem(images)),
            index_files(image_files(masks) if masks.is_dir() else [], relative_stem(masks, self._suffix)),
        )

    def _named(self, name: str, by_name: tuple[dict[str, Path], dict[str, Path]], where: str) -> Entry:
        plain = Path(native(name)).with_suffix("").as_posix()
        for key in (name, plain):
            if key in by_name[0] and key in by_name[1]:
                return Entry(by_name[0][key], by_name[1][key], key)
        missing = self._masks if name in by_name[0] or plain in by_name[0] else self._images
        raise UserError(f"{where}: {name!r} has no file in {self._below(missing)}")

    # ---- reading

    def load_label(self, path: Path) -> np.ndarray:
        """Return class ids (or values that are none, which the caller refuses), from whatever the mask holds."""
        if self._threshold is not None:
            return (read_levels(path) > self._threshold).astype(np.uint8)
        stored = read_mask(path)
        painted = stored.values.ndim == 3 and self._has_palette and not self._values.told
        if self._colors or (self._colors is None and painted):
            return self._colours.decode(stored.colours(), path)
        mask = stored.values if stored.values.ndim == 2 else self._grey(stored.values, path)
        return self._values.apply(mask, path)

    def _grey(self, mask: np.ndarray, path: Path) -> np.ndarray:
        if (mask[:, :, :1] != mask[:, :, :3]).any():
            raise UserError(
                f"{path} is painted in colours: set `palette` in the loader's args to one RGB colour per class, in "
                "the order of `classes` (and leave `colors` and `mask_values` out)"
            )
        return np.ascontiguousarray(mask[:, :, 0])

    def _check_first(self) -> None:
        super()._check_first()
        if self.label_count == 2 and self._threshold is None and not self._values.told and not self._colors:
            self._refuse_0_and_255()

    def _refuse_0_and_255(self) -> None:
        """Masks of 0 and 255 look legal, as background and "not labelled": nothing would ever be learnt."""
        seen: set[int] = set()
        count = min(_PROBED, len(self.entries))
        for index in np.linspace(0, len(self.entries) - 1, count).astype(int):
            entry = self.entries[int(index)]
            with suppress(UserError):  # unreadable: told elsewhere, or skipped as asked
                seen.update(np.unique(self.load_label(entry.label)).tolist() if entry.label else ())
        if 255 in seen and seen <= {0, 255}:
            raise UserError(
                f"the masks in {self.data_dir} hold only 0 and 255 (of {count} looked at), and 255 means 'not "
                f"labelled' ({self.ignore_index}, ignore_index). If it means {self.class_names[-1]!r}, set "
                "`mask_values: [0, 255]` in the loader's args; if not, `mask_values: [0, 1]`"
            )


class _ValueTable:
    """What mask values mean: position in ``mask_values`` is the class id."""

    def __init__(
        self, count: int, mask_values: Sequence[int] | None, ignored: Sequence[int] | None, ignore_index: int
    ) -> None:
        self.told = mask_values is not None or ignored is not None
        values = list(range(count) if mask_values is None else mask_values)
        ignored = list(ignored or ())
        if len(values) != count:
            raise ValueError(f"mask_values must have one value per class: {count} classes, {len(values)} values")
        if len({*values, *ignored}) != len(values) + len(ignored):
            raise ValueError(f"mask_values and ignore_values must all differ, got {values} and {ignored}")
        if not all(0 <= value <= _LARGEST_VALUE for value in (*values, *ignored)):
            raise ValueError(
                f"mask_values and ignore_values must lie in 0..{_LARGEST_VALUE}, got {values} and {ignored}"
            )
        self._shown = values
        meaning = {**{value: i for i, value in enumerate(values)}, **dict.fromkeys(ignored, ignore_index)}
        meaning.setdefault(255, 255)  # "not labelled" unless something else is told
        # One more row, for all values outside of the table.
        self._known = np.zeros(max(256, *meaning) + 2, bool)
        self._ids = np.zeros(len(self._known), np.int32)
        for value, i in meaning.items():
            self._known[value], self._ids[value] = True, i
        if self._ids.min() >= 0 and self._ids.max() <= 255:
            self._ids = self._ids.astype(np.uint8)

    def apply(self, mask: np.ndarray, path: Path) -> np.ndarray:
        """Return ids, ``(H, W)``; UserError on a value that was not told. Unchanged when nothing was told."""
        if not self.told:
            return mask
        last = len(self._known) - 1
        rows = mask if mask.dtype == np.uint8 else np.where((mask >= 0) & (mask < last), mask, last)
        if not self._known[rows].all():
            unknown = mask[~self._known[rows]]
            raise UserError(
                f"{path} holds values {np.unique(unknown)[:10].tolist()} ({plural(unknown.size, 'pixel')}), which are "
                f"neither in mask_values {self._shown} nor in ignore_values"
            )
        return self._ids[rows]


def _colour_table(palette: Sequence[Colour], count: int, ignored: Sequence[Colour], ignore_index: int) -> ColourTable:
    colours = [(r, g, b) for r, g, b in palette]
    if len(colours) < count:  # one class against an unnamed background
        colours = [(0, 0, 0), *colours]
    hint = (
        f"The palette has {', '.join(str(list(c)) for c in colours[:30])}{' ...' if len(colours) > 30 else ''}: "
        "correct `palette` in the loader's args, or give colours that count nowhere as `ignore_colors`."
    )
    ids = dict.fromkeys(((r, g, b) for r, g, b in ignored), ignore_index)
    ids |= {colour: i for i, colour in enumerate(colours)}
    return ColourTable(ids, hint)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
