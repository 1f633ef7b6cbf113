"""The base of all schedules, and Poly and OneCycle as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from utils.bounds import AboveZero, NonNegative, Share, ShareBelowOne


def poly(step: int, total: int, power: float = 0.9, warmup: int = 0) -> float:
    """Return the factor of the learning rate in step ``step`` of 0 ... ``total - 1``.

    ``(1 - step / total) ** power`` (Liu et al., ParseNet, arXiv 1506.04579; Chen et al., DeepLab): 1 in the first
    step, above 0 in the last. With ``warmup`` steps, the factor first rises linearly from 1 / (warmup + 1), and the
    polynomial spans the remaining steps.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return ((total - step) / (total - warmup)) ** power


def one_cycle(
    step: int,
    total: int,
    phase1: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    momentums: tuple[float, float] = (0.85, 0.95),
) -> tuple[float, float]:
    """Return the factor of the learning rate and the momentum in step ``step`` of 0 ... ``total - 1``.

    Cosine from 1 / div_factor up to 1 during the first ``phase1`` of the run, while the momentum falls from
    ``momentums[1]`` to ``momentums[0]``; then down to 1 / (div_factor * final_div_factor) in the last step, while
    the momentum rises again. Source: Smith & Topin, *Super-convergence*, arXiv 1708.07120; the same curve as
    torch's OneCycleLR.
    """
    low, high = momentums
    peak = max(phase1 * total - 1, 0.0)  # the step of the highest rate, not necessarily whole
    if step < peak:
        return _cosine(1 / div_factor, 1.0, step / peak), _cosine(high, low, step / peak)
    share = (step - peak) / max(total - 1 - peak, 1.0)
    return _cosine(1.0, 1 / (div_factor * final_div_factor), share), _cosine(low, high, share)


def _cosine(start: float, end: float, share: float) -> float:
    """Go from ``start`` to ``end`` along half a cosine wave as ``share`` goes from 0 to 1."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def optimizer_steps(epochs: int, batches: int, accumulate: int = 1) -> int:
    """Return the number of optimizer steps of a run; the last batches of an epoch make one step, even if fewer."""
    return epochs * math.ceil(batches / accumulate)


class Schedule:
    """Base class of all schedules. It counts steps, and can resume exactly.

    Args:
        optimizer: the learning rates of its groups at construction are the base values of the schedule.
        total_steps: optimizer steps of the whole run; after the last one, the values do not change.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; expected at least 1")
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.last_step = 0
        self._base = [_values(group) for group in optimizer.param_groups]

    def step(self) -> None:
        """Set the values of the next optimizer step; call it after each ``optimizer.step()``."""
        self.last_step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the base values as plain numbers, lists and dicts."""
        return {"last_step": self.last_step, "base": [dict(base) for base in self._base]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved step.

        ``total_steps`` and the base values are not restored: a run that is resumed with more epochs or another learning
        rate follows the new curve. With the same config, the values are bit-identical.
        """
        if len(state["base"]) != len(self._base):
            raise ValueError(
                f"the saved schedule has {len(state['base'])} parameter groups, the optimizer {len(self._base)}"
            )
        self.last_step = state["last_step"]
        self._restore()

    def _reset_groups(self) -> None:
        """Put the base values back into the optimizer."""
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base["lr"]
            if "momentum" in base:
                _set_momentum(group, base["momentum"])

    def _apply(self) -> None:
        """Set the values of ``last_step``, given that those of the previous step are set."""
        raise NotImplementedError

    def _restore(self) -> None:
        """Set the values of ``last_step`` from any earlier state."""
        raise NotImplementedError


def _values(group: dict[str, Any]) -> dict[str, float]:
    """Return a group's base learning rate and, where it has one, momentum."""
    values = {"lr": float(group["lr"])}
    if "betas" in group:
        values["momentum"] = float(group["betas"][0])
    elif "momentum" in group:
        values["momentum"] = float(group["momentum"])
    return values


