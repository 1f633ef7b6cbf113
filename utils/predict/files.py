"""Probabilities and masks on disk: apply another procedure later, without the network.

A folder of probabilities contains ``probs.json`` (classes, palette, checkpoint and options of the run) and
one ``NAME.npz`` per image: array ``probs``, ``(C, H, W)``, float32 (float16 for images too large for the memory). A
procedure then sees exactly the numbers that it saw in the run, so its masks are the same. ``test.py --save-probs`` and
``inference.py --probs`` write such folders; ``python -m utils.predict`` reads them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils import stamps
from utils.errors import UserError
from utils.facts import Facts
from utils.files import atomic, file_digest, write_text
from utils.images import write_png
from utils.predict import Prediction, PredictOptions, label_map
from utils.predict.network import AnyNetwork
from utils.predict.spool import Spool

INDEX = "probs.json"
FORMAT = 2
# The names of arrays of probabilities in .npz files of this project, of nnU-Net, and of its first version.
KEYS = ("probs", "probabilities", "softmax")


def write_probs(path: Path, probs: Tensor | Spool, run: str = stamps.NO_RUN) -> None:
    """Write the probabilities of one image, as ``numpy.savez_compressed(path, probs=...)`` would.

    Args:
        path: the file; it is complete or not there.
        probs: float32 ``(C, H, W)``, or the spool of a large image, which is written in small pieces.
        run: for the file's stamp, see :mod:`utils.stamps`.
    """
    kind = "<f2" if isinstance(probs, Spool) else "<f4"
    header = {"descr": kind, "fortran_order": False, "shape": tuple(probs.shape)}
    with (
        atomic(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("probs.npy", "w", force_zip64=True) as member,
    ):
        archive.comment = stamps.text(run).encode()
        np.lib.format.write_array_header_1_0(member, header)
        for c in range(probs.shape[0]):
            planes = probs.planes(c) if isinstance(probs, Spool) else [probs[c].detach().cpu().float().numpy()]
            for plane in planes:
                member.write(np.ascontiguousarray(plane).data)


def read_probs(path: Path) -> Tensor:
    """Return the probabilities in a ``.npz`` or ``.npy`` file, float32 ``(C, ...)``.

    A ``.npz`` file contains one array, or one with a name of ``KEYS``.

    Raises:
        UserError: the file is something else, or truncated.
    """
    try:
        values = np.load(path, allow_pickle=False)
        if isinstance(values, np.lib.npyio.NpzFile):
            with values as archive:
                key = next((k for k in KEYS if k in archive), archive.files[0] if len(archive.files) == 1 else None)
                if key is None:
                    raise ValueError(f"it has {', '.join(archive.files)}, expected one array or {' or '.join(KEYS)}")
                values = archive[key]
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file of probabilities") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a file of probabilities, or truncated: {error}") from None
    if values.dtype.kind != "f" or values.ndim < 2 or not values.size:
        raise UserError(
            f"{path}: expected floating point probabilities (classes, height, width), found {values.dtype} of shape "
            f"{values.shape}"
        )
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def file_name(name: str) -> str:
    """Return an image's name as a relative path that stays inside its folder."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    return "/".join(parts) or "image"


# ------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Index:
    """The description of a folder of probabilities: the content of ``probs.json``."""

    facts: Facts
    options: PredictOptions
    procedure: str
    temperature: float
    checkpoint: str  # its file
    run: str = stamps.NO_RUN  # a digest of the weights and of the views of the images: digest_of_run
    data: str = ""  # what was predicted, if a folder must not contain several data sets
    note: str = ""  # why scores on these images are optimistic


def digest_of_run(weights: Iterable[Path], network: AnyNetwork, **views: Any) -> str:
    """Return a digest of all that probabilities depend on, except the image."""
    digests = [file_digest(path)[:16] for path in weights]
    return stamps.digest({"weights": digests, "network": network.settings(), **views})


def prepare_folder(folder: Path, index: Index, force: bool = False) -> None:
    """Make a folder ready for the probabilities of a run (:func:`write_probs`).

    Args:
        folder: is created.
        index: what the folder says about itself.
        force: remove the probabilities of an earlier run instead of refusing to mix.

    Raises:
        UserError: the folder contains probabilities of another run, or cannot be written.
    """
    there = sorted(path for path in folder.rglob("*.npz") if not path.name.startswith("."))
    others = [path for path in there if stamps.stamp_of(path) != index.run]
    if not force:
        stamps.refuse_foreign(others, folder)
        other = f"such as {others[0].name}" if others else ""
        if (folder / INDEX).is_file():
            earlier = read_index(folder)
            if (earlier.run, earlier.data) != (index.run, index.data):
                other = f"{earlier.checkpoint} {earlier.data}".strip()
        if other:
            raise UserError(
                f"{folder}: contains the probabilities of another run ({other}); choose another folder, or pass "
                "--force to remove them"
            )
    for path in others:
        if stamps.stamp_of(path) is not None:
            path.unlink(missing_ok=True)
    write_text(folder / INDEX, json.dumps({"format": FORMAT} | asdict(index), indent=2) + "\n")


def read_index(folder: Path) -> Index:
    """Return the description of a folder of probabilities. Raises: UserError: the folder has none."""
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("written by another version")
        options = content["options"]
        options["classes"] = None if options["classes"] is None else tuple(options["classes"])
        return Index(**content | {"facts": Facts.from_dict(content["facts"]), "options": PredictOptions(**options)})
    except FileNotFoundError:
        raise UserError(
            f"{folder}: contains no {INDEX}; expected a folder that test.py --save-probs or inference.py --probs wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not in the format of test.py --save-probs: {error}") from None


# ---------------------------------------------------------------------------------------------------- masks


def labels_for_png(procedure: str, probs: Tensor, prediction: Prediction, options: PredictOptions) -> NDArray[Any]:
    """Return the label map ``(B, H, W)`` for palette PNGs, uint8 (uint16 with more than 255 classes).

    See :func:`utils.predict.label_map`. Pixels without a class get 255 (65535).
    """
    kind = label_type(probs.shape[1])
    labels = label_map(procedure, probs, options, prediction, unassigned=int(np.iinfo(kind).max))
    return labels.cpu().numpy().astype(kind)


def label_type(classes: int) -> type[np.uint8 | np.uint16]:
    """Return the type of label maps: it contains every class id, and its largest value marks unassigned pixels."""
    return np.uint8 if classes <= 255 else np.uint16


def write_classes(
    folder: Path, facts: Facts, pictures: Iterable[tuple[int, NDArray[Any]]], run: str = stamps.NO_RUN
) -> None:
    """Write gray PNGs of classes, ``folder/003_car.png``; those that an earlier run left in the folder are removed.

    Args:
        folder: of one image alone; is created.
        facts: for the classes' names.
        pictures: class id and uint8 ``(H, W)``.
        run: for the stamp.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = set()
    for c, picture in pictures:
        plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in facts.class_names[c])
        path = folder / f"{c:03d}_{plain}.png"
        write_png(path, picture, software=stamps.text(run))
        written.add(path)
    for path in folder.glob("*.png"):
        if path not in written and stamps.stamp_of(path) is not None:
            path.unlink()
