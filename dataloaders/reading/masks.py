"""Read masks with class ids, other values, colors, or gray levels of two classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.classes import Color
from base.labels import PaletteReference
from dataloaders.reading.colors import ColorTable
from utils.errors import UserError, listed, plural
from utils.facts import Facts
from utils.images import read_levels, read_mask
from utils.images.labels import Mask

_SHOWN_COLORS = 30


@dataclass(frozen=True)
class MaskOptions:
    """Arguments of the Folder loader, and whether the palette gives the colors in the masks (``painted``)."""

    mask_values: Sequence[int] | None = None
    ignore_values: Sequence[int] | None = None
    threshold: int | None = None
    colors: bool | None = None
    ignore_colors: Sequence[Color] | None = None
    painted: bool = False


class MaskReader:
    """Reads masks according to the options, and raises errors for ambiguous masks.

    Raises:
        ValueError: the options contradict each other.
    """

    def __init__(self, options: MaskOptions, facts: Facts) -> None:
        self.count = max(2, facts.num_classes)
        if options.threshold is not None and (self.count != 2 or options.mask_values or options.colors):
            raise ValueError(
                "threshold is for two classes in gray masks, without mask_values and colors; "
                f"classes has {len(facts.class_names)} names"
            )
        if options.colors and len(set(facts.palette)) < len(facts.palette):
            raise ValueError("palette must have a different color for each class, because the masks are painted in it")
        self.options = options
        self.values = _ValueTable(self.count, options.mask_values, options.ignore_values, facts.ignore_index)
        colors = [(r, g, b) for r, g, b in facts.palette]
        if len(colors) < self.count:  # one class against an unnamed background
            colors = [(0, 0, 0), *colors]
        self._class_colors = np.array(colors, np.uint8)
        ignored = (((r, g, b), facts.ignore_index) for r, g, b in options.ignore_colors or ())
        self._colors = ColorTable(
            [*ignored, *((color, i) for i, color in enumerate(colors))],
            f"The palette has {listed(map(list, colors), _SHOWN_COLORS)}: correct `palette` in the loader's args, "
            "or list the colors of unlabeled pixels in `ignore_colors`.",
        )
        self._by_color = bool(options.colors)
        self._palettes = PaletteReference()

    @property
    def says_more(self) -> bool:
        """Whether the options give the meaning of values or gray levels."""
        return self.options.threshold is not None or self.values.given or self._by_color

    def probe(self, paths: Iterable[Path]) -> set[int]:
        """Return the values in a few masks that are not RGB; unreadable files are skipped.

        If one is RGB and the options do not say otherwise, all masks are read by color.
        """
        seen: set[int] = set()
        for path in paths:
            try:
                mask = read_mask(path)
            except UserError:
                continue
            if mask.values.ndim == 2:
                seen.update(np.unique(mask.values).tolist())
            elif self.options.painted and self.options.colors is None and not self.values.given:
                self._by_color = True
        return seen

    def read(self, path: Path) -> np.ndarray:
        """Return class ids ``(H, W)``, or values that are not a class, which the caller rejects."""
        if self.options.threshold is not None:
            return (read_levels(path) > self.options.threshold).astype(np.uint8)
        mask = read_mask(path)
        if self._by_color:
            return self._from_colors(mask, path)
        if mask.values.ndim == 3:
            if (mask.values[:, :, :1] != mask.values).any():
                raise UserError(
                    f"{path} is painted in colors: set `palette` in the loader's args to one RGB color per class, in "
                    "the order of `classes` (and leave `colors` and `mask_values` out)"
                )
            return self.values.apply(np.ascontiguousarray(mask.values[:, :, 0]), path)
        if self.options.colors is None and not self.values.given:
            self._palettes.check(mask, path, '`"colors": true` with a palette reads colors, `"colors": false` values')
            if self.options.painted and mask.palette is not None:
                self._refuse_permuted(mask, path)
        return self.values.apply(mask.values, path)

    def _from_colors(self, mask: Mask, path: Path) -> np.ndarray:
        ids = self._colors.decode(mask.colors(), path)
        is_gray = mask.values.ndim == 2 and mask.palette is None and self.options.colors is None
        if is_gray and mask.values.max(initial=0) < self.count and (mask.values != ids).any():
            raise UserError(
                f'{path} is gray, but other masks are painted in colors. Are its numbers class ids? Set `"colors": '
                "true` if they are gray levels of the palette, else save all masks in the same way"
            )
        return ids

    def _refuse_permuted(self, mask: Mask, path: Path) -> None:
        """Raise an error if a file's palette has the colors of the config's palette in another order."""
        assert mask.palette is not None
        used = np.flatnonzero(np.bincount(mask.values.reshape(-1), minlength=256))
        used = used[used < 255]
        shown = mask.palette[used]
        known = (shown[:, None] == self._class_colors[None]).all(2)
        if known.any(1).all() and not all(i < self.count and known[row, i] for row, i in enumerate(used.tolist())):
            raise UserError(
                f"{path} has the colors of `palette` in another order, so its values and its colors disagree. "
                'Set `"colors": true` in the loader\'s args if the colors are right, `"colors": false` if the '
                "values are"
            )


class _ValueTable:
    """A table from mask value to class id, which is the position in ``mask_values``."""

    def __init__(
        self, count: int, mask_values: Sequence[int] | None, ignored: Sequence[int] | None, ignore_index: int
    ) -> None:
        self.given = mask_values is not None or ignored is not None
        values = list(range(count) if mask_values is None else mask_values)
        ignored = list(ignored or ())
        if len(values) != count:
            raise ValueError(f"mask_values must have one value per class: {count} classes, {len(values)} values")
        if len({*values, *ignored}) != len(values) + len(ignored):
            raise ValueError(f"mask_values and ignore_values must all differ, got {values} and {ignored}")
        self._shown = values
        meaning = {**{value: i for i, value in enumerate(values)}, **dict.fromkeys(ignored, ignore_index)}
        meaning.setdefault(255, 255)  # "not labeled" unless it has another meaning
        limits = np.iinfo(np.int32)
        if not all(limits.min <= value <= limits.max for value in meaning):
            raise ValueError(f"mask_values and ignore_values must fit in 32 bits, got {values} and {ignored}")
        self._stored = np.array(sorted(meaning))
        ids = np.array([meaning[value] for value in sorted(meaning)])
        self._ids = ids.astype(np.uint8 if ids.min() >= 0 and ids.max() <= 255 else np.int32)
        self._place_of_byte = np.minimum(np.searchsorted(self._stored, np.arange(256)), len(ids) - 1)

    def apply(self, mask: np.ndarray, path: Path) -> np.ndarray:
        """Return ids ``(H, W)``, the mask itself if no values were given; raise UserError for unknown values."""
        if not self.given:
            return mask
        if mask.dtype == np.uint8:
            places = self._place_of_byte[mask]
        else:
            places = np.minimum(np.searchsorted(self._stored, mask), len(self._stored) - 1)
        known = self._stored[places] == mask
        if not known.all():
            unknown = mask[~known]
            raise UserError(
                f"{path} contains values {np.unique(unknown)[:10].tolist()} ({plural(unknown.size, 'pixel')}), which "
                f"are neither in mask_values {self._shown} nor in ignore_values"
            )
        return self._ids[places]
