"""Your own data: folders of images and masks, or a list of files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from base.base_dataset import BaseDataSet
from base.entries import Entry
from base.labels import Colour
from dataloaders.reading.colours import ColourTable
from dataloaders.reading.pairing import Pairs, image_files, pair, relative_stem, split_by_fraction
from utils.errors import UserError, plural
from utils.images import read_image, read_label

_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
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
        split_seed: another number, another dealing.
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
        self._colors, self._has_palette = colors, common.get("palette") is not None
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
        if self._list_file is not None:
            return self._from_list(self._below(self._list_file.replace("{split}", self.split)))
        folders = self._split_folders()
        if folders is not None:
            return [entry for images, masks in folders for entry in self._from_folders(images, masks)]
        entries = self._from_folders(self._below(self._images), self._below(self._masks))
        if self.split == "all":
            return entries
        parts = split_by_fraction((e.name for e in entries), self._fractions, "train", self._split_seed)
        chosen = [entry for entry in entries if entry.name in parts[self.split]]
        if entries and not chosen:
            key = "test_fraction" if self.split == "test" else "val_fraction"
            raise UserError(
                f"split {self.split!r} of {len(entries)} samples in {self.data_dir} is empty. Give a larger {key}, a "
                f"list_file or folders {self._images}/{self.split} and {self._masks}/{self.split} (or drop this loader "
                "and hold out a part of the training data with train_loader.args.val_split)"
            )
        return chosen

    def _below(self, path: str) -> Path:
        return self.data_dir / Path(path).expanduser()  # an absolute path stays what it is

    def _split_folders(self) -> list[tuple[Path, Path]] | None:
        """Return the (images, masks) folders of the split; None where data is not split by folders."""
        found: dict[str, tuple[Path, Path]] = {}
        for split, names in _SPLIT_FOLDERS.items():
            for name in names:
                for images, masks in (
                    (self._below(self._images) / name, self._below(self._masks) / name),
                    (self.data_dir / name / self._images, self.data_dir / name / self._masks),
                ):
                    if images.is_dir():
                        found.setdefault(split, (images, masks))
        if not found:
            return None
        if any(self._fractions.values()):
            raise ValueError(f"val_fraction, test_fraction: remove them, {self.data_dir} is split by folders")
        if self.split == "all":
            return list(found.values())
        if self.split not in found:
            raise self.layout_error(f"there is no folder for split {self.split!r}, only for {', '.join(found)}")
        return [found[self.split]]

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
                "added at the end, say so with mask_suffix; else give a list_file"
            )

    def _from_list(self, path: Path) -> list[Entry]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"list_file {path}: cannot be read: {error.strerror}") from error
        by_name: tuple[dict[str, Path], dict[str, Path]] | None = None
        entries = []
        for number, line in enumerate(lines, start=1):
            columns = _columns(line)
            if len(columns) == 1:
                by_name = by_name or self._by_name()
                entries.append(self._named(columns[0], by_name, f"{path}, line {number}"))
            elif len(columns) == 2:
                image, mask = (self._below(column) for column in columns)
                entries.append(Entry(image, mask, image.stem))
            elif columns:
                raise UserError(f"{path}, line {number}: {len(columns)} columns; expected image and mask, or a name")
        return entries

    def _by_name(self) -> tuple[dict[str, Path], dict[str, Path]]:
        images, masks = self._below(self._images), self._below(self._masks)
        key, mask_key = relative_stem(images), relative_stem(masks, self._suffix)
        return {key(p): p for p in image_files(images)}, {mask_key(p): p for p in image_files(masks)}

    def _named(self, name: str, by_name: tuple[dict[str, Path], dict[str, Path]], where: str) -> Entry:
        for key in (name, Path(name).with_suffix("").as_posix()):
            if key in by_name[0] and key in by_name[1]:
                return Entry(by_name[0][key], by_name[1][key], key)
        folder = self._images if name not in by_name[0] else self._masks
        raise UserError(f"{where}: {name!r} has no file in {self._below(folder)}")

    # ---- reading

    def load_label(self, path: Path) -> np.ndarray:
        """Return class ids (or values that are none, which the caller refuses), from whatever the mask holds."""
        if self._colors:
            return self._colours.decode(_eight_bits(read_image(path, 3), path), path)
        mask = read_label(path, allow_colour=True)
        if mask.ndim == 3 and self._colors is None and self._has_palette and not self._values.told:
            return self._colours.decode(_eight_bits(mask[:, :, :3], path), path)
        if mask.ndim == 3:
            mask = self._grey(mask, path)
        if self._threshold is not None:
            return (mask > self._threshold).astype(np.uint8)
        if path.suffix.lower() in (".jpg", ".jpeg"):
            raise UserError(
                f"{path} is a JPEG file: compression changes its values, which so cannot be class ids. With two "
                "classes set `threshold: 127` in the loader's args; with more, masks must be PNG"
            )
        return self._values.apply(mask, path)

    def _grey(self, mask: np.ndarray, path: Path) -> np.ndarray:
        if self._threshold is None and (mask[:, :, :1] != mask[:, :, :3]).any():
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


def _eight_bits(mask: np.ndarray, path: Path) -> np.ndarray:
    if mask.dtype != np.uint8:
        raise UserError(f"{path} has more than 8 bits per channel; masks in colours must have 8")
    return mask


def _columns(line: str) -> list[str]:
    """Split a line of a list at tabs, else at commas, else at blanks; comments and empty lines have no columns."""
    line = line.strip()
    if not line or line.startswith("#"):
        return []
    separator = "\t" if "\t" in line else "," if "," in line else None
    return [column.strip() for column in line.split(separator)]
