"""Messages about files: expected and found folders side by side, and sizes that differ."""

from __future__ import annotations

from itertools import islice, zip_longest
from pathlib import Path

from utils.errors import UserError
from utils.images.formats import orientation, read_bytes

_DEPTH = 4
_ENTRIES_PER_FOLDER = 5
_LINES = 30


def layout_problem(problem: str, expected: str, folder: Path | None) -> str:
    """Return ``problem``, and below it in two columns the ``expected`` tree and that of ``folder``."""
    left = ["expected:", *expected.strip("\n").splitlines()] if expected else []
    right = [f"found in {folder}:", *found_tree(folder)] if folder is not None else []
    if not left or not right:
        return "\n".join([problem, *("  " + line for line in left or right)])
    width = max(len(line) for line in left)
    rows = zip_longest(left, right, fillvalue="")
    return "\n".join([problem, *(f"  {a:<{width}} | {b}".rstrip(" ") for a, b in rows)])


def found_tree(folder: Path) -> list[str]:
    """Return the first levels of a folder as indented lines, a few entries of each level."""
    if not folder.exists():
        parent = next((p for p in folder.absolute().parents if p.is_dir()), None)
        return ["(does not exist)"] + ([f"nearest existing folder: {parent}", *_tree(parent, 1)] if parent else [])
    if not folder.is_dir():
        return ["(a file, not a folder)"]
    return _tree(folder, _DEPTH) or ["(empty)"]


def _tree(folder: Path, depth: int, indent: str = "") -> list[str]:
    try:
        # Folders first; huge folders are not listed completely.
        names = sorted(islice(folder.iterdir(), 10_000), key=lambda p: (not p.is_dir(), p.name))
    except OSError as error:
        return [f"{indent}({error.strerror})"]
    lines: list[str] = []
    for path in names[:_ENTRIES_PER_FOLDER]:
        is_folder = path.is_dir()
        lines.append(f"{indent}{path.name}{'/' if is_folder else ''}")
        if is_folder and depth > 1:
            lines += _tree(path, depth - 1, indent + "  ")
    if len(names) > _ENTRIES_PER_FOLDER:
        lines.append(f"{indent}... {len(names) - _ENTRIES_PER_FOLDER} more")
    return lines[:_LINES]


def sizes_differ(image: Path, label: Path, image_size: tuple[int, ...], label_size: tuple[int, ...]) -> UserError:
    """Return the error for an image and a label of different sizes, each (height, width)."""
    text = (
        f"image and label differ in size: {image} is {image_size[1]}x{image_size[0]}, "
        f"{label} is {label_size[1]}x{label_size[0]} (width x height)"
    )
    turned = [path for path in (image, label) if orientation(read_bytes(path)) >= 5]
    if label_size[::-1] == image_size and len(turned) == 1:
        text += (
            f". Only {turned[0].name} is rotated by its EXIF orientation, so the mask was made for the image as "
            "stored. Remove the orientation from that file, or rotate the other one"
        )
    return UserError(text)
