"""Fetch archives that may be large over lines that may break, check them, and unpack them safely."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from utils.errors import UserError
from utils.progress import progress_bar

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte before a connection counts as broken


@dataclass(frozen=True)
class Archive:
    """A file that a publisher offers.

    Args:
        filename: its name on disk.
        url: where it is; None where the publisher asks for an account, so that only the user can fetch it.
        checksum: ``"md5:..."``, ``"sha1:..."``, or None where the publisher names none (the archive's own
            checks, which unpacking runs, must then do).
        into: folder below the data set's folder that it is unpacked into.
    """

    filename: str
    url: str | None
    checksum: str | None = None
    into: str = "."


class Unreachable(UserError):
    """The server did not answer, or broke off more often than we are willing to try again."""


def fetch(url: str, path: Path, checksum: str | None = None, attempts: int = 5, pause: float = 2.0) -> None:
    """Download ``url`` to ``path`` with a progress bar; go on where an earlier attempt stopped.

    An unfinished download lies beside ``path`` with the suffix ``.part``; ``path`` exists only when it is
    complete and its checksum is right.

    Args:
        checksum: ``"algorithm:hexdigest"`` as hashlib names them, or None.
        attempts: connections without a single new byte before giving up; ``pause`` seconds between them.

    Raises:
        Unreachable: no connection, a refusal, or it broke off too often. What came so far is kept.
        UserError: the disk is full, or the checksum is wrong (the download is removed).
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    start, failures = _size(part), 0
    while True:
        before = _size(part)
        try:
            _continue(url, part)
            break
        except HTTPError as error:
            raise Unreachable(f"{url}: the server answers {error.code} {error.reason}") from error
        except (HTTPException, OSError) as error:
            failures = 0 if _size(part) > before else failures + 1
            offline = isinstance(error, URLError) and _size(part) == start
            if offline or failures >= attempts:
                raise Unreachable(f"{url}: cannot be reached ({getattr(error, 'reason', error)})") from error
            time.sleep(pause)
    try:
        verify(part, checksum)
    except UserError:
        part.unlink()
        raise
    _validator_file(part).unlink(missing_ok=True)
    os.replace(part, path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _validator_file(part: Path) -> Path:
    """Return the file that remembers which version of the remote file ``part`` is the beginning of."""
    return part.with_name(part.name + ".version")


def _continue(url: str, part: Path) -> None:
    """Bring ``part`` to its full length, with one connection."""
    have, version = _size(part), _validator_file(part)
    headers = {"User-Agent": "python-dataloaders-prepare"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version.exists():
            # A file that changed since is sent from its start, never glued to the old beginning.
            headers["If-Range"] = version.read_text(encoding="utf-8")
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and have and have == _total(error.headers.get("Content-Range")):
            return  # everything had come before the last stop
        if error.code == 416 and have:
            part.unlink()
            raise ConnectionError("the remote file is shorter than what was there; starting over") from error
        raise
    with response:
        resumed = response.status == 206
        if not resumed:
            have = 0
            _remember_version(version, response.headers.get("ETag") or response.headers.get("Last-Modified"))
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        _demand_space(part, total, have)
        with open(part, "ab" if resumed else "wb") as out, _bar(part, total, have) as bar:
            while chunk := response.read(CHUNK):
                _save(out, chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) < total:
        raise ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")


def _save(out: IO[bytes], chunk: bytes) -> None:
    try:
        out.write(chunk)
        out.flush()
    except OSError as error:  # not the network's fault: trying again would not help
        raise UserError(f"{out.name}: cannot be written: {error}") from error


def _remember_version(version: Path, validator: str | None) -> None:
    # A weak ETag promises nothing about bytes; If-Range must not be used with it (RFC 9110, 13.1.5).
    if validator and not validator.startswith("W/"):
        version.write_text(validator, encoding="utf-8")
    else:
        version.unlink(missing_ok=True)


def _total(content_range: str | None) -> int | None:
    """Return N of ``bytes */N``."""
    with suppress(AttributeError, ValueError):
        return int(content_range.rpartition("/")[2])  # type: ignore[union-attr]
    return None


def _demand_space(part: Path, total: int | None, have: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise UserError(
            f"{part.parent}: {part.stem} needs {(total - have) / 1e9:.1f} GB more, the disk has {free / 1e9:.1f} GB"
        )


def _bar(part: Path, total: int | None, have: int) -> Any:
    return progress_bar(total=total, initial=have, unit="B", desc=part.stem)


def verify(path: Path, checksum: str | None) -> None:
    """Raise UserError when the file's digest is not ``checksum``: ``"algorithm:hexdigest"``, or None."""
    if checksum is None:
        return
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise UserError(
            f"{path}: {algorithm} is {digest.hexdigest()}, expected {expected}: the file is damaged or not "
            "the one that the publisher offered; remove it and run the command again"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar[.gz/.bz2/.xz] into ``folder``; members that would land elsewhere are refused.

    Everything is unpacked beside first and moved when complete, so that an interrupted run leaves no half
    folder that looks whole. The archive's own checks (CRC, gzip) are run on the way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f".unpacking-{archive.name}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        if zipfile.is_zipfile(archive):
            _unzip(archive, work)
        else:
            _untar(archive, work)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"{archive}: cannot be unpacked ({error}); remove it and run the command again") from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _merge(work, folder)
    shutil.rmtree(work, ignore_errors=True)


def _inside(name: str, archive: Path) -> PurePosixPath:
    """Return the member's path; raise UserError if it leaves the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise UserError(
            f"{archive}: the archive holds {name!r}, which would be written outside the folder; not unpacked"
        )
    return path


def _unzip(archive: Path, work: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in progress_bar(file.infolist(), desc=f"unpack {archive.name}", unit="file"):
            target = work / _inside(member.filename, archive)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"{archive}: the archive holds a link, {member.filename!r}; not unpacked")
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            with file.open(member) as source:
                _write(source, target)


def _untar(archive: Path, work: Path) -> None:
    with tarfile.open(archive) as file:
        for member in progress_bar(_members(file), desc=f"unpack {archive.name}", unit="file"):
            target = work / _inside(member.name, archive)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
            elif member.isfile():
                with file.extractfile(member) as source:  # type: ignore[union-attr]
                    _write(source, target)
            else:
                raise UserError(f"{archive}: the archive holds a link or device, {member.name!r}; not unpacked")


def _members(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield members while reading on, without a first pass over the (compressed) archive."""
    while (member := file.next()) is not None:
        yield member
    # tarfile stops at its end mark; the compressor's checksum stands behind it and is compared on reading.
    while file.fileobj.read(CHUNK):  # type: ignore[union-attr]
        pass


def _write(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as out:
        shutil.copyfileobj(source, out, CHUNK)


def _merge(source: Path, folder: Path) -> None:
    """Move what is in ``source`` into ``folder``: folders that are there are filled, files replaced."""
    if not source.exists():
        return
    for entry in sorted(source.iterdir()):
        target = folder / entry.name
        if entry.is_dir() and target.is_dir():
            _merge(entry, target)
        else:
            os.replace(entry, target)
