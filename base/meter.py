"""Scores of a run: live ones of a training epoch, and the one that chooses the best epoch (``trainer.monitor``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils import distributed
from utils.config.schema import Trainer as Settings
from utils.metrics import Metrics
from utils.predict import Prediction


class Meter:
    """Mean loss and scores over the batches of an epoch, kept on the device until they are read."""

    def __init__(self, metrics: Metrics, device: torch.device) -> None:
        self.metrics, self.device = metrics, device
        self.reset()

    def reset(self) -> None:
        """Start an epoch."""
        self.metrics.reset()
        self._loss = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum, batches
        self._recent: list[Tensor] = []

    def update(self, loss: Tensor, prediction: Prediction, target: Tensor) -> None:
        """Add a batch, without waiting for the device."""
        self.metrics.update(prediction, target)
        self._recent.append(loss)
        # In place: a new tensor per iteration would cost one more kernel.
        self._loss[0] += loss
        # A batch without a labeled pixel has a loss of 0, which would lower the mean.
        self._loss[1] += (target != self.metrics.ignore_index).any()

    def scores(self) -> dict[str, float]:
        """Return ``train_loss`` and ``train_...`` scores of this process so far; waits for the device."""
        result = self.metrics.compute()
        total, count = self._loss.tolist()
        names = ("Mean_Dice", "Mean_IoU", "Pixel_Accuracy", "Multiclass_Accuracy")
        scores = {f"train_{key}": result[key] for key in names}
        return {"train_loss": total / count if count else math.nan, **scores}

    def take_recent_loss(self) -> float:
        """Return the mean loss since this was last called."""
        recent, self._recent = self._recent, []
        return torch.stack(recent).mean().item() if recent else math.nan

    def gather(self) -> None:
        """Add up the scores of all processes."""
        own = {"sums": {key: value.cpu() for key, value in self.metrics.totals().items()}}, self._loss.cpu()
        shares = distributed.gather(own)
        if len(shares) == 1:
            return
        self.metrics.reset()
        for state, _ in shares:
            share = Metrics(self.metrics.num_classes)
            share.load_state_dict(state)
            self.metrics.merge([share])
        self._loss = torch.stack([loss for _, loss in shares]).sum(dim=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"metrics": self.metrics.state_dict(), "loss": self._loss.clone(), "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; an empty state starts an epoch."""
        self.reset()
        if state:
            self.metrics.load_state_dict(state["metrics"], self.device)
            self._loss.copy_(state["loss"])
            self._recent = [loss.to(self.device) for loss in state["recent"]]


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
        self.best, self.not_improved = float(state["monitor_best"]), int(state["not_improved_count"])
