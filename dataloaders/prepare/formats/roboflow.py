"""Roboflow's "Semantic Segmentation Masks": images and ``*_mask.png`` side by side, with ``_classes.csv``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from base.classes import read_classes
from dataloaders.prepare.export import Export, Images, Picture, split_of
from dataloaders.reading.pairing import image_files, index_files, relative_stem
from utils.errors import UserError
from utils.images import read_label

_CLASSES, _SUFFIX = "_classes.csv", "_mask"


def read(source: Path, images: Images) -> Export:
    """Read the exported folder, usually with train, valid and test below it."""
    folders = sorted(file.parent for file in source.rglob(_CLASSES)) if source.is_dir() else []
    if not folders:
        raise UserError(f"{source}: there is no {_CLASSES}; export as 'Semantic Segmentation Masks'")
    export = Export()
    for folder in folders:
        names = list(read_classes(folder / _CLASSES).names)
        export.take_classes(names, folder / _CLASSES)
        files = index_files(image_files(folder), relative_stem(folder))
        for stem, path in files.items():
            if stem.endswith(_SUFFIX) and stem.removesuffix(_SUFFIX) in files:
                continue
            mask = files.get(stem + _SUFFIX)
            if mask is None:
                export.left_out["image", "without a mask"] += 1
                continue
            ids = partial(_ids, mask, len(names))
            export.pictures.append(Picture(path, ids=ids, split=split_of(path, source)))
    return export


def _ids(path: Path, count: int) -> np.ndarray:
    label = read_label(path)
    if label.max(initial=0) >= count:
        raise UserError(f"{path} contains the value {label.max()}, but {_CLASSES} has the values 0 to {count - 1}")
    return label
