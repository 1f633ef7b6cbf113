"""A checkpoint, and inference.py to run on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import inference
from tests.inference.running import Script
from tests.small_checkpoint import write_checkpoint
from utils import errors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "best.pth")


@pytest.fixture
def script(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Script:
    """Run inference.py in this process; return exit code, output and error output."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, defaults: bool = True) -> tuple[int, str, str]:
        common = ["-m", str(model), "-i", "photos", "-o", "masks", "-mo", "single"] if defaults else []
        monkeypatch.setattr(sys, "argv", ["inference.py", *common, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            errors.run(inference.main)
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call
