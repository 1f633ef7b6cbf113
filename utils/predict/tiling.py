"""Views of an image on their way through a network: scales, flips and overlapping tiles.

Pure functions: no state, no config; device and dtype come from the input. ``forward`` is any function from images
``(B, channels, h, w)`` to scores ``(B, classes, h, w)``: logits, probabilities, or a composition of functions of this
module (tiles that are each seen at several scales).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor], Tensor]

# The memory that a band of blended scores may take before a wide image is processed in vertical strips.
BAND_BYTES = 2**30


@dataclass(frozen=True)
class Tiles:
    """How an image is cut into overlapping tiles; ValueError if a value is out of its range."""

    size: int | tuple[int, int] = 512  # side of a tile in pixels, or its (height, width); at most those of the image
    overlap: float = 0.25  # the least share of a tile that its neighbor covers too, in [0, 1)
    batch_size: int = 4  # tiles per forward pass
    max_bytes: int = BAND_BYTES  # memory of a band of scores

    def __post_init__(self) -> None:
        if min(self.sides) < 1:
            raise ValueError(f"tile: expected at least 1 pixel, got {self.size}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: expected a share in [0, 1), got {self.overlap}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a tile."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class Block(NamedTuple):
    """A finished part of the scores of one image: ``scores`` ``(classes, h, w)`` belong at row ``y``, column ``x``."""

    y: int
    x: int
    scores: Tensor


# ---------------------------------------------------------------------------------------------------- views


def pad_to(images: Tensor, smallest: int, multiple: int = 1) -> Tensor:
    """Repeat the border of images ``(B, C, h, w)`` until both sides have at least ``smallest`` pixels.

    Sides become multiples of ``multiple``. The image stays in the top left corner; images that fit already come back
    as they are.
    """
    # Rounded up without negative numbers, which torch.export cannot solve for.
    padded = ((max(side, smallest) + multiple - 1) // multiple * multiple for side in images.shape[-2:])
    bottom, right = (new - side for new, side in zip(padded, images.shape[-2:], strict=True))
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def views(
    forward: Forward,
    images: Tensor,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    link: Forward | None = None,
) -> Tensor:
    """Return the mean of the scores over scales and horizontal flips, at the images' own size.

    Args:
        forward: from images to scores of the same size.
        images: floating point ``(B, channels, H, W)``.
        scales: the image is seen at ``round(scale * H) x round(scale * W)`` (at least 1 x 1), resized bilinearly
            (``align_corners=False``); its scores are resized back in the same way.
        flip: at every scale see the mirror image as well, in the same forward pass.
        link: what turns resized scores into what is averaged, for example logits into probabilities. The mean of
            probabilities is again a forecast; the mean of logits is sharper than any of its parts deserve.

    Returns:
        ``(B, classes, H, W)``. With one scale of 1 and no flip exactly ``link(forward(images))``.
    """
    size = images.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        scaled = _resize(images, [max(1, round(side * scale)) for side in size])
        if flip:
            scaled = torch.cat([scaled, scaled.flip(-1)])
        scores = _resize(forward(scaled), size)
        if link is not None:
            scores = link(scores)
        if flip:
            plain, mirrored = scores.chunk(2)
            scores = plain + mirrored.flip(-1)
        total = scores if total is None else total + scores
    assert total is not None  # there is a scale
    count = len(scales) * (2 if flip else 1)
    return total if count == 1 else total / count


def _resize(images: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------- tiles


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Return where tiles begin along an axis, so that they cover it and none extends over its end.

    Neighbors share at least ``overlap`` of a tile; the last tile ends at the axis' end. An axis shorter than
    ``tile`` has one tile, starting at 0 (of the axis' length).
    """
    if length <= tile:
        return [0]
    stride = max(1, math.floor(tile * (1 - overlap)))
    return [*range(0, length - tile, stride), length - tile]


