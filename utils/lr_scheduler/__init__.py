"""Learning-rate schedules, stepped once per optimizer step.

Poly and OneCycle are pure functions of the step (:func:`poly`, :func:`one_cycle`); torch's schedulers are available by
name. All of them are used like this::

    schedule = build("Poly", optimizer, total_steps)  # sets the values of step 0
    for _ in range(total_steps):
        ...
        optimizer.step()
        schedule.step()                               # sets the values of the next step

A *step* is an optimizer step: with gradient accumulation, one per ``accumulate`` batches. Numbers that count epochs in
torch's documentation (``step_size``, ``milestones``, ``T_max``, ``T_0``, ``total_iters``, ...) count steps here, or
epochs with ``steps_per_epoch``.

``python -m utils.lr_scheduler --config CONFIG`` draws the learning rate and the momentum over a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer

from utils.lr_scheduler.schedules import OneCycle, PerEpoch, Poly, Schedule, one_cycle, optimizer_steps, poly
from utils.lr_scheduler.torch_schedule import CONSTRUCTORS
from utils.registry import Registry

__all__ = ["SCHEDULERS", "Schedule", "build", "needs_momentum", "one_cycle", "optimizer_steps", "poly", "walk"]


SCHEDULERS = Registry(
    "scheduler",
    {"Poly": Poly, "OneCycle": OneCycle, **CONSTRUCTORS},
    refused={
        "LambdaLR": "a config cannot contain a function; use Poly, PolynomialLR or SequentialLR",
        "MultiplicativeLR": "a config cannot contain a function; use ExponentialLR or SequentialLR",
        "ReduceLROnPlateau": "it depends on a score, but a schedule here must be a function of the step; use Poly, "
        "OneCycle or CosineAnnealingLR",
    },
    provided=("optimizer", "total_steps", "last_epoch"),
)
"""Name -> constructor, called as ``SCHEDULERS[name](optimizer, total_steps, **args)``."""


def needs_momentum(type: str, args: Mapping[str, Any]) -> bool:
    """Return whether the schedule changes the momentum, which the optimizer must then have."""
    if type == "OneCycle":
        return args.get("momentums", True) is not None
    return type in ("OneCycleLR", "CyclicLR") and args.get("cycle_momentum", True)


def build(
    type: str, optimizer: Optimizer, total_steps: int, *, steps_per_epoch: int | None = None, **args: Any
) -> Schedule:
    """Return the schedule ``type`` over ``total_steps`` optimizer steps; it has set the values of the first.

    Args:
        type: a name in :data:`SCHEDULERS`.
        optimizer: its learning rates are the base values.
        total_steps: optimizer steps of the run.
        steps_per_epoch: advance once per epoch (this number of steps), and count epochs; None: advance in every step.
        args: of the schedule.

    Raises:
        UserError: there is no such schedule, or it cannot be used here.
        ValueError: an unknown argument, or a value out of range.
    """
    SCHEDULERS.check(type, args)
    make = partial(SCHEDULERS[type], **args)
    if steps_per_epoch is None:
        return make(optimizer, total_steps)
    return PerEpoch(optimizer, total_steps, steps_per_epoch, make)


def walk(schedule: Schedule, steps: int) -> Iterator[list[dict[str, Any]]]:
    """Run a schedule for ``steps`` steps without training; yield the optimizer's parameter groups in each of them."""
    for step in range(steps):
        yield schedule.optimizer.param_groups
        if step == 0:
            schedule.optimizer.step()  # torch warns of a schedule that advances first
        schedule.step()
