"""Pascal VOC 2012 (Everingham et al., 2010), with the extra annotations of SBD (Hariharan et al., ICCV 2011)."""

from __future__ import annotations

from pathlib import Path

from base.base_dataset import BaseDataSet
from base.entries import Entry
from base.text import read_lines
from dataloaders.labels import labels
from dataloaders.reading.lists import columns_of
from utils.errors import UserError


class VOC(BaseDataSet):
    """``VOCdevkit/VOC2012`` below data_dir; the ``_aug`` splits are lists of two columns, image and label."""

    class_names, palette = labels("voc")
    num_classes = len(class_names)
    mean = (0.45734706, 0.43338275, 0.40058118)
    std = (0.23965294, 0.23532275, 0.2398498)
    splits = ("train", "val", "trainval", "test", "train_aug", "val_aug", "trainval_aug", "test_aug")
    layout = """
data_dir/
  VOCdevkit/VOC2012/
    JPEGImages/<id>.jpg
    SegmentationClass/<id>.png
    SegmentationClassAug/<id>.png
    ImageSets/Segmentation/
      train.txt        one <id> a line
      train_aug.txt    /JPEGImages/<id>.jpg
                       /SegmentationClassAug/<id>.png
"""

    def samples(self) -> list[Entry]:
        """Return the pairs that the split's list names, in its order."""
        root = self.root("VOCdevkit/VOC2012", "VOC2012", holds=["ImageSets"])
        path = root / "ImageSets" / "Segmentation" / f"{self.split}.txt"
        if not path.is_file():
            raise self.layout_error(f"there is no list {path} for split {self.split!r}")
        return [self._entry(root, columns_of(line), path) for _, line in read_lines(path, "data_dir")]

    def _entry(self, root: Path, columns: list[str], path: Path) -> Entry:
        if len(columns) == 1:
            name = columns[0]
            image, label = root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png"
        elif len(columns) == 2:
            image, label = (root / column.lstrip("/") for column in columns)
            name = image.stem
        else:
            raise UserError(f"{path}: a line has {len(columns)} columns; expected one id, or image and label")
        # The labels of VOC's test images are not public.
        return Entry(image, label if not self.split.startswith("test") or label.is_file() else None, name)
