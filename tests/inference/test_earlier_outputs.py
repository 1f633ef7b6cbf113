"""inference.py in a folder with earlier outputs: continue, replace, refuse."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.inference.running import Script, files, write
from tests.small_checkpoint import photo, write_checkpoint


def test_skip_existing_continues(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        write(f"photos/{seed}.png", photo(40, 50, seed=seed))
    assert script("--limit", 2)[0] == 0
    assert files("masks") == ["0.png", "1.png", "expected_dice.csv"]
    before = Path("masks/0.png").stat().st_mtime_ns
    code, out, _ = script("--skip-existing")
    assert code == 0
    assert "segmented 2 images" in out
    assert "skipped 2" in out
    assert Path("masks/0.png").stat().st_mtime_ns == before
    with open("masks/expected_dice.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 5  # the table still has all four
    assert "segmented 4" in script("--skip-existing", "--json")[1]  # some outputs were missing


def test_skip_existing_knows_the_model_and_the_options(script: Script, tmp_path: Path) -> None:
    write("photos/a.png", photo(40, 50))
    assert script("--overlay")[0] == 0
    assert "skipped 1" in script("--skip-existing", "--overlay", "--batch-size", 2)[1]
    other = write_checkpoint(tmp_path / "other.pth", num_classes=5)
    for changed in (["-m", other], ["-p", "max"], ["--flip"], ["--set", "predict.temperature=2"], ["--overlay", "0.9"]):
        arguments = ("--skip-existing", "--overlay", *changed)
        code, out, _ = script(*arguments)
        assert code == 0
        assert "segmented 1" in out, changed
        assert "replaced outputs of another model, other options or another program: 1 image" in out
        assert "skipped 1" in script(*arguments)[1]


def test_outputs_of_earlier_options_do_not_stay_next_to_new_masks(script: Script) -> None:
    write("photos/a.png", photo(40, 50))
    script("--json", "--overlay", "--probs", "png", "--masks", "-p", "rankdice")
    assert {"a.json", "a_overlay.jpg", "expected_dice.csv"} < set(files("masks"))
    assert any(name.startswith("a_masks/") for name in files("masks"))
    script("-p", "max")
    assert files("masks") == ["a.png"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.png", []),
        ("a_overlay.jpg", ["--overlay"]),
        ("a.json", ["--json"]),
        ("a.npz", ["--probs"]),
        ("a_probs/x.png", ["--probs", "png"]),
        ("a_masks/x.png", ["--masks"]),
        ("expected_dice.csv", []),
    ],
)
def test_files_of_others_are_not_overwritten(script: Script, name: str, arguments: list[str]) -> None:
    write("photos/a.jpg", photo(40, 50))
    foreign = Path("masks") / name
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"ground truth")
    code, out, err = script(*arguments)
    assert (code, out) == (2, "")
    assert str(foreign) in err
    assert "--force" in err
    assert files("masks") == [name]
    assert foreign.read_bytes() == b"ground truth"
    code, _, err = script(*arguments, "--force")
    assert code == 0, err
    assert "a.png" in files("masks")


def test_a_mask_that_was_corrected_is_not_overwritten(script: Script) -> None:
    write("photos/a.jpg", photo(40, 50))
    assert script()[0] == 0
    assert script()[0] == 0  # files of this program are replaced
    Image.open("masks/a.png").save("masks/a.png")
    corrected = Path("masks/a.png").read_bytes()
    code, _, err = script()
    assert code == 2
    assert "masks/a.png" in err
    assert Path("masks/a.png").read_bytes() == corrected


def test_probabilities_are_not_mixed(script: Script, tmp_path: Path) -> None:
    write("photos/a.png", photo(40, 50))
    assert script("--probs")[0] == 0
    assert script("--probs", "-p", "T")[0] == 0  # probabilities do not depend on the procedure
    other = write_checkpoint(tmp_path / "other.pth", num_classes=5)
    code, _, err = script("--probs", "-m", other)
    assert code == 2
    assert "contains the probabilities of another run" in err
    assert script("--probs", "-m", other, "--force")[0] == 0
    assert np.load("masks/a.npz")["probs"].shape == (5, 40, 50)
