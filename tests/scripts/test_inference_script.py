"""inference.py as users call it: outputs, bad files, mistakes, videos, several processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import inference
from tests.small_checkpoint import NAMES, everything_fitted, photo, write_checkpoint
from utils import checkpoint, errors
from utils.inference import outputs, pipeline, sources
from utils.predict import PROCEDURES
from utils.predictor import Predictor

Script = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "best.pth")


@pytest.fixture
def script(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Script:
    """Run inference.py in this process: exit code, what it printed, and what it complained of."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, defaults: bool = True) -> tuple[int, str, str]:
        common = ["-m", str(model), "-i", "photos", "-o", "masks", "-mo", "single"] if defaults else []
        monkeypatch.setattr(sys, "argv", ["inference.py", *common, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            errors.run(inference.main)
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


def write(path: str | Path, image: np.ndarray, **options: object) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def files(folder: str | Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def errors_of(err: str) -> list[str]:
    return [line[line.index("error: ") :] for line in err.splitlines() if "error: " in line]


# ------------------------------------------------------------------------------------------- outputs


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


def test_paths_may_hold_variables(script: Script, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "cut 1 image into tiles, too large" in script("--max-pixels", 5000)[1]


def test_a_config_beside_the_checkpoint(script: Script, model: Path) -> None:
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


def test_everything_beside_the_masks(script: Script, model: Path) -> None:
    write("photos/x/a.png", photo(40, 50))
    code, _, err = script("--overlay", "0.7", "--probs", "npz", "--json")
    assert code == 0, err
    assert files("masks") == ["expected_dice.csv", "probs.json", "x/a.json", "x/a.npz", "x/a.png", "x/a_overlay.jpg"]
    result = Predictor(model, mode="single", keep_probs=True)("photos/x/a.png")
    probs = np.load("masks/x/a.npz")["probs"]
    assert probs.dtype == np.float32
    np.testing.assert_array_equal(probs, result.probs.numpy())
    assert Image.open("masks/x/a_overlay.jpg").size == (50, 40)
    described = json.loads(Path("masks/x/a.json").read_text())
    assert (described["width"], described["height"], described["procedure"]) == (50, 40, "rankdice")
    assert sum(c["pixels"] for c in described["classes"]) == 40 * 50
    for entry in described["classes"]:
        assert entry["name"] == NAMES[entry["id"]]
        assert entry["pixels"] == (result.labels == entry["id"]).sum()
        assert "presence" not in entry  # without a fit it is not known
        assert entry["mask_pixels"] == result.volumes[entry["id"]]
        if entry["mask_pixels"]:
            assert entry["expected_dice"] == pytest.approx(result.scores[entry["id"]])
    assert described["expected_dice"] == pytest.approx(result.expected)


@pytest.mark.parametrize("memory", [[], ["--memory", "1e-5"]])
def test_probabilities_as_png(script: Script, model: Path, memory: list[str]) -> None:
    write("photos/a.png", photo(60, 50))
    assert script("--probs", "png", "-mo", "sliding", *memory)[0] == 0
    assert files("masks/a_probs") == [
        f"{c:03d}_{n}.png" for c, n in enumerate(["background", "dog___cat", "car", "tree"])
    ]
    probs = Predictor(model, mode="sliding", keep_probs=True)("photos/a.png").probs
    plane = np.asarray(Image.open("masks/a_probs/002_car.png")) / 255
    np.testing.assert_allclose(plane, probs[2], atol=0.5 / 255 + 5e-4)


def test_streamed_probabilities_are_a_regular_npz(script: Script) -> None:
    write("photos/a.png", photo(60, 50))
    assert script("--probs", "-mo", "sliding", "-o", "whole")[0] == 0
    assert script("--probs", "-mo", "sliding", "-o", "streamed", "--memory", "1e-5")[0] == 0
    whole, streamed = np.load("whole/a.npz")["probs"], np.load("streamed/a.npz")["probs"]
    assert streamed.shape == whole.shape
    np.testing.assert_allclose(streamed, whole, atol=1e-3)


def test_one_class_json(script: Script, tmp_path: Path) -> None:
    write("photos/a.png", photo(60, 50))
    one = write_checkpoint(tmp_path / "one.pth", num_classes=1)
    code, _, err = script("-m", one, "--json")
    assert code == 0, err
    described = json.loads(Path("masks/a.json").read_text())
    assert [c["name"] for c in described["classes"]] == ["background", "dog / cat"]
    assert "expected_dice" not in described["classes"][0]
    assert described["classes"][1]["mask_pixels"] == described["classes"][1]["pixels"]


def test_the_table_is_sorted_worst_first(script: Script, model: Path) -> None:
    for seed in range(5):
        write(f"photos/{seed}.png", photo(40, 50, seed=seed))
    _, out, _ = script()
    with open("masks/expected_dice.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "expected_dice", *NAMES[:4]]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores)
    assert len(rows) == 5
    result = Predictor(model, mode="single")(rows[0][0])
    assert scores[0] == pytest.approx(result.expected, abs=1e-4)
    assert result.presence is None
    assert f"lowest: {scores[0]:.3f}, {rows[0][0]}" in out


def test_a_presence_fit_says_which_classes_are_in_the_image(script: Script, tmp_path: Path) -> None:
    fitted = write_checkpoint(tmp_path / "fitted.pth", **everything_fitted())
    write("photos/a.png", photo(40, 50))
    for streamed, memory in (((), None), (("--memory", 1e-5), 10_737)):
        code, _, err = script("-m", fitted, "--json", "--force", *streamed)
        assert code == 0, err
        with open("masks/expected_dice.csv", newline="") as file:
            header, row = csv.reader(file)
        assert header == ["image", "expected_dice", *NAMES[:4], *(f"presence of {name}" for name in NAMES[:4])]
        presence = Predictor(fitted, mode="single", memory=memory)("photos/a.png").presence
        assert [float(cell) for cell in row[6:]] == pytest.approx(presence.tolist(), abs=1e-5)
        for entry in json.loads(Path("masks/a.json").read_text())["classes"]:
            assert entry["presence"] == pytest.approx(presence[entry["id"]], abs=1e-5)


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
    # One image with its mask beside it is what the command says.
    assert script("-i", "photos/a.jpg", "-o", "photos", "-p", "max")[0] == 0
    assert files("photos") == ["a.jpg", "a.png"]


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
    assert "segmented 4" in script("--skip-existing", "--json")[1]  # not all outputs were there


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
        assert "replaced the outputs of 1 image: of another model" in out
        assert "skipped 1" in script(*arguments)[1]


def test_outputs_of_earlier_options_do_not_stay_beside_new_masks(script: Script) -> None:
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
    assert script()[0] == 0  # its own files are replaced
    Image.open("masks/a.png").save("masks/a.png")
    corrected = Path("masks/a.png").read_bytes()
    code, _, err = script()
    assert code == 2
    assert "masks/a.png" in err
    assert Path("masks/a.png").read_bytes() == corrected


def test_overlapping_masks_as_files(script: Script, model: Path) -> None:
    write("photos/x/a.png", photo(40, 50))
    assert script("--masks")[0] == 0
    result = Predictor(model, mode="single")("photos/x/a.png")
    found = {int(path.name[:3]): np.asarray(Image.open(path)) for path in Path("masks/x/a_masks").iterdir()}
    assert set(found) == set(result.volumes.nonzero()[0])
    for c, mask in found.items():
        np.testing.assert_array_equal(mask, result.masks[c] * 255)
    script("--masks", "--memory", "1e-6", "--tile", 64, "-p", "T")
    streamed = {int(path.name[:3]): np.asarray(Image.open(path)) for path in Path("masks/x/a_masks").iterdir()}
    whole = Predictor(model, mode="single", predict="T")("photos/x/a.png").masks
    assert set(streamed) == set(whole.any((1, 2)).nonzero()[0])
    for c, mask in streamed.items():
        assert (mask == whole[c] * 255).mean() > 0.99
    script("--masks", "--memory", "1e-6", "--tile", 64)
    for path in Path("masks/x/a_masks").iterdir():
        assert (np.asarray(Image.open(path)) == result.masks[int(path.name[:3])] * 255).mean() > 0.99
    code, _, err = script("--masks", "-p", "max")
    assert code == 2
    assert "procedure max has no overlapping masks" in err


def test_probabilities_are_not_mixed(script: Script, tmp_path: Path) -> None:
    write("photos/a.png", photo(40, 50))
    assert script("--probs")[0] == 0
    assert script("--probs", "-p", "T")[0] == 0  # the procedure does not matter to probabilities
    other = write_checkpoint(tmp_path / "other.pth", num_classes=5)
    code, _, err = script("--probs", "-m", other)
    assert code == 2
    assert "contains the probabilities of another run" in err
    assert script("--probs", "-m", other, "--force")[0] == 0
    assert np.load("masks/a.npz")["probs"].shape == (5, 40, 50)


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
    Path("photos/b.png").symlink_to("../elsewhere/b.png")  # the only way to this one
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
        (["probs.jpg"], ["probs.jpg"]),  # its JSON file would be the folder's index
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
    state["state_dict"][list(state["state_dict"])[-2]].fill_(3e38)  # finite, but sums of it are not
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
    assert "--skip-existing continues" in out


# ------------------------------------------------------------------------------------------- bad inputs


def test_ten_bad_files_among_good_ones(script: Script, tmp_path: Path) -> None:
    """One clear line per file that cannot be used; the others are segmented; exit code 2."""
    good = photo(40, 50)
    write("photos/good.jpg", good)
    Path("photos/zero.png").touch()
    whole = write("whole.jpg", good).read_bytes()
    Path("photos/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    Path("photos/truncated.png").write_bytes(write("whole.png", good).read_bytes()[:300])
    Path("photos/text.jpg").write_text("no image at all")
    Path("photos/wrong_extension.png").write_bytes(whole)  # a JPEG: its content says so
    write("photos/one_pixel.png", photo(1, 1))
    write("photos/panorama.jpg", photo(20, 3000))
    Image.fromarray(photo(40, 50, 1)[:, :, 0].astype(np.uint16) * 257).save("photos/sixteen.png")
    clear = Image.fromarray(good).quantize(8)
    clear.info["transparency"] = 3
    clear.save("photos/clear_palette.png", transparency=3)
    frames = [Image.fromarray(photo(40, 50, seed=s)) for s in range(3)]
    frames[0].save("photos/moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(good).convert("CMYK").save("photos/cmyk.jpg")
    Image.fromarray(good).convert("RGBA").save("photos/rgba.png")
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    Image.fromarray(good).save("photos/upright.jpg", exif=exif)
    Path("photos/folder.jpg").mkdir()
    os.symlink("nowhere.png", "photos/dangling.png")
    np.save("photos/channels.npy", np.zeros((5, 5, 7), np.uint8))
    code, out, err = script("-p", "max")
    assert code == 2
    bad = ["channels.npy", "dangling.png", "text.jpg", "truncated.jpg", "truncated.png", "zero.png"]
    lines = errors_of(err)
    assert len(lines) == len(bad), lines
    for name in bad:
        assert sum(name in line for line in lines) == 1, (name, lines)
        assert name in out
    assert "6 failed" in out
    masks = {Path(name).stem: Image.open(f"masks/{name}").size for name in files("masks")}
    assert masks == {
        "good": (50, 40), "wrong_extension": (50, 40), "one_pixel": (1, 1), "panorama": (3000, 20),
        "sixteen": (50, 40), "clear_palette": (50, 40), "moving": (50, 40), "cmyk": (50, 40), "rgba": (50, 40),
        "upright": (40, 50),
    }  # fmt: skip


def test_a_full_disk_fails_images_one_by_one(model: Path, tmp_path: Path) -> None:
    """The kernel refuses to write more than a few bytes: real failures of every write, in a process of its own."""
    write(tmp_path / "photos/small.png", photo(8, 8))
    write(tmp_path / "photos/a.png", np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8))
    command = (
        "import resource, signal, sys, torch; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "torch.optim.SGD([torch.zeros(1)], lr=1.0);"  # torch 2.6 writes a file here
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500));"
        f"sys.argv = ['inference.py', '-m', {str(model)!r}, '-i', 'photos', '-o', 'masks', '-mo', 'single'];"
        "import inference; from utils.errors import run; run(inference.main)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(inference.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    lines = errors_of(done.stderr)
    assert len(lines) == 1, done.stderr
    assert "photos/a.png" in lines[0]
    assert "could not be written" in lines[0]
    assert "Traceback" not in done.stderr
    assert files(tmp_path / "masks") == ["expected_dice.csv", "small.png"]


def test_outputs_of_a_failed_image_do_not_stay(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    write("photos/a.png", photo(40, 50))
    write("photos/b.png", photo(40, 50, seed=1))
    write_mask = outputs.write_mask

    def full(path: Path, *arguments: object) -> None:
        if path.stem == "a":
            raise OSError(28, "No space left on device")
        write_mask(path, *arguments)

    monkeypatch.setattr(outputs, "write_mask", full)
    code, out, err = script("--overlay", "--json", "--probs")
    assert code == 2
    assert errors_of(err) == ["error: photos/a.png: its outputs could not be written: the disk is full"]
    assert files("masks") == ["b.json", "b.npz", "b.png", "b_overlay.jpg", "expected_dice.csv", "probs.json"]
    assert script("--probs", "png", "-o", "other")[0] == 2
    assert sorted(p.name for p in Path("other").iterdir()) == ["b.png", "b_probs", "expected_dice.csv"]


def test_an_unreadable_folder_is_said(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    write("photos/a.png", photo(20, 20))
    write("photos/locked/b.png", photo(20, 20))
    scandir = os.scandir

    def refusing(path: str | Path) -> object:  # chmod would not stop root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    code, out, err = script("-p", "max")
    assert code == 2
    assert errors_of(err) == ["error: photos/locked: the folder cannot be read: Permission denied"]
    assert files("masks") == ["a.png"]


def test_one_bad_image_of_a_batch_fails_alone(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        write(f"photos/{seed}.png", photo(40, 50, seed=seed))
    marked = photo(40, 50, seed=1)
    segment = Predictor.segment

    def fussy(self: Predictor, images: list) -> list:
        if any(np.array_equal(pixels.image, marked) for pixels in images):
            raise MemoryError
        return segment(self, images)

    monkeypatch.setattr(Predictor, "segment", fussy)
    code, out, err = script("-p", "max")
    assert code == 2
    assert len(errors_of(err)) == 1
    assert "photos/1.png: out of memory; try --mode sliding" in err
    assert files("masks") == ["0.png", "2.png"]


# ------------------------------------------------------------------------------------------- mistakes


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


# ------------------------------------------------------------------------------------------- videos, processes


def write_video(path: str, frames: int = 5) -> None:
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    if not writer.isOpened():
        pytest.skip("this build of OpenCV writes no video")
    for seed in range(frames):
        writer.write(photo(48, 64, seed=seed))
    writer.release()


def test_a_video_becomes_masks_and_an_overlay_video(script: Script, model: Path) -> None:
    write_video("clip.avi")
    code, out, err = script("-i", "clip.avi", "--overlay", "-p", "max")
    assert code == 0, err
    assert files("masks") == [*(f"clip/frame_{i:06d}.png" for i in range(5)), "clip_overlay.mp4"]
    frame = next(iter(cv2_frames("clip.avi")))
    expected = Predictor(model, mode="single", predict="max")(frame[:, :, ::-1].copy())
    np.testing.assert_array_equal(np.asarray(Image.open("masks/clip/frame_000000.png")), expected.labels)
    shown = list(cv2_frames("masks/clip_overlay.mp4"))
    assert len(shown) == 5
    assert shown[0].shape == (48, 64, 3)


def cv2_frames(path: str) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(path), []
    while True:
        ok, frame = capture.read()
        if not ok:
            return frames
        frames.append(frame)


def test_a_video_that_breaks_off_fails(script: Script) -> None:
    write_video("clip.avi", 20)
    whole = Path("clip.avi").read_bytes()
    Path("clip.avi").write_bytes(whole[: len(whole) // 2])
    frames = len(cv2_frames("clip.avi"))
    assert 0 < frames < 20
    code, out, err = script("-i", "clip.avi", "--overlay", "-p", "max")
    assert code == 2
    assert f"clip.avi: ends at frame {frames} of 20" in out
    assert len(files("masks")) == frames + 1
    assert script("-i", "clip.avi", "--limit", "2", "-p", "max")[0] == 0


def test_frames_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video("clip.avi")
    parts = [[item.name for item in sources.Video("clip.avi", (rank, 2))] for rank in range(2)]
    assert parts[0] == [f"clip/frame_{i:06d}" for i in (0, 2, 4)]
    assert parts[1] == [f"clip/frame_{i:06d}" for i in (1, 3)]


def test_a_camera_is_asked_for_frames(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Camera:
        def __init__(self, number: int) -> None:
            assert number == 3

        isOpened = grab = lambda self: True  # noqa: N815 - OpenCV's names

        def get(self, _: int) -> float:
            return 0.0

        def retrieve(self) -> tuple[bool, np.ndarray]:
            return True, photo(24, 32)

        def release(self) -> None:
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    code, _, err = script("-i", "camera:3", "--limit", "4", "-p", "max")
    assert code == 0, err
    assert files("masks") == [f"camera3/frame_{i:06d}.png" for i in range(4)]


def test_several_processes_share_a_folder(model: Path, tmp_path: Path) -> None:
    """As torchrun starts them: files strided, one summary and one table over all."""
    for seed in range(5):
        write(tmp_path / f"photos/{seed}.png", photo(30, 30, seed=seed))
    Path(tmp_path / "photos/bad.png").touch()
    root = Path(inference.__file__).parent
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(root / "inference.py"), "-m", str(model), "-i", "photos", "-o", "masks", "-mo", "single", "-d", "cpu"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0  # one file failed
    assert done.stdout.count("segmented 5 images") == 1, done.stdout + done.stderr
    assert done.stdout.count("1 failed") == 1
    assert files(tmp_path / "masks") == [*(f"{i}.png" for i in range(5)), "expected_dice.csv"]
    with (tmp_path / "masks/expected_dice.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 6


def test_reading_ahead_is_bounded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the images, only as many are in memory as the bound allows, or one."""
    live, most = [0], [0]

    def item(index: int, pixels: int) -> sources.Item:
        class Counted(sources.Item):
            def pixels(self) -> int:
                return pixels

        return Counted(source=f"{index}", name=f"{index}", image=photo(30, 30, seed=index))

    def counting(image: np.ndarray) -> object:
        live[0] += 1
        most[0] = max(most[0], live[0])
        return read(image)

    def finished(item: sources.Item, problem: str | None) -> None:
        assert problem is None
        live[0] -= 1

    predictor = Predictor(model, mode="single", predict="max", keep_masks=False)
    read = predictor.read
    monkeypatch.setattr(predictor, "read", counting)
    wanted = outputs.Outputs(tmp_path / "masks", predictor.facts, outputs.Decoding("max"))
    for pixels, bound in ((pipeline.PIXELS_IN_FLIGHT, 1), (pipeline.PIXELS_IN_FLIGHT // 2, 2)):
        most[0] = 0
        report = pipeline.Pipeline(predictor, wanted, finished).run(item(i, pixels) for i in range(6))
        assert report.done == 6
        assert most[0] <= bound
