"""What the tests of inference.py share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Script = Callable[..., tuple[int, str, str]]


def write(path: str | Path, image: np.ndarray, **options: object) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def files(folder: str | Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def errors_of(err: str) -> list[str]:
    return [line[line.index("error: ") :] for line in err.splitlines() if "error: " in line]
