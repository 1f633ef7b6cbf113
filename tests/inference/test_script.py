"""inference.py as users call it: which images, which options, which masks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.inference.running import Script, files, write
from tests.small_checkpoint import photo, write_checkpoint
from utils import checkpoint
from utils.inference import sources
from utils.predict import PROCEDURES
from utils.predictor import Predictor


def test_a_folder_becomes_masks(script: Script, model: Path, tmp_path: Path) -> None:
    write("photos/a.jpg", photo(40, 50))
    write("photos/deep/er/b.c.png", photo(33, 64, seed=1))
    write("photos/deep/B.TIF", photo(30, 30, seed=2))
    Path("photos/notes.txt").write_text("not an image")
    code, out, err = script()
    assert code == 0, err
    assert files("masks") == ["a.png", "deep/B.png", "deep/er/b.c.png", "expected_dice.csv"]
    mask = Image.open("masks/deep/er/b.c.png")
    assert mask.mode == "P"
    assert mask.size == (64, 33)
    predict = Predictor(model, mode="single")
    np.testing.assert_array_equal(np.asarray(mask), predict("photos/deep/er/b.c.png").labels)
    assert "segmented 3 images by rankdice" in out


def test_paths_may_contain_variables(script: Script, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTOS", "photos")
    monkeypatch.setenv("MODELS", str(model.parent))
    write("photos/a.png", photo(40, 50))
    code, _, err = script("-m", "$MODELS/best.pth", "-i", "$PHOTOS", "-o", "${PHOTOS}_out", defaults=False)
    assert code == 0, err
    assert files("photos_out") == ["a.png", "expected_dice.csv"]
    code, _, err = script("-m", model, "-i", "$NOT_SET_ANYWHERE/x", "-o", "out", defaults=False)
    assert code == 2
    assert "the environment variable NOT_SET_ANYWHERE is not set" in err


def test_the_default_is_what_was_tested(script: Script, model: Path) -> None:
    write("photos/a.png", photo(40, 50))
    assert script("-m", model, "-i", "photos/a.png", defaults=False)[0] == 0
    expected = Predictor(model, mode="single")("photos/a.png").labels
    np.testing.assert_array_equal(np.asarray(Image.open("outputs/a.png")), expected)


def test_options_reach_the_predictor(script: Script, model: Path) -> None:
    write("photos/a.png", photo(90, 100))
    code, _, err = script(
        *("-mo", "sliding", "-p", "max", "--flip", "--tile", 40, "--overlap", 0.4, "--batch-size", 3),
        *("--set", "predict.temperature=1.7", "-d", "cpu"),
    )
    assert code == 0, err
    expected = Predictor(
        model, mode="sliding", predict="max", flip=True, tile=40, overlap=0.4, batch_size=3, temperature=1.7
    )("photos/a.png")
    np.testing.assert_array_equal(np.asarray(Image.open("masks/a.png")), expected.labels)
    assert script("--scales", 0.5, 1.5, "-mo", "multiscale")[0] == 0
    expected = Predictor(model, mode="multiscale", scales=(0.5, 1.5))("photos/a.png")
    np.testing.assert_array_equal(np.asarray(Image.open("masks/a.png")), expected.labels)
    assert script("--memory", 1e-5, "-mo", "single")[0] == 0
    expected = Predictor(model, mode="single", memory=10_737)("photos/a.png")
    np.testing.assert_array_equal(np.asarray(Image.open("masks/a.png")), expected.labels)
    assert "cut 1 image into tiles, because they are too large" in script("--max-pixels", 5000)[1]


def test_a_config_next_to_the_checkpoint(script: Script, model: Path) -> None:
    write("photos/a.png", photo(40, 40))
    config = {
        "name": "other",
        "arch": {"type": "UNet", "args": {"width": 4}},
        "train_loader": {"type": "VOC", "args": {"data_dir": "nowhere", "split": "train"}},
        "trainer": {"val": False, "monitor": "off"},
        "predict": {"test": "max"},
    }
    Path("other.json").write_text(json.dumps(config))
    code, out, err = script("-c", "other.json")
    assert code == 0, err
    assert "by max" in out


def test_other_procedures_expect_nothing(script: Script) -> None:
    write("photos/a.png", photo(40, 50))
    assert script("-p", "T", "--json")[0] == 0
    assert files("masks") == ["a.json", "a.png"]
    assert "expected_dice" not in json.loads(Path("masks/a.json").read_text())


def test_extensions(script: Script) -> None:
    write("photos/a.jpg", photo(20, 20))
    write("photos/b.PNG", photo(20, 20))
    write("photos/c.bmp", photo(20, 20))
    script("-e", "png", ".bmp", "-p", "max")
    assert files("masks") == ["b.png", "c.png"]


def test_images_that_differ_in_extension_only(script: Script) -> None:
    write("photos/a.jpg", photo(20, 20))
    write("photos/a.png", photo(30, 30))
    write("photos/b.png", photo(30, 30))
    script("-p", "max")
    assert files("masks") == ["a.jpg.png", "a.png.png", "b.png"]


@pytest.mark.parametrize(
    ("images", "output", "words"),
    [
        ("photos", "photos", ["--output photos is the folder", "--output outputs"]),
        ("photos", "./photos/../photos", ["is the folder of the images", "--output outputs"]),
        ("photos", "photos/masks", ["--output photos/masks lies inside", "--images photos", "--output outputs"]),
        (".", "outputs", ["--output outputs lies inside", "_outputs"]),
    ],
)
def test_masks_do_not_go_among_the_images(script: Script, images: str, output: str, words: list[str]) -> None:
    write("photos/a.jpg", photo(20, 20))
    before = files(".")
    code, out, err = script("-i", images, "-o", output, "-p", "max")
    assert (code, out) == (2, "")
    assert all(word in err for word in words), err
    assert files(".") == before
    # The command asks for one image with its mask next to it.
    assert script("-i", "photos/a.jpg", "-o", "photos", "-p", "max")[0] == 0
    assert files("photos") == ["a.jpg", "a.png"]


def test_an_ensemble(script: Script, model: Path, tmp_path: Path) -> None:
    write("photos/a.png", photo(40, 50))
    other = write_checkpoint(tmp_path / "other.pth", temperature=3.0)
    assert script("--probs", "-m", model, other)[0] == 0
    singles = [Predictor(path, mode="single", keep_probs=True)("photos/a.png").probs for path in (model, other)]
    np.testing.assert_allclose(np.load("masks/a.npz")["probs"], sum(singles) / 2, atol=1e-6)
    code, _, err = script("-m", model, write_checkpoint(tmp_path / "more.pth", num_classes=5))
    assert code == 2
    assert "num_classes" in err


def test_t_says_how_many_pixels_have_no_class(script: Script) -> None:
    write("photos/a.png", photo(40, 50))
    out = script("-p", "T", "--set", "predict.threshold=0.6")[1]
    share = 100 * (np.asarray(Image.open("masks/a.png")) == 255).mean()
    assert share > 0
    assert f"{share:.1f} % of the pixels are unassigned" in out


def test_images_without_a_mask_are_counted(script: Script) -> None:
    write("photos/a.png", photo(40, 50))
    strict = ["--set", "predict.presence=prune", "--set", "predict.rankdice.prune=1.0"]
    assert "no RankDice mask in 1 image, because no class has a probability above" in script(*strict)[1]
    assert "no RankDice mask" not in script()[1]


@pytest.mark.parametrize(("configured", "used"), [("T", "max"), ("max", "max"), ("rankdice", "rankdice")])
def test_the_default_procedure_gives_complete_maps(script: Script, tmp_path: Path, configured: str, used: str) -> None:
    write("photos/a.png", photo(40, 50))
    assert f"by {used}" in script("-m", write_checkpoint(tmp_path / "x.pth", test=configured))[1]


def test_names_that_are_not_utf8(script: Script) -> None:
    Path("photos").mkdir()
    name = os.fsdecode(b"stra\xdfe.png")
    write("photos/b.png", photo(40, 50))
    os.rename("photos/b.png", os.path.join("photos", name))
    code, out, err = script("--json", "--overlay")
    assert code == 0, err
    assert name in os.listdir("masks")
    assert "stra\\xdfe.png" in Path("masks/expected_dice.csv").read_text()
    assert b"stra\\\\xdfe.png" in Path(os.path.join("masks", name[:-4] + ".json")).read_bytes()
    os.rename(os.path.join("photos", name), os.path.join("photos", name[:-4] + ".jpg"))
    Path("photos", name[:-4] + ".jpg").write_bytes(b"")
    code, _, err = script()
    assert code == 2
    assert "stra\\xdfe.jpg" in err


def test_links_are_counted_and_take_no_image_twice(script: Script) -> None:
    write("photos/deep/a.png", photo(40, 50))
    write("elsewhere/b.png", photo(40, 50))
    Path("photos/notes.txt").touch()
    Path("photos/more.txt").touch()
    Path("photos/list.csv").touch()
    Path("photos/again.png").symlink_to("deep/a.png")
    Path("photos/round").symlink_to("../photos")
    Path("photos/b.png").symlink_to("../elsewhere/b.png")  # the only way to choose this one
    code, out, _ = script("-p", "max")
    assert code == 0
    assert files("masks") == ["b.png", "deep/a.png"]
    assert "skipped: 3 files of other types (2 .txt, 1 .csv); 2 links" in out


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "b/a.jpg"], ["a", "b/a"]),
        (["a.jpg", "a.png"], ["a.jpg", "a.png"]),
        (["a.jpg", "A.png"], ["a.jpg", "A.png"]),
        (["a.jpg", "a.jpg.png", "a.png"], ["a.jpg", "a.jpg.png", "a.png"]),
        (["a.jpg", "A.JPG"], ["a.jpg", "A.JPG~2"]),
        (["probs.jpg"], ["probs.jpg"]),  # its JSON file would replace the index of the folder
        (["a.jpg", "a.png/b.jpg"], ["a.jpg", "a.png/b"]),
        (["a.jpg", "a_probs/000_x.jpg"], ["a.jpg", "a_probs/000_x"]),
        (["caf\u00e9.jpg", "cafe\u0301.png"], ["caf\u00e9.jpg", "cafe\u0301.png"]),
    ],
)
def test_output_names_are_unique(names: list[str], expected: list[str]) -> None:
    assert sources.output_names([Path(name) for name in names]) == expected


def test_overlays_of_formats_that_pillow_reads(script: Script) -> None:
    for extension in ("webp", "gif", "png", "jpg"):
        write(f"photos/{extension}.{extension}", photo(40, 50))
    code, _, err = script("--overlay", "-p", "max")
    assert code == 0, err
    assert len([name for name in files("masks") if name.endswith("_overlay.jpg")]) == 4


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("memory", [[], ["--memory", "1e-6"]])
def test_probabilities_that_are_not_finite_fail_the_image(
    script: Script, tmp_path: Path, procedure: str, memory: list[str]
) -> None:
    path = write_checkpoint(tmp_path / "bad.pth")
    state = checkpoint.read(path)
    state["state_dict"][list(state["state_dict"])[-2]].fill_(3e38)  # finite, but its sums are not
    checkpoint.save(state, path)
    write("photos/a.png", photo(40, 50))
    code, out, err = script("-m", path, "-p", procedure, *memory)
    assert code == 2
    assert "photos/a.png: the network's probabilities are not finite" in err
    assert files("masks") == []


def test_ctrl_c_keeps_what_is_done(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        write(f"photos/{seed}.png", photo(40, 50, seed=seed))
    segment, calls = Predictor.segment, []

    def interrupted(self: Predictor, images: list) -> list:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segment(self, images)

    monkeypatch.setattr(Predictor, "segment", interrupted)
    code, out, _ = script("--batch-size", 1)
    assert code == 130
    assert files("masks") == ["0.png", "1.png", "expected_dice.csv"]
    assert "use --skip-existing" in out
