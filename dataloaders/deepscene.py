"""DeepScene's Freiburg Forest (Valada et al., ISER 2016): paths through a forest, 6 classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from base.base_dataset import BaseDataSet
from base.entries import Entry
from dataloaders.labels import labels
from dataloaders.reading.colors import ColorTable
from dataloaders.reading.pairing import pair_folders
from utils.images import read_label, read_mask

_TREE, _VEGETATION = (0, 60, 0), 3


class DeepScene(BaseDataSet):
    """``rgb`` images with masks in colors (``GT_color``), or already as class ids (``GT_index``).

    The publisher has the folders train and test; split "val" is test too. Trees are drawn in a color of their own
    and belong to vegetation.

    Args:
        ignore_void: ignore void (class 0) in loss and scores, instead of training it as a class.
    """

    class_names, palette = labels("deepscene")
    num_classes = len(class_names)
    mean = (0.45734706, 0.43338275, 0.40058118)
    std = (0.23965294, 0.23532275, 0.2398498)
    splits = ("train", "val", "test")
    layout = """
data_dir/                (or freiburg_forest_annotated/ below it)
  train/
    rgb/<id>_Clipped.jpg
    GT_color/<id>_mask.png       (or GT_index/)
  test/
    rgb/
    GT_color/
"""

    def __init__(self, *, ignore_void: bool = False, **common: Any) -> None:
        if ignore_void:
            self.lut = np.array([255, 1, 2, 3, 4, 5])
        self._colors = ColorTable(
            [*((color, i) for i, color in enumerate(self.palette)), (_TREE, _VEGETATION)],
            hint="The colors of Freiburg Forest are listed in dataloaders/labels/deepscene.txt.",
        )
        super().__init__(**common)

    def samples(self) -> list[Entry]:
        """Return the pairs of the split, sorted; file names agree up to the first underscore."""
        part = "train" if self.split == "train" else "test"
        folder = self.root("freiburg_forest_annotated", holds=["train", "test"]) / part
        self._painted = (folder / "GT_color").is_dir() or not (folder / "GT_index").is_dir()
        masks = folder / ("GT_color" if self._painted else "GT_index")
        return pair_folders(self, folder / "rgb", masks, lambda path: path.stem.partition("_")[0])

    def load_label(self, path: Path) -> np.ndarray:
        """Return the class ids, decoded from the mask's colors if it is painted."""
        return self._colors.decode(read_mask(path).colors(), path) if self._painted else read_label(path)
