"""Read and write checkpoint files."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import files
from utils.checkpoint.contents import are_weights, malformed
from utils.errors import UserError, import_extra, listed
from utils.files import expand

_DEEPEST = 4  # folders below trainer.save_dir: name, loss, procedure, date
#: Where other programs keep the weights in their files; if there are several, the first is used.
WEIGHT_KEYS = ("model_state_dict", "model", "weights", "params")


def save(state: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that ``path`` contains either the old file or the whole new one, whatever happens.

    Raises:
        UserError: the disk is full or the folder cannot be written to; an earlier file at ``path`` is untouched.
    """
    with files.atomic(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # torch's zip writer hides the system's error behind its own
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or OSError(f"{error} (is the disk full?)") from None


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of a run that was killed while it saved."""
    for path in folder.glob(files.LEFTOVERS):
        with suppress(OSError):
            path.unlink()


def link(source: Path, path: Path) -> None:
    """Make ``path`` another name of ``source``, replacing what it named; a copy where links are not possible."""
    with files.atomic(path) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def read(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint file contains, tensors on the CPU, without running any code of the file.

    Weights alone, under a key that other programs use, or in a ``.safetensors`` file are returned as
    ``{"state_dict": ...}``. A file that contains a whole network (:func:`network_kind`) is not read yet: the result
    is ``{"network": path, "state_dict": {}}``.

    Raises:
        UserError: there is no such file, or it is not a checkpoint, is truncated, or would need to run code.
    """
    path = expand(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: {_what_is_there(path)}")
    if network_kind(path) is not None:
        return {"network": str(path), "state_dict": {}}
    if path.suffix == ".safetensors":
        return {"state_dict": _read_safetensors(path)}
    _check_container(path)
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(_numpy_scalars()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of problems that are errors below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, error)) from None
    except Exception as error:  # damaged bytes can raise nearly any exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        size = f"{path.stat().st_size:,} bytes"
        raise UserError(f"{path}: not a checkpoint, or truncated ({size}): {reason}; copy or train it again") from None
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: expected a checkpoint (a dict with 'state_dict'), found {type(state).__name__}")
    if "state_dict" not in state:
        state = {"state_dict": _weights_in(state, path)}
    problem = malformed(state)
    if problem:
        raise UserError(f"{path}: {problem}")
    return dict(state)


def _weights_in(state: Mapping[str, Any], path: Path) -> Mapping[str, torch.Tensor]:
    """Return the weights alone, under one of the usual keys, or under the only key with weights."""
    if are_weights(state):
        return state
    keys = [key for key in state if are_weights(state[key])]
    usual = [key for key in WEIGHT_KEYS if key in keys]
    if not usual and len(keys) != 1:
        several = f"; weights are in {listed(keys, 5)}, so save one of them alone" if keys else ""
        raise UserError(
            f"{path}: expected 'state_dict' or the weights alone, found the keys {listed(state, 5) or 'none'}{several}"
        )
    return state[[*usual, *keys][0]]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    safetensors = import_extra("safetensors.torch", str(path))
    try:
        return safetensors.load_file(path)
    except Exception as error:  # damaged bytes
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None


def network_kind(path: str | Path) -> str | None:
    """Return the kind of a file with a whole network: "pt2" (torch.export), "torchscript" or "onnx"; else None."""
    if str(path).endswith(".onnx"):
        return "onnx"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # damaged, or not an archive: damaged bytes can raise nearly any exception
        return None
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return "pt2"
    return "torchscript" if any(name.endswith("constants.pkl") for name in names) else None


def _check_sums(path: Path) -> None:
    """Verify the checksums that torch stores with each tensor: torch itself reads damaged files without an error.

    Raises:
        UserError: the file is damaged.
    """
    if not zipfile.is_zipfile(path):
        return  # from an old version of torch, without checksums; or truncated, which torch.load reports
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged bytes can raise nearly any exception
        raise UserError(f"{path}: the file is damaged or truncated ({error}); copy or train it again") from None
    if damaged is not None:
        raise UserError(f"{path}: the file is damaged: the checksum of {damaged} is wrong; copy or train it again")


def _what_is_there(path: Path) -> str:
    """Return why a path is no checkpoint file, with the checkpoints that are near it."""
    folder = path if path.is_dir() else path.parent
    found = sorted(p.name for p in folder.glob("*.pth")) if folder.is_dir() else []
    there = listed(found, 8)
    if path.is_dir():
        if found:
            return f"is a folder; it contains {there}; pass one of them"
        files = (p for depth in range(1, _DEEPEST + 1) for p in path.glob(f"{'*/' * depth}*.pth"))
        below = sorted((p for p in files if p.is_file()), key=lambda p: p.stat().st_mtime)
        if not below:
            return "is a folder without a checkpoint"
        run = below[-1].parent
        names = listed(sorted(p.name for p in below if p.parent == run), 8)
        return f"is a folder without a checkpoint; the newest below it: {run} with {names}"
    if "..." in path.parts:
        return 'there is no such checkpoint file: "..." stands for the folder of a run, which training prints as "run"'
    early = " (best_model.pth is written by the first validation)" if path.name == "best_model.pth" else ""
    return "there is no such checkpoint file" + (f"; in that folder: {there}{early}" if found else "")


def _check_container(path: Path) -> None:
    """Raise UserError unless the file begins as torch writes files: a zip archive, or a pickle of old versions."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return
    what = f"it begins with {start[:24]!r}" if start else "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        what = "this is a Git LFS pointer; fetch the file itself with git lfs pull"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what = "this is a web page, so the download failed"
    raise UserError(f"{path}: not a checkpoint: {what}")


def _refusal(path: Path, error: Exception) -> str:
    text = str(error)
    if "GLOBAL " not in text:
        return (
            f"{path}: refused: it contains something other than tensors, numbers, text, lists and dicts written by "
            "torch.save, which may run code; copy or train it again"
        )
    named = text.split("GLOBAL ")[1].split(" ")[0]
    return (
        f"{path}: refused: reading it would run code ({named}). A checkpoint may contain tensors, numbers, text, "
        "lists and dicts only. If you trust where it comes from, load it once with "
        "torch.load(..., weights_only=False) and save its 'state_dict' alone"
    )


def _numpy_scalars() -> list[Any]:
    """Return what published checkpoints contain besides tensors: a numpy scalar (the best score), as in numpy 1."""
    scalar = np.float64(0).__reduce__()[0]
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)),
    ]
