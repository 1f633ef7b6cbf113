"""Use saved probabilities instead of a network and its images, so that they are scored like images.

Reads folders that ``test.py --save-probs`` and ``inference.py --probs`` wrote, and folders of plain ``.npz`` or
``.npy`` files ``(classes, height, width)`` or ``(classes, depth, height, width)`` of other programs, such as nnU-Net.

Volumes become one tall image: RankDice and all other procedures treat an image as a set of pixels, so nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import stamps
from utils.batch import Batch
from utils.errors import UserError, import_extra
from utils.facts import Facts
from utils.files import atomic
from utils.images import read_label, voc_colormap
from utils.images.palette import write_mask
from utils.predict import PROCEDURES, Activation, PredictOptions
from utils.predict.files import INDEX, Index, read_index, read_probs
from utils.predict.network import check_finite

VOLUMES = (".nii.gz", ".nii")
LABELS = (".png", ".tif", ".tiff", ".bmp", ".npy", *VOLUMES)
_OUTSIDE = 1e-3  # float16 and the sums of other programs leave [0, 1] by less


@dataclass(frozen=True)
class Case:
    """One saved image or volume."""

    name: str
    path: Path
    label: Path | None = None


class SavedProbs:
    """The images of a folder of saved probabilities, as a loader yields them.

    Args:
        folder: see the module.
        labels: a folder with a label file for each, of the same name; None: images are yielded without labels.
        ignore_index: of folders without ``probs.json``.

    Raises:
        UserError: the folder contains no probabilities, a label is missing, or the files do not match.
    """

    def __init__(self, folder: Path, labels: Path | None = None, ignore_index: int = 255) -> None:
        self.folder = folder
        self.known = known = (folder / INDEX).is_file()
        self.cases: list[Case] = []
        found = sorted(path for kind in (("*.npz",) if known else ("*.npz", "*.npy")) for path in folder.rglob(kind))
        for path in found:
            top = path.relative_to(folder).parts[:2]
            written = path.suffix == ".npy" and top[0] == "masks" and top[1] in PROCEDURES  # by an earlier call
            if path.name.startswith(".") or written:
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            files = [] if labels is None else [f for end in LABELS if (f := labels / f"{name}{end}").is_file()]
            same = [case.path for case in self.cases[-1:] if case.name == name]  # they are sorted
            for several in (files, [*same, path]):
                if len(several) > 1:
                    raise UserError(f"{several[0]} and {several[1]} have the same name; keep one of them")
            self.cases.append(Case(name, path, files[0] if files else None))
        if not self.cases:
            raise UserError(f"{folder}: contains no probabilities (*.npz or *.npy)")
        missing = [case.name for case in self.cases if case.label is None]
        if labels is not None and missing:
            raise UserError(
                f"--labels {labels}: no label file for {len(missing)} of {len(self.cases)} images, such as "
                f"{missing[0]} (expected {missing[0]}{{{','.join(LABELS)}}})"
            )
        first = read_probs(self.cases[0].path)
        self.index = read_index(folder) if known else _plain_index(folder, len(first), ignore_index)
        for case in self.cases if known else ():
            if stamps.stamp_of(case.path) != self.index.run:
                raise UserError(
                    f"{case.path}: was not written by the run that {folder / INDEX} describes; move it elsewhere"
                )
        is_softmax = _sums_to_one(first)
        if not is_softmax and ((first.sum(-1) - 1).abs() < 0.01).all():
            raise UserError(
                f"{self.cases[0].path}: expected (classes, height, width), found {tuple(first.shape)}, whose last axis "
                "sums to 1 like classes; save the classes as the first axis"
            )
        self.activation: Activation = "softmax" if is_softmax else "sigmoid"
        self.dataset = self  # what reads the loader asks its data set for

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[Batch]:
        """Yield one image at a time; without labels, all pixels are ignored."""
        for case in self.cases:
            probs = self.read(case)
            shape = tuple(probs.shape[1:])
            if case.label is None:
                label = torch.full(shape, self.index.facts.ignore_index)
            else:
                label = torch.from_numpy(read_any_label(case.label))
                label = label[0] if label.ndim == 3 and len(label) == 1 else label
                if label.shape != shape:
                    raise UserError(
                        f"{case.label}: has the shape {tuple(label.shape)}, its probabilities {case.path} have {shape}"
                    )
            yield Batch(flat(probs)[None], label.flatten(0, -2).long()[None], [case.name])

    def read(self, case: Case) -> Tensor:
        """Return the probabilities of one case, float32 ``(C, H, W)`` or ``(C, D, H, W)``.

        Raises:
            UserError: they are not probabilities, or of another number of classes.
        """
        probs = read_probs(case.path)
        classes = self.index.facts.num_classes
        if len(probs) != classes or probs.ndim not in (3, 4):
            raise UserError(
                f"{case.path}: expected ({classes}, height, width) or ({classes}, depth, height, width), found "
                f"{tuple(probs.shape)}"
            )
        check_finite(probs[None], [str(case.path)])
        low, high = float(probs.min()), float(probs.max())
        if low < -_OUTSIDE or high > 1 + _OUTSIDE:
            raise UserError(
                f"{case.path}: expected probabilities in [0, 1], found {low:.4g} to {high:.4g}; save the softmax or "
                "sigmoid of the network, not its logits"
            )
        if self.activation == "softmax" and not _sums_to_one(probs):
            raise UserError(
                f"{case.path}: its classes do not sum to 1 in every pixel, unlike those of {self.cases[0].path}; save "
                "the same kind of probabilities for all images"
            )
        probs = probs.clamp_(0, 1)
        return probs[:, 0] if probs.ndim == 4 and probs.shape[1] == 1 else probs  # nnU-Net saves images as one slice


def _sums_to_one(probs: Tensor) -> bool:
    """Return whether the classes sum to 1 in every pixel with data."""
    sums = probs.flatten(1).sum(0)
    return bool((((sums - 1).abs() < 0.01) | (sums == 0)).all())


def flat(probs: Tensor) -> Tensor:
    """Return ``(C, H, W)``; a volume ``(C, D, H, W)`` becomes ``(C, D * H, W)``."""
    return probs.flatten(1, -2)


def _plain_index(folder: Path, classes: int, ignore_index: int) -> Index:
    """Return an index for a folder without one."""
    names = tuple(f"class {c}" for c in range(classes))
    palette = voc_colormap(max(2, classes))[-classes:]  # a single class is not black
    facts = Facts(classes, names, palette, (0.0,) * 3, (1.0,) * 3, ignore_index)
    return Index(facts, PredictOptions(), "rankdice", 1.0, str(folder))


def read_any_label(path: Path) -> np.ndarray:
    """Return a label map ``(H, W)`` or a volume ``(D, H, W)`` of integers.

    NIfTI volumes need nibabel; their axes are reversed, as SimpleITK and nnU-Net order them.
    """
    if not path.name.endswith((*VOLUMES, ".npy")):
        return read_label(path)
    try:
        volume = path.name.endswith(VOLUMES)
        values = np.asarray(_nibabel(path).load(path).dataobj).T if volume else np.load(path, allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # nibabel raises many kinds of errors
        raise UserError(f"{path}: cannot be read as labels: {error}") from None
    if values.dtype.kind not in "iufb" or not np.array_equal(values, np.rint(values)):
        raise UserError(f"{path}: expected whole numbers, the class ids")
    return np.ascontiguousarray(values, dtype=np.int64)


def write_labels(path: Path, facts: Facts, case: Case, labels: np.ndarray) -> None:
    """Write a label map ``(H, W)`` as palette PNG, or a volume ``(D, H, W)`` as ``.npy`` or, in its space, as NIfTI.

    ``path``: as :func:`output_path` gives it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        write_mask(path, labels, facts.palette, stamps.text())
    elif path.suffix == ".npy":
        with atomic(path, ".npy") as part:
            np.save(part, labels)
    else:
        nibabel = _nibabel(path)
        space = nibabel.load(case.path.with_suffix(".nii.gz"))
        with atomic(path, ".nii.gz") as part:
            nibabel.save(nibabel.Nifti1Image(labels.T, space.affine, space.header, dtype=labels.dtype), part)


def output_path(folder: Path, case: Case, dimensions: int) -> Path:
    """Return the file for a label map, or a volume: NIfTI if a ``NAME.nii.gz`` is next to its probabilities."""
    of_volume = ".nii.gz" if case.path.with_suffix(".nii.gz").is_file() else ".npy"
    return folder / f"{case.name}{'.png' if dimensions == 2 else of_volume}"


def _nibabel(path: Path) -> Any:
    return import_extra("nibabel", f"{path}: reading NIfTI files")
