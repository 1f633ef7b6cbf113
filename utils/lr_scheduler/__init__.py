"""Learning-rate schedules, stepped once per optimizer step.

Poly and OneCycle are pure functions of the step (:func:`poly`, :func:`one_cycle`); the schedulers of torch are
available by name. Whatever the type, a schedule is used like this::

    schedule = build("Poly", optimizer, total_steps)  # sets the values of step 0
    for _ in range(total_steps):
        ...
        optimizer.step()
        schedule.step()                               # sets the values of the next step

A *step* is an optimizer step: with gradient accumulation, one per ``accumulate`` batches. Numbers of torch's
schedulers that count epochs in its documentation (``step_size``, ``milestones``, ``T_max``, ``T_0``,
``total_iters``, ...) count steps here.

``python -m utils.lr_scheduler --config CONFIG`` draws the learning rate and the momentum over a run.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from utils.optim import TypeTable, check_arguments, checked_signature, subclasses_in

if TYPE_CHECKING:
    from torch.optim import Optimizer
else:
    # The command line's --help does not wait for torch, and the annotations can still be evaluated.
    Optimizer = Any


# -- pure functions of the step --------------------------------------------------------------------------------


def poly(step: int, total: int, power: float = 0.9, warmup: int = 0) -> float:
    """Return the factor of the learning rate in step ``step`` of 0 ... ``total - 1``.

    ``(1 - step / total) ** power`` (Liu et al., ParseNet, arXiv 1506.04579; Chen et al., DeepLab): 1 in the first
    step, above 0 in the last. With ``warmup`` steps it rises linearly before, from 1 / (warmup + 1), and the
    polynomial spans the steps that are left.
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
    """Return the number of optimizer steps of a run; an epoch's last batches make a step of their own."""
    return epochs * math.ceil(batches / accumulate)


# -- schedules -------------------------------------------------------------------------------------------------


class Schedule:
    """What all schedules share: counting steps, and a state that resumes bit by bit.

    Args:
        optimizer: its groups' learning rates at construction are the base values of the schedule.
        total_steps: optimizer steps of the whole run; after the last one, the values stay.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; a run has at least one step")
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.last_step = 0
        self._base = [_values(group) for group in optimizer.param_groups]

    def step(self) -> None:
        """Set the values of the next optimizer step; call it after each ``optimizer.step()``."""
        self.last_step += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """Return the current learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the base values as plain numbers, lists and dicts."""
        return {"last_step": self.last_step, "base": [dict(base) for base in self._base]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the saved step.

        ``total_steps`` and the base values stay what they are here: a run that is resumed with more epochs or another
        learning rate follows the new curve. Same config, same bits.
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
        """Set the values of ``last_step``, having set those of the step before."""
        raise NotImplementedError

    def _restore(self) -> None:
        """Set the values of ``last_step`` out of nothing."""
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
        """Return the factor of the learning rate and the momentum (None: left alone)."""
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
        optimizer, total_steps: see :class:`Schedule`.
        power: exponent > 0.
        warmup: below 1, a fraction of the run; else a number of steps, fewer than the run has.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, power: float = 0.9, warmup: float = 0.0) -> None:
        super().__init__(optimizer, total_steps)
        if not power > 0:
            raise ValueError(f"power is {power}; expected > 0")
        self.power = power
        self.warmup = round(warmup * total_steps if 0 <= warmup < 1 else warmup)
        if not 0 <= self.warmup < max(total_steps, 1):
            raise ValueError(f"warmup is {warmup}; expected >= 0 and less than the run's {total_steps} steps")
        self._apply()

    def _value(self, step: int) -> tuple[float, None]:
        return poly(step, self.total_steps, self.power, self.warmup), None


class OneCycle(_PureSchedule):
    """One cycle of learning rate and momentum, see :func:`one_cycle`; the optimizer's rates are the peaks.

    Args:
        optimizer, total_steps: see :class:`Schedule`.
        momentums: lowest and highest momentum (first beta of Adam-like optimizers); None leaves it alone.
        div_factor: peak rate / first rate.
        phase1: fraction of the run before the peak.
        final_div_factor: first rate / last rate.

    Raises:
        ValueError: a value out of range; ``momentums`` with an optimizer that runs without momentum.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        momentums: tuple[float, float] | None = (0.85, 0.95),
        div_factor: float = 25.0,
        phase1: float = 0.3,
        final_div_factor: float = 1e4,
    ) -> None:
        super().__init__(optimizer, total_steps)
        if not 0 <= phase1 <= 1:
            raise ValueError(f"phase1 is {phase1}; expected a fraction of the run")
        if not (div_factor > 0 and final_div_factor > 0):
            raise ValueError("div_factor and final_div_factor must be > 0")
        if momentums is not None:
            low, high = momentums
            if not 0 <= low <= high < 1:
                raise ValueError(f"momentums is {momentums}; expected [low, high], 0 <= low <= high < 1")
            if not all(base.get("momentum") for base in self._base):
                raise ValueError(
                    f"momentums: OneCycle cycles the momentum, but {type(optimizer).__name__} runs without any; "
                    "set the optimizer's momentum, or momentums to null"
                )
        self.momentums = momentums
        self.div_factor = div_factor
        self.phase1 = phase1
        self.final_div_factor = final_div_factor
        self._apply()

    def _value(self, step: int) -> tuple[float, float | None]:
        factor, momentum = one_cycle(
            step,
            self.total_steps,
            self.phase1,
            self.div_factor,
            self.final_div_factor,
            self.momentums or (0.0, 0.0),
        )
        return factor, momentum if self.momentums else None


