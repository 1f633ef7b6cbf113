"""Lists of samples. Each line has an image and its mask, or a name."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path

from base.text import read_lines, without_quotes
from utils.errors import UserError
from utils.images import IMAGE_EXTENSIONS

_HEADER = {"image", "images", "img", "image_path", "file", "filename", "path", "name", "mask", "masks", "mask_path",
           "label", "labels", "annotation"}  # fmt: skip


def read_names(path: Path) -> list[str]:
    """Return the names in the first column of a list."""
    return [columns_of(line)[0] for _, line in read_lines(path, "data_dir")]


def read_rows(
    path: Path, is_file: Callable[[str], bool], is_name: Callable[[str], bool]
) -> list[tuple[int, list[str]]]:
    """Return (line number, one or two columns) of each line of a list.

    Columns are separated by a tab, else by a comma or semicolon, else by spaces; quotes around a column are removed.
    Names may contain spaces: a line is then divided so that its parts exist. ``is_file`` and ``is_name`` say whether a
    column is the path of a file or the name of a sample.

    Raises:
        UserError: the list cannot be read, or a line has more columns.
    """
    rows: list[tuple[int, list[str]]] = []
    for number, line in read_lines(path, "list_file"):
        columns = columns_of(line)
        if not rows and {column.lower() for column in columns} <= _HEADER and not any(map(is_name, columns)):
            continue
        if len(columns) > 1 and not (len(columns) == 2 and all(map(is_file, columns))):
            columns = _with_blanks(line, is_file, is_name) or columns
        if len(columns) > 2:
            raise UserError(
                f"{path}, line {number}: {len(columns)} columns; expected image and mask, or a name. Put quotes around "
                "names that contain the separator"
            )
        rows.append((number, columns))
    return rows


def columns_of(line: str) -> list[str]:
    """Split a line at tabs, else at commas, else at semicolons, else at spaces outside quotes."""
    for separator in "\t,;":
        if separator in line:
            cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
            return [without_quotes(cell) for cell in cells]
    return [without_quotes(part) for part in re.findall(r"\"[^\"]*\"|'[^']*'|\S+", line)]


def _with_blanks(line: str, is_file: Callable[[str], bool], is_name: Callable[[str], bool]) -> list[str] | None:
    """Return a line with spaces as one name or as two files that exist; None if there are none."""
    if is_name(line):
        return [line]
    for blank in re.finditer(r"\s+", line):
        parts = [without_quotes(line[: blank.start()]), without_quotes(line[blank.end() :])]
        if all(map(is_file, parts)):
            return parts
    return None


def without_extension(name: str) -> str:
    """Return a name of a list without the extension of an image file; other dots belong to the name."""
    path = Path(native(name))
    return (path.with_suffix("") if path.suffix.lower() in IMAGE_EXTENSIONS else path).as_posix()


def native(path: str) -> str:
    """Return a path of a list written on Windows with the separators of this system."""
    return path.replace("\\", "/") if os.sep == "/" else path
