"""What counts as a gain: how much similar neighboring images count, and the limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from utils.evidence import CLEAR, CLEAR_IF_FEW, SMALLEST, clear, independent, standard_error


def chain(length: int, features: int, memory: float, seed: int = 0) -> Tensor:
    """Draw an autoregressive chain; the correlation at lag k is ``memory ** k``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, features, generator=generator, dtype=torch.float64)
    rows = [noise[0]]
    for step in noise[1:]:
        rows.append(memory * rows[-1] + (1 - memory**2) ** 0.5 * step)
    return torch.stack(rows)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.8])
def test_images_count_as_the_closed_form_says(memory: float) -> None:
    # 1 + 2 * sum of memory ** k
    expected = 2000 * (1 - memory) / (1 + memory)
    assert independent(chain(2000, 20, memory)) == pytest.approx(expected, rel=0.12)


def test_repeated_images_count_once() -> None:
    features = chain(30, 20, 0.0).repeat_interleave(6, dim=0)
    assert independent(features) == pytest.approx(30, rel=0.2)


def test_constant_features_say_nothing() -> None:
    assert independent(torch.ones(40, 3)) == 40
    rows = chain(400, 10, 0.5)
    assert independent(torch.cat([rows, torch.ones(400, 5)], dim=1)) == independent(rows)
    assert independent(torch.rand(1, 3)) == 1


def test_the_limit_is_so_many_standard_errors() -> None:
    gains = torch.tensor([0.0, 0.2] * 50, dtype=torch.float64)
    error = float(gains.std()) / 10
    assert standard_error(gains, 100) == pytest.approx(error)
    assert standard_error(gains, 25) == pytest.approx(2 * error)
    for factor, expected in ((0.99, False), (1.01, True)):
        assert clear(gains - gains.mean() + factor * CLEAR * error, 100) is expected
        few = CLEAR_IF_FEW * standard_error(gains, 10)
        assert clear(gains - gains.mean() + factor * few, 10) is expected
    assert not clear(-gains, 100)


def test_images_without_a_score_are_skipped() -> None:
    gains = torch.tensor([0.1, torch.nan, 0.3, torch.nan])
    assert standard_error(gains, 4) == pytest.approx(standard_error(gains[::2], 2))
    assert not clear(torch.tensor([0.5]), 1)
    assert not clear(torch.full((5,), torch.nan), 5)


def test_a_tiny_gain_is_not_worth_an_option() -> None:
    assert not clear(torch.full((100,), 0.9 * SMALLEST), 100)
    assert clear(torch.full((100,), 1.1 * SMALLEST), 100)
    assert not clear(torch.zeros(100), 100)
