"""Cityscapes (Cordts et al., CVPR 2016): street scenes, 19 classes."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np

from base.base_dataset import BaseDataSet
from base.entries import Entry
from dataloaders.labels import labels
from dataloaders.reading.pairing import pair_folders

_KIND = re.compile(r"_(leftImg8bit|gt(Fine|Coarse)_labelIds)$")  # the end of the file names

# trainId of each labelId 0..33 as the publisher's label definitions have it; 255 is ignored. The remaining
# labelId, -1 (license plate), is not drawn into the label images.
TRAIN_IDS = np.full(34, 255)
TRAIN_IDS[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = np.arange(19)


class CityScapes(BaseDataSet):
    """Pairs of ``*_leftImg8bit.png`` and ``*_gtFine_labelIds.png`` (or gtCoarse), folders as in the zip files or bare.

    Args:
        mode: which annotations: "fine", or "coarse" (splits train, train_extra, val).
    """

    class_names, palette = labels("cityscapes")
    num_classes = len(class_names)
    mean = (0.28689529, 0.32513294, 0.28389176)
    std = (0.17613647, 0.18099176, 0.17772235)
    splits = ("train", "val", "test", "train_extra")
    lut = TRAIN_IDS
    layout = """
data_dir/
  leftImg8bit/<split>/<city>/<id>_leftImg8bit.png
  gtFine/<split>/<city>/<id>_gtFine_labelIds.png
or, as the zip files unpack into their own names,
  leftImg8bit_trainvaltest/leftImg8bit/<split>/...
  gtFine_trainvaltest/gtFine/<split>/...
for train_extra and mode "coarse"
  leftImg8bit_trainextra/leftImg8bit/train_extra/...
  gtCoarse/<split>/<city>/<id>_gtCoarse_labelIds.png
"""

    def __init__(self, *, mode: Literal["fine", "coarse"] = "fine", **common: Any) -> None:
        self.mode = mode
        super().__init__(**common)

    def samples(self) -> list[Entry]:
        """Return the pairs of all cities of the split, sorted by city and id."""
        kind = "gtFine" if self.mode == "fine" else "gtCoarse"
        if self.split == ("train_extra" if self.mode == "fine" else "test"):
            raise self.layout_error(f"split {self.split!r} has no {self.mode} annotations")
        extra = self.split == "train_extra"
        inside, labels_inside = f"leftImg8bit/{self.split}", f"{kind}/{self.split}"
        archive = "leftImg8bit_trainextra" if extra else "leftImg8bit_trainvaltest"
        images = self.root(archive, holds=[inside]) / inside
        masks = self.root("gtFine_trainvaltest" if self.mode == "fine" else "gtCoarse", holds=[labels_inside])
        masks = masks / labels_inside
        return pair_folders(self, images, masks, lambda p: _KIND.sub("", p.stem), suffix=f"_{kind}_labelIds")
