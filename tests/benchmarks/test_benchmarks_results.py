"""benchmarks/results.py: what it runs, how it goes on after a stop, and the tables it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results

FIT = {
    "temperature": 1.25,
    "threshold": 0.4,
    "before": {"NLL": 0.5, "ECE": 0.05},
    "after": {"NLL": 0.45, "ECE": 0.01},
}


def content(gain: float, low: float = 0.01, high: float = 0.03) -> dict[str, Any]:
    """Return a results.json with an argmax of 0.5 mDice, and rankdice ``gain`` above it."""
    score = {"Mean_IoU": 0.4, "Expected_Dice": 0.6, "Measured_Dice": 0.55}
    procedures = {name: score | {"Mean_Dice": 0.5} for name in ("T", "T_tuned", "max")}
    procedures["rankdice"] = score | {"Mean_Dice": 0.5 + gain}
    difference = {"mean": gain, "low": low, "high": high, "better": 9, "same": 0, "worse": 1}
    return {"procedures": procedures, "comparison": {"Mean_Dice": {"rankdice": difference}}}


def entry(gain: float) -> dict[str, Any]:
    return {"plain": content(gain), "unpruned": content(gain + 0.02), "fitted": content(gain + 0.01), "fit": FIT}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_one_seed_shows_the_interval_and_several_the_deviation() -> None:
    text = results.table({"camvid_fcn8": [entry(0.02)], "medical_unet": [entry(0.01), entry(0.03)]})
    one, several = map(cells, text.splitlines()[2:])
    assert one[2:6] == ["50.0 / 40.0", "50.0 / 40.0", "52.0 / 40.0", "+2.0 (+1.0 to +3.0)"]
    assert one[6:] == ["9 / 0 / 1", "60.0 (55.0)", "54.0 / 40.0", "60.0 (55.0)"]
    assert several[4] == "52.0 ± 1.4 / 40.0 ± 0.0"
    assert several[5] == "+2.0 ± 1.4"
    assert several[6] == "18 / 0 / 2"
    assert several[1].endswith(", 2 seeds")


def test_calibration_is_shown_before_and_after() -> None:
    (line,) = results.calibration_table({"camvid_unet": [entry(0.02)]}).splitlines()[2:]
    assert cells(line)[2:] == [
        "1.25", "0.500 → 0.450", "5.0 → 1.0", "50.0 (0.40)", "52.0", "53.0", "60.0 (55.0)",
    ]  # fmt: skip


def test_the_page_keeps_what_stands_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- scores: begin -->\nold\n<!-- scores: end -->\nbelow\n")
    results.write_docs({"scores": "new"}, page)
    assert page.read_text() == "above\n<!-- scores: begin -->\nnew\n<!-- scores: end -->\nbelow\n"
    with pytest.raises(SystemExit, match="lacks the lines"):
        results.write_docs({"calibration": "new"}, page)


def test_every_row_has_a_config_and_every_config_a_row() -> None:
    assert set(results.TITLES) == {path.stem for path in results.CONFIGS.glob("*.json")}
    assert {row.split("_")[0] for row in results.TITLES} == set(results.DATASETS)


class Scripts:
    """Stands for train.py and test.py: writes the files that they would; may stop at one of them."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        self.folder, self.stop_at = folder, stop_at
        self.ran: list[str] = []

    def __call__(self, *arguments: object) -> None:
        words = [str(a) for a in arguments]
        step = (
            "resume"
            if "auto" in words
            else "train"
            if words[0] == "train.py"
            else "fit"
            if "--fit" in words
            else "test"
        )
        saved = self.folder / "name/loss/rankdice/11-22_10-00"
        if step in ("train", "resume"):
            saved.mkdir(parents=True, exist_ok=True)
            (saved / "latest.pth").touch()
        if self.stop_at == len(self.ran):
            raise SystemExit(1)
        self.ran.append(step)
        if step in ("train", "resume"):
            (saved / "best_model.pth").touch()
        elif step == "fit":
            torch.save({"calibration": FIT}, Path(words[words.index("-o") + 1]) / "best_model_calibrated.pth")
        else:
            output = Path(words[words.index("-o") + 1])
            output.mkdir(exist_ok=True)
            (output / "results.json").write_text(json.dumps(content(0.02)))


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "camvid_unet" / "seed0"
    folder.mkdir(parents=True)
    for stop_at, expected in (
        (0, []),
        (1, ["resume"]),
        (0, []),
        (3, ["test", "test", "fit"]),
        (None, ["test"]),
        (None, []),
    ):
        scripts = Scripts(folder, stop_at)
        monkeypatch.setattr(results, "script", scripts)
        if stop_at is None:
            results.run("camvid_unet", 0, tmp_path, folder, [])
        else:
            with pytest.raises(SystemExit):
                results.run("camvid_unet", 0, tmp_path, folder, [])
        assert scripts.ran == expected
    (found,) = results.gather(tmp_path)["camvid_unet"]
    assert found["fit"]["temperature"] == 1.25


def test_a_wrong_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        results.parse(["camvid_unte"])
    assert stop.value.code == 2
    assert "camvid_unte" in capsys.readouterr().err
