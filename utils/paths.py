"""Paths as users write them: ``~``, ``$VARIABLES``, and names that no file system takes."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str | Path) -> Path:
    """Return a path with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced; unknown names stay as they are."""
    return Path(os.path.expanduser(os.path.expandvars(path)))


def is_folder(path: str | Path) -> bool:
    """Return whether an expanded path is a folder; False also for names that the file system does not take."""
    return os.path.isdir(expand(path))


def is_file(path: str | Path) -> bool:
    """Return whether an expanded path is a file; False also for names that the file system does not take."""
    return os.path.isfile(expand(path))
