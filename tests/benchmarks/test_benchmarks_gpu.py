"""benchmarks/gpu.py: its parts in a short form on a CPU, and its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu


def test_the_short_form_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "TABLE", [(1, 1, 64, 64), (1, 2, 96, 96)])
    monkeypatch.setattr(gpu, "SETTINGS", {"float32": {}, "impossible": {"amp": "bf16"}})
    monkeypatch.setattr(gpu, "package", dict)  # rankseg is not installed
    files = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    monkeypatch.setattr(sys, "argv", ["gpu", "--short", "--device", "cpu", "--parts", "rankdice", "training", *files])
    assert gpu.main() == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    times = result["parts"]["rankdice"]["milliseconds"]
    assert list(times) == ["1x1x64x64", "1x2x96x96"]
    assert {"RankDice", "presence + label map", "argmax", "sort", "RankDice, launches"} <= set(times["1x2x96x96"])
    assert result["parts"]["rankdice"]["rankseg"] == "not installed"
    assert result["parts"]["training"]["training"]["UNet, float32"]["images/s, ours"] > 0
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("| --- |") == 2  # a table per part
    assert "device CPU" in page
    assert "| milliseconds | RankDice | RankDice IoU | presence + label map | argmax | sort |" in page
    assert "\n| 1x2x96x96 | " in page


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> dict:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu, "PARTS", {"rankdice": broken, "scripts": lambda args: {"seconds": 1.0}})
    files = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", *files])
    assert gpu.main() == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "\nerror: RuntimeError: no kernel image\n" in page.partition("## RankDice\n")[2].partition("##")[0]
    assert page.partition("## test.py\n")[2].endswith("\nseconds: 1.00\n")
