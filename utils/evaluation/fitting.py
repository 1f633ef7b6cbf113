"""Fit temperature, bias, presence and threshold on validation data, and keep what clearly helps on held-out images.

``train.py`` does it when training ends, ``test.py --fit`` for any checkpoint. The network sees the images once, or
again if their logits do not fit into memory. All decisions are based on folds, each scored with a fit on the others.
Folds consist of consecutive images, because neighbors in a video look alike, or of whole groups if the data has groups
(``group_by``). :func:`utils.evidence.clear` says which gains are more than noise.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import torch
from torch import Tensor

from utils import distributed, evidence, presence, tables
from utils.config.schema import Predict
from utils.errors import are, plural
from utils.evaluation import Evaluator, Limited, evaluate
from utils.evaluation.held_out import OWN, SCALED, TRIED_IMAGES, Calibrations, Row, Scorer, Seen, stacked, thresholds
from utils.evaluation.temperature import Calibration, LogitSample
from utils.metrics import count, image_scores
from utils.predict import PROCEDURES, PredictOptions
from utils.predict.network import SCALES, Network, SavedNetwork
from utils.presence import learning

# Averaging over scales takes twelve times as long, so its gain must be larger and more certain than that of a fit.
MULTISCALE = {"errors": 2.0, "smallest": 0.005}


@dataclass(frozen=True)
class Fit:
    """What was fitted and kept.

    Attributes:
        calibration: temperature, and bias per class or None.
        threshold: of procedure T.
        presence: the fit for :func:`utils.presence.choose`, with the ids of its ``classes`` and its ``metric``; None:
            none is kept.
        mode: "single" or "multiscale": how inference should view images; None: not tried.
        images: validation images.
        figures: scores of held-out images, for each way to calibrate the logits: ``NLL``, ``Brier``, ``ECE``,
            ``Class_ECE``, and the mDice of ``T`` at the threshold used so far, ``T_tuned``, ``rankdice`` without a
            presence fit, and ``presence`` with one (NaN if there is none).
        chosen: the row of ``figures`` that is kept.
        notes: sentences on what was kept and why, and warnings.
    """

    calibration: Calibration
    threshold: float
    presence: dict[str, Any] | None
    mode: str | None
    images: int
    figures: dict[str, dict[str, float]]
    chosen: str
    notes: tuple[str, ...]

    @property
    def temperature(self) -> float:
        """The temperature that is kept."""
        return self.calibration.temperature

    def fields(self) -> dict[str, Any]:
        """Return the fields of the config's ``predict`` that the fit sets."""
        found = {
            "temperature": self.calibration.temperature,
            "bias": None if self.calibration.bias is None else list(self.calibration.bias),
            "threshold": self.threshold,
            "presence_fit": self.presence,
        }
        return found if self.mode is None else found | {"mode": self.mode}

    def changes(self, predict: Predict) -> bool:
        """Return whether the fit differs from what a config says."""
        now = predict.model_dump()
        return any(now[name] != value for name, value in self.fields().items())