def blend_weights(length: int, tile: int, overlap: float) -> Tensor:
    """Return how much each tile counts at each of its pixels along one axis.

    A raised-cosine window (positive everywhere, highest in a tile's middle, where the network has seen most of a
    pixel's surroundings), divided by the sum of the windows of all tiles that cover the pixel: the weights at every
    pixel of the axis sum to 1, so blended probabilities are probabilities, and no count has to be kept.

    Returns:
        float32 ``(tiles, min(tile, length))``, for the tiles of :func:`tile_starts`.
    """
    starts = tile_starts(length, tile, overlap)
    tile = min(tile, length)
    middle = torch.arange(tile, dtype=torch.float64) + 0.5
    window = torch.sin(math.pi * middle / tile) ** 2 + 1e-6
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += window
    weights = torch.stack([window / total[start : start + tile] for start in starts])
    return weights.float()


def sliding_blocks(forward: Forward, image: Tensor, num_classes: int, tiles: Tiles = Tiles()) -> Iterator[Block]:  # noqa: B008
    """Predict one image of any size in overlapping tiles and yield its blended scores as they are finished.

    Memory without the image: one band of scores, ``num_classes * tile height * width * 4`` bytes, and one batch of
    tiles in the network. If the band would take more than ``tiles.max_bytes``, the image is processed in vertical
    strips. Tiles that two strips share are then computed twice; the result is the same.

    Args:
        forward: from tiles ``(B, channels, h, w)``, of the image's dtype and on its device, to scores
            ``(B, num_classes, h, w)`` on any device. All tiles have one size.
        image: ``(channels, H, W)``.
        num_classes: number of score planes.
        tiles: how the image is cut.

    Yields:
        :class:`Block`: a partition of the image, from top to bottom within each strip. ``scores`` are float32 on the
        device of ``forward``'s output, and valid until the next block is requested.
    """
    height, width = image.shape[-2:]
    (tall, wide), overlap = tiles.sides, tiles.overlap
    rows, columns = tile_starts(height, tall, overlap), tile_starts(width, wide, overlap)
    down, across = blend_weights(height, tall, overlap), blend_weights(width, wide, overlap)
    tall, wide = down.shape[1], across.shape[1]
    strip = max(wide, tiles.max_bytes // (num_classes * tall * 4))
    for left in range(0, width, strip):
        right = min(left + strip, width)
        seen = [j for j, x in enumerate(columns) if left - wide < x < right]
        cells = [(i, j) for i in range(len(rows)) for j in seen]
        band: Tensor | None = None  # the rows from the top of the current row of tiles
        for first in range(0, len(cells), tiles.batch_size):
            batch = cells[first : first + tiles.batch_size]
            cut = [image[:, rows[i] : rows[i] + tall, columns[j] : columns[j] + wide] for i, j in batch]
            found = forward(torch.stack(cut))
            if band is None:
                band = found.new_zeros((num_classes, tall, right - left), dtype=torch.float32)
            for (i, j), scores in zip(batch, found, strict=True):
                x = columns[j]
                begin, end = max(x, left), min(x + wide, right)
                weight = down[i].to(band.device)[:, None] * across[j][begin - x : end - x].to(band.device)
                band[:, :, begin - left : end - left].addcmul_(scores[:, :, begin - x : end - x].float(), weight)
                if j == seen[-1]:  # the row of tiles is complete, and no later row touches its upper part
                    done = rows[i + 1] - rows[i] if i + 1 < len(rows) else tall
                    yield Block(rows[i], left, band[:, :done])
                    band[:, : tall - done] = band[:, done:].clone()
                    band[:, tall - done :] = 0


def sliding(forward: Forward, images: Tensor, num_classes: int, tiles: Tiles = Tiles()) -> Tensor:  # noqa: B008
    """Return the blended scores ``(B, num_classes, H, W)`` of whole images ``(B, channels, H, W)``.

    The blocks of :func:`sliding_blocks` put together, for images whose scores fit in memory.
    """
    outputs = []
    for image in images:
        whole: Tensor | None = None
        for y, x, scores in sliding_blocks(forward, image, num_classes, tiles):
            if whole is None:
                whole = scores.new_empty((num_classes, *image.shape[-2:]))
            whole[:, y : y + scores.shape[1], x : x + scores.shape[2]] = scores
        assert whole is not None  # there is a tile
        outputs.append(whole)
    return torch.stack(outputs)
