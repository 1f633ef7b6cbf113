"""The table of expected scores over all images, ``expected_dice.csv``."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.facts import Facts
from utils.files import csv_text, unescape, write_text


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    image: str  # its file
    expected: float | None  # the mean over the classes that have a mask; None if none has
    per_class: tuple[float | None, ...]  # the score of each class's mask; None without a mask
    presence: tuple[float | None, ...]  # of each class; None if it is of no interest; empty without a fit


@dataclass(frozen=True)
class Table:
    """The table in a folder of outputs; ``metric`` is what the scores are, "dice" or "iou"."""

    folder: Path
    facts: Facts
    metric: str

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"expected_{self.metric}.csv"

    def write(self, rows: Iterable[Row], keep: Iterable[str] = ()) -> list[Row]:
        """Write the table, worst image first, and return its rows.

        Lines of an earlier table are kept for the images ``keep`` (those that this run skips).
        """
        rows = list(rows)
        wanted = set(keep) - {row.image for row in rows}
        rows += [row for row in self._read() if row.image in wanted]
        rows.sort(key=lambda row: (row.expected is None, row.expected or 0.0, row.image))
        names = self.facts.class_names
        seen = [f"presence of {name}" for name in names if any(row.presence for row in rows)]
        lines = [["image", f"expected_{self.metric}", *names, *seen]]
        for row in rows:
            numbers = (row.expected, *row.per_class, *(row.presence or (None,) * len(seen)))
            lines.append([row.image, *("" if number is None else f"{number:.6f}" for number in numbers)])
        write_text(self.path, csv_text(lines))
        return rows

    def refuse_foreign(self) -> None:
        """Raise UserError if a file with the table's name is not such a table."""
        if self.path.exists() and not self._is_ours():
            raise UserError(
                f"{self.path} was not written by this program; choose another folder, or pass --force to replace it"
            )

    def remove(self) -> None:
        """Remove the table of an earlier run, whose masks have been replaced."""
        if self.path.exists() and self._is_ours():
            self.path.unlink()

    def _is_ours(self) -> bool:
        with self.path.open(encoding="utf-8", errors="replace", newline="") as file:
            return file.read(100).startswith(f"image,{self.path.stem}")

    def _read(self) -> Iterator[Row]:
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            classes = self.facts.num_classes
            if len(header) not in (2 + classes, 2 + 2 * classes):
                return  # of another model
            for image, *cells in lines:
                expected, *numbers = (float(cell) if cell else None for cell in cells)
                yield Row(unescape(image), expected, tuple(numbers[:classes]), tuple(numbers[classes:]))
