"""Data sets by the names that configs use; each is imported when it is first used."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from utils.registry import Registry

if TYPE_CHECKING:
    from base.base_dataloader import BaseDataLoader


class Loaders(Registry):
    """The table of data sets, and of the constructors that share the arguments of a loader."""

    def constructors(self, name: str) -> tuple[type, ...]:
        """Return the classes that share a loader's arguments: the data set, its bases, the loader."""
        from base.base_dataloader import BaseDataLoader  # here, because it imports torch, which --help does not need

        return (*self[name].constructors(), BaseDataLoader)


LOADERS = Loaders(
    "data set",
    {
        "VOC": "dataloaders.voc.VOC",
        "CityScapes": "dataloaders.cityscapes.CityScapes",
        "ADE20K": "dataloaders.ade20k.ADE20K",
        "COCO": "dataloaders.coco.COCO",
        "KvasirSEG": "dataloaders.kvasir.KvasirSEG",
        "DeepScene": "dataloaders.deepscene.DeepScene",
        "Folder": "dataloaders.folder.Folder",
        "Shapes": "dataloaders.shapes.dataset.Shapes",
    },
    aliases={"kvasirSEG": "KvasirSEG", "Kvasir": "KvasirSEG"},
    provided=("seed", "ignore_index"),
)


def list_only(type: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a loader that lists the same samples, but does not read all files or start processes."""
    light = args | {"num_workers": 0}
    if LOADERS[type].layout:  # files, which these arguments would read at once
        light |= {"cache": None} | ({"sampler": None} if args.get("shuffle") else {})
    return light


def build(type: str, **args: Any) -> BaseDataLoader:
    """Return a loader of the named data set; ``loader.dataset`` has the class facts.

    Args:
        type: a key of :data:`LOADERS`.
        args: the data set's own, those of `BaseDataSet` and those of `BaseDataLoader` (batch_size, shuffle, ...).

    Raises:
        ValueError: an argument is unknown or has an invalid value; the message names it.
        UserError: the data set is unknown, or its files are not as expected.
    """
    LOADERS.check(type, args)
    constructors = LOADERS.constructors(type)
    *special, shared, loader = (inspect.signature(c).parameters for c in constructors)
    of_special = {name for parameters in special for name in parameters}
    dataset = LOADERS[type](**{n: v for n, v in args.items() if n in of_special or n in shared})
    # The loader does not get arguments that the data set itself takes (Folder: val_fold); both get the seed.
    return constructors[-1](dataset, **{n: v for n, v in args.items() if n in loader and n not in of_special})
