"""Kvasir-SEG (Jha et al., MMM 2020): polyps in colonoscopy, and data laid out like it."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from base.base_dataset import BaseDataSet
from base.entries import Entry
from base.splits import split_by_fraction
from dataloaders.labels import labels
from dataloaders.reading.lists import read_names, without_extension
from dataloaders.reading.pairing import pair_folders
from utils.bounds import ShareBelowOne
from utils.errors import UserError
from utils.images import read_levels


class KvasirSEG(BaseDataSet):
    """Images and masks as published, or split beforehand.

    Masks are JPEG files whose gray levels lie near 0 and 255: above 127 is the object. Two classes by default;
    with one name in ``classes`` the network has one output channel (sigmoid).

    Args:
        val_fraction: fraction of the images for "val" (0.12 of 1000 gives the usual 880 and 120). If train.txt and
            val.txt exist (one name per line), they are used instead.
    """

    class_names, palette = labels("kvasir")
    num_classes = len(class_names)
    mean = (0.48897059, 0.46548275, 0.4294)
    std = (0.22861765, 0.22948039, 0.24054667)
    splits = ("train", "val", "all")
    void_label = None
    layout = """
data_dir/
  images/<id>.jpg
  masks/<id>.jpg
or, split beforehand,
  images_split/<split>/jpg_images/<id>.jpg
  masks_split/<split>/jpg_masks/<id>.jpg
"""

    def __init__(self, *, val_fraction: ShareBelowOne = 0.12, **common: Any) -> None:
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.val_fraction = val_fraction
        super().__init__(**common)

    def samples(self) -> list[Entry]:
        """Return the pairs of the split, sorted by name."""
        images, masks = self.data_dir / "images_split", self.data_dir / "masks_split"
        if images.is_dir():
            parts = ("train", "val") if self.split == "all" else (self.split,)
            pairs = (pair_folders(self, images / part / "jpg_images", masks / part / "jpg_masks") for part in parts)
            return list(chain.from_iterable(pairs))
        entries = pair_folders(self, self.data_dir / "images", self.data_dir / "masks")
        published = self.data_dir / f"{self.split}.txt"
        if self.split == "all":
            return entries
        if any((self.data_dir / f"{split}.txt").is_file() for split in ("train", "val")):
            known = {entry.name for entry in entries}
            chosen = {name if name in known else without_extension(name) for name in read_names(published)}
            if strangers := sorted(chosen - known):
                raise UserError(f"{published}: {strangers[0]!r} has no image with a mask in {self.data_dir}")
        else:
            names = [entry.name for entry in entries]
            chosen = split_by_fraction(names, {"val": self.val_fraction}, rest="train")[self.split]
        return [entry for entry in entries if entry.name in chosen]

    def load_label(self, path: Path) -> np.ndarray:
        """Return 1 where the mask is brighter than half, else 0."""
        return (read_levels(path) > 127).astype(np.uint8)
