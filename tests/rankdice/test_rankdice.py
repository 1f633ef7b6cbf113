"""The exact solver against slow references, brute force and Monte Carlo; batches, layouts and dtypes."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.rankdice.maps import check_masks, odd_rows, same, smooth_maps
from tests.rankdice.reference import (
    best_of_all_subsets,
    expected_scores,
    integral_scores,
)
from utils.rankdice import METRICS, SOLVERS, RankDice, exact, rank_dice
from utils.rankdice.integral import ORDERS, Goal, series_factors
from utils.rankdice.table import SERIES_RATE

SMOOTHS = (0.0, 0.3, 1.0, 20.0)
EXACT = settings(max_examples=60, deadline=None, derandomize=True)

probability = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 0.25, 1e-3, 0.999, 0.5000001]),
    st.floats(0, 1, width=32),
    st.floats(0, 1).map(lambda p: p**8),
)
row = st.lists(probability, min_size=1, max_size=14)


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
    """At every 101st volume and at all volumes near the result; smaller maps are compared at every volume."""
    probs = smooth_maps(1, 2, height, 2 * height, seed=height, grain=128)[:, :1]
    found = rank_dice(probs, metric)
    most, near = int((probs > 0).sum()), int(found.volumes)
    volumes = np.union1d(np.arange(1, most + 1, 101), np.arange(max(near - 3000, 1), min(near + 3000, most) + 1))
    scores = integral_scores(probs.numpy().ravel(), metric, 0.0, volumes)
    assert float(found.scores) == pytest.approx(scores.max(), rel=1e-9)
    assert scores[np.searchsorted(volumes, near)] >= scores.max() * (1 - 1e-9)


def rows_of_mean(mean: int) -> list[Tensor]:
    """Return rows ``(N,)`` with about this mean volume, of few or many kinds of pixels."""
    generator = torch.Generator().manual_seed(mean)
    two = torch.cat([torch.full((mean,), 0.75), torch.full((mean,), 0.25)])
    rows = [torch.ones(mean), torch.full((2 * mean,), 0.5), two, torch.rand(4 * mean, generator=generator) ** 3]
    rows += [torch.full((50 * mean,), 0.02), torch.full((mean,), 0.9), torch.full((mean,), 0.7)] * (mean < 100)
    sizes = [5600, 140_000] if mean < 80 else [5600]
    return [torch.nn.functional.pad(row, (0, max(0, size - len(row)))) for row in rows for size in sizes]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mean", [3, 40, 82, 235, 1210, 46_000])
def test_scores_where_fewer_power_sums_begin_to_do(mean: int, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mean < SERIES_RATE or any(0 <= mean / rate - 1 < 0.03 for rate in exact.FAR_RATES)
    for row in rows_of_mean(mean):
        for most_sorted in (0, len(row)):
            monkeypatch.setattr(exact, "SORTED_PIXELS", most_sorted)
            found = rank_dice(row.view(1, 1, -1), metric, prune=None)
            (score,) = integral_scores(row.numpy(), metric, 0.0, found.volumes[0].numpy())
            assert float(found.scores) == pytest.approx(score, rel=2e-10)


def test_higher_powers_are_replaced_by_the_best_polynomials() -> None:
    p = torch.linspace(0, 1, 4001, dtype=torch.float64)
    factors = series_factors(5, p.device)
    sign = torch.tensor([1.0, -1.0] * (ORDERS // 2), dtype=torch.float64)
    for n in range(1, 6):
        known = p ** torch.arange(1, n + 1).unsqueeze(1)
        assert torch.equal(factors[n, :n, :n], sign[:n].diag())
        wrong = (sign[n] * factors[n, n, :n] @ known - p ** (n + 1)) / p.clamp(min=1e-9)
        assert float(wrong.abs().max()) == pytest.approx(2 ** (1 - 2 * n), rel=1e-6)
        assert not factors[n, :, n:5].any()
        counts = torch.arange(1, 1 + ORDERS, dtype=torch.float64).unsqueeze(1)
        assert torch.allclose(factors[n, :, :5] / counts, factors[n, :, 5:], rtol=1e-15)


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
    goal, mean, variance = Goal(metric, smooth), mass[-1:], float((probs * (1 - probs)).sum())
    total = (mean + smooth).clamp(min=1e-100)
    rate = goal.rate(total, volume, mass)
    least = goal.least(rate, mass)
    assert (least <= scores * (1 + 1e-12) + 1e-300).all()
    assert (least + 2 / total >= scores * (1 - 1e-12)).all()
    assert (rate.diff() >= -1e-12).all()
    lead = ((mass if metric == "iou" else 2 * mass) + smooth) / rate
    for cut in (0.0, 0.1, 0.3, 0.5, float(lead.max()) / 2, 0.9, torch.inf):
        known = int((probs > cut).sum())
        most = goal.most(float(total), known, float(mass[known]), cut)
        assert most >= lead.max() * (1 - 1e-12)
    best = scores.max()
    if best <= 0:
        return
    # If only the volumes from `first` to `last` are looked at, is the best one proven to be among them?
    few, half = max(float(volume[scores.argmax()]) - 1 + smooth, smooth or 1), goal.half(float(least.max()))
    low, high = half - goal.below(variance, few), half + goal.above(float(total), variance, few)
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
        mean, variance = float(probs.sum()), float((probs * (1 - probs)).sum())
        step = max(1, shape[1] // 500)
        volume = torch.arange(1, shape[1] + 1).double()
        scores = torch.from_numpy(integral_scores(probs.numpy(), metric, 0.0, np.arange(1, shape[1], step)))
        best = scores.argmax() * step + 1  # the best volume of the grid, which may be a step away from the best one
        least = goal.least(goal.rate(mean, volume, probs.cumsum(0)), probs.cumsum(0))
        assert (least <= 1).all()
        assert scores.max() <= least.max() + 2 / mean
        for few in (best / 3, max(1.0, best - step - 1)):  # volumes that are certainly below the best one
            few, half = max(1, float(few)), goal.half(float(least.max()))
            assert best - step <= int((probs > half - goal.below(variance, few)).sum())
            assert best + step >= int((probs >= half + goal.above(mean, variance, few)).sum())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("guess", [0.0, 0.01, 0.3, 0.9, 2.0])
def test_a_wrong_guess_costs_time_only(metric: str, guess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any estimate from the sample, the best cut is among the pixels that are examined."""
    probs = torch.cat([smooth_maps(1, 3, 75, 75).flatten(2), odd_rows(5625)], 1)
    expected = rank_dice(probs, metric, prune=None)
    check_masks(probs, expected)
    for mean in (0.0, 3e3, 1e9):

        def estimate(rows: Tensor, goal: Goal, mean: float = mean) -> tuple[torch.Tensor, torch.Tensor]:
            return rows.new_full((len(rows), 1), guess), rows.new_full((len(rows), 1), mean)

        monkeypatch.setattr(exact, "_estimate", estimate)
        found = rank_dice(probs, metric, prune=None)
        # Power sums now replace more or fewer pixels, so the scores differ slightly more.
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
    """For pixels of probability 1, the rates of IoU are equal up to rounding; the window must still advance."""
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


