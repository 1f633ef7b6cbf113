"""Shapes, the built-in data: rendered scenes (``scene``), the data set over them (``dataset``), files of them
(``python -m dataloaders.shapes``).
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Late, so that the command's --help need not wait for torch.
    if name == "Shapes":
        from dataloaders.shapes.dataset import Shapes

        return Shapes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
