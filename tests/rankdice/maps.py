"""Probabilities for the tests of RankDice, and checks of its results."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from utils.rankdice import RankDice


def smooth_maps(*shape: int, seed: int = 0, contrast: float = 6.0, grain: int = 16) -> Tensor:
    """Return probabilities (B, C, H, W) like those of a network: the softmax of smooth random fields with noise."""
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
    """Return whether volumes, masks, cut-offs and largest values are equal, and scores to 1e-12."""
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("masks", "volumes", "cutoffs", "highest"))
    return equal and torch.allclose(a.scores, b.scores, rtol=1e-12, atol=0)


def check_masks(probs: Tensor, found: RankDice) -> None:
    """Check that masks have the ``volumes`` most probable pixels; of equal ones, those with the lowest index."""
    rows, masks = probs.flatten(2), found.masks.flatten(2)
    assert torch.equal(masks.sum(2), found.volumes)
    order = rows.double().sort(dim=2, descending=True, stable=True).indices
    places = torch.arange(rows.shape[2]).expand_as(order)
    rank = torch.empty_like(order).scatter_(2, order, places)
    assert torch.equal(masks, rank < found.volumes.unsqueeze(2))
    inside = torch.where(masks, rows, torch.inf).amin(2) if rows.shape[2] else found.cutoffs
    assert torch.equal(found.cutoffs, inside)
