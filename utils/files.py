"""Write files completely or not at all, and tables as CSV."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError

_CHUNK = 2**20
LEFTOVERS = ".*.tmp*"  # the temporary files of a process that was killed while it wrote
# A spreadsheet runs a cell that begins with one of these as a formula. The pattern includes leading quotes, so
# that unescape can undo escape.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


@contextmanager
def atomic(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """Give the path of an empty temporary file next to ``path``; once written, it replaces ``path``.

    ``path`` contains the old content or the whole new one, whatever happens: an error, a kill, a power cut, or another
    process that writes the same file. New files get the permissions that the umask grants.

    Args:
        path: the file to write; its folder is created.
        suffix: what the temporary name must end with, for writers that choose the format by it.

    Raises:
        UserError: the file could not be written; an earlier file at ``path`` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        # The system applies the umask to 0o666. Python could only read the umask by changing it for a moment.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kept = "; the earlier file is untouched" if path.is_file() else ""
        raise UserError(f"{path}: could not be written: {reason(error)}{kept}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def reason(error: OSError) -> str:
    """Return why the system refused, in words."""
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file completely or not at all, see :func:`atomic`."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file completely or not at all, see :func:`atomic`."""
    write_bytes(path, text.encode())


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Return the digest of a file's content, hexadecimal; ``algorithm``: one of hashlib."""
    found = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV; text that a spreadsheet would run as a formula gets a quote in front (:func:`unescape`)."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([escape(cell) for cell in row] for row in rows)
    return stream.getvalue()


def escape(cell: object) -> object:
    """Return a CSV cell with a quote in front where a spreadsheet would run it as a formula; numbers stay."""
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def unescape(cell: str) -> str:
    """Return the text that :func:`escape` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def expand(path: str | Path) -> Path:
    """Return a path with ``~`` and environment variables, such as ``$SCRATCH/runs``, replaced.

    Raises:
        UserError: a variable that is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    missing = re.search(r"\$\{?(\w+)\}?", expanded)
    if missing and missing[1] not in os.environ and not os.path.lexists(expanded):
        raise UserError(f"{path}: the environment variable {missing[1]} is not set")
    return Path(expanded)


def looked_in(path: str | Path) -> str:
    """Return where a relative path was looked for, for messages; nothing for an absolute path."""
    return "" if Path(path).is_absolute() else f" (looked in {Path.cwd()})"


def unwritable(folder: str | Path) -> str | None:
    """Return why a folder cannot be created or written to; None if it can. Nothing is created."""
    if not str(folder):
        return "expected a folder"
    try:
        path = Path(os.path.abspath(expand(folder)))
        path.stat()
    except UserError as error:  # a variable that is not set
        return str(error)
    except FileNotFoundError:
        pass
    except OSError as error:
        if not isinstance(error, NotADirectoryError | PermissionError):
            return f"{path} cannot be created ({error.strerror})"  # a name that is too long, links in a circle
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not nearest.is_dir():
        return f"{nearest} is a file, not a folder"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{nearest} cannot be written to ({error.strerror})"


def check_folder(folder: str | Path) -> Path:
    """Check before the work that results can be written to a folder; create nothing yet.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    why = unwritable(folder)
    if why is not None:
        raise UserError(f"{folder}: results cannot be written there: {why}; choose another folder with --output")
    return Path(folder)
