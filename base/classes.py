"""Class names and colors: as given in a config, or from the class files that labeling tools write."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from base.text import read_lines, without_quotes
from utils.bounds import Byte
from utils.errors import UserError
from utils.files import expand
from utils.images import voc_colormap

Color = tuple[Byte, Byte, Byte]

_NAME_COLUMNS = ("class", "name", "class_name", "label", "classes")
_VALUE_COLUMNS = ("pixel value", "value", "id", "pixel_value", "index", "idx", "class_id", "label_id", "trainid")
_COLOR_COLUMNS = (("r", "g", "b"), ("red", "green", "blue"))
_GAP = r"\s*[,;\s]\s*"
_RGB = _GAP.join(rf"(?P<{channel}>\d{{1,3}})" for channel in "rgb")
# A line with a color: of CVAT's labelmap.txt (name:R,G,B:parts:actions), R G B name, or name R G B.
_WITH_COLOR = (
    re.compile(rf"(?P<name>[^:]*):\s*{_RGB}\s*:[^:]*:[^:]*"),
    re.compile(rf"{_RGB}{_GAP}(?P<name>\S.*)"),
    re.compile(rf"(?P<name>.*\S){_GAP}{_RGB}"),
)
_NUMBERED = re.compile(r"(?P<id>\d+)\s*[\s,;:=]\s*(?P<name>\S.*)")  # an id and a name
_STRUCTURED = re.compile(r"[\[{]|- |.*[:{]$")  # the first line of JSON, YAML and the like


class Classes(NamedTuple):
    """Names of the classes in the order of their ids, and one color per class if the file gives colors."""

    names: tuple[str, ...]
    palette: tuple[Color, ...] | None = None


def read_classes(path: str | Path) -> Classes:
    """Read a class file.

    Each line is a name or ``R G B name``. The file may also be a CSV file with a header (``name,r,g,b``, or Roboflow's
    ``Pixel Value, Class``) or CVAT's ``labelmap.txt`` (``name:R,G,B:parts:actions``).

    Names may follow their ids, ``0 road``.

    Raises:
        UserError: the file is missing, has no class or the same class twice, or its ids have gaps.
    """
    lines = read_lines(path, "classes")
    odd = next((c for _, line in lines for c in line if not c.isprintable() and c != "\t"), None)
    if odd is not None:
        raise UserError(f"classes: {path} is not UTF-8 text (it contains {ascii(odd)}); save it as UTF-8")
    texts = [line for _, line in lines]
    try:
        found = _from_csv(texts, path) or _from_color_lines(texts) or _from_names(texts, path)
    except ValueError as error:
        raise UserError(f"classes: {path}: {error}") from None
    numbered = [_NUMBERED.fullmatch(name) for name in found.names]
    if len(numbered) > 1 and all(numbered):
        names = [match["name"] for match in numbered if match]
        found = _by_id([int(match["id"]) for match in numbered if match], names, found.palette, path)
    twice = next((name for i, name in enumerate(found.names) if name in found.names[:i]), None)
    if twice is not None:
        raise UserError(f"classes: {path} lists {twice!r} twice; class names must be unique")
    return found


def _from_names(texts: Sequence[str], path: str | Path) -> Classes:
    if not texts:
        raise UserError(f"classes: {path} contains no class name; expected one name per line")
    if _STRUCTURED.match(texts[0]):
        raise UserError(
            f"classes: {path} begins with {texts[0][:40]!r}, which is not a name. Expected one name per line; or write "
            "the names as a list in the config"
        )
    for separator in ",;\t":
        counts = {text.count(separator) for text in texts}
        if len(counts) == 1 and counts != {0} and not all(map(_NUMBERED.fullmatch, texts)):
            raise UserError(
                f"classes: {path} looks like a table without a known header. Expected one name per line, or a first "
                "line like name,r,g,b or Pixel Value,Class; or write the names as a list in the config"
            )
    return Classes(tuple(map(without_quotes, texts)))


def _from_csv(texts: Sequence[str], path: str | Path) -> Classes | None:
    """Read a CSV file whose header names the columns; None if there is no such header."""
    if not texts:
        return None
    separator = next((s for s in ",;\t" if s in texts[0]), ",")
    header, *rows = csv.reader(texts, delimiter=separator, skipinitialspace=True)
    columns = {name.strip().lower(): i for i, name in enumerate(header)}
    name = next((columns[key] for key in _NAME_COLUMNS if key in columns), None)
    value = next((columns[key] for key in _VALUE_COLUMNS if key in columns), None)
    color = next(([columns[c] for c in keys] for keys in _COLOR_COLUMNS if set(keys) <= set(columns)), None)
    if name is None or len(header) < 2:
        return None
    if not rows:
        raise UserError(f"classes: {path} contains only a header; expected one line per class below it")
    try:
        palette = None if color is None else tuple(_color([int(row[c]) for c in color]) for row in rows)
        names = [row[name].strip() for row in rows]
        if value is not None:
            return _by_id([int(row[value]) for row in rows], names, palette, path)
        return Classes(tuple(names), palette)
    except (IndexError, ValueError) as error:
        raise UserError(f"classes: {path} is not a table with the columns {', '.join(header)}: {error}") from None


def _by_id(ids: Sequence[int], names: Sequence[str], palette: Sequence[Color] | None, path: str | Path) -> Classes:
    """Return the classes in the order of their ids."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    found = [ids[i] for i in order]
    if found != list(range(len(ids))):
        raise UserError(
            f"classes: the ids in {path} are {found}, expected 0 to {len(ids) - 1}. Write the names as a list "
            f'and set "mask_values": {found} (Folder loader)'
        )
    return Classes(tuple(names[i] for i in order), None if palette is None else tuple(palette[i] for i in order))


