"""The label map against argmax among the same classes, against all label maps, and against another program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.rankdice.maps import smooth_maps
from utils.rankdice import label_map, rank_dice


def total(probs: Tensor, labels: Tensor, chosen: Tensor | None = None, smooth: float = 0.0) -> Tensor:
    """Return what ``label_map`` maximizes, by its definition: probabilities ``(C, N)``, labels ``(..., N)``."""
    found = torch.zeros(labels.shape[:-1], dtype=torch.float64)
    for c in range(len(probs)) if chosen is None else chosen.nonzero().view(-1).tolist():
        own = labels == c
        mass = (own * probs[c].double()).sum(-1)
        found += (2 * mass + smooth) / (own.sum(-1) + probs[c].double().sum() + 1 + smooth)
    return found


def drawn(seed: int, classes: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Return probabilities ``(C, N)``, some with ties or sums other than 1, and which classes are used."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(classes, pixels, generator=generator) * (1 + seed % 4)
    logits += torch.randn(classes, 1, generator=generator)
    probs = logits.softmax(0) if seed % 3 else logits.sigmoid()
    probs = (probs * 8).round() / 8 if seed % 5 == 0 else probs
    chosen = torch.rand(classes, generator=generator) < 0.7
    return probs, chosen if chosen.any() else ~chosen


@pytest.mark.parametrize("smooth", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("classes", [2, 3, 7, 14])
def test_it_is_never_below_argmax_among_the_same_classes(classes: int, smooth: float) -> None:
    for seed in range(40):
        probs, chosen = drawn(seed, classes, (6, 30, 200)[seed % 3])
        labels = label_map(probs[None], chosen[None], smooth=smooth)[0]
        argmax = probs.masked_fill(~chosen[:, None], -1).argmax(0)
        assert chosen[labels].all()
        assert total(probs, labels, chosen, smooth) >= total(probs, argmax, chosen, smooth) - 1e-9, seed


def test_it_comes_near_the_best_of_all_label_maps() -> None:
    """Exhaustive search over three classes and eight pixels, and over two of the classes."""
    every = torch.tensor(list(itertools.product(range(3), repeat=8)))
    lost = []
    for seed in range(60):
        probs, chosen = drawn(seed, 3, 8)
        allowed = every[chosen[every].all(1)]
        best = total(probs, allowed, chosen).max()
        lost.append(1 - total(probs, label_map(probs[None], chosen[None])[0], chosen) / best)
    assert min(lost) >= -1e-9
    assert torch.stack(lost).mean() < 0.005
    assert max(lost) < 0.08


def test_absent_classes_do_not_hide_a_present_one() -> None:
    """Twelve pixels of an object, with ten more classes that have a small probability everywhere."""
    probs = torch.full((12, 400), 0.004)
    probs[1] = 0.02
    probs[1, 100:112] = 0.45
    probs[0] = 1 - probs[1:].sum(0)
    chosen = torch.zeros(12, dtype=torch.bool)
    chosen[:2] = True
    for smooth in (0.0, 1.0):
        labels = label_map(probs[None], chosen[None], smooth=smooth)[0]
        assert labels[100:112].eq(1).all()
        assert int(labels.sum()) == 12


def test_it_is_ahead_of_the_label_map_of_rankseg() -> None:
    """For the same classes, by what both maximize, and by the Dice of labels drawn from the probabilities."""
    rankseg = pytest.importorskip("rankseg")
    gains, measured = [], []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(1, 5, 6, 8, generator=generator) * 3
        probs = torch.nn.functional.interpolate(coarse, size=(40, 56), mode="bicubic").softmax(1)
        theirs = rankseg.RankSEG(metric="dice", output_mode="multiclass", solver="RMA", pruning_prob=0.0).predict(probs)
        ours, everything = label_map(probs), torch.ones(5, dtype=torch.bool)
        flat = probs[0].flatten(1)
        gains.append(total(flat, ours.flatten(), everything) - total(flat, theirs.flatten(), everything))
        truth = torch.multinomial(flat.T, 50, replacement=True, generator=generator).T
        dice = [
            (2 * ((m.flatten() == c) & (truth == c)).sum(1) / ((m == c).sum() + (truth == c).sum(1)).clamp(min=1))
            for m in (ours, theirs)
            for c in range(5)
        ]
        measured.append(float(sum(d.mean() for d in dice[:5]) - sum(d.mean() for d in dice[5:])))
    assert torch.stack(gains).mean() > 0
    assert sum(measured) > 0


def test_label_map_beats_argmax_and_comes_near_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(12):
        probs = (3 * torch.randn(3, 6, generator=generator)).softmax(0)
        labels = label_map(probs.unsqueeze(0))[0]
        best = max(float(total(probs, torch.tensor(choice))) for choice in itertools.product(range(3), repeat=6))
        reached = float(total(probs, labels))
        assert reached >= float(total(probs, probs.argmax(0))) - 1e-12
        gaps.append(best - reached)
    assert max(gaps) < 0.2  # a local optimum: six pixels leave little room to climb
    assert float(np.mean(gaps)) < 0.04


def test_label_map_is_one_image_at_a_time() -> None:
    probs = smooth_maps(3, 5, 40, 48)
    labels = label_map(probs)
    assert labels.dtype == torch.int64
    assert labels.shape == (3, 40, 48)
    for b in range(3):
        assert torch.equal(label_map(probs[b : b + 1])[0], labels[b])
        assert total(probs[b].flatten(1), labels[b].flatten()) >= total(
            probs[b].flatten(1), probs[b].argmax(0).flatten()
        )
    assert torch.equal(label_map(probs, max_bytes=10_000), labels)
    assert torch.equal(label_map(probs.contiguous(memory_format=torch.channels_last)), labels)


def test_label_map_of_some_classes() -> None:
    probs = smooth_maps(2, 5, 20, 24)
    labels = label_map(probs, classes=[4, 1])
    assert set(labels.unique().tolist()) <= {1, 4}
    assert torch.equal(label_map(probs, classes=[3]), torch.full((2, 20, 24), 3))
    assert label_map(probs[:, :1]).eq(0).all()
    assert label_map(torch.zeros(0, 3, 4, 4)).shape == (0, 4, 4)
    chosen = torch.tensor([[True, False, False, True, False], [False, True, False, False, False]])
    each = label_map(probs, classes=chosen)
    assert torch.equal(each[0], label_map(probs[:1], classes=[0, 3])[0])
    assert each[1].eq(1).all()
    assert torch.equal(label_map(probs, classes=torch.zeros(2, 5, dtype=torch.bool)), label_map(probs))
    found = rank_dice(probs, prune=None)
    assert torch.equal(label_map(probs, classes=chosen, found=found), each)
    with pytest.raises(ValueError, match="classes: expected a bool tensor"):
        label_map(probs, classes=chosen[:1])
    for classes in ([], [0, 0], [5], [-1]):
        with pytest.raises(ValueError, match="classes"):
            label_map(probs, classes=classes)


def test_label_map_of_an_image_does_not_depend_on_images_that_take_more_rounds() -> None:
    # Found by search: one image falls in total before it would rise again, while others still rise.
    generator = torch.Generator().manual_seed(9)
    classes = int(torch.randint(3, 9, (1,), generator=generator))
    side = int(torch.randint(6, 20, (1,), generator=generator))
    noise = torch.randn(8, classes, side, side, generator=generator)
    probs = (noise * torch.rand(8, 1, 1, 1, generator=generator) * 4).softmax(1)
    together = label_map(probs)
    for b in range(len(probs)):
        assert torch.equal(label_map(probs[b : b + 1])[0], together[b])
