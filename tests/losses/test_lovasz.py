"""The Lovász extension against its definition, and where float32 matters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.losses.lovasz import jaccard_gradient, lovasz_extension


def jaccard_loss(wrong: set[int], truth: set[int]) -> float:
    """Return 1 - intersection / union if exactly the pixels ``wrong`` are wrong; 0 if there are none."""
    predicted = truth ^ wrong
    union = truth | predicted
    return 1 - len(truth & predicted) / len(union) if union else 0.0


def extension_by_definition(errors: list[float], truth: set[int], valid: set[int]) -> float:
    """Sum errors from the largest down times the rise of the set function (Berman et al., definition 1)."""
    total, wrong = 0.0, set()
    for pixel in sorted(valid, key=lambda i: -errors[i]):
        rise = jaccard_loss(wrong | {pixel}, truth & valid) - jaccard_loss(wrong, truth & valid)
        total += errors[pixel] * rise
        wrong.add(pixel)
    return total


@st.composite
def rows(draw):
    size = draw(st.integers(1, 12))
    numbers = st.floats(0, 5) | st.sampled_from([0.0, 0.5, 1.0])  # ties, too
    errors = draw(st.lists(numbers, min_size=size, max_size=size))
    flags = st.lists(st.booleans(), min_size=size, max_size=size)
    return errors, draw(flags), draw(flags)


def tensors(row) -> tuple[Tensor, Tensor, Tensor]:
    errors, truth, valid = row
    return torch.tensor([errors], dtype=torch.float64), torch.tensor([truth]), torch.tensor([valid])


@settings(max_examples=300, deadline=None)
@given(rows())
def test_extension_equals_its_definition(row):
    errors, truth, valid = row
    expected = extension_by_definition(
        errors, {i for i, t in enumerate(truth) if t}, {i for i, v in enumerate(valid) if v}
    )
    assert lovasz_extension(*tensors(row)).item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(rows())
def test_gradient_is_a_distribution_of_the_whole_loss(row):
    _, _, valid = tensors(row)
    gradient = jaccard_gradient(*tensors(row))
    assert (gradient >= 0).all()
    assert (gradient[~valid] == 0).all()
    # The decreases lead from the perfect prediction to the one in which every valid pixel is wrong.
    assert gradient.sum().item() == pytest.approx(float(valid.any()), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_hard_errors_give_the_jaccard_loss(pixels):
    truth = torch.tensor([[t for t, _ in pixels]])
    wrong = torch.tensor([[w for _, w in pixels]])
    expected = jaccard_loss(set(wrong[0].nonzero()[:, 0].tolist()), set(truth[0].nonzero()[:, 0].tolist()))
    found = lovasz_extension(wrong.double(), truth, torch.ones_like(truth))
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_rows_are_independent():
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(5, 40, generator=generator)
    truth = torch.rand(5, 40, generator=generator) < torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])[:, None]
    valid = torch.rand(5, 40, generator=generator) < torch.tensor([1.0, 0.0, 0.5, 0.9, 0.2])[:, None]
    together = jaccard_gradient(errors, truth, valid)
    alone = [jaccard_gradient(*(x[i : i + 1] for x in (errors, truth, valid))) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_a_row_worked_by_hand():
    errors = torch.tensor([[0.0, 2.0, 1.0, 5.0]])
    truth = torch.tensor([[True, True, False, False]])
    valid = torch.tensor([[True, True, True, False]])
    # From 2 / 2: 2.0 misses half of the class (1 / 2), 1.0 adds a false alarm (1 / 3), 0.0 misses the rest (0 / 3).
    torch.testing.assert_close(jaccard_gradient(errors, truth, valid), torch.tensor([[1 / 3, 1 / 2, 1 / 6, 0.0]]))


def test_millions_of_pixels_keep_their_precision_in_float32():
    size, generator = 1_000_000, torch.Generator().manual_seed(0)
    errors = torch.randperm(size, generator=generator).view(1, -1) / 2**20
    truth = torch.rand(1, size, generator=generator) < 0.3
    valid = torch.ones_like(truth)
    found = jaccard_gradient(errors, truth, valid).double()
    exact = jaccard_gradient(errors.double(), truth, valid)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


def test_the_backward_pass_gives_the_gradient():
    generator = torch.Generator().manual_seed(1)
    errors = torch.rand(3, 20, generator=generator, dtype=torch.float64).requires_grad_()
    truth = torch.rand(3, 20, generator=generator) < 0.4
    valid = torch.rand(3, 20, generator=generator) < 0.8
    assert torch.autograd.gradcheck(lambda e: lovasz_extension(e, truth, valid), errors)
