"""The approximations against their formulas, the authors' program and the exact solver."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.rankdice.maps import check_masks, smooth_maps
from tests.rankdice.reference import (
    approximate_scores,
    integral_scores,
    program_volume,
)
from utils.rankdice import METRICS, rank_dice


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
    """All classes of one real image; docs/rankdice.md has the result for six images."""
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
