"""The exact RankDice solver (interim: sorts whole rows)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Volumes(NamedTuple):
    """Per row: volume, cut-off, score, and how many pixels equal to the cut-off are NOT in the mask."""

    volumes: Tensor
    cutoffs: Tensor
    scores: Tensor
    surplus: Tensor


def row_tiles(rows: Tensor, chosen: Tensor, pixels: int, lazily: bool = False) -> Iterator:
    """Walk over the chosen rows in tiles of at most about ``pixels`` pixels: whole rows, or parts of one."""
    count, width = chosen.numel(), rows.shape[1]
    everything = count == rows.shape[0]
    per_tile, length = max(1, pixels // max(1, width)), width
    if pixels < width:
        length = max(1024, pixels // 1024 * 1024)
    for first in range(0, count, per_tile):
        names = slice(first, min(first + per_tile, count))
        for start in range(0, width, length):
            columns = slice(start, min(start + length, width))

            def load(names: slice = names, columns: slice = columns) -> Tensor:
                if everything:
                    return rows[names, columns]
                return rows[:, columns].index_select(0, chosen[names])

            yield chosen[names], load if lazily else load(), names, columns


def solve(rows: Tensor, highest: Tensor, active: Tensor, metric: str, smooth: float, budget: int) -> Volumes:
    """Find the best volume of every row."""
    count, width = rows.shape
    found = Volumes(
        torch.zeros(count, dtype=torch.int64, device=rows.device),
        torch.full((count,), float("inf"), dtype=rows.dtype, device=rows.device),
        torch.zeros(count, dtype=torch.float64, device=rows.device),
        torch.zeros(count, dtype=torch.int64, device=rows.device),
    )
    chosen = active.nonzero().view(-1)
    per = max(1, budget // (64 * max(1, width)))
    x, w = np.polynomial.laguerre.laggauss(24)
    for first in range(0, chosen.numel(), per):
        index = chosen[first : first + per]
        p32 = rows[index].sort(dim=1, descending=True).values
        p = p32.double()
        c = p.cumsum(1)
        mu = c[:, -1:]
        tau = torch.arange(1, width + 1, device=rows.device)
        rough = 2 * c / (tau + 1 + mu) if metric == "dice" else c / (tau + mu - c)
        t0 = rough.argmax(1, keepdim=True)
        m = t0 + 1 + mu + smooth
        if metric == "iou":
            m = m - c.gather(1, t0)
        total = torch.zeros_like(p)
        for xk, wk in zip(x, w, strict=True):
            s = xk / m
            e = torch.exp(-s)
            q = (1 - p) + p * e
            weight = wk / m * torch.exp(xk - s * (tau + smooth))
            logs = q.log().cumsum(1)
            if metric == "dice":
                total += weight * logs[:, -1:].exp() * (2 * e * (p / q).cumsum(1) + smooth)
            else:
                total += weight * (logs[:, -1:] - logs).exp() * (c + smooth)
        score, best = total.masked_fill_(p <= 0, -1).max(1)
        cut = p32.gather(1, best.unsqueeze(1))
        found.volumes[index] = best + 1
        found.cutoffs[index] = cut.squeeze(1)
        found.scores[index] = score
        found.surplus[index] = (p32 >= cut).sum(1) - best - 1
    return found