def fit(
    evaluator: Evaluator,
    loader: Any,
    options: PredictOptions,
    limit: int | None = None,
    procedure: str = "rankdice",
) -> Fit:
    """Fit on a loader of validation data.

    Args:
        evaluator: its network's temperature and bias are what the fit is compared with.
        loader: of the validation data. Its ``group_of``, if it has one and it is not None, returns the group of an
            image by its name.
        options: their threshold and pruning are what the fit is compared with; a presence fit in them is ignored.
        limit: at most this many images.
        procedure: "T", "max" or "rankdice": the one whose mDice decides.

    Raises:
        UserError: the data has no labeled pixel, or the logits are not finite.
    """
    network = evaluator.network
    assert isinstance(network, Network | SavedNetwork)  # the members of an ensemble are fitted one by one
    options = replace(options, fit=None, presence="auto")
    total = len(loader.batches.indices) if hasattr(loader, "batches") else len(loader.dataset)
    total = min(total, limit or total)

    seen = Seen(LogitSample(evaluator.facts, total), max(1, total // TRIED_IMAGES))
    evaluate(evaluator, Limited(loader, images=limit), {}, title="FIT", on_part=seen.add)
    seen.sample.rows = distributed.gather_dicts(seen.sample.rows)

    def rows(calibrations_of: Callable[[str], Sequence[Calibration]], title: str, each: int) -> list[Row]:
        scorer = Scorer(evaluator, options, calibrations_of)
        if seen.complete:
            for name, (logits, target) in seen.maps.items():
                scorer.at(name, logits.to(network.device), target.to(network.device))
        else:
            evaluate(evaluator, Limited(loader, images=limit), {}, title=title, on_part=scorer.add)
        return stacked(distributed.gather_dicts(scorer.rows), each)

    own = Calibration(network.temperature, None if network.bias is None else tuple(network.bias))
    calibrations = Calibrations(seen.sample, network.activation, own, getattr(loader, "group_of", None))
    held_out = rows(calibrations.held_out, "FIT, held out", len(calibrations.names))
    trials = {
        name: Trial(name, found, options, calibrations)
        for name, found in zip(calibrations.names, held_out, strict=True)
    }
    best = _best_calibration(trials, procedure)
    everything = held_out[0] if best == OWN else rows(lambda _: [calibrations.final[best]], "FIT, all", 1)[0]
    found = _decided(best, trials, calibrations, everything, options, procedure)
    return replace(found, **_mode(seen, evaluator, found, options, procedure, trials[best].worth))


# ---------------------------------------------------------------------------------------------------- decisions


class Trial:
    """The scores of the held-out images ``(N,)`` under one kind of calibration.

    Attributes:
        learned: the fit of presence, with the scores of ``rankdice`` with and without it.
        pruned: scores of ``rankdice`` without a fit.
        before, tuned: scores of ``T`` with the threshold used so far, and with a fitted one.
        keeps_threshold: whether the fitted threshold clearly gains.
        quality, nll: see :meth:`Calibrations.quality`.
        worth: how many independent images these are.
    """

    def __init__(self, name: str, rows: Row, options: PredictOptions, calibrations: Calibrations) -> None:
        self.learned = presence.learn(*rows[:4], prune=options.prune, folds=calibrations.folds)
        chosen = rows.highest > (0.0 if options.prune is None else options.prune)
        self.pruned = presence.mean_scores(chosen, rows.measured, rows.present)
        self.worth = learning.independent_images(rows.highest, rows.scores, rows.present)
        steps = thresholds(options.threshold)
        self.before = rows.sweep[:, steps.index(options.threshold)]
        self.tuned = torch.full_like(self.before, nan)
        for fold in calibrations.folds.unique():
            own = calibrations.folds == fold
            best = _best_threshold(rows.sweep[~own], steps, options.threshold)
            self.tuned[own] = rows.sweep[own, steps.index(best)]
        self.keeps_threshold = evidence.clear(self.tuned - self.before, self.worth)
        self.quality, self.nll = calibrations.quality(name)

    def scores(self, procedure: str) -> Tensor:
        """Return the scores of a procedure with what clearly helps it."""
        if procedure == "T":
            return self.tuned if self.keeps_threshold else self.before
        fitted = self.learned.fitted
        return self.pruned if self.learned.fit is None or fitted is None else fitted

    def figures(self) -> dict[str, float]:
        """Return the scores of all images: quality of the probabilities, and means of mDice."""
        fitted = self.learned.fitted
        shown = {"T": self.before, "T_tuned": self.tuned, "rankdice": self.pruned, "presence": fitted}
        means = {name: nan if scores is None else float(scores.nanmean()) for name, scores in shown.items()}
        return self.quality | means


def _best_threshold(sweep: Tensor, steps: Sequence[float], before: float) -> float:
    """Return the threshold with the highest mean score; of equal ones, the nearest to the one used so far."""
    means = sweep.nanmean(0).nan_to_num(-1.0).tolist() if len(sweep) else [0.0] * len(steps)
    return max(zip(means, steps, strict=True), key=lambda pair: (pair[0], -abs(pair[1] - before)))[1]


def _best_calibration(trials: dict[str, Trial], procedure: str) -> str:
    """Return the calibration that is kept.

    They are judged by the likelihood of the labels, which is more precise than mDice on few images. A calibration
    replaces a simpler one if its NLL is clearly lower, and its mDice is neither clearly lower than with the simpler one
    nor lower at all than as trained.
    """
    best = OWN
    for name, trial in trials.items():
        lower, lost = trials[best].nll - trial.nll, trials[best].scores(procedure) - trial.scores(procedure)
        gained = trial.scores(procedure) - trials[OWN].scores(procedure)
        fits_better = evidence.clear(lower, trial.worth, smallest=0.0)
        if fits_better and not evidence.clear(lost, trial.worth) and not gained.nanmean() < 0:
            best = name
    return best


def _decided(
    best: str, trials: dict[str, Trial], calibrations: Calibrations, rows: Row, options: PredictOptions, procedure: str
) -> Fit:
    """Return what is kept, fitted on ``rows``: all images under the calibration that is kept."""
    trial, facts = trials[best], calibrations.sample.facts
    kept, threshold = None, options.threshold
    if trial.learned.fit is not None:
        classes = range(facts.num_classes) if options.classes is None else options.classes
        found = presence.learn(*rows[:4], prune=options.prune, folds=calibrations.folds).found
        kept = None if found is None else found | {"classes": list(classes), "metric": options.metric}
    if trial.keeps_threshold:
        threshold = _best_threshold(rows.sweep, thresholds(threshold), threshold)
    fit = Fit(
        calibration=calibrations.final[best],
        threshold=threshold,
        presence=kept,
        mode=None,
        images=len(rows.highest),
        figures={name: one.figures() for name, one in trials.items()},
        chosen=best,
        notes=(),
    )
    return replace(fit, notes=tuple(_notes(fit, trials, calibrations, procedure)))


@torch.no_grad()
def _mode(
    seen: Seen, evaluator: Evaluator, found: Fit, options: PredictOptions, procedure: str, worth: float
) -> dict[str, Any]:
    """Return the fields of :class:`Fit` that change if averaging over scales scores clearly higher.

    ``worth``: how many independent images the validation images are worth. If they are few, this costly mode is not
        tried.
    """
    if not isinstance(evaluator.network, Network):
        return {}  # saved probabilities have one view
    if worth < evidence.FEW:
        return {"notes": (*found.notes, f"Mode: not tried. This needs {evidence.FEW} independent images.")}
    single = replace(evaluator.network, temperature=found.calibration.temperature, bias=found.calibration.bias)
    options = replace(options, threshold=found.threshold, fit=found.presence)
    scores = {
        name: [
            _mean_dice(evaluator, network, image, target, options, procedure)
            for network in (single, replace(single, scales=SCALES))
        ]
        for name, image, target in seen.tried
    }
    pairs = torch.tensor(list(distributed.gather_dicts(scores).values())).view(-1, 2)
    pairs = pairs[pairs.isfinite().all(dim=1)]
    if len(pairs) < learning.FEWEST_IMAGES:
        return {}
    clear = evidence.clear(pairs[:, 1] - pairs[:, 0], min(worth, len(pairs)), **MULTISCALE)
    mode = "multiscale" if clear else "single"
    one, several = pairs.mean(dim=0).tolist()
    note = f"Mode: {mode}. On {len(pairs)} images, mDice {one:.4f} in one view, {several:.4f} averaged over scales."
    return {"mode": mode, "notes": (*found.notes, note)}


def _mean_dice(
    evaluator: Evaluator, network: Network, image: Tensor, target: Tensor, options: PredictOptions, procedure: str
) -> float:
    facts = evaluator.facts
    prediction = PROCEDURES[procedure](network.probabilities(image[None]), options)
    target = target[None].to(network.device)
    counts = count(prediction, target, facts.num_classes, facts.ignore_index, evaluator.count_ignored)
    own = slice(None) if options.classes is None else list(options.classes)
    return float(image_scores(counts).dice[0, own].nanmean())


# ---------------------------------------------------------------------------------------------------- words


def _notes(found: Fit, trials: dict[str, Trial], calibrations: Calibrations, procedure: str) -> Iterable[str]:
    """Yield sentences on what is kept and why."""
    trial, own = trials[found.chosen], trials[OWN]
    yield _about_the_calibration(found, trials, procedure)
    kept = "kept" if found.presence is not None else "not kept" if trial.learned.found else "not fitted"
    yield f"Presence: {kept}. {trial.learned.reason[0].upper()}{trial.learned.reason[1:]}."
    yield (
        f"Threshold of T: {found.threshold:.2f}. mDice of T: {float(trial.before.nanmean()):.4f} before, "
        f"{float(trial.tuned.nanmean()):.4f} with a fitted threshold."
    )
    name = "T" if procedure == "T" else "rankdice"
    before = float((own.before if procedure == "T" else own.pruned).nanmean())
    yield (
        f"mDice of {name} on held-out images: {before:.4f} without the fit, "
        f"{float(trial.scores(procedure).nanmean()):.4f} with the values that are kept."
    )
    if own.worth < found.images / 2:
        yield (
            f"These {found.images} images count as {own.worth:.0f}, because consecutive images look alike. A fit "
            "must therefore gain more to be kept."
        )
    if calibrations.example is not None:
        yield (
            "Consecutive images look alike, so each fold holds out all images whose names have the same prefix, "
            f"such as {calibrations.example!r}. If the images must be grouped in another way, set group_by of the "
            "loader."
        )
    if calibrations.groups == 1:
        yield (
            "Warning: all validation images belong to one group (group_by), so the fit cannot be tested on other "
            "groups. Validate on several groups."
        )
    if found.images < learning.FEW_IMAGES:
        yield f"Warning: {are(found.images, 'validation image')} few. Fit on at least {learning.FEW_IMAGES}."


def _about_the_calibration(found: Fit, trials: dict[str, Trial], procedure: str) -> str:
    """Say which calibration is kept, or why none is."""
    if SCALED not in trials:
        return (
            "Temperature: not kept, because it reached the end of its range. Either the network's outputs are not "
            "probabilities (was it trained with a proper loss?), or there are too few validation images."
        )
    own, trial = trials[OWN], trials[found.chosen]
    if found.chosen != OWN:
        bias = ", and a bias per class" if found.calibration.bias is not None else ""
        return (
            f"Temperature: {found.temperature:.4f}{bias}. NLL of held-out images: {float(own.nll.nanmean()):.4f} "
            f"before, {float(trial.nll.nanmean()):.4f} with the fit."
        )
    scaled = trials[SCALED]
    if evidence.clear(own.nll - scaled.nll, scaled.worth, smallest=0.0):
        before, after = (float(one.scores(procedure).nanmean()) for one in (own, scaled))
        return f"Temperature: not kept. It lowers mDice from {before:.4f} to {after:.4f}."
    return "Temperature: not kept. It does not clearly lower the NLL of held-out images."


def text(found: Fit, data: str) -> str:
    """Return the fit as a table and sentences; ``data`` says which images it was fitted on."""
    shown = ("NLL", "Brier", "ECE", "Class_ECE", "T", "T_tuned", "rankdice", "presence")
    titles = ["NLL", "Brier", "ECE", "class ECE", "T", "T tuned", "rankdice", "presence"]
    rows = [
        [("* " if name == found.chosen else "  ") + name, *(tables.number(figures[key]) for key in shown)]
        for name, figures in found.figures.items()
    ]
    head = f"Fitted on {plural(found.images, 'validation image')} ({data}); scores of held-out images in folds"
    notes = [textwrap.fill(note, 100, initial_indent="    ", subsequent_indent="    ") for note in found.notes]
    return "\n".join([f"\n    ## {head}", tables.plain(["  logits", *titles], rows, "    "), "", *notes])
