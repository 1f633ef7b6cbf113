"""Probabilities on disk, without loss: decide again under another procedure, without the network.

One folder holds ``probs.json`` (what the model is of: classes, palette, and the options of the run) and per image
``NAME.npz`` with the float32 probabilities ``(C, H, W)``. A procedure sees exactly the bits it saw in the run, so
its masks are the same.

Probabilities are noisy in their last bits, so no lossless code makes them much smaller. Here the four bytes of all
numbers are stored apart (``planes``, uint8 ``(4, C, H, W)``, lowest byte first) and deflated: on a network's output
about 1.3 times smaller than raw, twice as fast as ``numpy.savez_compressed`` and smaller than it. NumPy alone reads
them back: ``numpy.moveaxis(numpy.load(f)["planes"], 0, -1).copy().view("<f4")[..., 0]``.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.errors import UserError
from utils.facts import Facts
from utils.files import atomic, write_text
from utils.images.palette import write_mask
from utils.predict import Prediction, PredictOptions, label_map

INDEX = "probs.json"
FORMAT = 1


def write_probs(path: Path, probs: Tensor) -> None:
    """Write probabilities ``(C, H, W)`` losslessly; the file is whole or not there.

    Raises:
        UserError: it could not be written.
    """
    values = np.ascontiguousarray(probs.detach().cpu().numpy(), dtype="<f4")
    planes = np.ascontiguousarray(np.moveaxis(values.view(np.uint8).reshape(*values.shape, 4), -1, 0))
    with (
        atomic(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("planes.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array(file, planes, allow_pickle=False)


def read_probs(path: Path) -> Tensor:
    """Return the probabilities that :func:`write_probs` wrote, float32 ``(C, H, W)``.

    Raises:
        UserError: the file is not one of these, or cut short.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            planes = archive["planes"]
        values = np.moveaxis(planes, 0, -1).copy().view("<f4")[..., 0]
        return torch.from_numpy(values.astype(np.float32, copy=False))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file of probabilities") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not the probabilities of an image, or cut short: {error}") from None


def file_name(name: str) -> str:
    """Return an image's name as a relative path that stays inside its folder."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    return "/".join(parts) or "image"


@dataclass(frozen=True)
class Index:
    """What a folder of probabilities says of itself: the content of ``probs.json``."""

    facts: Facts
    options: PredictOptions
    procedure: str
    temperature: float
    checkpoint: str


class ProbsWriter:
    """Writes the probabilities of each image of a run into a folder.

    Args:
        folder: is made; files of the same images are replaced.
        index: what the folder is to say of itself.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        write_text(folder / INDEX, json.dumps({"format": FORMAT} | asdict(index), indent=2) + "\n")

    def write(self, names: list[str], probs: Tensor) -> None:
        """Write a batch ``(B, C, H, W)``."""
        for name, image in zip(names, probs, strict=True):
            write_probs(self.folder / f"{file_name(name)}.npz", image)


def read_index(folder: Path) -> Index:
    """Return what a folder of probabilities says of itself.

    Raises:
        UserError: it is none.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        options = content["options"]
        options["classes"] = None if options["classes"] is None else tuple(options["classes"])
        return Index(
            facts=Facts.from_dict(content["facts"]),
            options=PredictOptions(**options),
            procedure=content["procedure"],
            temperature=content["temperature"],
            checkpoint=content["checkpoint"],
        )
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no {INDEX}; expected a folder that test.py --save-probs wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not as test.py --save-probs writes it: {error}") from None


def stored(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and file of every stored image, sorted."""
    for path in sorted(folder.rglob("*.npz")):
        if not path.name.startswith("."):
            yield path.relative_to(folder).with_suffix("").as_posix(), path


# ---------------------------------------------------------------------------------------------------- masks


def pictures(procedure: str, probs: Tensor, prediction: Prediction, options: PredictOptions) -> NDArray[Any]:
    """Return one label per pixel ``(B, H, W)``, uint8 (uint16 with more than 255 classes), for palette PNGs.

    As :func:`utils.predict.label_map`, as ``inference.py`` writes them; for rankdice with the IoU, which has no label
    map of its own, every pixel gets its most probable class among the masks that hold it. Pixels of no class get 255
    (65535).
    """
    classes = probs.shape[1]
    unassigned = 255 if classes <= 255 else 65535
    if procedure == "rankdice" and options.metric == "iou":
        assert prediction.masks is not None
        labels = mask_labels(probs, prediction.masks, unassigned)
    else:
        # One image at a time: what is decoded later from a file must not depend on the batch it was in.
        labels = torch.cat([label_map(procedure, one, options, unassigned) for one in probs.split(1)])
    return labels.cpu().numpy().astype(np.uint8 if classes <= 255 else np.uint16)


def mask_labels(probs: Tensor, masks: Tensor, unassigned: int) -> Tensor:
    """Return one label per pixel ``(B, H, W)`` of masks that may overlap: the most probable class among those that
    hold the pixel, ``unassigned`` where none does; with one channel 0 and 1.
    """
    if probs.shape[1] == 1:
        return masks[:, 0].long()
    best, labels = probs.masked_fill(~masks, -1.0).max(dim=1)
    return torch.where(best >= 0, labels, unassigned)


def write_masks(folder: Path, facts: Facts, names: list[str], labels: NDArray[Any]) -> None:
    """Write label maps ``(B, H, W)`` as palette PNGs, ``folder/NAME.png``.

    Raises:
        UserError: one could not be written.
    """
    for name, one in zip(names, labels, strict=True):
        write_mask(folder / f"{file_name(name)}.png", one, facts.palette)


def write_packed(path: Path, prediction: Prediction) -> None:
    """Write the overlapping masks of one image: ``masks`` (bits packed along the last axis), ``shape``, ``scores``."""
    assert prediction.masks is not None
    masks = prediction.masks[0].cpu().numpy()
    arrays: dict[str, Any] = {"masks": np.packbits(masks, axis=-1), "shape": np.array(masks.shape)}
    if prediction.scores is not None:
        arrays["scores"] = prediction.scores[0].float().cpu().numpy()
    with atomic(path, ".npz") as temporary:
        np.savez_compressed(temporary, **arrays)
