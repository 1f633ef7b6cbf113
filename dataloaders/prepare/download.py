"""Download large archives, continue interrupted downloads, verify checksums, and unpack safely."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from utils.errors import UserError
from utils.files import file_digest
from utils.progress import progress_bar

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte before a connection counts as broken


@dataclass(frozen=True)
class Archive:
    """An archive that a publisher offers."""

    filename: str
    url: str | None  # None: the publisher requires an account, so only the user can download it
    checksum: str | None = None  # "md5:..." or "sha1:...", if the publisher gives one
    into: str = "."  # the folder, below that of the data set, to unpack it into


class Unreachable(UserError):
    """The server did not answer, or the connection was lost too often."""


def fetch(url: str, path: Path, checksum: str | None = None, attempts: int = 5, pause: float = 2.0) -> None:
    """Download ``url`` to ``path`` with a progress bar; continue an earlier download.

    An unfinished download has the suffix ``.part``; ``path`` exists only after the checksum was verified.

    Args:
        checksum: ``"algorithm:hexdigest"`` with an algorithm of hashlib, or None.
        attempts: give up after this many connections without a new byte; they are ``pause`` seconds apart.

    Raises:
        Unreachable: there is no connection, the server refuses, or the connection was lost too often. The unfinished
            download is kept.
        UserError: the disk is full, or the checksum is wrong (then the download is removed).
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
    """Return the file with the version (ETag or date) of the remote file that ``part`` comes from."""
    return part.with_name(part.name + ".version")


def _continue(url: str, part: Path) -> None:
    """Download the rest of ``part`` with one connection."""
    have, version = _size(part), _validator_file(part)
    headers = {"User-Agent": "python-dataloaders-prepare"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version.exists() and (validator := version.read_text(encoding="utf-8")):
            headers["If-Range"] = validator  # if the remote file has changed, the server sends it from its start
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and have and (error.headers.get("Content-Range") or "").endswith(f"/{have}"):
            return  # it was already complete
        if error.code == 416 and have:
            part.unlink()
            raise ConnectionError("the remote file is shorter than the unfinished download; starting over") from error
        raise
    with response:
        resumed = response.status == 206
        if not resumed:
            have = 0
            validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            # A weak ETag must not be used with If-Range (RFC 9110, 13.1.5).
            version.write_text("" if validator.startswith("W/") else validator, encoding="utf-8")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        needed, free = int(length or 0) / 1e9, shutil.disk_usage(part.parent).free / 1e9
        if needed > free:
            raise UserError(f"{part.parent}: {part.stem} needs {needed:.1f} GB more, the disk has {free:.1f} GB")
        bar = progress_bar(total=total, initial=have, unit="B", desc=part.stem)
        with open(part, "ab" if resumed else "wb") as out, bar:
            while chunk := response.read(CHUNK):
                _save(out, chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) < total:
        raise ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")


def _save(out: IO[bytes], chunk: bytes) -> None:
    try:
        out.write(chunk)
        out.flush()
    except OSError as error:  # not a network error, so another attempt would not help
        raise UserError(f"{out.name}: cannot be written: {error}") from error


def verify(path: Path, checksum: str | None) -> None:
    """Raise UserError if the digest of a file is not ``checksum``: ``"algorithm:hexdigest"``, or None."""
    if checksum is None:
        return
    algorithm, _, expected = checksum.partition(":")
    found = file_digest(path, algorithm)
    if found != expected:
        raise UserError(
            f"{path}: {algorithm} is {found}, expected {expected}: the file is damaged or has been replaced by the "
            "publisher; remove it and run the command again"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar[.gz/.bz2/.xz] into ``folder``; raise UserError if a file would be written elsewhere.

    Files are unpacked into a temporary folder and moved when all are there, so an interrupted run leaves no incomplete
    folder. The checksums in the archive (CRC, gzip) are verified.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f".unpacking-{archive.name}"
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    try:
        work.mkdir()
        (_unzip if zipfile.is_zipfile(archive) else _untar)(archive, work)
        # Moves the files, also into folders that exist.
        shutil.copytree(work, folder, dirs_exist_ok=True, copy_function=os.replace)
    # RuntimeError: it is encrypted; NotImplementedError: a kind of compression that Python does not know.
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise UserError(
            f"{archive}: cannot be unpacked ({error}); download or export it again and run the command again"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _inside(name: str, archive: Path) -> PurePosixPath:
    """Return the path of a member; raise UserError if it is outside the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise UserError(
            f"{archive}: the archive contains {name!r}, which would be written outside the folder; not unpacked"
        )
    return path


def _unzip(archive: Path, work: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in progress_bar(file.infolist(), desc=f"unpack {archive.name}", unit="file"):
            target = work / _inside(member.filename, archive)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"{archive}: the archive contains a link, {member.filename!r}; not unpacked")
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            with file.open(member) as source:
                _write(source, target)


def _untar(archive: Path, work: Path) -> None:
    with tarfile.open(archive) as file:
        for member in progress_bar(file, desc=f"unpack {archive.name}", unit="file"):
            target = work / _inside(member.name, archive)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
            elif member.isfile():
                with file.extractfile(member) as source:  # type: ignore[union-attr]
                    _write(source, target)
            else:
                raise UserError(f"{archive}: the archive contains a link or device, {member.name!r}; not unpacked")
        # The checksum of the compression comes after the end mark, at which tarfile stops.
        while file.fileobj.read(CHUNK):  # type: ignore[union-attr]
            pass


def _write(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as out:
        shutil.copyfileobj(source, out, CHUNK)
