"""A folder with images and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.dataloaders.folders import IDS, photo, save


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Ten images with index masks."""
    for i in range(10):
        photo(tmp_path / f"images/im{i}.jpg", 20 * i)
        save(tmp_path / f"masks/im{i}.png", np.roll(IDS, i))
    return tmp_path
