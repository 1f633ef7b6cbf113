"""The schedulers of torch.optim.lr_scheduler as schedules: arguments that follow from the run, exact resume."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from utils.lr_scheduler.schedules import Schedule
from utils.optim import subclasses_in
from utils.registry import signature

_NOT_A_PART = {"ReduceLROnPlateau"}
# Given by the schedule itself, or (verbose) without effect.
_RESERVED = {"optimizer", "total_steps", "epochs", "steps_per_epoch", "last_epoch", "verbose"}
_FROM_THE_RUN = {"CosineAnnealingLR": {"T_max"}, "OneCycleLR": {"max_lr"}, "PolynomialLR": {"total_iters"}}

CLASSES = subclasses_in(lr_scheduler, lr_scheduler.LRScheduler)


def _factory(name: str, scheduler: type) -> Callable[..., Schedule]:
    """Return a constructor whose signature shows what a config may give the torch schedule ``name``."""

    def make(optimizer: Optimizer, total_steps: int, **args: Any) -> Schedule:
        return TorchSchedule(optimizer, total_steps, name, args)

    own = []
    for parameter in signature(scheduler).parameters.values():
        if parameter.name in _RESERVED:
            continue
        if parameter.name in _FROM_THE_RUN.get(name, ()):
            kind = parameter.annotation
            parameter = parameter.replace(default=None, annotation=Any if kind is parameter.empty else kind | None)
        if parameter.name == "schedulers":
            parameter = parameter.replace(annotation=list[dict[str, Any]])
        # Keyword-only: here a parameter with a default may stand before one without.
        own.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    make.__doc__ = f"torch.optim.lr_scheduler.{name}, stepped once per optimizer step."
    make.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]  # PEP 362; unknown to stubs
    return make


# A constructor for each of torch's schedulers, called as (optimizer, total_steps, **args).
CONSTRUCTORS = {name: _factory(name, scheduler) for name, scheduler in CLASSES.items()}


class TorchSchedule(Schedule):
    """The scheduler ``name`` of torch.optim.lr_scheduler.

    Most of torch's schedulers compute a value from the previous one. To restore their state, this class repeats all
    steps from the base values, about ten microseconds each. That gives the same bits, and is correct for a longer run,
    too.

    Lengths that default to the run's (``T_max`` of CosineAnnealingLR, ``total_iters`` of PolynomialLR) and ``max_lr``
    of OneCycleLR, which defaults to the optimizer's rates, may be left out of ``args``. The ``schedulers`` of
    SequentialLR and ChainedScheduler are ``{"type", "args"}``.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, name: str, args: dict[str, Any]) -> None:
        super().__init__(optimizer, total_steps)
        self._name = name
        self._args = args
        # Steps in which torch warns for no reason: the first one (AMP may have skipped the optimizer's first step,
        # and a replay has none), and those at which SequentialLR switches. Other steps are not silenced, because
        # leaving a catch_warnings block makes Python repeat every warning that it has shown already.
        self._noisy = {1}.union(*({end, end + 1} for end in args.get("milestones", ())))
        self._inner = self._fresh()

    def _fresh(self) -> Any:
        for group in self.optimizer.param_groups:
            group.pop("initial_lr", None)  # of a schedule before; torch would prefer it to the group's rate
        with _silence():
            return _make(self._name, self.optimizer, self.total_steps, self._args)

    def _advance(self, step: int) -> None:
        if step <= self.total_steps:
            with _silence() if step in self._noisy else nullcontext():
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
    """Return torch's scheduler ``name`` for a stretch of ``length`` steps; arguments may follow from the run."""
    # Within SequentialLR, the scheduler before has changed the rate already.
    peaks = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    defaults: dict[str, dict[str, Any]] = {
        "CosineAnnealingLR": {"T_max": length},
        "PolynomialLR": {"total_iters": length},
        "OneCycleLR": {"total_steps": length, "max_lr": peaks},
    }
    args = {**args, **{key: value for key, value in defaults.get(name, {}).items() if args.get(key) is None}}
    if name == "SequentialLR":
        ends = [*args["milestones"], length]
        lengths = [end - start for start, end in zip([0, *args["milestones"]], ends, strict=True)]
        if not all(stretch > 0 for stretch in lengths[:-1]):
            raise ValueError(f"milestones are {args['milestones']}; expected increasing numbers above 0")
        args["schedulers"] = _make_all(name, args["schedulers"], optimizer, lengths)
    elif name == "ChainedScheduler":
        parts = _make_all(name, args["schedulers"], optimizer, [length] * len(args["schedulers"]))
        return CLASSES[name](parts, optimizer=optimizer)
    return CLASSES[name](optimizer, **args)


def _make_all(name: str, specs: list[dict[str, Any]], optimizer: Optimizer, lengths: list[int]) -> list[Any]:
    """Build the parts, ``{"type", "args"}`` each, of a compound scheduler."""
    if len(specs) != len(lengths):
        raise ValueError(f"{name}: {len(specs)} schedulers need {len(specs) - 1} milestones, one at each change")
    for spec in specs:
        if "type" not in spec or not spec.keys() <= {"type", "args"}:
            raise ValueError(f'{name}: a part is {spec}; expected {{"type": NAME, "args": {{...}}}}')
        if spec["type"] not in CLASSES.keys() - _NOT_A_PART:
            raise ValueError(f"{name} combines torch's schedulers; {spec['type']} is not one that it can use")
    pairs = zip(specs, lengths, strict=True)
    return [_make(spec["type"], optimizer, length, spec.get("args", {})) for spec, length in pairs]