class TorchSchedule(Schedule):
    """A scheduler of torch.optim.lr_scheduler.

    Most of torch's schedulers compute a value from the one before. Their state is therefore restored by
    replaying the steps from the base values, about ten microseconds each: the same floating-point operations,
    thus the same bits, and correct if the run has become longer.

    Args:
        optimizer, total_steps: see :class:`Schedule`.
        name: its class in torch.
        args: its arguments, see :func:`signature_of`.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, name: str, args: dict[str, Any]) -> None:
        super().__init__(optimizer, total_steps)
        self._name = name
        self._args = args
        # Steps in which torch warns without a cause: a scheduler's first (AMP may have skipped the optimizer's
        # first step, a replay has none), and where SequentialLR changes over. Other steps are left alone, because
        # leaving a catch_warnings block makes Python repeat every warning it has shown already.
        self._noisy = {1}.union(*({end, end + 1} for end in args.get("milestones", ())))
        self._inner = self._fresh()

    def _fresh(self) -> Any:
        for group in self.optimizer.param_groups:
            group.pop("initial_lr", None)  # of a schedule before; torch would prefer it to the group's rate
        with _silence():
            return _make(self._name, self.optimizer, self.total_steps, self._args)

    def _advance(self, step: int) -> None:
        if step > self.total_steps:
            return
        if step in self._noisy:
            with _silence():
                self._inner.step()
        else:
            self._inner.step()

    def _apply(self) -> None:
        self._advance(self.last_step)

    def _restore(self) -> None:
        self._reset_groups()
        self._inner = self._fresh()
        for step in range(1, self.last_step + 1):
            self._advance(step)


@contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _make(name: str, optimizer: Optimizer, length: int, args: dict[str, Any]) -> Any:
    """Return torch's scheduler ``name`` for a stretch of ``length`` steps."""
    from torch.optim import lr_scheduler

    check_arguments(name, signature_of(name), args)
    defaults = _defaults(name, optimizer, length)
    args = {**args, **{key: value for key, value in defaults.items() if args.get(key) is None}}
    if name == "SequentialLR":
        ends = [*args["milestones"], length]
        lengths = [end - start for start, end in zip([0, *args["milestones"]], ends, strict=True)]
        args["schedulers"] = _make_all(name, args["schedulers"], optimizer, lengths)
    elif name == "ChainedScheduler":
        parts = _make_all(name, args["schedulers"], optimizer, [length] * len(args["schedulers"]))
        return lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)
    return getattr(lr_scheduler, name)(optimizer, **args)


def _make_all(name: str, specs: list[dict[str, Any]], optimizer: Optimizer, lengths: list[int]) -> list[Any]:
    """Build the parts, ``{"type", "args"}`` each, of a compound scheduler."""
    if len(specs) != len(lengths):
        raise ValueError(f"{name}: {len(specs)} schedulers need {len(specs) - 1} milestones, one at each change")
    for spec in specs:
        if "type" not in spec or not spec.keys() <= {"type", "args"}:
            raise ValueError(f'{name}: a part is {spec}; expected {{"type": NAME, "args": {{...}}}}')
        if spec["type"] in _OWN:
            raise ValueError(f"{name} is made of torch's schedulers; {spec['type']} is not one")
    return [
        _make(spec["type"], optimizer, length, spec.get("args", {}))
        for spec, length in zip(specs, lengths, strict=True)
    ]


