"""COCO-Stuff (Caesar et al., CVPR 2018): things and stuff, in the editions of 10 and of 164 thousand images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from base.base_dataset import BaseDataSet
from base.entries import Entry
from dataloaders.labels import labels
from dataloaders.reading.lists import read_names
from dataloaders.reading.matlab import load_mat
from dataloaders.reading.pairing import pair_folders
from utils.errors import UserError
from utils.images import read_label

# Things that COCO names but never annotated (the publisher's README lists them).
UNANNOTATED = (
    *("street sign", "hat", "shoe", "eye glasses", "plate", "mirror"),
    *("window", "desk", "door", "blender", "hair brush"),
)
_NAMES, _PALETTE = labels("coco_stuff")
_KEPT = [i for i, name in enumerate(_NAMES) if name not in UNANNOTATED]
_SPLITS_10K = ("train", "test", "all")
_SPLITS_164K = {"train": "train2017", "val": "val2017", "train2017": "train2017", "val2017": "val2017"}

_LAYOUT_10K = """
data_dir/
  images/COCO_train2014_<number>.jpg
  annotations/COCO_train2014_<number>.mat
  imageLists/train.txt, test.txt, all.txt
"""
_LAYOUT_164K = """
data_dir/
  images/
    train2017/<number>.jpg
    val2017/<number>.jpg
  annotations/           (stuffthingmaps_trainval2017.zip)
    train2017/<number>.png
    val2017/<number>.png
"""


class COCO(BaseDataSet):
    """COCO-Stuff with 182 class ids as published, or the 171 of them that occur.

    Args:
        partition: "CocoStuff164k" (PNG with class ids, 255: unlabeled; splits train2017, val2017) or "CocoStuff10k"
            (.mat with class ids plus one, 0: unlabeled; splits train, test, all; needs SciPy).
        compact: leave out the 11 unused ids: 171 classes, numbered without gaps.
    """

    class_names, palette = _NAMES, _PALETTE
    num_classes = len(class_names)
    mean = (0.43931922, 0.41310471, 0.37480941)
    std = (0.24272706, 0.23649098, 0.23429529)
    splits = ("train2017", "val2017", "train", "val", "test", "all")
    layout = _LAYOUT_164K

    def __init__(
        self,
        *,
        partition: Literal["CocoStuff164k", "CocoStuff10k"] = "CocoStuff164k",
        compact: bool = False,
        **common: Any,
    ) -> None:
        self.partition = partition
        self.layout = _LAYOUT_10K if partition == "CocoStuff10k" else _LAYOUT_164K
        ids = np.arange(len(_NAMES))
        if compact:
            ids = np.full(len(_NAMES), 255)
            ids[_KEPT] = np.arange(len(_KEPT))
            if common.get("classes") is None:
                common["classes"] = [_NAMES[i] for i in _KEPT]
                common["palette"] = common.get("palette") or [_PALETTE[i] for i in _KEPT]
        self.lut = np.concatenate([[255], ids]) if partition == "CocoStuff10k" else ids
        super().__init__(**common)

    def samples(self) -> list[Entry]:
        """Return the pairs of the split: in the order of its list (10k), sorted by number (164k)."""
        images, masks = self.data_dir / "images", self.data_dir / "annotations"
        if self.partition == "CocoStuff164k":
            if self.split not in _SPLITS_164K:
                raise ValueError(f"split must be train2017 or val2017 for CocoStuff164k, got {self.split!r}")
            part = _SPLITS_164K[self.split]
            return pair_folders(self, images / part, masks / part)
        if self.split not in _SPLITS_10K:
            raise ValueError(f"split must be one of {', '.join(_SPLITS_10K)} for CocoStuff10k, got {self.split!r}")
        names = self.data_dir / "imageLists" / f"{self.split}.txt"
        if not names.is_file():
            raise self.layout_error(f"there is no list {names}")
        return [Entry(images / f"{name}.jpg", masks / f"{name}.mat", name) for name in read_names(names)]

    def load_label(self, path: Path) -> np.ndarray:
        """Return the label map as stored."""
        if path.suffix != ".mat":
            return read_label(path)
        content = load_mat(path)
        if "S" not in content or content["S"].ndim != 2:
            raise UserError(f"{path}: there is no label map S, which COCO-Stuff 10k's files have")
        return content["S"].astype(np.int32)
