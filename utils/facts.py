"""The facts about a data set that a trained model needs when the files are not available."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from utils.bounds import AboveZero, Byte, ClassCount, Number


@dataclass(frozen=True)
class Facts:
    """Classes, colors, normalization and ignore index of a data set: plain Python values.

    ``class_names`` has one name per class and ``palette`` one RGB triple. ``mean`` and ``std`` are per channel, for
    intensities in [0, 1].
    ``value_range`` and ``nodata`` say how stored values become intensities (:class:`utils.images.values.ValueRange`).
    """

    num_classes: ClassCount
    class_names: tuple[str, ...]
    palette: tuple[tuple[Byte, Byte, Byte], ...]
    mean: tuple[Number, ...]
    std: tuple[AboveZero, ...]
    ignore_index: int
    in_channels: int = 3
    value_range: tuple[float, float] | None = None
    nodata: float | str | None = None

    @classmethod
    def of(cls, dataset: Any) -> Facts:
        """Return the facts of a data set (an object or, for its defaults, a class)."""
        return cls(
            num_classes=int(dataset.num_classes),
            class_names=tuple(str(n) for n in dataset.class_names),
            palette=tuple((int(r), int(g), int(b)) for r, g, b in dataset.palette),
            mean=tuple(float(v) for v in dataset.mean),
            std=tuple(float(v) for v in dataset.std),
            ignore_index=int(dataset.ignore_index),
            in_channels=len(dataset.mean),
            value_range=getattr(dataset, "value_range", None),
            nodata=getattr(dataset, "nodata", None),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Facts:
        """Return the facts that :meth:`to_dict` wrote.

        Raises:
            ValueError: a field is missing or wrong; the message names it.
        """
        try:
            facts = TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg']}, found {str(first['input'])[:60]!r}") from None
        named, colored = len(facts.class_names), len(facts.palette)
        if named != facts.num_classes or colored < named:
            raise ValueError(
                f"class_names and palette: expected {facts.num_classes} of each, found {named} and {colored}"
            )
        if not len(facts.mean) == len(facts.std) == facts.in_channels:
            raise ValueError(f"mean and std: expected a number for each of {facts.in_channels} channels")
        return facts

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels; with one class there are two, the background and the class."""
        return self.class_names if self.num_classes > 1 else ("background", *self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers."""
        return asdict(self)
