"""Empty rows, ties, pruning, invalid pixels, wrong arguments and memory of RankDice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.rankdice.maps import check_masks, same, smooth_maps
from tests.rankdice.reference import (
    expected_scores,
    integral_scores,
)
from utils.rankdice import METRICS, SOLVERS, label_map, rank_dice


@pytest.mark.parametrize("solver", SOLVERS)
def test_empty_and_trivial_rows(solver: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0), (2, 3, 4, 0)):
        found = rank_dice(torch.zeros(shape), solver=solver)
        assert found.masks.shape == shape
        assert found.volumes.shape == found.scores.shape == shape[:2]
    nothing = rank_dice(torch.zeros(1, 2, 3, 3), solver=solver, prune=None)
    assert not nothing.masks.any()
    assert nothing.scores.tolist() == [[0.0, 0.0]]
    assert nothing.cutoffs.tolist() == [[float("inf")] * 2]
    everything = rank_dice(torch.ones(1, 1, 3, 3), solver=solver)
    assert everything.masks.all()
    one = rank_dice(torch.full((1, 1, 1), 0.7, dtype=torch.float64), solver=solver)
    assert one.masks.all()
    if solver in ("exact", "trna"):
        assert float(one.scores) == pytest.approx(0.7)


def test_prune() -> None:
    probs = torch.tensor([[[0.5, 0.5, 0.1], [0.5001, 0.5, 0.1], [0.2, 0.1, 0.1]]])
    assert rank_dice(probs).volumes.bool().tolist() == [[False, True, False]]
    assert rank_dice(probs, prune=None).volumes.bool().tolist() == [[True, True, True]]
    assert rank_dice(probs, prune=0.15).volumes.bool().tolist() == [[True, True, True]]
    found = rank_dice(probs, smooth=1.0)
    for k in (0, 2):  # the score of an empty mask, which smoothing makes positive
        assert float(found.scores[0, k]) == pytest.approx(
            expected_scores(probs[0, k].numpy(), "dice", 1.0)[0], rel=1e-9
        )


def test_scores_of_pruned_large_rows_with_smoothing() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(1, 3, 3000, generator=generator, dtype=torch.float64) * torch.tensor([[[0.5], [0.02], [1e-4]]])
    for smooth in (0.1, 30.0):
        found = rank_dice(probs, smooth=smooth)
        assert found.volumes.tolist() == [[0, 0, 0]]
        x, w = np.polynomial.legendre.leggauss(30)
        for k in range(3):
            row, total = probs[0, k].numpy(), 0.0
            edges = np.concatenate([[0], np.logspace(-6, np.log10(60 / smooth), 200)])
            for low, high in itertools.pairwise(edges):
                s = (high + low + x * (high - low)) / 2
                logs = np.log1p(np.expm1(-s)[:, None] * row).sum(1)
                total += (w * (high - low) / 2 * smooth * np.exp(-s * smooth + logs)).sum()
            assert float(found.scores[0, k]) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_ties_are_broken_by_index(solver: str) -> None:
    probs = (smooth_maps(1, 3, 40, 50) * 6).round() / 6
    found = rank_dice(probs, solver=solver)
    check_masks(probs, found)
    check_masks(probs[:, :, 0], rank_dice(probs[:, :, 0], solver=solver))


@pytest.mark.parametrize("pixels", [900, 12_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_minus_zero_is_zero(dtype: torch.dtype, pixels: int) -> None:
    """Values are sorted by their bits, and those of -0 are the bits of a negative integer."""
    probs = torch.rand(1, 2, pixels, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    probs = torch.where(probs < 0.4, 0, probs)
    for solver in ("exact", "rma"):
        plain, minus = (rank_dice(torch.where(probs == 0, zero, probs), solver=solver) for zero in (0.0, -0.0))
        assert torch.equal(plain.masks, minus.masks)
        assert torch.equal(plain.cutoffs, minus.cutoffs)
        assert torch.equal(plain.scores, minus.scores)


@pytest.mark.parametrize("value", [0.3, 0.7, 1.0])
def test_large_plateaus(value: float) -> None:
    probs = torch.full((1, 2, 300, 310), value)
    probs[0, 1, :100] = 0.9 * value
    found = rank_dice(probs, prune=None)
    check_masks(probs, found)
    assert found.volumes[0, 0] == 300 * 310
    scores = integral_scores(probs[0, 1].numpy().ravel(), "dice", 0.0, np.arange(1, 93001, 31))
    assert float(found.scores[0, 1]) >= scores.max() * (1 - 1e-9)


def test_a_cut_inside_a_plateau() -> None:
    """The best volume ends somewhere among pixels of equal probability."""
    probs = (smooth_maps(1, 1, 256, 256, grain=64) * 3).round() / 3 * 0.7 + 0.15
    for metric in METRICS:
        check_masks(probs, rank_dice(probs, metric))


@pytest.mark.parametrize("solver", ["exact", "rma"])
@pytest.mark.parametrize("pixels", [60, 9000])
def test_torn_ties_drop_the_last_pixels(solver: str, pixels: int) -> None:
    """The cut lies in a plateau of pixels at the probability where one more pixel neither helps nor hurts."""
    probs = torch.ones(1, 1, pixels)
    probs[0, 0, pixels // 3 :] = 2**0.5 - 1
    probs = probs.roll(pixels // 7, 2)
    found = rank_dice(probs, solver=solver)
    check_masks(probs, found)
    check_masks(probs.flip(2), rank_dice(probs.flip(2), solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_valid_pixels_only(solver: str) -> None:
    probs = smooth_maps(2, 3, 20, 30)
    valid = torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0)) < 0.6
    found = rank_dice(probs, solver=solver, valid=valid)
    for b in range(2):
        cropped = rank_dice(probs[b : b + 1, :, valid[b]], solver=solver)
        assert torch.equal(found.masks[b][:, valid[b]], cropped.masks[0])
        assert torch.equal(found.volumes[b], cropped.volumes[0])
        assert torch.allclose(found.scores[b], cropped.scores[0], rtol=1e-9)
    assert not (found.masks & ~valid.unsqueeze(1)).any()
    spoiled = probs.masked_fill(~valid.unsqueeze(1), float("nan"))
    assert same(rank_dice(spoiled, solver=solver, valid=valid), found)
    assert same(rank_dice(probs, solver=solver, valid=valid.unsqueeze(1)), found)
    assert rank_dice(probs, solver=solver, valid=torch.zeros(20, 30, dtype=torch.bool)).volumes.sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "f1"}, "metric"),
        ({"solver": "bruteforce"}, "solver"),
        ({"metric": "iou", "solver": "ba"}, "solver"),
        ({"metric": "iou", "solver": "trna"}, "solver"),
        ({"metric": "iou", "solver": "paper"}, "solver"),
        ({"smooth": -1.0}, "smooth"),
        ({"smooth": float("nan")}, "smooth"),
        ({"prune": 1.5}, "prune"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"probs": torch.zeros(3, 4)}, "probs"),
        ({"probs": torch.full((1, 1, 3), float("nan"))}, "probs.*finite"),
        ({"probs": torch.full((1, 1, 3), float("inf"))}, "probs.*finite"),
        ({"probs": torch.tensor([[[0.2, float("nan"), 0.9]]])}, "probs.*finite"),
        ({"probs": torch.full((1, 1, 3), 1.01)}, r"probs.*\[0, 1\].*1.01"),
        ({"probs": torch.full((1, 1, 3), -0.01)}, r"probs.*\[0, 1\]"),
        ({"valid": torch.ones(1, 7, dtype=torch.bool)}, "valid"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    options = {"probs": torch.full((1, 1, 3), 0.6), **change}
    with pytest.raises(ValueError, match=message):
        rank_dice(**options)


def test_a_map_without_a_batch_is_refused() -> None:
    probs = smooth_maps(1, 4, 24, 30)[0]
    with pytest.raises(ValueError, match=r"classes, height, width\) without a batch; pass probs\[None\]"):
        rank_dice(probs)
    with pytest.raises(ValueError, match=r"probs\[None\]"):
        label_map(probs)
    assert rank_dice(probs[None]).masks.shape == (1, 4, 24, 30)
    sure = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))  # does not add up to 1: a sigmoid
    for shape in (sure, sure[:1], sure.mT, sure[:, :16, :16]):
        for call in (rank_dice, label_map, lambda p: rank_dice(p, solver="rma")):
            with pytest.raises(ValueError, match=r"without a batch; pass probs\[None\], or probs\[..., None\]"):
                call(shape)
    assert torch.equal(rank_dice(sure[..., None]).volumes[2], rank_dice(sure[2, None, :, None]).volumes[0])
    flat = smooth_maps(3, 4, 24, 30).flatten(2)  # (batch, classes, pixels) is fine
    assert rank_dice(flat).volumes.shape == (3, 4)


def test_a_huge_smooth_is_refused() -> None:
    probs = smooth_maps(1, 2, 20, 20)
    for solver in SOLVERS:
        with pytest.raises(ValueError, match="smooth: expected a number from 0 to 100,000"):
            rank_dice(probs, solver=solver, smooth=1e6)
    most = rank_dice(probs, smooth=1e5)
    scores = integral_scores(probs[0, 0].numpy().ravel(), "dice", 1e5, np.arange(1, 401))
    assert scores[int(most.volumes[0, 0]) - 1] == scores.max()


def test_results_are_ordinary_tensors() -> None:
    probs = smooth_maps(2, 3, 80, 90).requires_grad_()
    for part in rank_dice(probs):
        assert not part.is_inference()
        part.zero_()
    assert (rank_dice(probs).masks * probs).sum().requires_grad


def test_the_largest_probability_is_returned() -> None:
    probs = smooth_maps(2, 3, 20, 30)
    found = rank_dice(probs)
    assert torch.equal(found.highest, probs.amax((2, 3)))
    assert rank_dice(probs * 0.4).volumes.eq(0).all()  # all pruned: the volumes show it


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="probs"):
        rank_dice(torch.ones(1, 1, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="valid"):
        rank_dice(torch.ones(1, 1, 3), valid=torch.ones(1, 3))


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(run) -> int:  # noqa: ANN001
    """Return the largest number of bytes that live tensors made inside ``run`` hold at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    del kept
    return int(live.max())


@pytest.mark.parametrize("kind", ["fields", "channels_last", "half", "uniform", "constant", "no contrast", "one row"])
def test_extra_memory_is_at_most_twice_the_map(kind: str) -> None:
    if kind in ("fields", "channels_last", "half"):
        probs = smooth_maps(1, 21, 320, 512)
        probs = probs.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else probs
        probs = probs.half() if kind == "half" else probs
    elif kind == "one row":
        probs = smooth_maps(1, 2, 1536, 2048, grain=256)[:, :1].contiguous()
    else:
        probs = torch.rand(1, 2, 2048, 1024, generator=torch.Generator().manual_seed(0))  # not under the least budget
        probs = {"uniform": probs, "constant": torch.full_like(probs, 0.7), "no contrast": 0.2 * probs}[kind]
    assert peak_bytes(lambda: rank_dice(probs, prune=None)) <= 2 * probs.numel() * probs.element_size()