def _defaults(name: str, optimizer: Optimizer, length: int) -> dict[str, Any]:
    """Return arguments that follow from the run: its length, and the optimizer's rates as peaks."""
    defaults: dict[str, dict[str, Any]] = {
        "CosineAnnealingLR": {"T_max": length},
        "PolynomialLR": {"total_iters": length},
        "OneCycleLR": {
            "total_steps": length,
            # Within SequentialLR, the scheduler before has changed the rate already.
            "max_lr": [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups],
        },
    }
    return defaults.get(name, {})


# -- the table -------------------------------------------------------------------------------------------------

_OWN = {"Poly": Poly, "OneCycle": OneCycle}
# Given by the schedule itself, or (verbose) without effect.
_RESERVED = {"optimizer", "total_steps", "epochs", "steps_per_epoch", "last_epoch", "verbose"}
_FROM_THE_RUN = {"CosineAnnealingLR": {"T_max"}, "OneCycleLR": {"max_lr"}, "PolynomialLR": {"total_iters"}}


def _find_schedulers() -> dict[str, Callable[..., Schedule]]:
    from torch.optim import lr_scheduler

    found = subclasses_in(lr_scheduler, lr_scheduler.LRScheduler)
    return {**_OWN, **{name: _factory(name, scheduler) for name, scheduler in found.items()}}


def _factory(name: str, scheduler: type) -> Callable[..., Schedule]:
    """Return a constructor of the torch schedule ``name`` that shows its true signature to those who check it."""

    def make(optimizer: Optimizer, total_steps: int, **args: Any) -> Schedule:
        return TorchSchedule(optimizer, total_steps, name, args)

    run = [p for p in inspect.signature(make).parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = []
    for parameter in checked_signature(scheduler, drop=_RESERVED).parameters.values():
        if parameter.name in _FROM_THE_RUN.get(name, ()):
            parameter = parameter.replace(default=None)
            if parameter.annotation is not parameter.empty:
                parameter = parameter.replace(annotation=parameter.annotation | None)
        if parameter.name == "schedulers":
            parameter = parameter.replace(annotation=list[dict[str, Any]])
        # By keyword, since one with a default may stand before one without.
        own.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"torch.optim.lr_scheduler.{name}, stepped once per optimizer step."
    make.__signature__ = inspect.Signature([*run, *own])  # type: ignore[attr-defined]  # PEP 362; unknown to stubs
    make.__annotations__ = {p.name: p.annotation for p in own if p.annotation is not p.empty}
    return make


SCHEDULERS = TypeTable(
    "scheduler",
    _find_schedulers,
    {
        "ReduceLROnPlateau": "it waits for a metric to stall, while schedules here are functions of the step, "
        "known before the run; take Poly, OneCycle or CosineAnnealingLR"
    },
)
"""Name -> constructor, each called as ``SCHEDULERS[name](optimizer, total_steps, **args)``."""


def signature_of(type: str) -> inspect.Signature:
    """Return what ``args`` of the schedule ``type`` may hold.

    Lengths that default to the run's (``T_max`` of CosineAnnealingLR, ``total_iters`` of PolynomialLR) and
    ``max_lr`` of OneCycleLR, which defaults to the optimizer's rates, have the default None. The ``schedulers``
    of SequentialLR and ChainedScheduler are ``{"type", "args"}``.
    """
    return checked_signature(SCHEDULERS[type], drop={"optimizer", "total_steps"})


def needs_momentum(type: str, args: Mapping[str, Any]) -> bool:
    """Return whether the schedule changes the momentum, which the optimizer must then have."""
    if type == "OneCycle":
        return args.get("momentums", True) is not None
    return type in ("OneCycleLR", "CyclicLR") and args.get("cycle_momentum", True)


def build(type: str, optimizer: Optimizer, total_steps: int, **args: Any) -> Schedule:
    """Return the schedule ``type`` over ``total_steps`` optimizer steps; it has set the values of the first.

    Raises:
        UserError: there is no such schedule, or it is of no use here.
        TypeError, ValueError: an argument it does not take, or a value out of range.
    """
    check_arguments(type, signature_of(type), args)
    return SCHEDULERS[type](optimizer, total_steps, **args)
