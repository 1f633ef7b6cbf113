"""Where images to be segmented come from: files, folders, videos and cameras. Imports nothing heavy."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


@dataclass(frozen=True)
class Item:
    """One image to be segmented.

    ``source``: how messages call it. ``name``: where its outputs go below the output folder, without extension.
    ``read``: returns ``(H, W, channels)``, given the number of channels, or raises UserError.
    ``file``: the image file, where it is one.
    """

    source: str
    name: str
    read: Callable[[int], np.ndarray]
    file: Path | None = None

    def pixels(self) -> int:
        """Return the number of pixels as the file's header has it; 0 where that is not known."""
        if self.file is None:
            return 0
        from PIL import Image

        try:
            with Image.open(self.file) as image:
                return image.width * image.height
        except Exception:  # whatever is wrong with the file is said when it is read
            return 0


def is_camera(images: str) -> bool:
    """Return whether the argument means a camera: ``camera:0``."""
    return images.startswith("camera:")


def is_video(images: str) -> bool:
    """Return whether the argument means frames of a video file or a camera."""
    return is_camera(images) or Path(images).suffix.lower() in VIDEO_EXTENSIONS


# ------------------------------------------------------------------------------------------------------ files


def find_images(
    images: str | Path, output: str | Path, extensions: Sequence[str] | None = None
) -> tuple[list[Item], list[str]]:
    """Return the images of a file or of a folder and its subfolders, sorted, and what could not be looked into.

    Args:
        images: an image file or a folder. Hidden files are left out.
        output: the folder that outputs go to, with the same structure of subfolders.
        extensions: such as ``["jpg", ".png"]``, in any case; None: all that :func:`utils.images.read_image` knows.

    Raises:
        UserError: nothing there, no image in it, an output folder among the images, or an output that would
            overwrite an image.
    """
    from utils.images import IMAGE_EXTENSIONS, read_image

    root = Path(images)
    wanted = tuple(_extension(e) for e in extensions) if extensions else IMAGE_EXTENSIONS
    problems: list[str] = []
    if root.is_file():
        files, root = [root], root.parent
    elif root.is_dir():
        _refuse_to_mix(root, Path(output))
        files, others = _walk(root, wanted, problems)
        if not files and not problems:
            raise UserError(_nothing_found(root, wanted, others))
    else:
        raise UserError(f"--images {images}: there is no such file or folder (looked in {Path.cwd()})")
    items = [
        Item(source=str(file), name=name, read=_reader(read_image, file), file=file)
        for file, name in zip(files, output_names([f.relative_to(root) for f in files]), strict=True)
    ]
    _refuse_to_overwrite(items, Path(output))
    return items, problems


def _reader(read_image: Callable[[Path, int], Any], file: Path) -> Callable[[int], Any]:
    return lambda channels: read_image(file, channels)


def _extension(text: str) -> str:
    return f".{text.lower().lstrip('*').lstrip('.')}"


def _refuse_to_mix(root: Path, output: Path) -> None:
    """Masks among images are images to whoever reads the folder next: a training, or this program."""
    inner, outer = output.resolve(), root.resolve()
    if not inner.is_relative_to(outer):
        return
    default = Path("outputs")
    free = outer.parent / f"{outer.name}_outputs" if default.resolve().is_relative_to(outer) else default
    relation = "is" if inner == outer else "lies inside"
    raise UserError(
        f"--output {output} {relation} the folder of the images, --images {root}: masks would lie among the images; "
        f"choose a folder outside, such as --output {free}"
    )


def _walk(root: Path, wanted: Sequence[str], problems: list[str]) -> tuple[list[Path], Counter[str]]:
    """List the wanted files below ``root``, and count the extensions of the others."""
    files: list[Path] = []
    others: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename}: the folder cannot be read: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        here = Path(folder)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        for name in sorted(n for n in names if not n.startswith(".")):
            extension = Path(name).suffix.lower()
            if extension in wanted:
                files.append(here / name)
            else:
                others[extension or "(none)"] += 1
    return files, others


def _nothing_found(root: Path, wanted: Sequence[str], others: Counter[str]) -> str:
    there = ", ".join(f"{count} with {extension}" for extension, count in others.most_common(5))
    return (
        f"--images {root}: no file with {', '.join(wanted)} in this folder or below; "
        f"there are {there or 'no files at all'}" + (" (choose with --extension)" if others else "")
    )


def output_names(files: Sequence[Path]) -> list[str]:
    """Return the outputs' names: paths without extension; with it where two images differ in nothing else."""
    stems = [file.with_suffix("").as_posix() for file in files]
    count = Counter(stem.casefold() for stem in stems)
    return [stem if count[stem.casefold()] == 1 else file.as_posix() for stem, file in zip(stems, files, strict=True)]


def _refuse_to_overwrite(items: Sequence[Item], output: Path) -> None:
    inputs = {item.file.resolve() for item in items if item.file}
    for item in items:
        mask = (output / f"{item.name}.png").resolve()
        if mask in inputs:
            raise UserError(f"--output {output}: the mask of {item.source} would overwrite the image {mask}")


# ------------------------------------------------------------------------------------------------------ frames


class Video:
    """Frames of a video file or of a camera, through OpenCV.

    Args:
        source: a path, or ``camera:N``.
        shard: (rank, number of processes): every process takes its share of the frames.

    Raises:
        UserError: OpenCV cannot open it.
    """

    def __init__(self, source: str, shard: tuple[int, int] = (0, 1)) -> None:
        import cv2

        self.source, self.shard = source, shard
        self.is_camera = is_camera(source)
        if self.is_camera:
            number = source.partition(":")[2]
            if not number.isdigit():
                raise UserError(f"--images {source}: expected camera:NUMBER, such as camera:0")
            self.name = f"camera{number}"
        else:
            if not Path(source).is_file():
                raise UserError(f"--images {source}: there is no such video file (looked in {Path.cwd()})")
            self.name = Path(source).stem
        self._capture = cv2.VideoCapture(int(number) if self.is_camera else source)
        if not self._capture.isOpened():
            kind = "camera cannot be opened" if self.is_camera else "video cannot be read (damaged, or unknown codec)"
            raise UserError(f"--images {source}: the {kind}")
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.frames = None if self.is_camera else int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)) or None

    def __iter__(self) -> Iterator[Item]:
        """Yield frames until the video, or the camera, ends; release it then."""
        import cv2

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
                    yield Item(source=f"{self.source} frame {index}", name=name, read=_frame_reader(rgb))
                index += 1
        finally:
            self._capture.release()
        if index == 0:
            raise UserError(f"--images {self.source}: no frame can be read of it")


def _frame_reader(frame: np.ndarray) -> Callable[[int], np.ndarray]:
    def read(channels: int) -> np.ndarray:
        import cv2

        if channels == 1:
            return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)[:, :, None]
        if channels != 3:
            raise UserError(f"the model takes images with {channels} channels; frames of a video have 3")
        return frame

    return read
