"""RankDice against slow references, brute force, Monte Carlo and itself (batches, layouts, dtypes, chunks)."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate
from torch.profiler import ProfilerActivity, profile

from tests.rankdice.reference import (
    approximate_scores,
    best_of_all_subsets,
    expected_scores,
    integral_scores,
    program_volume,
)
from utils.rankdice import METRICS, SOLVERS, RankDice, exact, label_map, rank_dice
from utils.rankdice.integral import Goal

SMOOTHS = (0.0, 0.3, 1.0, 20.0)
EXACT = settings(max_examples=60, deadline=None, derandomize=True)

probability = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 0.25, 1e-3, 0.999, 0.5000001]),
    st.floats(0, 1, width=32),
    st.floats(0, 1).map(lambda p: p**8),
)
row = st.lists(probability, min_size=1, max_size=14)


def smooth_maps(*shape: int, seed: int = 0, contrast: float = 6.0, grain: int = 16) -> Tensor:
    """Return probabilities (B, C, H, W) as a network's: smooth random fields with a little noise, through softmax."""
    generator = torch.Generator().manual_seed(seed)
    batch, classes, height, width = shape
    coarse = torch.randn(batch, classes, height // grain + 2, width // grain + 2, generator=generator)
    logits = interpolate(coarse, (height, width), mode="bicubic", align_corners=False) * contrast
    return (logits + 0.3 * torch.randn(shape, generator=generator)).softmax(1)


def odd_rows(pixels: int = 5000) -> Tensor:
    """Return rows (1, R, N) of every kind that the solver treats differently."""
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(pixels, generator=generator)
    kinds = [
        uniform,
        uniform**8,
        uniform**60,
        uniform * 0.2,
        uniform * 1e-4,
        (uniform * 8).round() / 8,
        torch.full_like(uniform, 0.7),
        torch.full_like(uniform, 0.003),
        torch.ones_like(uniform),
        torch.zeros_like(uniform),
        (uniform > 0.9).float(),
        torch.where(uniform > 0.5, torch.ones_like(uniform), 0.3),
        torch.cat([torch.tensor([0.6]), torch.full((pixels - 1,), 0.005)]),
        torch.cat([torch.tensor([0.9, 0.6]), torch.full((pixels - 2,), 1e-6)]),
        torch.cat([torch.tensor([0.51]), 0.01 + 0.2 * uniform[1:]]),
        torch.cat([torch.full((pixels // 2,), 0.45), uniform[pixels // 2 :] * 0.9]),
        0.45 + 0.0001 * uniform,
        uniform.clamp(max=0.5),
    ]
    return torch.stack(kinds).unsqueeze(0)


def same(a: RankDice, b: RankDice) -> bool:
    """Say whether volumes, masks, cut-offs and largest values are equal, and scores to 1e-12."""
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("masks", "volumes", "cutoffs", "highest"))
    return equal and torch.allclose(a.scores, b.scores, rtol=1e-12, atol=0)


def check_masks(probs: Tensor, found: RankDice) -> None:
    """A mask holds exactly ``volumes`` pixels, the most probable ones, and of equal ones those with low index."""
    rows, masks = probs.flatten(2), found.masks.flatten(2)
    assert torch.equal(masks.sum(2), found.volumes)
    order = rows.double().sort(dim=2, descending=True, stable=True).indices
    places = torch.arange(rows.shape[2]).expand_as(order)
    rank = torch.empty_like(order).scatter_(2, order, places)
    assert torch.equal(masks, rank < found.volumes.unsqueeze(2))
    inside = torch.where(masks, rows, torch.inf).amin(2) if rows.shape[2] else found.cutoffs
    assert torch.equal(found.cutoffs, inside)


# --- the exact solver is exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("smooth", SMOOTHS)
@EXACT
@given(row=row)
@example(row=[1.0])
@example(row=[0.0])
@example(row=[1e-30, 1e-38])
@example(row=[1.0] * 5 + [0.0] * 5)
@example(row=[0.5] * 14)
@example(row=[1.0, 0.4, 0.4, 0.4, 0.4])
def test_small_rows_against_the_joint_distribution(row: list[float], metric: str, smooth: float) -> None:
    probs = torch.tensor(row, dtype=torch.float64).view(1, 1, -1)
    found = rank_dice(probs, metric, smooth=smooth, prune=None)
    scores = expected_scores(np.array(row), metric, smooth)
    best = scores.max()
    assert float(found.scores) == pytest.approx(best, rel=1e-9, abs=1e-300)
    assert scores[int(found.volumes)] == pytest.approx(best, rel=1e-9, abs=1e-300)
    check_masks(probs, found)


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(row=st.lists(probability, min_size=1, max_size=7), smooth=st.sampled_from(SMOOTHS))
def test_no_subset_is_better(row: list[float], smooth: float, metric: str) -> None:
    found = rank_dice(torch.tensor(row, dtype=torch.float64).view(1, 1, -1), metric, smooth=smooth, prune=None)
    assert float(found.scores) == pytest.approx(
        best_of_all_subsets(np.array(row), metric, smooth), rel=1e-9, abs=1e-300
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_odd_rows_against_the_integral_at_every_volume(metric: str, smooth: float) -> None:
    probs = odd_rows(3000)
    found = rank_dice(probs, metric, smooth=smooth, prune=None)
    check_masks(probs, found)
    for k, row in enumerate(probs[0].numpy()):
        positive = int((row > 0).sum())
        if positive == 0:
            assert found.volumes[0, k] == 0
            assert float(found.scores[0, k]) == pytest.approx(float(smooth > 0), rel=1e-14, abs=0)
            continue
        scores = integral_scores(row, metric, smooth, np.arange(1, positive + 1))
        score, volume = float(found.scores[0, k]), int(found.volumes[0, k])
        assert score >= scores.max() * (1 - 1e-9), k
        if volume:
            assert score == pytest.approx(scores[volume - 1], rel=1e-9), k


@pytest.mark.parametrize("metric", METRICS)
def test_maps_against_the_integral_at_every_volume(metric: str) -> None:
    probs = smooth_maps(1, 4, 96, 128)
    found = rank_dice(probs, metric)
    check_masks(probs, found)
    for k, row in enumerate(probs[0].flatten(1).numpy()):
        scores = integral_scores(row, metric, 0.0, np.arange(1, row.size + 1))
        assert float(found.scores[0, k]) >= scores.max() * (1 - 1e-9)
        assert scores[int(found.volumes[0, k]) - 1] >= scores.max() * (1 - 1e-9)
        assert float(found.scores[0, k]) == pytest.approx(scores.max(), rel=1e-9)


@pytest.mark.parametrize(("metric", "height"), [("dice", 1024), ("iou", 512)])
def test_a_large_map_against_the_integral(metric: str, height: int) -> None:
    """At one volume in 101 and at all near the one that was found; smaller maps are compared at every volume."""
    probs = smooth_maps(1, 2, height, 2 * height, seed=height, grain=128)[:, :1]
    found = rank_dice(probs, metric)
    most, near = int((probs > 0).sum()), int(found.volumes)
    volumes = np.union1d(np.arange(1, most + 1, 101), np.arange(max(near - 3000, 1), min(near + 3000, most) + 1))
    scores = integral_scores(probs.numpy().ravel(), metric, 0.0, volumes)
    assert float(found.scores) == pytest.approx(scores.max(), rel=1e-9)
    assert scores[np.searchsorted(volumes, near)] >= scores.max() * (1 - 1e-9)


def test_the_score_is_the_mean_dice_of_drawn_labels() -> None:
    probs = smooth_maps(1, 2, 24, 32, seed=4)
    generator = torch.Generator().manual_seed(5)
    for metric in METRICS:
        found = rank_dice(probs, metric)
        for k in range(2):
            p, mask = probs[0, k].flatten(), found.masks[0, k].flatten()
            labels = torch.rand(8000, p.numel(), generator=generator) < p
            both = (labels & mask).sum(1).double()
            size, volume = labels.sum(1), mask.sum()
            drawn = 2 * both / (size + volume) if metric == "dice" else both / (size + volume - both)
            error = drawn.std() / len(drawn) ** 0.5
            assert abs(drawn.mean() - found.scores[0, k]) < 4 * error


# --- the bounds hold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@EXACT
@example(row=[1.0, 1.0, 0.0], smooth=0.0)
@given(row=row, smooth=st.sampled_from(SMOOTHS))
def test_bounds_hold_at_every_volume(row: list[float], smooth: float, metric: str) -> None:
    probs = torch.tensor(sorted(row, reverse=True), dtype=torch.float64)
    scores = torch.from_numpy(expected_scores(probs.numpy(), metric, smooth))
    volume, mass = torch.arange(len(row) + 1).double(), torch.cat([torch.zeros(1).double(), probs.cumsum(0)])
    goal, mean, variance = Goal(metric, smooth), mass[-1:], (probs * (1 - probs)).sum().view(1)
    total = (mean + smooth).clamp(min=1e-100)
    rate = goal.rate(total, volume, mass)
    least = goal.least(rate, mass)
    assert (least <= scores * (1 + 1e-12) + 1e-300).all()
    assert (least + 2 / total >= scores * (1 - 1e-12)).all()
    assert (rate.diff() >= -1e-12).all()
    lead = ((mass if metric == "iou" else 2 * mass) + smooth) / rate
    for cut in (0.0, 0.1, 0.3, 0.5, float(lead.max()) / 2, 0.9, torch.inf):
        known = int((probs > cut).sum())
        most = goal.most(total, volume[known : known + 1], mass[known : known + 1], torch.tensor([cut]).double())
        assert most >= lead.max() * (1 - 1e-12)
    best = scores.max()
    if best <= 0:
        return
    # If only the volumes from `first` to `last` are looked at, is the best one proven to be among them?
    few = (volume[scores.argmax()] - 1 + smooth).clamp(min=smooth or 1).view(1)
    below, above = goal.margins(total, variance, few)
    low, high = goal.half(least.max()) - below, goal.half(least.max()) + above
    for first, last in itertools.combinations_with_replacement(range(len(row) + 1), 2):
        before, behind = probs[:first], probs[last:]  # a smaller volume leaves out the last of `before`
        if (before >= high * (1 + 1e-12)).all() and (behind <= low * (1 - 1e-12)).all():
            assert scores[first : last + 1].max() >= best * (1 - 1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(30, 900), (12, 20_000)])
def test_cuts_hold_for_larger_rows(metric: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    goal = Goal(metric, 0.0)
    for k in range(shape[0]):
        probs = torch.rand(shape[1], generator=generator, dtype=torch.float64) ** (1 + k) * (0.2 if k % 3 == 0 else 1)
        probs = probs.sort(descending=True).values
        mean, variance = probs.sum(), (probs * (1 - probs)).sum()
        step = max(1, shape[1] // 500)
        volume = torch.arange(1, shape[1] + 1).double()
        scores = torch.from_numpy(integral_scores(probs.numpy(), metric, 0.0, np.arange(1, shape[1], step)))
        best = scores.argmax() * step + 1  # the best of the grid, which may lie a step from the best volume
        least = goal.least(goal.rate(mean, volume, probs.cumsum(0)), probs.cumsum(0))
        assert (least <= 1).all()
        assert scores.max() <= least.max() + 2 / mean
        for few in (best / 3, max(1.0, best - step - 1)):  # volumes that the best one surely exceeds
            few = torch.tensor([float(max(1, few))])
            below, above = goal.margins(mean, variance, few)
            assert best - step <= int((probs > goal.half(least.max()) - below).sum())
            assert best + step >= int((probs >= goal.half(least.max()) + above).sum())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("guess", [0.0, 0.01, 0.3, 0.9, 2.0])
def test_a_wrong_guess_costs_time_only(metric: str, guess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever cut and mean volume the sample suggests, the best cut is among the pixels that are looked at."""
    probs = torch.cat([smooth_maps(1, 3, 75, 75).flatten(2), odd_rows(5625)], 1)
    expected = rank_dice(probs, metric, prune=None)
    check_masks(probs, expected)
    for mean in (0.0, 3e3, 1e9):

        def estimate(rows: torch.Tensor, mean: float = mean) -> tuple[torch.Tensor, torch.Tensor]:
            return rows.new_full((len(rows), 1), guess), rows.new_full((len(rows), 1), mean)

        monkeypatch.setattr(exact, "_estimate", estimate)
        found = rank_dice(probs, metric, prune=None)
        # Power sums stand for more or fewer pixels now: the scores differ a little more.
        assert torch.allclose(found.scores, expected.scores, rtol=1e-9, atol=0)
        assert torch.equal(found.volumes, expected.volumes)
        assert torch.equal(found.masks, expected.masks)


@pytest.mark.parametrize("metric", METRICS)
def test_crowded_rows_are_sorted_to_the_same_answer(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.cat([smooth_maps(1, 3, 75, 75).flatten(2), odd_rows(5625)], 1)
    for smooth in (0.0, 1.0):
        expected = rank_dice(probs, metric, smooth=smooth, prune=None)
        for name, value in (("TABLE_BYTES", 1 << 40), ("SORTED_PIXELS", 10_000)):
            with monkeypatch.context() as patch:
                patch.setattr(exact, name, value)
                patch.setattr(exact, "MOST_PIXELS", 8)
                found = rank_dice(probs, metric, smooth=smooth, prune=None)
            assert torch.allclose(found.scores, expected.scores, rtol=1e-10, atol=0)
            assert torch.equal(found.masks, expected.masks)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_with_plateaus_end_and_are_right(metric: str, dtype: torch.dtype) -> None:
    """1,250 random rows per dtype and metric: plateaus, quantized values, faint and sure rows, few and many pixels."""
    generator = torch.Generator().manual_seed(7)
    for count, pixels in ((250, 1), (250, 2), (300, 13), (300, 120), (130, 1500), (20, 9000)):
        draw = torch.rand(count, 6, 1, generator=generator)
        probs = torch.rand(count, pixels, generator=generator) ** (0.2 * 500 ** draw[:, 0]) * 1e-3 ** draw[:, 1] ** 4
        levels = (255 * draw[:, 2] ** 4).round()
        probs = torch.where(draw[:, 3] < 0.4, (probs * levels).round() / levels.clamp(min=1), probs)
        plateau = torch.tensor([1.0, 1.0, 0.999, 0.7, 0.5, 2**0.5 - 1, 1e-3])[(draw[:, 4] * 7).long()]
        length = pixels * (2 * draw[:, 5] - 1)  # none in half of the rows
        probs = torch.where(torch.arange(pixels) < length, plateau, probs).to(dtype)[None, ..., None]
        for smooth in (0.0, 1e-3):
            found = rank_dice(probs, metric, smooth=smooth, prune=None)
            check_masks(probs, found)
            if smooth:
                continue
            assert torch.equal(found.masks, rank_dice(probs.double(), metric, prune=None).masks)
            for k in range(0, count, 100):
                row = probs[0, k, :, 0].double().numpy()
                positive = int((row > 0).sum())
                if positive:
                    scores = integral_scores(row, metric, smooth, np.arange(1, positive + 1))
                    assert float(found.scores[0, k]) == pytest.approx(scores.max(), rel=1e-9)
                    assert scores[int(found.volumes[0, k]) - 1] >= scores.max() * (1 - 1e-9)


@pytest.mark.parametrize("smooth", [0.0, 0.001, 1.0])
def test_certain_pixels_end(smooth: float) -> None:
    """Along pixels of probability 1 the rates of IoU are equal but for rounding: the window must still advance."""
    assert rank_dice(torch.ones(1, 1, 2), "iou", smooth=smooth).volumes.item() == 2
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(1, 8, 2000, generator=generator)
    probs[:, :, :700] = 1
    found = rank_dice(probs, "iou", smooth=smooth)
    assert (found.volumes >= 700).all()
    check_masks(probs, found)


def test_two_pixels_by_hand() -> None:
    """Two pixels, p = 0.9 and 0.4, as worked out in ``docs/rankdice.md``."""
    p, q = 0.9, 0.4
    one = p * (1 - q) * 1 + p * q * 2 / 3
    two = p * q * 1 + (p * (1 - q) + (1 - p) * q) * 2 / 3
    found = rank_dice(torch.tensor([p, q], dtype=torch.float64).view(1, 1, 2))
    assert two < one
    assert found.volumes.tolist() == [[1]]
    assert float(found.scores) == pytest.approx(one, rel=1e-12)
    assert rank_dice(torch.tensor([0.6, 0.45]).view(1, 1, 2)).volumes.tolist() == [[2]]


# --- approximations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ba", "trna", "rma"])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_approximations_against_direct_sums(solver: str, smooth: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(1, 3, 40, generator=generator, dtype=torch.float64) ** torch.tensor([[[1.0], [3.0], [9.0]]])
    rows = torch.cat([rows, torch.full((1, 1, 40), 0.5, dtype=torch.float64), rows.round()], 1)
    for metric in (name for name, score in METRICS.items() if solver in score.solvers):
        found = rank_dice(rows, metric, solver, smooth=smooth, prune=None)
        check_masks(rows, found)
        for k in range(rows.shape[1]):
            scores = approximate_scores(rows[0, k].numpy(), metric, solver, smooth)
            volume = int(found.volumes[0, k])
            assert volume > 0
            assert float(found.scores[0, k]) == pytest.approx(scores.max(), rel=1e-9)
            assert scores[volume - 1] == pytest.approx(scores.max(), rel=1e-9)


def test_paper_is_the_program_behind_the_published_tables() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(24, 400, generator=generator, dtype=torch.float64) ** torch.linspace(0.6, 40, 24).unsqueeze(1)
    rows = torch.cat([rows, 0.49 * rows[:2], 0.3 + 0.3 * rows[:6]]).unsqueeze(0)
    counts = (rows >= 0.5).sum(2)[0]
    assert (counts == 0).any()
    assert ((counts > 0) & (counts <= 50)).sum() > 5
    assert (counts > 50).sum() > 5
    for smooth in (0.0, 1.0):
        found = rank_dice(rows, solver="paper", smooth=smooth, prune=None)
        expected = [program_volume(row.numpy(), smooth) for row in rows[0]]
        assert found.volumes[0].tolist() == expected
        check_masks(rows, found)


def test_paper_on_a_networks_probabilities(shared_dir: Path) -> None:
    """Every class of one real image; docs/rankdice.md has the result for six."""
    with np.load(shared_dir / "data" / "camvid_probs" / "val.npz") as data:
        logits = torch.from_numpy(data["logits8"][:1, :, ::2, ::2].astype(np.float64))
    probs = (logits / 255 * 16 - 8).sigmoid()
    found = rank_dice(probs, solver="paper", prune=None)
    assert found.volumes[0].tolist() == [program_volume(row.numpy()) for row in probs[0].flatten(1)]
    check_masks(probs, found)


@pytest.mark.parametrize("solver", ["ba", "trna", "rma"])
def test_approximations_lose_little_and_never_win(solver: str) -> None:
    probs = smooth_maps(1, 3, 48, 64, seed=2)
    exact, other = rank_dice(probs), rank_dice(probs, solver=solver)
    for k in range(3):
        volumes = np.array([int(other.volumes[0, k])])
        reached = integral_scores(probs[0, k].numpy().ravel(), "dice", 0.0, volumes)[0]
        best = float(exact.scores[0, k])
        assert best * (1 - 1e-3) < reached <= best * (1 + 1e-10)


# --- batches, chunks, layouts, dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_gives_what_single_rows_give(solver: str) -> None:
    rows = odd_rows(2100) if solver == "exact" else odd_rows(700)
    rows = torch.cat([rows, rows.roll(7, 2).flip(1)]).contiguous()[:, :: 1 if solver == "exact" else 2]
    for metric, smooth in itertools.product(
        [name for name, score in METRICS.items() if solver in score.solvers], (0.0, 1.0)
    ):
        options = {"metric": metric, "solver": solver, "smooth": smooth, "prune": 0.4}
        whole = rank_dice(rows, **options)
        order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))
        shuffled = rank_dice(rows[:, order], **options)
        assert same(RankDice(*(part[:, order] for part in whole)), shuffled)
        for b, c in itertools.product(range(rows.shape[0]), range(rows.shape[1])):
            single = rank_dice(rows[b : b + 1, c : c + 1], **options)
            assert same(single, RankDice(*(part[b : b + 1, c : c + 1] for part in whole))), (b, c)


@pytest.mark.parametrize("metric", METRICS)
def test_maps_give_the_same_alone_and_in_any_chunks(metric: str) -> None:
    probs = smooth_maps(2, 5, 190, 211)
    whole = rank_dice(probs, metric)
    check_masks(probs, whole)
    for b, c in itertools.product(range(2), range(5)):
        single = rank_dice(probs[b : b + 1, c : c + 1], metric)
        assert same(single, RankDice(*(part[b : b + 1, c : c + 1] for part in whole)))
    for max_bytes in (1, 300_000, 2_000_000, 1 << 30):
        assert same(rank_dice(probs, metric, max_bytes=max_bytes), whole), max_bytes


@pytest.mark.parametrize("metric", METRICS)
def test_threads_change_nothing(metric: str) -> None:
    probs = smooth_maps(1, 3, 190, 211)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rank_dice(probs, metric)
        torch.set_num_threads(3)
        assert same(rank_dice(probs, metric), one)
    finally:
        torch.set_num_threads(threads)


def test_memory_layouts() -> None:
    probs = smooth_maps(2, 3, 48, 52)
    expected = rank_dice(probs)
    before = probs.clone()
    wide = torch.zeros(2, 3, 96, 104)
    wide[:, :, ::2, ::2] = probs
    layouts = [
        probs.contiguous(memory_format=torch.channels_last),
        probs.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        wide[:, :, ::2, ::2],
        probs.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    for layout in layouts:
        assert same(rank_dice(layout), expected)
    assert torch.equal(rank_dice(probs).masks, expected.masks)
    assert torch.equal(probs, before)
    assert expected.masks.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 3, 5, 8), (2, 3, 2, 4, 5), (1, 1, 1), (1, 1, 1, 1)])
def test_any_number_of_spatial_dimensions(shape: tuple[int, ...]) -> None:
    probs = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = rank_dice(probs, prune=None)
    flat = rank_dice(probs.flatten(2), prune=None)
    assert found.masks.shape == shape
    assert torch.equal(found.masks.flatten(2), flat.masks)
    assert found.volumes.shape == shape[:2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes_give_what_the_same_values_give(dtype: torch.dtype, metric: str) -> None:
    """Values that a dtype holds exactly give the same masks as in float64; float64 sees no further rounding."""
    probs = smooth_maps(1, 3, 64, 80).to(dtype)
    found, wide = rank_dice(probs, metric), rank_dice(probs.double(), metric)
    assert torch.equal(found.masks, wide.masks)
    assert torch.allclose(found.scores, wide.scores, rtol=1e-9)
    assert found.cutoffs.dtype == dtype
    assert found.scores.dtype == torch.float64
    check_masks(probs, found)


def test_float32_and_float64_agree_on_the_score() -> None:
    probs = smooth_maps(1, 3, 64, 80).double() * (1 - 1e-9)
    assert torch.allclose(rank_dice(probs).scores, rank_dice(probs.float()).scores, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_a_gpu_gives_the_masks_of_the_cpu(metric: str) -> None:
    probs = torch.cat([smooth_maps(2, 5, 190, 211).flatten(2), odd_rows(190 * 211).expand(2, -1, -1)], 1)
    expected, found = rank_dice(probs, metric), rank_dice(probs.cuda(), metric)
    assert torch.equal(found.masks.cpu(), expected.masks)
    assert torch.allclose(found.scores.cpu(), expected.scores, rtol=1e-12)


# --- corners ----------------------------------------------------------------------------------------------------------


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
    """One certain pixel more than the plateau is worth: the volume ends somewhere among equal probabilities."""
    probs = (smooth_maps(1, 1, 256, 256, grain=64) * 3).round() / 3 * 0.7 + 0.15
    for metric in METRICS:
        check_masks(probs, rank_dice(probs, metric))


@pytest.mark.parametrize("solver", ["exact", "rma"])
@pytest.mark.parametrize("pixels", [60, 9000])
def test_torn_ties_drop_the_last_pixels(solver: str, pixels: int) -> None:
    """The cut runs through a plateau of pixels with the probability at which one more neither helps nor harms."""
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


# --- label maps -------------------------------------------------------------------------------------------------------


def label_total(probs: Tensor, labels: Tensor, smooth: float = 0.0) -> float:
    """Return what ``label_map`` maximizes, for one image (C, N)."""
    probs = probs.double()
    total = 0.0
    for c in range(probs.shape[0]):
        own = labels == c
        total += float((2 * probs[c][own].sum() + smooth) / (own.sum() + probs[c].sum() + 1 + smooth))
    return total


def test_label_map_beats_argmax_and_comes_near_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(12):
        probs = (3 * torch.randn(3, 6, generator=generator)).softmax(0)
        labels = label_map(probs.unsqueeze(0))[0]
        best = max(label_total(probs, torch.tensor(choice)) for choice in itertools.product(range(3), repeat=6))
        reached = label_total(probs, labels)
        assert reached >= label_total(probs, probs.argmax(0)) - 1e-12
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
        assert label_total(probs[b].flatten(1), labels[b].flatten()) >= label_total(
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
