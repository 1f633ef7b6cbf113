"""Where the images come from: files, folders, videos and cameras."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.errors import UserError, plural
from utils.files import looked_in
from utils.images import IMAGE_EXTENSIONS

# Formats whose header counts the frames.
_COUNTED = (".mp4", ".m4v", ".mov", ".avi")
VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


@dataclass(frozen=True)
class Item:
    """One image to segment."""

    source: str  # its name in messages, always printable
    name: str  # where its outputs go below the output folder, without extension
    image: Path | np.ndarray  # the image file, or a frame (H, W, 3)

    def pixels(self) -> int:
        """Return the number of pixels that the file's header states; 0 if unknown."""
        if not isinstance(self.image, Path):
            return 0
        try:
            with Image.open(self.image) as image:
                return image.width * image.height
        except Exception:  # reading the file reports what is wrong with it
            return 0


@dataclass
class Found:
    """The images of a file or folder, and the files that were skipped."""

    items: list[Item]  # sorted
    problems: list[str]  # one message per folder that cannot be read
    others: Counter[str]  # files of other types, by extension
    links: int = 0  # linked folders, and links to files that are listed anyway

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def total(self) -> int:
        """How many images there are."""
        return len(self.items)

    @property
    def passed_over(self) -> str:
        """A sentence about the files that were skipped; empty if there are none."""
        total = self.others.total()
        types = ", ".join(f"{count} {extension}" for extension, count in self.others.most_common(3))
        more = ", ..." if len(self.others) > 3 else ""
        parts = [f"{plural(total, 'file')} of other types ({types}{more})"] * bool(total)
        parts += [f"{plural(self.links, 'link')} to folders, or to images that are listed already"] * bool(self.links)
        return f"skipped: {'; '.join(parts)}" if parts else ""


