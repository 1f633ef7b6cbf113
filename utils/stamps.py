"""Stamps in output files, which tell the run that wrote them, so that a run replaces only files of this program.

A stamp is a short text inside the file: a text chunk of a PNG, a comment of a JPEG or zip file, a field of JSON, a box
at the end of an MP4. It names the model and the options by their digest. Programs that edit a mask and save it again
drop the stamp, so corrected masks are not overwritten either.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError, are, listed

NO_RUN = "0" * 16  # of files that do not depend on a run's model
_MARK = "segmentation-output:"
_STAMP = re.compile(rb"segmentation-output:([0-9a-f]{16})")
_NEAR = 4096  # stamps are this close to the start or the end of a file


def digest(settings: Mapping[str, Any]) -> str:
    """Return a digest of these settings, 16 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def text(run: str = NO_RUN) -> str:
    """Return the stamp of a run, from its digest."""
    return _MARK + run


def jpeg(data: bytes, run: str) -> bytes:
    """Return a JPEG file's bytes with a stamp in a comment."""
    comment = text(run).encode()
    return data[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + data[2:]


def append_mp4(path: Path, run: str) -> None:
    """Add a stamp to an MP4 file, in a box that players skip."""
    content = text(run).encode()
    with open(path, "ab") as file:
        file.write(struct.pack(">I", len(content) + 8) + b"free" + content)


def stamp_of(path: Path) -> str | None:
    """Return the digest in a file's stamp; None where there is no file or no stamp."""
    try:
        with open(path, "rb") as file:
            found = _STAMP.search(file.read(_NEAR))
            if found is None:
                file.seek(max(0, path.stat().st_size - _NEAR))
                found = _STAMP.search(file.read(_NEAR))
    except OSError:
        return None
    return found.group(1).decode() if found else None


def remove(folder: Path, pattern: str) -> None:
    """Remove the files with a stamp below a folder whose names match a pattern."""
    for path in folder.rglob(pattern):
        if stamp_of(path) is not None:
            path.unlink(missing_ok=True)


def refuse_foreign(paths: Iterable[Path], folder: Path) -> None:
    """Raise UserError if a path contains a file without a stamp.

    Args:
        paths: files that are about to be written.
        folder: their name in the message.
    """
    foreign = [path for path in paths if path.exists() and stamp_of(path) is None]
    if foreign:
        raise UserError(
            f"{folder}: {are(len(foreign), 'file')} in the way that this program did not write, or that changed since "
            f"then: {listed(foreign, 3)}; choose another folder, or pass --force to replace what is there"
        )
