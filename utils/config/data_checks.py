"""Checks of a run that need its data: facts that agree, loss and procedure, the length of the schedule."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from utils import lr_scheduler
from utils.config.building import build_section, schedule_alone
from utils.config.checks import PER_CLASS_SCORES, check_classes_of_interest, unknown_class
from utils.config.schema import Config
from utils.errors import UserError, listed, warn
from utils.facts import Facts
from utils.losses import LOSSES, gives_probabilities, is_proper
from utils.registry import found


def check_facts(config: Config, facts: Facts, others: dict[str, Facts]) -> None:
    """Raise UserError unless data sets agree in their classes, and the config's class ids and names exist.

    ``facts`` are those of the data (or model) that decides, ``others`` of further loaders, by the name of their field.
    """
    for path, other in others.items():
        if other.num_classes != facts.num_classes:
            raise UserError(
                f"{path}: its data has {other.num_classes} classes ({listed(other.class_names, 4)}), the model "
                f"{facts.num_classes} ({listed(facts.class_names, 4)}); use the same args.classes for both"
            )
        different = first_difference(facts.class_names, other.class_names)
        if different is not None:
            raise UserError(
                f"{path}: class {different} of its data is {other.class_names[different]!r}, but "
                f"{facts.class_names[different]!r} for the model; use the same args.classes in the same order for both"
            )
        if other.in_channels != facts.in_channels:
            raise UserError(
                f"{path}: its images have {other.in_channels} channels, the model takes {facts.in_channels} "
                "(args.in_channels)"
            )
        if other.ignore_index != facts.ignore_index:
            raise UserError(
                f"{path}: its data ignores the label {other.ignore_index}, the model ignores "
                f"{facts.ignore_index}; set one ignore_index in the config for both"
            )
        stored, known = ((f.value_range, f.nodata) for f in (other, facts))
        if stored != known:
            raise UserError(
                f"{path}: its value_range and nodata are {found(stored)}, those of the model {found(known)}. "
                "inference.py reads images as in training, so set the same values for both (args.value_range, "
                "args.nodata)"
            )
    for problem in check_classes_of_interest(config, facts):
        raise UserError(str(problem))
    name = config.trainer.monitor.partition(" ")[2]
    if name.startswith(PER_CLASS_SCORES):
        wrong = unknown_class(name.partition("/")[2], facts.class_names)
        if wrong:
            raise UserError(f"trainer.monitor: {wrong}")


def resumed_facts(config: Config, stored: Facts, facts: Facts) -> Facts:
    """Return the facts of a resumed run: those of the data, with the mean and std that the run measured at its start.

    Raises:
        UserError: the classes of the data are not those of the checkpoint.
    """
    check_facts(config, stored, {"train_loader": facts})
    args = config.train_loader.args
    return replace(facts, **{name: getattr(stored, name) for name in ("mean", "std") if args.get(name) == "auto"})


def first_difference(names: tuple[str, ...], others: tuple[str, ...]) -> int | None:
    """Return the first class with different names, apart from case and spacing; numbered classes have any name."""
    numbered = tuple(f"class {i}" for i in range(len(names)))
    if numbered in (names, others):
        return None
    plain, other_plain = ([re.sub(r"[\s_-]", "", name).lower() for name in side] for side in (names, others))
    return next((i for i, pair in enumerate(zip(plain, other_plain, strict=True)) if pair[0] != pair[1]), None)


def warn_about_loss(config: Config, procedures: list[str]) -> None:
    """Warn if rankdice is used with a loss that does not give calibrated probabilities."""
    name, args = config.loss.type, config.loss.args
    if not any(p.startswith("rankdice") for p in procedures) or name not in LOSSES or is_proper(name, **args):
        return
    which = f"{name} with {', '.join(args)}" if LOSSES[name].proper or LOSSES[name].nearly_proper and args else name
    if not gives_probabilities(name, **args):
        effect = (
            f"{which} is not a strictly proper loss: its outputs are not probabilities, and expected scores will be "
            "off. For RankDice train with CrossEntropyLoss2d or BCEWithLogitsLoss2d, without weights"
        )
    elif config.predict.temperature == 1:
        effect = (
            f"{which} makes a network over- or underconfident, so rankdice can score below max. Fit a temperature on "
            "validation data first (test.py --fit)"
        )
    else:  # a temperature was fitted, which is what these losses need
        return
    warn(f"rankdice needs calibrated probabilities, and {effect} (docs/rankdice.md#when-not-to-use-it)")


FADED = 1e-3  # of the highest rate; below, hardly anything is learned
_SIMULATED = 20_000  # steps of a schedule that are looked at


def warn_about_schedule(config: Config, batches: int) -> None:
    """Warn if the learning rate is close to zero in more than half of a run with ``batches`` batches per epoch."""
    section, epochs = config.lr_scheduler, config.trainer.epochs
    schedule = schedule_alone(config, min(batches, config.trainer.limit_batches or batches))
    steps = schedule.total_steps
    rates = build_section("lr_scheduler.args", _rates, schedule, min(steps, _SIMULATED))
    limit = 1.001 * FADED * max(rates)
    low = [rate <= limit for rate in rates]
    first = len(low) - [*low[::-1], False].index(False)  # the rate is low from here on
    if steps - first <= steps / 2:
        return
    advice = (
        f". Its numbers count iterations, {steps // epochs} per epoch; with "
        '"lr_scheduler": {"step": "epoch", ...} they count epochs'
    )
    warn(
        f"lr_scheduler: {section.type} brings the learning rate below {FADED:g} of its highest value after {first} of "
        f"{steps} iterations{advice if section.step == 'iteration' else ''}"
    )


def _rates(schedule: lr_scheduler.Schedule, steps: int) -> list[float]:
    rates = [float(groups[0]["lr"]) for groups in lr_scheduler.walk(schedule, steps)]
    for step, rate in enumerate(rates):
        if not 0 <= rate < math.inf:
            raise ValueError(f"the learning rate would be {rate} in iteration {step + 1}")
    return rates
