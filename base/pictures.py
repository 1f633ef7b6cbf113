"""Input, target and prediction of the first validation images, in one picture for TensorBoard."""

from __future__ import annotations

import numpy as np
import torch

from utils.evaluation import Part
from utils.facts import Facts
from utils.images.captions import legend, line, stack
from utils.images.palette import colorize, complete_palette, displayable, grid
from utils.predict import PredictOptions, label_map

COUNT, SIDE = 6, 320  # images, and the longest side they are shown at
TITLES = ("input", "target", "prediction")
_UNLABELED = 255


class Pictures:
    """Collects the first images of an evaluation; ``procedure`` makes label maps of the probabilities."""

    def __init__(self, facts: Facts, procedure: str, options: PredictOptions) -> None:
        self.facts, self.procedure, self.options = facts, procedure, options
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, part: Part) -> None:
        """Add images until there are enough."""
        wanted = COUNT - len(self.rows)
        if wanted <= 0:
            return
        labels = label_map(self.procedure, part.probs[:wanted], self.options).cpu().numpy()
        target = part.target[:wanted].cpu().long()
        targets = torch.where(target == self.facts.ignore_index, _UNLABELED, target).numpy()
        for image, wished, predicted in zip(part.batch.images, targets, labels, strict=False):
            picture = displayable(image.permute(1, 2, 0).cpu().numpy())
            step = max(1, -(-max(picture.shape[:2]) // SIDE))
            self.rows.append((picture[::step, ::step], wished[::step, ::step], predicted[::step, ::step]))

    def draw(self) -> np.ndarray:
        """Return a picture with one row per image, titles above the columns, and a legend of the classes below."""
        palette = self.facts.palette
        cells = [part if part.ndim == 3 else colorize(part, palette) for row in self.rows for part in row]
        pictures = grid(cells, columns=len(TITLES))
        width = pictures.shape[1] // len(TITLES)
        titles = np.concatenate([line(title, width) for title in TITLES], axis=1)
        occur = np.unique(np.concatenate([labels.ravel() for row in self.rows for labels in row[1:]]))
        colors = complete_palette(palette)
        entries = [(name, colors[c]) for c, name in enumerate(self.facts.label_names) if c in occur]
        if _UNLABELED in occur:
            entries.append(("not labeled", colors[_UNLABELED]))
        return stack([titles, pictures, legend(entries, max(pictures.shape[1], 320))])