def test_a_row_needs_as_many_power_sums_alone_as_beside_another() -> None:
    """Two power sums are enough for the first row, and the second one needs more: its piece of the map has both."""
    generator = torch.Generator().manual_seed(0)
    full, faint = torch.rand(2, 1, 1, 125_000, 1, generator=generator, dtype=torch.float64)
    full, faint = 0.86 + 0.1 * full, faint**60
    both = rank_dice(torch.cat([full, faint], 1), prune=None).scores
    alone = torch.cat([rank_dice(row, prune=None).scores for row in (full, faint)], 1)
    assert torch.allclose(both, alone, rtol=1e-13, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pixels", [1600, 60_000])
def test_rows_of_a_small_mean_score_the_same_alone_and_beside_others(pixels: int, metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([2.0, 20.0, 45.0, 60.0, 79.0, 90.0, 150.0, 220.0, 300.0]).unsqueeze(1)
    chance, grade = torch.rand(2, 9, pixels, generator=generator)
    rows = ((chance < mean * 1.3 / pixels) * grade**0.3).unsqueeze(0)
    both = rank_dice(rows, metric, prune=None)
    for row, single in enumerate(rows.split(1, 1)):
        assert same(rank_dice(single, metric, prune=None), RankDice(*(part[:, row, None] for part in both)))


def test_the_power_sums_suffice_for_every_volume_that_can_be_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best volume of a row adds to the decay rate, but for the pixels in the table, which may all be left out."""
    sums = (2500.0, 2000.0)
    limits = exact._limits(Goal("dice", 0.0), 3300.0, 0.4, sums, (2600.0, 2300.0))
    assert limits.high < 1
    assert limits.most == 2500 + 2600 - 3300
    assert exact._limits(Goal("iou", 0.0), 3300.0, 0.4, sums, (2600.0, 2300.0)).high > 1  # its rate may be the mean
    assert exact._limits(Goal("dice", 0.0), 3300.0, 0.4, sums, (1000.0, 900.0)).high > 1
    probs = smooth_maps(1, 3, 90, 100)
    expected, sorted_rows, found = rank_dice(probs), [], exact._limits

    def no_room(*args: object) -> object:
        return found(*args)._replace(most=-1)

    def record(rows: Tensor, *args: object) -> Tensor:
        sorted_rows.append(len(rows))
        return solve_sorted(rows, *args)

    solve_sorted = exact.solve_sorted
    monkeypatch.setattr(exact, "_limits", no_room)
    monkeypatch.setattr(exact, "solve_sorted", record)
    assert torch.equal(rank_dice(probs).masks, expected.masks)
    assert sum(sorted_rows) == int((expected.volumes > 0).sum()) > 0


def test_maps_may_be_solved_in_several_threads_at_once() -> None:
    maps = [smooth_maps(1, 3, 150, 151 + i) for i in range(8)] * 4
    expected = [rank_dice(probs) for probs in maps]
    with ThreadPoolExecutor(8) as pool:
        assert all(map(same, pool.map(rank_dice, maps), expected))


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


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_pixel_of_a_mask_is_written(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = smooth_maps(1, 2, 400, 400)
    sparse[:, :, 100:] = 0
    some_pruned = torch.cat([smooth_maps(2, 3, 60, 90), torch.full((2, 1, 60, 90), 0.1)], 1)
    crowded = 0.45 + 1e-4 * torch.rand(1, 2, 150, 160, generator=torch.Generator().manual_seed(1))
    maps = [smooth_maps(1, 2, 40, 50), smooth_maps(1, 3, 90, 100), some_pruned]
    maps += [sparse, crowded, torch.zeros(2, 1, 9)] * (solver == "exact")
    options = [{"prune": 0.5}, {"prune": None}, {"prune": 0.5, "max_bytes": 1}]
    expected = [rank_dice(probs, solver=solver, **some) for probs in maps for some in options]
    monkeypatch.setattr(torch, "empty", lambda *args, **more: torch.ones(*args, **more))
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *args, **more: like.new_ones(*args, **more))
    found = [rank_dice(probs, solver=solver, **some) for probs in maps for some in options]
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


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
    """Values that a dtype represents exactly give the same masks as in float64."""
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
