"""benchmarks/rankdice.py: the score of masks from other packages."""

from __future__ import annotations

import pytest
import torch

from benchmarks.rankdice import exact_score
from utils.rankdice import METRICS, rank_dice


@pytest.mark.parametrize("metric", METRICS)
def test_the_score_of_a_volume_is_that_of_the_solver(metric: str) -> None:
    probs = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)).sigmoid()
    found = rank_dice(probs, metric=metric, prune=None)
    for c in range(3):
        score = exact_score(probs[0, c].flatten(), int(found.volumes[0, c]), metric)
        assert score == pytest.approx(float(found.scores[0, c]), abs=1e-12)
