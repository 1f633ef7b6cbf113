"""What all data sets share: class facts, listing, reading, checking, augmentation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from base import augmentation as aug
from base.classes import Color, class_colors, classes_of
from base.entries import BROKEN_FILES_HINT, Cache, Entries, Entry, Key, Sample, Skipped, distinct, spread
from base.labels import LabelTable, PaletteReference
from base.layout import layout_problem, sizes_differ
from base.statistics import Statistics, per_channel
from utils.bounds import AboveZero, Amount, Channels, ClassCount, Label, Number, Seed, Side
from utils.errors import DataFolderError, UserError
from utils.facts import Facts
from utils.files import expand
from utils.images import read_label, read_mask, read_pixels
from utils.images.values import Pixels, ValueRange

log = logging.getLogger("data")

CHECKED_AT_START = 4  # label maps that are read when the data set is opened


class BaseDataSet(Statistics, Dataset[Any]):
    """A list of (image, label) pairs with class facts and augmentation.

    A subclass sets its facts as class attributes and implements ``samples()``. If its label files do not contain class
    ids, it also overrides ``load_label``, or sets ``self.lut`` before it calls ``super().__init__``. Its constructor
    takes its own arguments as annotated keyword-only parameters and passes the others (``**common``) on to this one.

    Args:
        data_dir: the folder of the data, laid out like ``layout``.
        split: one of ``splits``.
        crop_size: side, or (height, width), of the crop.
        base_size: length of the longer side around which training images are randomly rescaled; None: the image's own.
        augment: augment images: rescale, rotate, crop, flip, blur, jitter (see the next arguments).
        scale: range of the random rescaling, (lowest, highest), as factors of base_size; true: 0.5 to 2.
        flip: flip half of the images horizontally.
        rotate: the largest rotation in degrees, in both directions; true: 10.
        blur: the largest standard deviation of a Gaussian blur in pixels; true: 1.
        jitter: the largest change of brightness, contrast and saturation; true: 0.3.
        val: rescale the shorter side to crop_size and crop the center. Without it (and without augment) images
            keep their own size.
        in_channels: number of channels; images are converted to it.
        classes: the class names, or a text file with one name per line (as given or below data_dir), or the number of
            classes; replaces the published ones.
        palette: one RGB color per class.
        mean, std: per channel, for intensities in [0, 1]; "auto" measures them on up to 500 images.
        value_range: [low, high], the stored values of black and white (intensities 0 and 1); None: the range of
            the data type.
        nodata: the stored value (or "nan") that means "no data"; pixels with it are ignored.
        cache: "ram" reads all files at the start and keeps them in memory.
        on_error: what to do with broken files: "raise" an error, or "skip" them.
        ignore_index: the label of ignored pixels; None: the data set's own.
        seed: random seed.

    Raises:
        ValueError: an argument has an invalid value; the message names it.
        UserError: the folder or the files are not as expected.
    """

    # Facts. Labels are 0 .. num_classes - 1 (for num_classes 1: 0 background, 1 the class) or ignore_index.
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    palette: tuple[Color, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    ignore_index: int = 255
    in_channels: int = 3
    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    void_label: int | None = 255  # the value of load_label that means "not labeled"; it becomes ignore_index
    layout: str = ""  # the expected folders and files below data_dir, for messages
    lut: np.ndarray | None = None  # table from stored label to class id or ignore index
    label_hint: str = ""  # added to the message about label values that are not a class
    held_out: Sequence[Entry] | None = None  # what samples() left out of the training split for validation
    alone: Sequence[Path] = ()  # files that samples() skipped because they have no partner
    group_by: str | None = None  # of base.splits.grouping, for data sets that take it as an argument
    part: str | None = None  # which part of the samples on disk this split is, for reports; None: all of them
    endless: bool = False  # each epoch has new images, which then cannot be counted or cached

    def __init__(
        self,
        data_dir: str | None = None,
        split: str = "train",
        *,
        crop_size: Side | tuple[Side, Side] | None = None,
        base_size: Side | None = None,
        augment: bool = False,
        scale: bool | tuple[AboveZero, AboveZero] = True,
        flip: bool = True,
        rotate: bool | Amount = True,
        blur: bool | Amount = False,
        jitter: bool | Amount = False,
        val: bool = False,
        in_channels: Channels = 3,
        classes: list[str] | str | ClassCount | None = None,
        palette: list[Color] | None = None,
        mean: list[float] | Literal["auto"] | None = None,
        std: list[float] | Literal["auto"] | None = None,
        value_range: list[Number] | None = None,
        nodata: Number | str | None = None,
        cache: Literal["ram"] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        ignore_index: Label | None = None,
        seed: Seed = 0,
    ) -> None:
        if split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(map(repr, self.splits))}; got {split!r}")
        self.split, self.seed, self.on_error, self.val = split, seed, on_error, val
        self._data_dir = expand(data_dir) if data_dir is not None else None
        given = {"data_dir": data_dir, "classes": classes, "palette": palette, "mean": mean, "std": std}
        given |= {"in_channels": in_channels, "ignore_index": ignore_index, "value_range": value_range}
        facts = self.facts_for(**given, nodata=nodata)
        vars(self).update(vars(facts))
        self.value_limits = ValueRange.of(facts.value_range, facts.nodata)
        if 0 <= self.ignore_index < self.label_count:
            log.warning("ignore_index %d is also a class id: all pixels of that class are ignored", self.ignore_index)
        plan = aug.Augmentation(
            aug.size_of(crop_size),
            base_size,
            aug.scale_range(scale),
            aug.amount(rotate, aug.MAX_ROTATION),
            flip,
            aug.amount(blur, aug.MAX_BLUR),
            aug.amount(jitter, aug.MAX_JITTER),
        )
        self.crop_size, self.augmentation = plan.crop_size, plan if augment and not val else None
        self._check_geometry(augment, base_size)
        self.replace_broken = augment  # in evaluation they are left out; the loader decides
        self._cache: Cache | None = None
        self.palettes = PaletteReference()
        self.entries: Sequence[Entry] = self._list()
        self._check_first()
        if "auto" in (mean, std):
            self._normalize_as_measured(mean == "auto", std == "auto")
        if cache == "ram":
            self._cache = self._read_all()

    # ---- facts

    @classmethod
    def facts_for(cls, **args: Any) -> Facts:
        """Return the facts under the arguments of a loader, without reading data (except for a class file).

        Arguments that do not change facts are ignored. For mean and std of "auto", the data set's own are returned.
        """
        given = args.get
        names, palette = cls.class_names, given("palette")
        own_colors: Sequence[Color] | None = cls.palette
        if given("classes") is not None:
            names, colors = classes_of(args["classes"], given("data_dir"))
            own_colors = cls.palette if names == cls.class_names else colors
        channels, ignore_index, nodata = args.get("in_channels", 3), given("ignore_index"), given("nodata")
        return Facts(
            num_classes=len(names),
            class_names=names,
            palette=class_colors(own_colors if palette is None else palette, len(names)),
            mean=per_channel("mean", given("mean"), cls.mean, channels),
            std=per_channel("std", given("std"), cls.std, channels),
            ignore_index=cls.ignore_index if ignore_index is None else ignore_index,
            in_channels=channels,
            value_range=ValueRange.of(given("value_range"), nodata).limits,
            nodata=nodata,
        )

    def _normalize_as_measured(self, mean: bool, std: bool) -> None:
        measured = self.measure()
        self.mean = measured[0] if mean else self.mean
        self.std = measured[1] if std else self.std
        if min(self.std) == 0:
            channel = self.std.index(0)
            raise UserError(f'"std": "auto": channel {channel} has only one value; set mean and std to numbers')

    @classmethod
    def constructors(cls) -> tuple[type, ...]:
        """Return the classes whose constructors share the arguments of a data set, this one first."""
        return tuple(c for c in cls.__mro__ if issubclass(c, BaseDataSet) and "__init__" in vars(c))

    @property
    def facts(self) -> Facts:
        """The facts of this instance, as plain Python values."""
        return Facts.of(self)

    # ---- listing

    @property
    def data_dir(self) -> Path:
        """The folder of the data; raises ValueError if none was given."""
        if self._data_dir is None:
            raise ValueError(f"data_dir is missing; {type(self).__name__} reads its files from there")
        return self._data_dir

    def samples(self) -> list[Entry] | list[tuple[Path, Path | None, str]]:
        """Return the (image path, label path or None, name) of all samples, in a fixed order."""
        raise NotImplementedError

    def root(self, *inner: str, holds: Sequence[str]) -> Path:
        """Return the folder, one of ``inner`` below data_dir or data_dir, that contains a folder of ``holds``."""
        for folder in (*(self.data_dir / name for name in inner), self.data_dir):
            if any((folder / name).is_dir() for name in holds):
                return folder
        raise self.layout_error(f"data_dir {self.data_dir} contains no folder {' or '.join(holds)}")

    def _list(self) -> Sequence[Entry]:
        if self.layout and not self.data_dir.is_dir():
            raise self.layout_error(f"data_dir {self.data_dir} does not exist or is not a folder")
        found = self.samples()
        if not found:
            raise self.layout_error(f"split {self.split!r} of {type(self).__name__} has no images")
        entries = distinct((Entry(*entry) for entry in found), self._data_dir)
        if len(entries) < len(found):
            log.warning("%d samples of split %r are listed more than once", len(found) - len(entries), self.split)
        return Entries(entries)

    def layout_error(self, problem: str) -> DataFolderError:
        """Return an error with ``problem``, the expected folders and files, and those that were found."""
        return DataFolderError(layout_problem(problem, self.layout, self._data_dir))

    def _check_geometry(self, augment: bool, base_size: int | None) -> None:
        if augment and self.val:
            log.warning("augment has no effect with `val: true`: images are only rescaled and center-cropped")
        elif not augment and not self.val:
            for name, value in (("crop_size", self.crop_size), ("base_size", base_size)):
                if value is not None:
                    log.warning("%s has no effect without `augment: true` or `val: true`: images stay whole", name)

    def _check_first(self) -> None:
        """Read a few label maps, so that a mistake that is in all of them is found at the start."""
        if not self.layout or self.on_error == "skip":
            return
        for index in spread(range(len(self)), CHECKED_AT_START):
            try:
                self.load(index)
            except UserError as error:
                raise UserError(f"{error}{BROKEN_FILES_HINT}") from None

    # ---- reading

    def load_image(self, path: Path) -> Pixels:
        """Return an image ``(H, W, in_channels)``, uint8 or float32 in [0, 1], and where it has no data."""
        return read_pixels(path, self.in_channels, self.value_limits)

    def load_label(self, path: Path) -> np.ndarray:
        """Return a label map ``(H, W)`` as stored, before ``lut`` and ``void_label`` are applied."""
        mask = read_mask(path)
        self.palettes.check(mask, path)
        return mask.values if mask.values.ndim == 2 else read_label(path)  # read_label refuses colors

    @cached_property
    def label_table(self) -> LabelTable:
        """Translates what ``load_label`` returns to class ids."""
        name, void, hint = type(self).__name__, self.void_label, self.label_hint
        return LabelTable(name, self.num_classes, self.ignore_index, void=void, lut=self.lut, hint=hint)

    def read(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return image ``(H, W, C)`` and label ``(H, W)`` from the files, labels translated and checked."""
        entry = self.entries[index]
        assert entry.image is not None  # data sets without files have a read() of their own
        pixels = self.load_image(entry.image)
        # Pixels without data become the mean color, which is 0 after normalization.
        image = pixels.filled(self.mean)
        if entry.label is None:
            return image, np.full(image.shape[:2], self.ignore_index, self.label_table.dtype)
        label = self.label_table.translate(self.load_label(entry.label), entry.label)
        if label.shape != image.shape[:2]:
            raise sizes_differ(entry.image, entry.label, image.shape[:2], label.shape[:2])
        if pixels.missing is not None:
            label = np.where(pixels.missing, label.dtype.type(self.ignore_index), label)
        return image, label

    def _read_all(self) -> Cache:
        if self.endless:
            raise ValueError(f"cache must be None: {type(self).__name__} draws new images each epoch")
        return Cache(self.read, len(self), keep_errors=self.on_error == "skip")

    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return image and label of a sample before augmentation, from the cache if there is one."""
        return self._cache[index] if self._cache is not None else self.read(index, epoch)

    def label_at(self, index: int) -> np.ndarray:
        """Return only the label map of a sample, with class ids and ignore index."""
        entry = self.entries[index]
        if self._cache is not None or entry.label is None:
            return self.load(index)[1]
        return self.label_table.translate(self.load_label(entry.label), entry.label)

    def image_at(self, index: int) -> Pixels:
        """Return only the image of a sample, and where it has no data."""
        path = self.entries[index].image
        return Pixels(self.read(index)[0]) if path is None else self.load_image(path)

    # ---- items

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: Key) -> Sample | Skipped:
        """Return the sample of a :data:`base.entries.Key`; the same key always gives the same sample."""
        epoch, index, *draw = key if isinstance(key, tuple) else (0, key)
        if index < 0:
            index += len(self)
        try:
            return self._sample(epoch, index, *draw)
        except UserError as error:
            if self.on_error == "raise":
                raise
            return self._replace(epoch, index, str(error))

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample | Skipped | UserError]:
        """Return the samples for a batch of keys. Errors are returned as items, and the loader raises them.

        If a worker process raised them, the user would see the worker's traceback.
        """
        return [self._item_or_error(key) for key in keys]

    def _item_or_error(self, key: Key) -> Sample | Skipped | UserError:
        try:
            return self[key]
        except UserError as error:
            return error

    def _replace(self, epoch: int, index: int, reason: str) -> Skipped:
        reasons = [reason]
        for step in range(1, min(len(self), 100) if self.replace_broken else 1):
            try:
                return Skipped(reasons, self._sample(epoch, (index + step) % len(self)))
            except UserError as error:
                reasons.append(str(error))
        return Skipped(reasons, None)

    def _sample(self, epoch: int, index: int, *draw: int) -> Sample:
        image, label = self.load(index, epoch)
        parameters = None
        if self.augmentation is not None:
            rng = np.random.default_rng([self.seed, epoch, index, *draw])
            parameters = self.augmentation.draw(rng, *label.shape)
        elif self.val and self.crop_size:
            parameters = aug.center_crop(label.shape[0], label.shape[1], self.crop_size)
        if parameters is not None:
            if max(label.shape) > aug.LARGEST_SIDE:
                raise UserError(
                    f"{self.entries[index].image} is {label.shape[1]}x{label.shape[0]} (width x height); augment and "
                    f"crop_size work for images of up to {aug.LARGEST_SIDE} pixels a side. Cut it into tiles"
                )
            # Outside the image is the mean color, which is 0 after normalization.
            fill = [round(255 * m) for m in self.mean] if image.dtype == np.uint8 else list(self.mean)
            image, label = aug.apply(image, label, parameters, fill, self.ignore_index)
        return Sample(_planes(image), torch.from_numpy(label.copy()), self.entries[index].name)

    def for_validation(self, whole: bool = False) -> BaseDataSet:
        """Return this data set without augmentation; center-cropped if there is a crop_size, unless ``whole``.

        If ``samples()`` held out samples, the returned data set contains these, otherwise the same samples.
        """
        other = copy.copy(self)
        other.augmentation, other.replace_broken = None, False
        other.val = self.crop_size is not None and not whole
        if self.held_out is not None:
            other.entries, other.held_out, other._cache = Entries(distinct(self.held_out, self._data_dir)), None, None
        return other


def _planes(image: np.ndarray) -> Tensor:
    """Return ``(C, H, W)`` of an image ``(H, W, C)``; always a copy, because the image may be a view of the cache."""
    planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
    for channel, plane in enumerate(planes):
        # Several times faster than a transposed copy in NumPy.
        cv2.extractChannel(image, channel, plane)
    return torch.from_numpy(planes)
