"""ADE20K scene parsing (Zhou et al., CVPR 2017): 150 classes of the ADEChallengeData2016 edition."""

from __future__ import annotations

import numpy as np

from base.base_dataset import BaseDataSet
from base.entries import Entry
from dataloaders.labels import labels
from dataloaders.reading.pairing import pair_folders

_FOLDERS = {"train": "training", "val": "validation", "test": "testing"}


class ADE20K(BaseDataSet):
    """``images`` and ``annotations`` with training and validation; a mask's 0 is unlabeled, k is class k - 1."""

    class_names, palette = labels("ade20k")
    num_classes = len(class_names)
    mean = (0.48897059, 0.46548275, 0.4294)
    std = (0.22861765, 0.22948039, 0.24054667)
    splits = ("training", "validation", "testing", "train", "val", "test")
    lut = np.concatenate([[255], np.arange(150)])
    layout = """
data_dir/                (or ADEChallengeData2016/ below it)
  images/
    training/ADE_train_<number>.jpg
    validation/ADE_val_<number>.jpg
  annotations/
    training/ADE_train_<number>.png
    validation/ADE_val_<number>.png
"""

    def samples(self) -> list[Entry]:
        """Return the pairs of the split, sorted; testing has images only."""
        part = _FOLDERS.get(self.split, self.split)
        root = self.root("ADEChallengeData2016", holds=["images"])
        return pair_folders(self, root / "images" / part, root / "annotations" / part, unlabeled=part == "testing")
