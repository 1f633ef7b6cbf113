"""The score named in ``trainer.monitor``: which epoch is the best, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from utils.config.schema import Trainer as Settings


class Monitor:
    """Compares the monitored score ``name`` of validations: the ``best`` so far, and how many have not improved it."""

    def __init__(self, settings: Settings) -> None:
        self.mode, _, self.name = settings.monitor.partition(" ")
        self.patience = settings.early_stop
        self.reset()

    def reset(self) -> None:
        """Forget all validations."""
        self.best = math.inf if self.mode == "min" else -math.inf
        self.not_improved = 0

    def update(self, scores: Mapping[str, float]) -> bool:
        """Add the scores of an epoch; return whether they are the best so far."""
        if self.mode == "off" or self.name not in scores:
            return False
        value = scores[self.name]
        better = value < self.best if self.mode == "min" else value > self.best  # nan is never better
        if better:
            self.best, self.not_improved = value, 0
        else:
            self.not_improved += 1
        return better

    @property
    def stops(self) -> bool:
        """Whether the run ends early."""
        return 0 < self.patience <= self.not_improved

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and the count for a checkpoint."""
        return {"monitor_best": float(self.best), "not_improved_count": self.not_improved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.best, self.not_improved = state["monitor_best"], state["not_improved_count"]