def printable(path: str | Path) -> str:
    """Return a path as text that can be printed: bytes that are not UTF-8 as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_camera(images: str) -> bool:
    """Return whether the argument means a camera: ``camera:0``."""
    return images.startswith("camera:")


def is_video(images: str) -> bool:
    """Return whether the argument means frames of a video file or a camera."""
    return is_camera(images) or Path(images).suffix.lower() in VIDEO_EXTENSIONS


# ------------------------------------------------------------------------------------------------------ files


def find_images(images: str | Path, output: str | Path, extensions: Sequence[str] | None = None) -> Found:
    """Return the images of a file, or of a folder and its subfolders.

    Links to folders are not followed, and a file that several links name is taken once. Hidden files are left out.

    Args:
        images: an image file or a folder.
        output: the folder that outputs go to, with the same structure of subfolders.
        extensions: such as ``["jpg", ".png"]``, in any case; None: all that :func:`utils.images.read_image` knows.

    Raises:
        UserError: nothing there, no image in it, an output folder among the images, or an output that would
            overwrite an image.
    """
    root = Path(images)
    wanted = tuple(f".{e.lower().lstrip('*.')}" for e in extensions) if extensions else IMAGE_EXTENSIONS
    found = Found([], [], Counter())
    if root.is_file():
        files, root = [root], root.parent
    elif root.is_dir():
        _refuse_to_mix(root, Path(output))
        files = _walk(root, wanted, found)
        if not files and not found.problems:
            raise UserError(_nothing_found(root, wanted, found))
    else:
        raise UserError(f"--images {images}: there is no such file or folder{looked_in(images)}")
    names = output_names([file.relative_to(root) for file in files])
    found.items = [Item(source=printable(file), name=name, image=file) for file, name in zip(files, names, strict=True)]
    inputs = {os.path.realpath(file) for file in files}  # resolve() fails for links in a circle
    for item in found.items:
        mask = os.path.realpath(Path(output) / f"{item.name}.png")
        if mask in inputs:
            raise UserError(f"--output {output}: the mask of {item.source} would overwrite the image {mask}")
    return found


def _refuse_to_mix(root: Path, output: Path) -> None:
    """Raise UserError if masks would be written among the images, where the next program would read them as images."""
    inner, outer = output.resolve(), root.resolve()
    if not inner.is_relative_to(outer):
        return
    default = Path("outputs")
    free = outer.parent / f"{outer.name}_outputs" if default.resolve().is_relative_to(outer) else default
    relation = "is" if inner == outer else "lies inside"
    raise UserError(
        f"--output {output} {relation} the folder of the images, --images {root}: the masks would be "
        f"mixed with the images; choose a folder outside, such as --output {free}"
    )


def _walk(root: Path, wanted: Sequence[str], found: Found) -> list[Path]:
    """List the files below ``root`` with the given extensions; record in ``found`` what is skipped."""
    files: list[Path] = []

    def unreadable(error: OSError) -> None:
        found.problems.append(f"{printable(error.filename)}: the folder cannot be read: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        here = Path(folder)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        found.links += sum((here / s).is_symlink() for s in subfolders)
        for name in sorted(n for n in names if not n.startswith(".")):
            extension = Path(name).suffix.lower()
            if extension in wanted:
                files.append(here / name)
            else:
                found.others[extension or "(none)"] += 1
    # Links to files that are listed anyway, by their own name or by an earlier link, are left out.
    listed, kept = {os.path.realpath(file) for file in files if not file.is_symlink()}, []
    for file in files:
        if file.is_symlink():
            if (target := os.path.realpath(file)) in listed:
                found.links += 1
                continue
            listed.add(target)
        kept.append(file)
    return kept


def _nothing_found(root: Path, wanted: Sequence[str], found: Found) -> str:
    there = ", ".join(f"{number} with {extension}" for extension, number in found.others.most_common(5))
    return (
        f"--images {printable(root)}: no file with {', '.join(wanted)} in this folder or below; "
        f"there are {there or 'no files at all'}"
        + (" (choose with --extension)" if found.others else "")
        + (f"; {plural(found.links, 'linked folder')} not followed: pass the folder itself" if found.links else "")
    )


def output_names(files: Sequence[Path]) -> list[str]:
    """Return the outputs' names: paths without extension, made unique.

    The extension is kept if two images differ in nothing else, and a number is added if that is not enough. Names that
    differ in case or in the Unicode form of accents count as equal, since some file systems say so.
    """
    stems = Counter(_folded(file.with_suffix("").as_posix()) for file in files)
    folders = {_folded(parent.as_posix()) for file in files for parent in file.parents}
    taken = {"probs"}  # probs.json describes the probabilities
    names = []
    for file in files:
        stem, whole = file.with_suffix("").as_posix(), file.as_posix()
        candidates = chain([stem] * (stems[_folded(stem)] == 1), [whole], (f"{whole}~{n}" for n in count(2)))
        name = next(c for c in candidates if _folded(c) not in taken and not _own_folders(c) & folders)
        taken.add(_folded(name))
        names.append(name)
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _own_folders(name: str) -> set[str]:
    """Return the paths below the output folder that no other image may use as a folder."""
    return {_folded(f"{name}{end}") for end in (".png", ".json", ".npz", "_overlay.jpg", "_probs", "_masks")}


# ------------------------------------------------------------------------------------------------------ frames


class Video:
    """Frames of a video file or of a camera, through OpenCV; used as :class:`Found` is.

    Args:
        source: a path, or ``camera:N``.
        shard: (rank, number of processes): every process takes its share of the frames.

    Raises:
        UserError: OpenCV cannot open it.
    """

    problems: Sequence[str] = ()
    passed_over = ""

    def __init__(self, source: str, shard: tuple[int, int] = (0, 1)) -> None:
        self.source, self.shard = source, shard
        self.is_camera = is_camera(source)
        if self.is_camera:
            number = source.partition(":")[2]
            if not number.isdigit():
                raise UserError(f"--images {source}: expected camera:NUMBER, such as camera:0")
            self.name = f"camera{number}"
        else:
            if not Path(source).is_file():
                raise UserError(f"--images {source}: there is no such video file{looked_in(source)}")
            self.name = Path(source).stem
        self._capture = cv2.VideoCapture(int(number) if self.is_camera else source)
        if not self._capture.isOpened():
            kind = "camera cannot be opened" if self.is_camera else "video cannot be read (damaged, or unknown codec)"
            raise UserError(f"--images {source}: the {kind}")
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.frames = None if self.is_camera else int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)) or None

    @property
    def total(self) -> int | None:
        """How many frames this process takes, if it is known."""
        rank, world = self.shard
        return self.frames and -(-(self.frames - rank) // world)

    def __iter__(self) -> Iterator[Item]:
        """Yield frames until the video or the camera ends; release it then.

        Raises:
            UserError: no frame can be read, or the video breaks off.
        """
        rank, world = self.shard
        index = 0
        try:
            while self._capture.grab():
                if index % world == rank:
                    ok, frame = self._capture.retrieve()
                    if not ok:
                        break
                    rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                    name = f"{self.name}/frame_{index:06d}"
                    yield Item(source=f"{self.source} frame {index}", name=name, image=rgb)
                index += 1
        finally:
            self._capture.release()
        if index == 0:
            raise UserError(f"--images {self.source}: no frame can be read from it")
        # Some formats announce a duration only, so their number of frames may be slightly off.
        slack = 0.0 if Path(self.source).suffix.lower() in _COUNTED else 0.05
        if rank == 0 and self.frames is not None and index < self.frames * (1 - slack):
            raise UserError(
                f"{self.source}: ends at frame {index} of {self.frames}: the file is damaged or truncated; "
                "the frames before it are segmented"
            )
