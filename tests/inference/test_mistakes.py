"""Wrong arguments of inference.py: one message, and nothing is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import inference
from tests.inference.running import Script, files, write
from tests.small_checkpoint import photo
from utils.predict import PROCEDURES

MISTAKES = {
    "no such checkpoint": (["-m", "missing.pth"], "missing.pth: there is no such checkpoint"),
    "a checkpoint that is none": (["-m", "photos/a.png"], "photos/a.png: "),
    "no such images": (["-i", "phots"], "phots: there is no such file or folder"),
    "a folder without images": (["-i", "texts"], "no file with .jpg"),
    "an extension nobody has": (["-e", "jpeg2"], "1 with .png (choose with --extension)"),
    "no such config": (["-c", "missing.json"], "missing.json: there is no such config"),
    "an unknown override": (["--set", "predict.treshold=0.4"], "did you mean threshold?"),
    "another network": (["--set", "arch.args.width=8"], "do not fit UNet"),
    "no such device": (["-d", "cuda:9"], "'cuda:9' cannot be used"),
    "no tile": (["--tile", "0"], "--tile 0: expected"),
    "overlap": (["--overlap", "1"], "--overlap 1.0: expected"),
    "opacity": (["--overlay", "50"], "--overlay 50.0: expected"),
    "scales": (["--scales", "1", "-2"], "--scales -2.0: expected"),
    "the output is a file": (["-o", "texts/notes.txt"], "is a file, not a folder"),
    "the output is the images' folder": (["-o", "photos"], "--output photos is the folder of the images"),
    "the output overwrites the image": (["-i", "photos/a.png", "-o", "photos"], "would overwrite the image"),
    "an unknown class": (["--set", "predict.CoI=[9]"], "predict.CoI: found [9]"),
    "no such video": (["-i", "missing.mp4"], "missing.mp4: there is no such video"),
    "no video": (["-i", "texts/fake.mp4"], "the video cannot be read"),
    "no camera": (["-i", "camera:x"], "expected camera:NUMBER"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_message_and_leave_nothing(script: Script, mistake: str) -> None:
    write("photos/a.png", photo(20, 20))
    Path("texts").mkdir()
    Path("texts/notes.txt").write_text("notes")
    Path("texts/fake.mp4").write_text("no video")
    arguments, message = MISTAKES[mistake]
    code, out, err = script(*arguments)
    assert code == 2
    assert message in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert out == ""
    assert not Path("masks").exists()
    assert files("photos") == ["a.png"]


@pytest.mark.parametrize("arguments", [["--mode", "slide"], ["--predict", "argmax"], ["--unknown"], ["--tile", "big"]])
def test_unknown_options_are_refused(script: Script, arguments: list[str]) -> None:
    code, out, err = script(*arguments)
    assert code == 2
    assert arguments[0] in err


def test_help_does_not_import_torch() -> None:
    command = (
        "import runpy, sys\nsys.argv = ['inference.py', '--help']\n"
        "try: runpy.run_path('inference.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL'} & set(sys.modules)\nassert not heavy, heavy"
    )
    root = Path(inference.__file__).parent
    done = subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--images" in done.stdout


def test_choices_are_those_of_the_procedures(script: Script) -> None:
    _, _, err = script("-p", "nothing")
    for name in PROCEDURES:
        assert name in err
