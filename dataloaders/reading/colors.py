"""Convert masks with colors to class ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils.errors import UserError, plural

Color = tuple[int, int, int]
_SHOWN = 5


class ColorTable:
    """A table from color to class id (or ignore index), given as pairs.

    The message about unknown colors ends with ``hint``.
    """

    _UNKNOWN = 65535

    def __init__(self, pairs: Iterable[tuple[Color, int]], hint: str = "") -> None:
        pairs = list(dict.fromkeys(pairs))
        ids = dict(pairs)
        self._twice = next(((color, i, ids[color]) for color, i in pairs if ids[color] != i), None)
        self._colors = np.array(list(ids), np.uint8).reshape(-1, 3)
        values = np.array(list(ids.values()), np.int32)
        self._values = values.astype(np.uint8) if values.min() >= 0 and values.max() <= 255 else values
        self._hint = hint
        self._table: np.ndarray | None = None

    def __getstate__(self) -> dict[str, object]:
        # Worker processes make the 32 MB table again, which is faster than sending it.
        return {**self.__dict__, "_table": None}

    def decode(self, mask: np.ndarray, path: Path | str) -> np.ndarray:
        """Return ids ``(H, W)`` of an RGB mask, uint8 ``(H, W, 3)``.

        Raises:
            UserError: the mask contains an unknown color, or one color of the table has two ids.
        """
        if self._twice is not None:
            color, one, other = self._twice
            raise UserError(
                f"{path}: it is unclear what its colors mean, because {list(color)} stands for both {one} and {other} "
                "(class ids, or ignored). Give each class a color of its own"
            )
        table = self._table
        if table is None:
            table = np.full(1 << 24, self._UNKNOWN, np.uint16)
            table[_packed(self._colors)] = np.arange(len(self._colors))
            self._table = table  # only now, when it is complete, because other threads read it
        rows = table[_packed(mask)]
        unknown = rows == self._UNKNOWN
        if unknown.any():
            colors, counts = np.unique(mask[unknown], axis=0, return_counts=True)
            order = np.argsort(-counts, kind="stable")[:_SHOWN]
            shown = ", ".join(f"{colors[i].tolist()} ({plural(counts[i], 'pixel')})" for i in order)
            more = f" and {len(colors) - _SHOWN} more" if len(colors) > _SHOWN else ""
            raise UserError(f"{path} contains colors that are not a class: {shown}{more}. {self._hint}".rstrip())
        return self._values[rows]


def _packed(mask: np.ndarray) -> np.ndarray:
    wide = mask.astype(np.uint32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
