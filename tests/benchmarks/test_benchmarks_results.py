"""benchmarks/results.py: its lists, the commands it runs, how it continues after a stop, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import letters, results

ROW = results.ROWS["camvid_unet_lite0"]


def content(gain: float, low: float | None = 0.01, high: float = 0.03) -> dict[str, Any]:
    """Return a results.json in which argmax has mDice 0.5 and rankdice ``gain`` more."""
    score = {"Mean_IoU": 0.4, "Expected_Dice": 0.6, "Measured_Dice": 0.55}
    procedures = {name: score | {"Mean_Dice": 0.5} for name in results.PROCEDURES}
    procedures["rankdice"] = score | {"Mean_Dice": 0.5 + gain}
    difference = {"mean": gain, "low": low, "high": high}
    return {
        "procedures": procedures,
        "comparison": {"Mean_Dice": {"rankdice": difference}},
        "reliability": {"ECE": 0.02},
        "protocol": {"temperature": 1.25},
    }


def entry(gain: float) -> dict[str, Any]:
    return {"plain": content(gain), "fitted": content(gain + 0.01)}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_scores_are_means_over_seeds_with_their_deviation() -> None:
    text = results.score_table({"camvid_enet": [entry(0.02)], "drive_unet": [entry(0.01), entry(0.03)]}, "Mean_Dice")
    header, _, one, several = map(cells, text.splitlines())
    assert header == ["data", "network", "seeds", *results.PROCEDURES]
    assert one[2:] == ["1", "50.0", "50.0", "50.0", "50.0", "53.0", "50.0"]
    assert several[7] == "53.0 ± 1.4"


def test_differences_have_intervals() -> None:
    (line,) = results.difference_table({"camvid_enet": [entry(0.02)]}).splitlines()[2:]
    assert cells(line)[3:] == ["-", "-", "-", "+3.0 (+1.0 to +3.0)", "-"]


def test_the_fit_is_shown_before_and_after() -> None:
    (line,) = results.fit_table({"camvid_unet": [entry(0.02)]}).splitlines()[2:]
    assert cells(line)[3:] == ["52.0", "60.0", "55.0", "2.0", "53.0", "60.0", "55.0", "2.0", "1.25"]


def test_the_page_keeps_the_text_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- mDice: begin -->\nold\n<!-- mDice: end -->\nbelow\n")
    results.write_docs({"mDice": "new"}, page)
    assert page.read_text() == "above\n<!-- mDice: begin -->\nnew\n<!-- mDice: end -->\nbelow\n"
    with pytest.raises(SystemExit, match="lacks the lines"):
        results.write_docs({"fit": "new"}, page)


def test_every_row_has_a_config_and_known_data() -> None:
    for row in results.ROWS.values():
        assert (results.ROOT / row.config).is_file()
        assert row.data in results.DATA


def test_held_out_images_are_the_last_of_each_drive(tmp_path: Path) -> None:
    names = [f"{drive}_{i:03}" for drive in ("0001TP", "0006R0", "0016E5") for i in range(10)]
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(names))
    (lists / "val.txt").write_text("clip_1\nclip_2\n")
    results.write_lists(tmp_path, tmp_path / "out")

    def read(folder: str, split: str) -> list[str]:
        lines = (tmp_path / "out" / folder / f"{split}.txt").read_text().splitlines()
        return [line.split("\t")[0].removeprefix("JPEGImages/").removesuffix(".jpg") for line in lines]

    assert read("clip", "val") == ["0001TP_009", "0006R0_009", "0016E5_009"]
    assert len(read("clip", "train")) == 27
    assert read("clip", "test") == ["clip_1", "clip_2"]
    assert read("drives", "test") == [f"0006R0_{i:03}" for i in range(10)]
    assert read("drives", "val") == ["0001TP_008", "0001TP_009", "0016E5_008", "0016E5_009"]
    assert len(read("drives", "train")) == 16


class Scripts:
    """Replaces train.py and test.py: writes their files; can stop at one of them."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        self.folder, self.stop_at = folder, stop_at
        self.ran: list[str] = []

    def __call__(self, log: Path, *arguments: object) -> None:
        words = [str(a) for a in arguments]
        step = "resume" if "auto" in words else words[0].removesuffix(".py")
        saved = self.folder / "name/loss/rankdice/11-22_10-00"
        if step != "test":
            saved.mkdir(parents=True, exist_ok=True)
            (saved / "latest.pth").touch()
        if self.stop_at == len(self.ran):
            raise RuntimeError("stopped")
        self.ran.append(step)
        if step != "test":
            (saved / "best_model.pth").touch()
        else:
            output = Path(words[words.index("-o") + 1])
            output.mkdir(exist_ok=True)
            (output / "results.json").write_text(json.dumps(content(0.02)))
            if "--save-probs" in words:
                Path(words[words.index("--save-probs") + 1]).mkdir()
            assert any(word.startswith("--set=predict.temperature") for word in words) == (output.name == "plain")


def test_a_run_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "camvid_unet_lite0" / "seed0"
    folder.mkdir(parents=True)
    for stop_at, expected in ((0, []), (2, ["resume", "test"]), (0, []), (None, ["test"]), (None, [])):
        scripts = Scripts(folder, stop_at)
        monkeypatch.setattr(results, "script", scripts)
        if stop_at is None:
            results.run(ROW, folder, [])
        else:
            with pytest.raises(RuntimeError, match="stopped"):
                results.run(ROW, folder, [])
        assert scripts.ran == expected
    # The probabilities of a run that is scored already are saved once.
    for expected in (["test"], []):
        scripts = Scripts(folder)
        monkeypatch.setattr(results, "script", scripts)
        results.run(ROW, folder, [], probs=True)
        assert scripts.ran == expected
        assert (folder / "probs").is_dir()
    (found,) = results.gather(tmp_path)["camvid_unet_lite0"]
    assert found["fitted"]["procedures"]["rankdice"]["Mean_Dice"] == 0.52


def test_a_wrong_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        results.parse(["camvid_unte"])
    assert stop.value.code == 2
    assert "camvid_unte" in capsys.readouterr().err


def test_letters_depend_on_the_seed_alone() -> None:
    image, label = letters.scene(np.random.default_rng([2, 5]))
    again = letters.scene(np.random.default_rng([2, 5]))
    assert np.array_equal(image, again[0])
    assert np.array_equal(label, again[1])
    config = json.loads((results.ROOT / "configs/results/letters.json").read_text())
    assert config["train_loader"]["args"]["classes"] == ["background", *letters.CHARACTERS]
    assert 0 < label.max() <= len(letters.CHARACTERS)
    # Most classes are absent from each scene.
    assert len(np.unique(label)) < 12
