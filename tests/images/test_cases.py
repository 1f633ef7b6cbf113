"""Many small files of many kinds, with their expected pixels: each is read correctly or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from utils.errors import UserError
from utils.images import read_image, tif

# Of 127 files to be read. Refused: values without a declared range (two .npy, two float TIFF), a JPEG, a PGM and a TIFF
# of 12 bits, five bands where three are wanted.
READ_WITH_THE_EXTRA, READ_WITHOUT = 119, 75


def outcomes(folder: Path) -> dict[str, str]:
    """Return name -> "right", "refused" or "wrong"; "right" also where a file must be refused and is."""
    expected = json.loads((folder / "expected.json").read_text())
    pictures = np.load(folder / "expected.npz")
    found = {}
    for name, how in expected.items():
        try:
            image = read_image(folder / "images" / name)
        except UserError:
            found[name] = "refused" if how["tolerance"] is not None else "right"
            continue
        found[name] = "wrong"
        if how["tolerance"] is not None and image.shape == pictures[name].shape:
            values = image / np.float64(255 if image.dtype == np.uint8 else 1)
            difference = np.abs(values - pictures[name] / 65535).max()
            found[name] = "right" if difference <= how["tolerance"] else "wrong"
    return found


@pytest.mark.parametrize(("extra", "read"), [(True, READ_WITH_THE_EXTRA), (False, READ_WITHOUT)])
def test_files_are_read_right_or_refused(
    shared_dir: Path, extra: bool, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not extra:
        monkeypatch.setattr(tif, "tifffile", None)
    folder = shared_dir / "cases"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    found = outcomes(folder)
    assert [name for name, outcome in found.items() if outcome == "wrong"] == []
    bad = sum(name.startswith("bad_") for name in found)
    assert Counter(found.values()) == {"right": read + bad, "refused": len(found) - read - bad}


def test_libraries_do_not_flood_the_screen(shared_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from utils.errors import UserError\n"
        "from utils.images import read_image\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: path.name.startswith('bad_') or read_image(path)\n"
        "    except UserError: pass\n"
    )
    folder = shared_dir / "cases" / "images"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "pages or frames" in done.stderr
