"""Read MATLAB's .mat files, which contain the annotations of SBD and COCO-Stuff 10k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.errors import UserError, import_extra


def load_mat(path: str | Path) -> dict[str, Any]:
    """Return the variables of a .mat file; raise UserError if it is broken or SciPy is not installed."""
    scipy = import_extra("scipy.io", f"{path}: reading .mat files")
    try:
        return scipy.loadmat(str(path))
    except Exception as error:  # scipy raises many kinds for a broken file
        raise UserError(f"{path}: cannot be read as a .mat file: {error}") from error