def _set_momentum(group: dict[str, Any], momentum: float) -> None:
    """Set the momentum of SGD-like optimizers, the first beta of Adam-like ones."""
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    else:
        group["momentum"] = momentum


class _PureSchedule(Schedule):
    """A schedule whose values are a function of the step."""

    def _value(self, step: int) -> tuple[float, float | None]:
        """Return the factor of the learning rate, and the momentum (None: unchanged)."""
        raise NotImplementedError

    def _apply(self) -> None:
        factor, momentum = self._value(min(self.last_step, self.total_steps - 1))
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base["lr"] * factor
            if momentum is not None:
                _set_momentum(group, momentum)

    def _restore(self) -> None:
        self._reset_groups()
        self._apply()


class Poly(_PureSchedule):
    """Polynomial decay after an optional linear warm-up, see :func:`poly`.

    Args:
        power: exponent, > 0.
        warmup: length of a linear warm-up: below 1 a fraction of the run, otherwise a number of steps.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, power: AboveZero = 0.9, warmup: NonNegative = 0.0
    ) -> None:
        super().__init__(optimizer, total_steps)
        self.power = power
        self.warmup = round(warmup * total_steps if 0 <= warmup < 1 else warmup)
        if not 0 <= self.warmup < max(total_steps, 1):
            raise ValueError(f"warmup is {warmup}; expected >= 0 and less than the run's {total_steps} steps")
        self._apply()

    def _value(self, step: int) -> tuple[float, None]:
        return poly(step, self.total_steps, self.power, self.warmup), None


class OneCycle(_PureSchedule):
    """One cycle of learning rate and momentum, see :func:`one_cycle`; the optimizer's learning rates are the peaks.

    Args:
        momentums: lowest and highest momentum (the first beta of Adam-like optimizers); None: do not change it.
        div_factor: peak learning rate / initial learning rate.
        phase1: fraction of the run before the peak.
        final_div_factor: initial learning rate / final learning rate.

    Raises:
        ValueError: a value out of range; ``momentums`` with an optimizer that runs without momentum.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        momentums: tuple[ShareBelowOne, ShareBelowOne] | None = (0.85, 0.95),
        div_factor: AboveZero = 25.0,
        phase1: Share = 0.3,
        final_div_factor: AboveZero = 1e4,
    ) -> None:
        super().__init__(optimizer, total_steps)
        if momentums is not None:
            low, high = momentums
            if not 0 <= low <= high < 1:
                raise ValueError(f"momentums is {momentums}; expected [low, high], 0 <= low <= high < 1")
            if not all(base.get("momentum") for base in self._base):
                raise ValueError(
                    f"momentums: OneCycle cycles the momentum, but {type(optimizer).__name__} has none; "
                    "set the optimizer's momentum, or momentums to null"
                )
        self.momentums = momentums
        self._curve = phase1, div_factor, final_div_factor
        self._apply()

    def _value(self, step: int) -> tuple[float, float | None]:
        factor, momentum = one_cycle(step, self.total_steps, *self._curve, self.momentums or (0.0, 0.0))
        return factor, momentum if self.momentums else None


class PerEpoch(Schedule):
    """A schedule that advances once per epoch instead of once per optimizer step.

    ``make`` is called with the optimizer and the number of epochs, and returns the schedule to advance.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, steps_per_epoch: int, make: Callable[[Optimizer, int], Schedule]
    ) -> None:
        super().__init__(optimizer, total_steps)
        self._steps_per_epoch = steps_per_epoch
        self._inner = make(optimizer, math.ceil(total_steps / steps_per_epoch))

    def _apply(self) -> None:
        if self.last_step % self._steps_per_epoch == 0:
            self._inner.step()

    def _restore(self) -> None:
        self._inner.load_state_dict({**self._inner.state_dict(), "last_step": self.last_step // self._steps_per_epoch})
