"""Shapes: the scenes are reproducible, the labels as uncertain as stated, and the VOC loader reads the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataloaders
from dataloaders.shapes import scene
from dataloaders.shapes.dataset import Shapes
from tests.running import run_here

SCENES = 250


@pytest.fixture(scope="module")
def scenes() -> list[scene.Scene]:
    return [scene.numbered(0, "val", number, 64, 64, with_probability=True) for number in range(SCENES)]


def test_a_scene_is_a_function_of_seed_split_and_number() -> None:
    one, two = Shapes(length=4, size=64), Shapes(length=9, size=64, seed=5)  # the seed of the run has no effect
    for index in (3, 0, 2):
        assert torch.equal(one[index].image, two[index].image)
        assert torch.equal(one[index].label, two[index].label)
    others = [
        Shapes(length=4, size=64, scene_seed=1),
        Shapes("val", length=4, size=64),
        Shapes("test", length=4, size=64),
    ]
    images = [one[0].image, one[1].image, *(other[0].image for other in others)]
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_training_epochs_go_on_and_validation_stays() -> None:
    train, val = Shapes(length=4, size=48), Shapes("val", length=4, size=48)
    long = Shapes(length=12, size=48)
    assert torch.equal(train[(2, 1)].image, long[9].image)
    assert torch.equal(val[(2, 1)].image, val[(0, 1)].image)
    fixed = Shapes(length=4, size=48, endless=False)
    assert torch.equal(fixed[(2, 1)].image, fixed[1].image)


def test_asking_for_probabilities_changes_nothing() -> None:
    for number in range(5):
        plain = scene.numbered(3, "train", number, 64, 80)
        full = scene.numbered(3, "train", number, 64, 80, with_probability=True)
        assert plain.probability is None
        assert np.array_equal(plain.image, full.image)
        assert np.array_equal(plain.label, full.label)


def test_samples() -> None:
    sample = Shapes(size=(48, 80), length=2)[0]
    assert sample.image.shape == (3, 48, 80)
    assert sample.image.dtype == sample.label.dtype == torch.uint8
    assert sample.name == "train_000000"
    assert Shapes(size=48, length=2, in_channels=1)[0].image.shape == (1, 48, 48)
    assert (Shapes(size=48, length=3, ignore_index=-1)[0].label >= -1).all()


def test_every_class_occurs_and_some_are_rare(scenes: list[scene.Scene]) -> None:
    labels = np.stack([s.label for s in scenes])
    in_images = {name: (labels == c).any((1, 2)).mean() for c, name in enumerate(scene.CLASS_NAMES)}
    assert all(share > 0.02 for share in in_images.values())
    assert in_images["star"] < 0.15
    assert in_images["background"] == 1
    assert 0.005 < (labels == scene.IGNORED).mean() < 0.08
    assert labels[labels != scene.IGNORED].max() == scene.CLASS_COUNT - 1
    assert (labels == scene.SPARK).mean() < 0.02  # very small things


def test_probabilities_sum_to_one_where_labels_count(scenes: list[scene.Scene]) -> None:
    for s in scenes[:40]:
        total = s.probability.sum(0)
        assert np.abs(total[s.label != scene.IGNORED] - 1).max() < 1e-4
        assert s.probability.min() >= 0


def test_labels_are_drawn_with_the_stated_probability(scenes: list[scene.Scene]) -> None:
    counted = np.stack([s.label for s in scenes]) != scene.IGNORED
    for c in range(scene.CLASS_COUNT):
        p = np.stack([s.probability[c] for s in scenes])
        hit = np.stack([s.label == c for s in scenes])
        for where in (counted, counted & (p > 0.25) & (p < 0.75)):
            # Per scene, because pixels of one object are labeled together: the excess over the probability is noise.
            excess = ((hit - p) * where).sum((1, 2))
            assert abs(excess.mean()) < 4 * excess.std() / len(excess) ** 0.5 + 0.02, scene.CLASS_NAMES[c]


def test_the_doubt_is_real(scenes: list[scene.Scene]) -> None:
    """Even the exact probabilities do not determine the labels, in some classes less than in others."""
    doubt = {}
    for c, name in enumerate(scene.CLASS_NAMES):
        p = np.stack([s.probability[c] for s in scenes])
        doubt[name] = float((p * (1 - p)).sum() / p.sum())
    assert doubt["cloud"] > 0.3
    assert doubt["spark"] > 0.15
    assert doubt["coin"] > 0.1
    assert doubt["star"] < 0.01


def test_rankdice_on_the_exact_probabilities_beats_both_other_rules(scenes: list[scene.Scene]) -> None:
    """The reason for the data: with perfect probabilities, argmax and threshold still lose Dice."""
    from utils.rankdice import rank_dice

    scores: dict[str, list[float]] = {"T": [], "max": [], "rankdice": []}
    best = rank_dice(torch.from_numpy(np.stack([s.probability for s in scenes])).clamp(0, 1)).masks
    for s, ranked in zip(scenes, best, strict=True):
        p = torch.from_numpy(s.probability)
        counted = torch.from_numpy(s.label != scene.IGNORED)
        target = torch.nn.functional.one_hot(torch.from_numpy(s.label * counted.numpy()).long(), len(p)).bool()
        target = target.permute(2, 0, 1) & counted
        masks = {
            "T": p > 0.5,
            "max": torch.nn.functional.one_hot(p.argmax(0), len(p)).permute(2, 0, 1).bool(),
            "rankdice": ranked,
        }
        for rule, mask in masks.items():
            mask = mask & counted
            both = (mask & target).sum((1, 2)).double()
            size = (mask.sum((1, 2)) + target.sum((1, 2))).double()
            scores[rule].append(float((2 * both / size)[size > 0].mean()))
    mean = {rule: 100 * float(np.mean(values)) for rule, values in scores.items()}
    assert mean["rankdice"] > mean["T"] + 0.5, mean
    assert mean["rankdice"] > mean["max"] + 0.3, mean


@pytest.mark.parametrize(
    ("argument", "value"), [("length", 0), ("size", 8), ("scene_seed", -1), ("split", "all"), ("cache", "ram")]
)
def test_impossible_arguments_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        dataloaders.build("Shapes", num_workers=0, **{argument: value})


def test_class_names_can_be_changed_but_not_their_number() -> None:
    assert Shapes(length=1, classes=list("abcdefgh")).class_names == tuple("abcdefgh")
    with pytest.raises(ValueError, match="classes must be 8"):
        Shapes(length=1, classes=["a", "b"])


def test_a_small_set_can_be_kept_in_memory() -> None:
    kept = Shapes(length=3, size=48, endless=False, cache="ram")
    assert torch.equal(kept[1].image, Shapes(length=3, size=48)[1].image)


# ---- the command


def command(*args: str) -> int:
    return run_here(["-m", "dataloaders.shapes", *args], Path.cwd())


def test_written_files_are_read_by_the_voc_loader(tmp_path: Path) -> None:
    assert command("--out", str(tmp_path), "--n", "8", "--size", "48", "--seed", "3") == 0
    for split, count in (("train", 6), ("val", 2), ("trainval", 8), ("test", 1), ("train_aug", 6), ("val_aug", 2)):
        data = dataloaders.LOADERS["VOC"](str(tmp_path), split, classes="classes.txt")
        assert len(data) == count
        assert data.class_names == scene.CLASS_NAMES
    val = dataloaders.LOADERS["VOC"](str(tmp_path), "val", classes="classes.txt")
    want = Shapes("val", length=2, size=48, scene_seed=3)
    for got, expected in zip(val, want, strict=False):
        assert torch.equal(got.label, expected.label)
        assert (got.image.float() - expected.image.float()).abs().mean() < 6
    with Image.open(tmp_path / "VOCdevkit/VOC2012/SegmentationClass/val_000000.png") as mask:
        assert mask.mode == "P"
        assert tuple(mask.getpalette()[3:6]) == scene.PALETTE[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n", "1"], "--n must be at least 2"),
        (["--n", "4", "--size", "8"], "--size must be at least"),
        (["--n", "4", "--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_mistakes_get_one_message(tmp_path: Path, args: list[str], message: str, capsys) -> None:
    assert command("--out", str(tmp_path / "x"), *args) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "x").exists()


def test_a_file_in_the_way_is_reported(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert command("--out", str(tmp_path / "file"), "--n", "4") == 2
    assert "could not be written" in capsys.readouterr().err


def test_help_needs_no_torch(root: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        "try: runpy.run_module('dataloaders.shapes', run_name='__main__')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL, check=False).returncode == 0
    )
