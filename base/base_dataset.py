"""What all data sets share: class facts, listing, reading, checking, augmentation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from base import augmentation as aug
from base.layout import layout_problem
from utils.errors import DataFolderError, UserError, plural
from utils.facts import Facts
from utils.images import read_image, read_label, voc_colormap

log = logging.getLogger("data")

Colour = tuple[int, int, int]
Key = int | tuple[int, int]

CHECKED_AT_START = 4  # label maps that are read when the data set is opened
BROKEN_FILES_HINT = (
    "\n(python -m dataloaders check --config CONFIG finds all such files; "
    '"on_error": "skip" in the loader\'s args goes on without them)'
)
STATISTICS_SAMPLES = 5000  # label maps that are counted, at most, for class weights


class Sample(NamedTuple):
    """One item: ``image`` uint8 ``(C, H, W)`` (float32 in [0, 1] for more than 8 bits), ``label`` integers
    ``(H, W)``: class ids or the ignore index, ``name``.
    """

    image: Tensor
    label: Tensor
    name: str


class Skipped(NamedTuple):
    """An item that could not be read under ``on_error: "skip"``: why, and what takes its place (if anything)."""

    reasons: list[str]
    replacement: Sample | None


class Entry(NamedTuple):
    """Where one sample comes from; ``label`` None: there is none, all its pixels are ignored."""

    image: Path | None
    label: Path | None
    name: str


class _ByteTables(NamedTuple):
    """For stored label values 0 to 255: the id, whether it is illegal (255 if so), whether all stay as they are."""

    ids: np.ndarray
    illegal: np.ndarray
    as_stored: bool


class Entries(Sequence[Entry]):
    """A list of entries in three flat buffers.

    A million small Python objects would be copied into every worker bit by bit, because counting references
    writes to them; buffers stay shared.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        fields = zip(*(("" if f is None else str(f) for f in e) for e in entries), strict=True)
        columns = [[text.encode("utf-8", "surrogateescape") for text in field] for field in fields]
        self._text = [b"".join(column) for column in columns]
        self._ends = [np.cumsum([len(t) for t in column], dtype=np.int64) for column in columns]
        self._count = len(entries)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]
        if not -self._count <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        index %= self._count
        image, label, name = (self._field(column, index) for column in range(3))
        return Entry(Path(image) if image else None, Path(label) if label else None, name)

    def _field(self, column: int, index: int) -> str:
        ends = self._ends[column]
        start = int(ends[index - 1]) if index else 0
        return self._text[column][start : int(ends[index])].decode("utf-8", "surrogateescape")