def _from_color_lines(texts: Sequence[str]) -> Classes | None:
    """Read lines with colors, all of one form; None if a line has another form."""
    for pattern in _WITH_COLOR:
        rows = [match for text in texts if (match := pattern.fullmatch(text))]
        if rows and len(rows) == len(texts):
            colors = tuple(_color([int(row[channel]) for channel in "rgb"]) for row in rows)
            return Classes(tuple(row["name"].strip() for row in rows), colors)
    return None


def classes_of(classes: Sequence[str] | str | int, data_dir: str | None) -> Classes:
    """Return the classes for the argument ``classes``: names, their number, or a file (below data_dir or as given).

    Raises:
        ValueError: no names, or equal names.
        UserError: the file is missing or its format is not known.
    """
    if isinstance(classes, int):
        return Classes(tuple(f"class {i}" for i in range(classes)))
    if isinstance(classes, str):
        below = expand(data_dir or ".") / classes
        given = expand(classes)
        folder = expand(data_dir or ".")
        if not given.is_file() and folder.is_dir() and not any(folder.iterdir()):
            raise UserError(f"data_dir: the folder {folder} is empty; expected the data, and {classes} (classes) in it")
        if not below.is_file() and not given.is_file():
            raise UserError(
                f"classes: neither {given} nor {below} is a file; expected the path of a text file with one name "
                "per line, or a list of names"
            )
        return read_classes(below if below.is_file() else given)
    names = tuple(str(name) for name in classes)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"classes must be different names, at least one; got {list(names)}")
    return Classes(names)


def class_colors(palette: Sequence[Sequence[int]] | None, count: int) -> tuple[Color, ...]:
    """Return one color per class: the given ones, or the first of the VOC color map.

    Raises:
        ValueError: another number of colors than classes, or something that is not an RGB color.
    """
    if palette is None:
        # Color 0 of the VOC map is black, which fits a background but not a single class.
        return voc_colormap(count) if count > 1 else voc_colormap(2)[1:]
    colors = tuple(_color(c) for c in palette)
    if len(colors) != count:
        raise ValueError(f"palette must have one color per class: {count} classes, {len(colors)} colors")
    return colors


def _color(color: Sequence[int]) -> Color:
    values = tuple(int(v) for v in color)
    if len(values) != 3 or not all(0 <= v <= 255 for v in values):
        raise ValueError(f"palette must contain RGB colors of three numbers from 0 to 255, got {list(color)}")
    return values  # type: ignore[return-value]
