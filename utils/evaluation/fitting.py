"""``test.py --fit``: a temperature and a threshold from the validation data, into a new checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils import checkpoint, distributed, tables
from utils.config.schema import Config
from utils.errors import UserError
from utils.evaluation import Decision, Evaluator, Progress, evaluate
from utils.evaluation.calibration import LogitSample, ThresholdSweep, fit_temperature, sample_calibration
from utils.evaluation.comparison import FEW_IMAGES
from utils.predict import PredictOptions
from utils.predict.network import Network

# What a checkpoint needs to be used; what a run needs to go on stays behind, in the original.
KEPT = ("format", "arch", "epoch", "iteration", "state_dict", "ema", "monitor_best", "facts")
SCORES = ("NLL", "Brier", "ECE", "Class_ECE", "T", "max", "rankdice")


@dataclass(frozen=True)
class Fit:
    """What was fitted, and the scores before and after: ``NLL, Brier, ECE, Class_ECE``, mDice per procedure."""

    temperature: float
    threshold: float
    at_bound: bool
    images: int
    before: dict[str, float]
    after: dict[str, float]


def fit(
    evaluator: Evaluator,
    loader: Any,
    options: PredictOptions,
    progress: Callable[[str], Progress],
    limit: int | None = None,
) -> Fit:
    """Fit temperature and threshold on a loader of validation data: two passes over it.

    Args:
        evaluator: with the temperature used so far.
        loader: of the validation data.
        options: with the threshold used so far.
        progress: from a title to a wrapper of the iteration.
        limit: only so many images.

    Raises:
        UserError: the data has no labelled pixel.
    """
    facts, network = evaluator.facts, evaluator.network
    assert isinstance(network, Network)  # a checkpoint's; the members of an ensemble are fitted one by one
    decisions = {name: Decision(name, options) for name in ("T", "max", "rankdice")}
    images = len(loader.batches.indices) if hasattr(loader, "batches") else len(loader.dataset)
    sample = LogitSample(facts, min(images, limit or images))
    first = evaluate(evaluator, loader, decisions, progress=progress("FIT 1/2"), on_part=sample.add, limit_images=limit)
    sample.merge(distributed.gather(sample))
    logits, target = sample.stacked()
    try:
        temperature = fit_temperature(logits, target, network.activation)
    except ValueError as error:
        raise UserError(f"the temperature cannot be fitted on the validation data: {error}") from None

    sweep = ThresholdSweep(facts, options.classes, evaluator.count_ignored)
    fitted = replace(evaluator, network=replace(network, temperature=temperature.value))
    second = evaluate(
        fitted, loader, {"rankdice": decisions["rankdice"]}, progress=progress("FIT 2/2"), on_part=sweep.add,
        limit_images=limit,
    )  # fmt: skip
    sweep.merge(distributed.gather(sweep))
    threshold, dice = sweep.best()

    before = _calibration(logits, target, evaluator) | {n: m.compute()["Mean_Dice"] for n, m in first.metrics.items()}
    after = _calibration(logits, target, fitted) | {
        "T": dice,
        "max": before["max"],  # a temperature does not change which class is the most probable
        "rankdice": second.metrics["rankdice"].compute()["Mean_Dice"],
    }
    return Fit(temperature.value, threshold, temperature.bound, first.images, before, after)


def _calibration(logits: Any, target: Any, evaluator: Evaluator) -> dict[str, float]:
    found = sample_calibration(logits, target, evaluator.network.activation, evaluator.network.temperature)
    return {key: found[key] for key in ("NLL", "Brier", "ECE", "Class_ECE")}


def text(found: Fit, config: Config, data: str) -> str:
    """Return the fit as a table, and what there is to say of it."""
    rows = []
    for name, temperature, threshold, scores in (
        ("before", config.predict.temperature, config.predict.threshold, found.before),
        ("after", found.temperature, found.threshold, found.after),
    ):
        rows.append([name, f"{temperature:.4f}", f"{threshold:.2f}", *(f"{scores[key]:.4f}" for key in SCORES)])
    titles = ["NLL", "Brier", "ECE", "class ECE", "mDice T", "mDice max", "mDice rankdice"]
    parts = [
        f"\n    ## Temperature and threshold, fitted on {found.images} validation images ({data})",
        tables.plain(["", "temperature", "threshold", *titles], rows),
    ]
    if found.at_bound:
        parts.append(
            f"    warning: the temperature ran to the bound {found.temperature:g}: the network's outputs are no "
            "probabilities (is the loss a proper one?), or the validation data is too little or perfectly separated"
        )
    if found.images < FEW_IMAGES:
        parts.append(
            f"    warning: {found.images} validation images are few: on others temperature, and more so threshold, "
            f"may do worse than before; fit on at least {FEW_IMAGES}"
        )
    return "\n".join(parts)


def calibrated(state: Mapping[str, Any], config: Config, found: Fit, data: str) -> dict[str, Any]:
    """Return the content of a new checkpoint: that of ``state``, with the fit in its config.

    Apart from the two fields the config stays the checkpoint's own: what the command line said of this run (devices,
    folders) is not of the model. ``calibration`` tells where they come from.
    """
    stored = state.get("config")
    own = json.loads(json.dumps(stored)) if isinstance(stored, Mapping) else config.model_dump()
    section = own.get("predict")
    own["predict"] = (dict(section) if isinstance(section, Mapping) else {}) | {
        "temperature": found.temperature,
        "threshold": found.threshold,
    }
    record = {
        "images": found.images,
        "data": data,
        "temperature": found.temperature,
        "threshold": found.threshold,
        "at_bound": found.at_bound,
        "before": found.before,
        "after": found.after,
    }
    return {key: state[key] for key in KEPT if key in state} | {"config": own, "calibration": record}


def save(state: Mapping[str, Any], source: str | Path, folder: str | Path | None) -> Path:
    """Write the new checkpoint beside the old one, or into a folder: ``NAME_calibrated.pth``; return its path."""
    source = Path(source)
    stem = source.stem.removesuffix("_calibrated")
    path = Path(folder or source.parent) / f"{stem}_calibrated.pth"
    checkpoint.save(state, path)
    return path