class BaseDataSet(Dataset[Any]):
    """A list of (image, label) pairs with class facts and augmentation.

    A data set is a subclass with its facts as class attributes and ``samples()``; one with special label files
    overrides ``load_label`` too (or sets ``self.lut`` before ``super().__init__``). Own arguments come as
    keyword-only parameters with type annotations in front of ``**common``, which goes to this constructor; this one
    takes no unknown names, so misspelt ones are found.

    Args:
        data_dir: the folder whose ``layout`` is shown when it is not as expected.
        split: one of ``splits``.
        crop_size: side, or (height, width), of the crop.
        base_size: training images are brought to a random length around this (longer side); None: around their own.
        augment: rescale, rotate, crop, flip, blur, jitter, as the next arguments say.
        scale: true: 0.5 to 2 times base_size; or (lowest, highest).
        flip: mirror half of the images.
        rotate: true: up to 10 degrees either way; or the largest angle in degrees.
        blur: true: Gaussian of up to 1 pixel; or the largest standard deviation.
        jitter: true: brightness, contrast and saturation change by up to 0.3 each; or the largest change.
        val: bring the shorter side to crop_size and crop the centre. Without it (and without augment) images
            come whole, at their own size.
        in_channels: channels that images are brought to.
        classes: names, or a text file with one a line (as given or below data_dir), or their number; replaces
            the published ones.
        palette: one RGB colour per class.
        mean, std: per channel, for intensities in [0, 1].
        cache: "ram" reads all files once, at start, and keeps them.
        on_error: "raise", or "skip" to go on without broken files.
        ignore_index: label that counts nowhere; None: the data set's own.
        seed: of everything random.

    Raises:
        ValueError: an argument's value is not possible; it is named.
        UserError: the folder or the files are not as they must be.
    """

    # Facts. Labels are 0 .. num_classes - 1 (for num_classes 1: 0 background, 1 the class) or ignore_index.
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    palette: tuple[Colour, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    ignore_index: int = 255
    in_channels: int = 3
    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    # The value that means "not labelled" in the files as load_label returns them; it becomes ignore_index.
    void_label: int | None = 255
    # The tree below data_dir, for messages.
    layout: str = ""
    # Stored label -> class id or ignore index, applied to what the files hold (uint8 files: 256 entries).
    lut: np.ndarray | None = None
    # Generated data sets draw another image per epoch; nothing of them can be counted or kept.
    endless: bool = False

    def __init__(
        self,
        data_dir: str | None = None,
        split: str = "train",
        *,
        crop_size: int | tuple[int, int] | None = None,
        base_size: int | None = None,
        augment: bool = False,
        scale: bool | tuple[float, float] = True,
        flip: bool = True,
        rotate: bool | float = True,
        blur: bool | float = False,
        jitter: bool | float = False,
        val: bool = False,
        in_channels: int = 3,
        classes: list[str] | str | int | None = None,
        palette: list[Colour] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        cache: str | None = None,
        on_error: str = "raise",
        ignore_index: int | None = None,
        seed: int = 0,
    ) -> None:
        _one_of("split", split, self.splits)
        _one_of("on_error", on_error, ("raise", "skip"))
        _one_of("cache", cache, (None, "ram"))
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        self.split, self.seed, self.on_error = split, seed, on_error
        self._data_dir = Path(data_dir).expanduser() if data_dir is not None else None
        facts = self.facts_for(
            data_dir=data_dir,
            classes=classes,
            palette=palette,
            mean=mean,
            std=std,
            in_channels=in_channels,
            ignore_index=ignore_index,
        )
        for name, value in vars(facts).items():
            setattr(self, name, value)
        if 0 <= self.ignore_index < self.label_count:
            log.warning("ignore_index %d is also a class id: no pixel of that class will count", self.ignore_index)
        self.crop_size = _pair("crop_size", crop_size)
        self.val = val
        self.augmentation = (
            aug.Augmentation(
                self.crop_size,
                _positive("base_size", base_size),
                _scale_range(scale),
                _amount("rotate", rotate, aug.MAX_ROTATION),
                flip,
                _amount("blur", blur, aug.MAX_BLUR),
                _amount("jitter", jitter, aug.MAX_JITTER),
            )
            if augment and not val
            else None
        )
        self._check_geometry(augment, base_size)
        # Broken files are replaced in training and left out in evaluation; the loader decides.
        self.replace_broken = augment
        self._cache: _Cache | None = None
        self.entries: Sequence[Entry] = self._list()
        self._check_first()
        if cache == "ram":
            if self.endless:
                raise ValueError(f"cache must be None: {type(self).__name__} draws new images each epoch")
            self._cache = _Cache(self)

    # ---- facts

    @classmethod
    def facts_for(
        cls,
        *,
        data_dir: str | None = None,
        classes: Sequence[str] | str | int | None = None,
        palette: Sequence[Colour] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        in_channels: int = 3,
        ignore_index: int | None = None,
    ) -> Facts:
        """Return the facts under the given overrides, without looking at the data (but for a class file)."""
        names = _class_names(classes, data_dir) if classes is not None else cls.class_names
        count = len(names)
        if palette is None and names == cls.class_names:
            palette = cls.palette
        elif palette is None:
            # Colour 0 of the VOC map is black: right for a background, wrong for a single class.
            palette = voc_colormap(count) if count > 1 else voc_colormap(2)[1:]
        colours = tuple(_colour(c) for c in palette)
        if len(colours) != count:
            raise ValueError(f"palette must have one colour per class: {count} classes, {len(colours)} colours")
        return Facts(
            num_classes=count,
            class_names=names,
            palette=colours,
            mean=_per_channel("mean", mean, cls.mean, in_channels),
            std=_per_channel("std", std, cls.std, in_channels),
            ignore_index=cls.ignore_index if ignore_index is None else ignore_index,
            in_channels=in_channels,
        )

    @classmethod
    def loader_targets(cls) -> tuple[type, ...]:
        """Return the classes whose constructors share out a loader's arguments: own and base, and the loader's."""
        from base.base_dataloader import BaseDataLoader

        return (*(c for c in cls.__mro__ if issubclass(c, BaseDataSet) and "__init__" in vars(c)), BaseDataLoader)

    @property
    def facts(self) -> Facts:
        """The facts as they hold for this instance: plain Python values."""
        return Facts.of(self)

    @property
    def label_count(self) -> int:
        """How many class ids labels may have: num_classes, or 2 where one class stands against background."""
        return max(2, self.num_classes)

    # ---- listing

    @property
    def data_dir(self) -> Path:
        """The folder of the data; ValueError where none was given."""
        if self._data_dir is None:
            raise ValueError(f"data_dir is missing: {type(self).__name__} reads files")
        return self._data_dir

    def samples(self) -> list[Entry] | list[tuple[Path, Path | None, str]]:
        """Return the (image path, label path or None, name) of all samples, in a fixed order."""
        raise NotImplementedError

    def _list(self) -> Sequence[Entry]:
        if self.layout and not self.data_dir.is_dir():
            raise self.layout_error(f"data_dir {self.data_dir} does not exist or is no folder")
        found = self.samples()
        if not found:
            raise self.layout_error(f"split {self.split!r} of {type(self).__name__} has no images")
        return Entries([Entry(*entry) for entry in found])

    def layout_error(self, problem: str) -> DataFolderError:
        """Return the error that tells ``problem`` with the expected tree beside what is there."""
        return DataFolderError(layout_problem(problem, self.layout, self._data_dir))

    def _check_geometry(self, augment: bool, base_size: int | None) -> None:
        if self.val and self.crop_size is None:
            raise ValueError("crop_size is missing: `val: true` crops the centre; leave both out for whole images")
        if augment and self.val:
            log.warning("augment has no effect with `val: true`: images are scaled and centre-cropped only")
        elif not augment and not self.val:
            for name, value in (("crop_size", self.crop_size), ("base_size", base_size)):
                if value is not None:
                    log.warning("%s has no effect without `augment: true` or `val: true`: images come whole", name)

    def _check_first(self) -> None:
        """Read a few label maps over the whole list: what is wrong with all of them is told at start."""
        if not self.layout or self.on_error == "skip":
            return
        count = min(CHECKED_AT_START, len(self.entries))
        for index in np.linspace(0, len(self.entries) - 1, count).astype(int):
            try:
                self.load(int(index))
            except UserError as error:
                raise UserError(f"{error}{BROKEN_FILES_HINT}") from None

    # ---- reading

    def load_image(self, path: Path) -> np.ndarray:
        """Return an image ``(H, W, in_channels)``, uint8 or float32 in [0, 1]."""
        return read_image(path, self.in_channels)

    def load_label(self, path: Path) -> np.ndarray:
        """Return a label map ``(H, W)`` as stored, before ``lut`` and ``void_label`` are applied."""
        return read_label(path)

    def read(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return image ``(H, W, C)`` and label ``(H, W)`` from the files, labels translated and checked."""
        entry = self.entries[index]
        assert entry.image is not None  # data sets without files have a read() of their own
        image = self.load_image(entry.image)
        if entry.label is None:
            return image, np.full(image.shape[:2], self.ignore_index, self.label_dtype)
        label = self.translate(self.load_label(entry.label), entry.label)
        if label.shape != image.shape[:2]:
            raise UserError(
                f"image and label differ in size: {entry.image} is {_size(image)}, "
                f"{entry.label} is {_size(label)} (width x height)"
            )
        return image, label

    def load(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return image and label of a sample before augmentation (from memory with ``cache: "ram"``)."""
        return self._cache[index] if self._cache is not None else self.read(index, epoch)

    @property
    def label_dtype(self) -> type[np.generic]:
        """The integer type of labels: uint8 where the ignore index and all ids fit in it, else int32."""
        fits = 0 <= self.ignore_index <= 255 and self.label_count <= 256
        return np.uint8 if fits else np.int32

    def translate(self, label: np.ndarray, path: Path | str) -> np.ndarray:
        """Return a stored label map as class ids and ignore_index; UserError if it holds anything else."""
        if label.dtype == np.uint8:
            tables = self._tables()
            if cv2.countNonZero(cv2.LUT(label, tables.illegal)):
                values = np.unique(label)
                raise self._illegal(label, values[tables.illegal[values] > 0], path)
            return label if tables.as_stored else tables.ids[label]
        return self._translate_wide(label, path)

    def _translate_wide(self, label: np.ndarray, path: Path | str) -> np.ndarray:
        stored = label
        if self.lut is not None:
            inside = (label >= 0) & (label < len(self.lut))
            label = np.where(inside, self.lut[np.where(inside, label, 0)], label)
        if self.void_label is not None:
            label = np.where(label == self.void_label, self.ignore_index, label)
        illegal = ((label < 0) | (label >= self.label_count)) & (label != self.ignore_index)
        if illegal.any():
            raise self._illegal(stored, np.unique(stored[illegal]), path)
        return label.astype(self.label_dtype)

    def _tables(self) -> _ByteTables:
        """Return what becomes of the stored values 0 to 255."""
        tables = self.__dict__.get("_byte_tables")
        if tables is None:
            ids = np.arange(256, dtype=np.int64)
            if self.lut is not None:
                ids[: len(self.lut)] = self.lut[:256]
            if self.void_label is not None:
                ids[ids == self.void_label] = self.ignore_index
            legal = ((ids >= 0) & (ids < self.label_count)) | (ids == self.ignore_index)
            as_stored = self.label_dtype == np.uint8 and np.array_equal(ids[legal], np.flatnonzero(legal))
            ids = np.where(legal, ids, 0).astype(self.label_dtype)
            tables = self._byte_tables = _ByteTables(ids, np.uint8(255) * ~legal, as_stored)
        return tables

    def _illegal(self, label: np.ndarray, values: np.ndarray, path: Path | str) -> UserError:
        pixels = int(np.isin(label, values).sum())
        shown = ", ".join(str(v) for v in values[:10]) + (", ..." if len(values) > 10 else "")
        hint = ""
        if self.label_count == 2 and set(values.tolist()) <= {255, *range(2, 256)}:
            hint = " (Masks stored as 0 and 255? The Folder loader takes them with `mask_values` or a palette.)"
        return UserError(
            f"{path} holds label values that are no class: {shown} ({plural(pixels, 'pixel')}). "
            f"{type(self).__name__} expects 0 to {self.label_count - 1} ({self.num_classes} classes) or "
            f"{self.ignore_index} (ignore_index). Change `classes` in the loader's args if there are more "
            f"classes, `ignore_index` if this value means 'not labelled', or mend the file.{hint}"
        )

    # ---- items

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: Key) -> Sample | Skipped:
        """Return the sample for an index, or for an (epoch, index) pair: the same key, the same sample."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if index < 0:
            index += len(self)
        if self.on_error == "raise":
            return self._sample(epoch, index)
        try:
            return self._sample(epoch, index)
        except UserError as error:
            return self._replace(epoch, index, str(error))

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample | Skipped | UserError]:
        """Return the samples for a batch of keys, errors among them as they are: the loader raises them.

        Raised in a worker process they would reach the user wrapped in the worker's traceback.
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

    def _sample(self, epoch: int, index: int) -> Sample:
        image, label = self.load(index, epoch)
        parameters = self._parameters(epoch, index, *label.shape)
        if parameters is not None:
            image, label = aug.apply(image, label, parameters, self._fill(image), self.ignore_index)
        return Sample(_planes(image), torch.from_numpy(label.copy()), self.entries[index].name)

    def _parameters(self, epoch: int, index: int, height: int, width: int) -> aug.Parameters | None:
        if self.augmentation is not None:
            return self.augmentation.draw(np.random.default_rng([self.seed, epoch, index]), height, width)
        return aug.centre_crop(height, width, self.crop_size) if self.val and self.crop_size else None

    def _fill(self, image: np.ndarray) -> list[float]:
        """The mean colour: 0 after normalisation."""
        return [round(255 * m) for m in self.mean] if image.dtype == np.uint8 else list(self.mean)

    def for_validation(self) -> BaseDataSet:
        """Return this data set without augmentation (centre-cropped if there is a crop_size); files are shared."""
        other = copy.copy(self)
        other.augmentation, other.replace_broken = None, False
        other.val = self.crop_size is not None
        return other

    # ---- what the labels hold

    def class_pixel_counts(
        self, limit: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """Count the pixels of each class in each sample, before augmentation.

        Args:
            limit: take at most this many samples, evenly spread; None: all.
            progress: called with (done, total) after each sample.

        Returns:
            int64 ``(samples, label_count)``; ignored pixels are in no column.
        """
        count = len(self) if limit is None else min(limit, len(self))
        chosen = np.linspace(0, len(self) - 1, count).astype(int)
        result = np.zeros((count, self.label_count), np.int64)
        with ThreadPoolExecutor(max_workers=_threads()) as pool:
            for row, counts in enumerate(pool.map(self._count, chosen.tolist())):
                result[row] = counts
                if progress is not None:
                    progress(row + 1, count)
        return result

    def _count(self, index: int) -> np.ndarray:
        try:
            label = self._label_alone(index)
        except UserError:
            if self.on_error == "skip":
                return np.zeros(self.label_count, np.int64)
            raise
        counted = label[(label != self.ignore_index)]
        return np.bincount(counted, minlength=self.label_count)

    def _label_alone(self, index: int) -> np.ndarray:
        entry = self.entries[index]
        if self._cache is not None or entry.label is None:
            return self.load(index)[1]
        return self.translate(self.load_label(entry.label), entry.label)

    def class_weights(self, limit: int | None = STATISTICS_SAMPLES) -> Tensor:
        """Return weights that balance the classes, float32 ``(num_classes,)`` (label_count for one channel).

        Median frequency balancing (Eigen & Fergus, ICCV 2015): the frequency of a class is its share of the
        labelled pixels of the images in which it occurs; its weight is the median frequency over its own. A class
        that never occurs gets 1.
        """
        counts = self.class_pixel_counts(limit).astype(np.float64)
        present = counts > 0
        pixels_where_present = (counts.sum(1, keepdims=True) * present).sum(0)
        frequency = counts.sum(0) / np.maximum(pixels_where_present, 1)
        occurs = frequency > 0
        if not occurs.any():
            raise UserError(f"no labelled pixel in split {self.split!r}: no class weights can be computed")
        weights = np.ones(self.label_count)
        weights[occurs] = np.median(frequency[occurs]) / frequency[occurs]
        return torch.from_numpy(weights.astype(np.float32))

    def sample_weights(self) -> np.ndarray:
        """Return how often each sample should be drawn so that rare classes are seen more often.

        Repeat factors (Gupta et al., LVIS, CVPR 2019): a class that is in the share f of the images has the factor
        max(1, sqrt(t / f)), an image the largest factor of its classes. t is the median of f.

        Returns:
            float64 ``(len(self),)``, sums to 1.
        """
        if self.endless:
            raise ValueError(f"sampler must be None: {type(self).__name__} draws new images each epoch")
        present = self.class_pixel_counts() > 0
        share = present.mean(0)
        occurs = share > 0
        factor = np.ones(self.label_count)
        if occurs.any():
            factor[occurs] = np.maximum(1.0, np.sqrt(np.median(share[occurs]) / share[occurs]))
        weights = np.where(present, factor, 0.0).max(1)
        weights[weights == 0.0] = 1.0
        return weights / weights.sum()


class _Cache:
    """All images and labels of a data set, read once and kept in two buffers that worker processes share."""

    def __init__(self, dataset: BaseDataSet) -> None:
        with ThreadPoolExecutor(max_workers=_threads()) as pool:
            pairs = list(pool.map(lambda i: self._read(dataset, i), range(len(dataset))))
        self._errors = {i: pair for i, pair in enumerate(pairs) if isinstance(pair, str)}
        good = [pair for pair in pairs if not isinstance(pair, str)]
        self._rows = np.cumsum([not isinstance(pair, str) for pair in pairs]) - 1
        self._images = _Buffer([pair[0] for pair in good])
        self._labels = _Buffer([pair[1] for pair in good])

    @staticmethod
    def _read(dataset: BaseDataSet, index: int) -> tuple[np.ndarray, np.ndarray] | str:
        try:
            return dataset.read(index)
        except UserError as error:
            if dataset.on_error == "skip":
                return str(error)
            raise

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self._errors:
            raise UserError(self._errors[index])
        row = int(self._rows[index])
        return self._images[row], self._labels[row]


class _Buffer:
    """Arrays of different shapes one after the other in one flat array per type of number."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._shapes = [a.shape for a in arrays]
        self._types = [a.dtype.str for a in arrays]
        # Starts are aligned to 8 bytes so that every type can be viewed in place.
        sizes = [-(-a.nbytes // 8) * 8 for a in arrays]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._bytes = np.empty(int(self._starts[-1]), np.uint8)
        for i, start in enumerate(self._starts[:-1].tolist()):
            array, arrays[i] = arrays[i], np.empty(0)  # released one by one: never everything twice
            self._bytes[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)

    def __getitem__(self, row: int) -> np.ndarray:
        shape, dtype = self._shapes[row], np.dtype(self._types[row])
        start = int(self._starts[row])
        return self._bytes[start : start + dtype.itemsize * int(np.prod(shape))].view(dtype).reshape(shape)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Return the names in a text file: one a line, empty lines and lines that begin with ``#`` left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"classes: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"classes: cannot read {path}: {error}") from None
    names = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not names:
        raise UserError(f"classes: {path} names no class; expected one name a line")
    return names


def _class_names(classes: Sequence[str] | str | int, data_dir: str | None) -> tuple[str, ...]:
    if isinstance(classes, bool):
        raise ValueError("classes must be names, a text file or a number")
    if isinstance(classes, int):
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        return tuple(f"class {i}" for i in range(classes))
    if isinstance(classes, str):
        below = Path(data_dir or ".").expanduser() / classes
        given = Path(classes).expanduser()
        if not below.is_file() and not given.is_file():
            raise UserError(
                f"classes: there is no file {given}, nor {below}; give the path of a text file with one name a line, "
                "or the names themselves as a list"
            )
        return read_class_names(below if below.is_file() else given)
    names = tuple(str(name) for name in classes)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"classes must be different names, at least one; got {list(names)}")
    return names


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(repr(a) for a in allowed)}; got {value!r}")


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _pair(name: str, value: int | Sequence[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    height, width = (value, value) if isinstance(value, int) else tuple(value)
    if min(height, width) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return height, width


def _scale_range(scale: bool | Sequence[float]) -> tuple[float, float]:
    if isinstance(scale, bool):
        return aug.SCALE_RANGE if scale else (1.0, 1.0)
    low, high = scale
    if not 0 < low <= high:
        raise ValueError(f"scale must be (lowest, highest) with 0 < lowest <= highest, got {tuple(scale)}")
    return float(low), float(high)


def _amount(name: str, value: bool | float, default: float) -> float:
    amount = default * value if isinstance(value, bool) else float(value)
    if not 0 <= amount <= 180:
        raise ValueError(f"{name} must be true, false or a number that is not negative, got {value}")
    return amount


def _colour(colour: Sequence[int]) -> Colour:
    values = tuple(int(v) for v in colour)
    if len(values) != 3 or not all(0 <= v <= 255 for v in values):
        raise ValueError(f"palette must hold RGB colours of three numbers from 0 to 255, got {list(colour)}")
    return values  # type: ignore[return-value]


def _per_channel(name: str, given: Sequence[float] | None, own: Sequence[float], channels: int) -> tuple[float, ...]:
    if given is None:
        # The published numbers are for RGB; other channels get their average.
        return tuple(own) if len(own) == channels else (float(np.mean(own)),) * channels
    if len(given) != channels:
        raise ValueError(f"{name} must have one number per channel ({channels}), got {list(given)}")
    if name == "std" and min(given) <= 0:
        raise ValueError(f"std must be above 0, got {list(given)}")
    return tuple(float(v) for v in given)


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _planes(image: np.ndarray) -> Tensor:
    """Return ``(C, H, W)`` of an image ``(H, W, C)``: always a copy, the image may be a view of the cache."""
    planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
    for channel, plane in enumerate(planes):
        # Several times faster than NumPy's transposed copy.
        cv2.extractChannel(image, channel, plane)
    return torch.from_numpy(planes)


def _threads() -> int:
    from base.base_dataloader import available_cores

    return min(8, 2 * available_cores())
