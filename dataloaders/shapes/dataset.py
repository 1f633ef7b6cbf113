"""The built-in data set: any number of scenes, rendered on the fly without files."""

from __future__ import annotations

from typing import Annotated, Any

import cv2
import numpy as np
from pydantic import Field

from base.base_dataset import BaseDataSet
from base.entries import Entry
from dataloaders.shapes import scene
from utils.bounds import Seed

Length = Annotated[int, Field(ge=1, le=1_000_000)]
SceneSide = Annotated[int, Field(ge=scene.SMALLEST, le=8192)]


class Shapes(BaseDataSet):
    """Rendered scenes with eight classes. Labels are as uncertain as those of a human annotator.

    Scene ``number`` of a split depends only on (scene_seed, split, number), not on the number of workers or the run's
    ``seed`` (which controls augmentation and order). In training, epoch e uses the numbers from e * length on, so no
    scene is repeated, unless ``endless`` is false.

    Args:
        length: number of scenes per epoch.
        size: side of the scenes, or (height, width).
        scene_seed: random seed of the scenes; each seed gives another data set.
        endless: use new scenes in every training epoch.
    """

    class_names = scene.CLASS_NAMES
    num_classes = len(class_names)
    palette = scene.PALETTE
    mean = (0.42, 0.42, 0.41)
    std = (0.14, 0.14, 0.14)
    ignore_index = scene.IGNORED
    splits = scene.SPLITS

    def __init__(
        self,
        split: str = "train",
        *,
        length: Length = 1000,
        size: SceneSide | tuple[SceneSide, SceneSide] = 128,
        scene_seed: Seed = 0,
        endless: bool = True,
        **common: Any,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.length, self.scene_seed = length, scene_seed
        self.endless = endless and split == "train"
        super().__init__(split=split, **common)
        if len(self.class_names) != scene.CLASS_COUNT:
            raise ValueError(f"classes must be {scene.CLASS_COUNT} names for Shapes, got {len(self.class_names)}")

    def samples(self) -> list[Entry]:
        """Return one name per scene; there are no files."""
        return [Entry(None, None, f"{self.split}_{index:06d}") for index in range(self.length)]

    def read(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Render the scene for a sample of an epoch."""
        number = index + (epoch * self.length if self.endless else 0)
        image, label, _ = scene.numbered(self.scene_seed, self.split, number, *self.size)
        if self.in_channels == 1:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
        elif self.in_channels != 3:
            raise ValueError(f"in_channels must be 1 or 3 for Shapes, got {self.in_channels}")
        return image, self.label_table.translate(label, self.entries[index].name)
