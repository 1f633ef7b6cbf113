"""Folders of images and masks, for the tests of the Folder loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import dataloaders
from base.base_dataset import BaseDataSet

CLASSES = ["background", "cell", "dirt"]
IDS = np.array([[0, 1, 2, 0], [1, 1, 2, 2], [0, 0, 0, 255]], np.uint8)


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path, **options)
    return path


def photo(path: Path, level: int = 100) -> Path:
    return save(path, np.full((*IDS.shape, 3), level, np.uint8))


def folder(root: Path, split: str = "train", **args: Any) -> BaseDataSet:
    args.setdefault("classes", CLASSES)
    return dataloaders.build("Folder", data_dir=str(root), split=split, num_workers=0, **args).dataset


def names(dataset: BaseDataSet) -> list[str]:
    return [entry.name for entry in dataset.entries]


def label(dataset: BaseDataSet, index: int = 0) -> np.ndarray:
    return dataset[index].label.numpy()
