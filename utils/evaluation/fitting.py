"""Fit temperature, bias, presence and threshold on validation data, and keep what helps on images held out.

``train.py`` does it when training ends, ``test.py --fit`` for any checkpoint. The network sees the images once, or
again if their logits do not fit into memory. Every number that decides is computed on five folds of consecutive images,
each scored with what was fitted on the other four: neighbours in a video are alike, so they belong in the same fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import isnan, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils import distributed, presence, tables
from utils.config.schema import Predict
from utils.errors import UserError
from utils.evaluation import Evaluator, Part, Progress, evaluate
from utils.evaluation.calibration import THRESHOLDS, Reliability, ThresholdSweep
from utils.evaluation.links import Link, LogitSample, fit_bias, fit_temperature
from utils.metrics import count, image_scores
from utils.predict import PROCEDURES, PredictOptions
from utils.predict.network import SCALES, Network
from utils.predict.saved import SavedNetwork

FOLDS = 5
KEPT_BYTES = 2**30  # of logits, for the second look at an image
TRIED_IMAGES = 24  # in single against multiscale
TRIED_PIXELS = 2**21  # larger images are not tried at twice their size
CLEAR = 2.0  # standard errors by which multiscale must win

OWN, SCALED, SHIFTED = "as trained", "temperature", "temperature and bias"


@dataclass(frozen=True)
class Fit:
    """What was fitted and kept.

    Attributes:
        link: temperature, and bias per class or None.
        threshold: of procedure T.
        presence: the fit for :func:`utils.presence.choose`, with the ids of its ``classes`` and its ``metric``; None:
            none is kept.
        mode: "single" or "multiscale": how inference should view images; None: not tried.
        images: validation images.
        figures: scores on images held out, by what the network's logits went through: ``NLL``, ``Brier``, ``ECE``,
            ``Class_ECE``, and the mDice of ``T`` at the threshold used so far, ``T_tuned``, ``rankdice`` without a
            presence fit, and ``presence`` with one (NaN if there is none).
        chosen: the row of ``figures`` that is kept.
        notes: sentences on what was kept and why, and what is doubtful.
    """

    link: Link
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
        return self.link.temperature

    def fields(self) -> dict[str, Any]:
        """Return the fields of the config's ``predict`` that the fit sets."""
        found = {
            "temperature": self.link.temperature,
            "bias": None if self.link.bias is None else list(self.link.bias),
            "threshold": self.threshold,
            "presence_fit": self.presence,
        }
        return found if self.mode is None else found | {"mode": self.mode}

    def changes(self, predict: Predict) -> bool:
        """Return whether the fit differs from what a config says."""
        now = predict.model_dump()
        return any(now[name] != value for name, value in self.fields().items())


class Row(NamedTuple):
    """Results of one image under one link: ``(C,)`` over the classes of interest, and mDice of T per threshold."""

    highest: Tensor
    scores: Tensor
    measured: Tensor
    present: Tensor
    sweep: Tensor


@dataclass
class _Seen:
    """Data kept from the pass over the images: a sample of pixels, the logits if they fit, images to test views on."""

    sample: LogitSample
    every: int
    maps: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tried: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    bytes: int = 0
    images: int = 0

    def add(self, part: Part) -> None:
        self.sample.add(part)
        for i, name in enumerate(part.batch.names):
            logits, target = part.logits[i].float(), part.target[i]
            self.bytes += logits.numel() * 4
            if self.bytes <= KEPT_BYTES:
                self.maps[name] = (logits.cpu(), target.cpu())
            else:
                self.maps.clear()
            if self.images % self.every == 0 and target.numel() <= TRIED_PIXELS:
                self.tried.append((name, part.batch.images[i].cpu(), target.cpu()))
            self.images += 1


def fit(
    evaluator: Evaluator,
    loader: Any,
    options: PredictOptions,
    progress: Callable[[str], Progress],
    limit: int | None = None,
    procedure: str = "rankdice",
) -> Fit:
    """Fit on a loader of validation data.

    Args:
        evaluator: its network's temperature and bias are what the fit is compared with.
        loader: of the validation data.
        options: their threshold and pruning are what the fit is compared with; a presence fit in them is ignored.
        progress: from a title to a wrapper of the iteration.
        limit: only so many images.
        procedure: "T", "max" or "rankdice": the one whose mDice decides.

    Raises:
        UserError: the data has no labelled pixel, or the logits are not finite.
    """
    network = evaluator.network
    assert isinstance(network, Network | SavedNetwork)  # the members of an ensemble are fitted one by one
    options = replace(options, fit=None, presence="auto")
    total = len(loader.batches.indices) if hasattr(loader, "batches") else len(loader.dataset)
    total = min(total, limit or total)
    seen = _Seen(LogitSample(evaluator.facts, total), max(1, total // TRIED_IMAGES))
    evaluate(evaluator, loader, {}, progress=progress("FIT"), on_part=seen.add, limit_images=limit)
    seen.sample.merge(distributed.gather(seen.sample))
    own = Link(network.temperature, None if network.bias is None else tuple(network.bias))
    links = _Links(seen.sample, network.activation, own)

    def again(links_of: Callable[[str], Sequence[Link]], title: str) -> dict[str, list[Row]]:
        look = _Look(evaluator, options, links_of)
        if seen.bytes <= KEPT_BYTES:
            for name, (logits, target) in seen.maps.items():
                look.at(name, logits.to(network.device), target.to(network.device))
        else:
            evaluate(evaluator, loader, {}, progress=progress(title), on_part=look.add, limit_images=limit)
        return {name: rows for share in distributed.gather(look.rows) for name, rows in share.items()}

    held_out = _stacked(again(links.held_out, "FIT, held out"), len(links.names))
    trials = {name: _Trial(rows, options, links) for name, rows in zip(links.names, held_out, strict=True)}
    likely = {name: links.calibration(k)["NLL"] for k, name in enumerate(trials)}
    best = max(trials, key=lambda name: (round(trials[name].value(procedure), 9), -likely[name]))
    rows = held_out[0] if best == OWN else _stacked(again(lambda _: [links.final[best]], "FIT, all"), 1)[0]
    found = _decided(best, trials, rows, options, links)
    return replace(found, **_mode(seen, evaluator, found, options, procedure))


# ---------------------------------------------------------------------------------------------------- links


class _Links:
    """The links that are tried: fitted on all images, and for each fold on the images of the other folds."""

    def __init__(self, sample: LogitSample, activation: Any, own: Link) -> None:
        self.activation = activation
        self.images = sorted(sample.rows)
        self.fold = {name: int(i * FOLDS / len(self.images)) for i, name in enumerate(self.images)}
        self.sample = sample
        self.final = self._fitted(self.images, own)
        self.names = list(self.final)
        self.of_fold = []
        for fold in range(FOLDS):
            others = [name for name in self.images if self.fold[name] != fold]
            found = self._fitted(others, own) if others else {}
            self.of_fold.append([found.get(name, own) for name in self.names])

    def _fitted(self, images: Sequence[str], own: Link) -> dict[str, Link]:
        rows = [self.sample.rows[name] for name in images]
        logits, target = (torch.cat(parts) for parts in zip(*rows, strict=True)) if rows else (torch.empty(0, 1),) * 2
        try:
            temperature = fit_temperature(logits, target, self.activation)
        except ValueError as error:
            raise UserError(f"the temperature cannot be fitted on the validation data: {error}") from None
        found = {OWN: own}
        if not temperature.bound:
            found[SCALED] = Link(temperature.value)
            shifted = fit_bias(logits, target, self.activation, self._common(rows, logits.shape[1]))
            if shifted is not None:
                found[SHIFTED] = shifted
        return found

    @staticmethod
    def _common(rows: Sequence[tuple[Tensor, Tensor]], classes: int) -> Tensor:
        """Return the classes that are in enough images to have a bias, bool ``(C,)``."""
        found = torch.zeros(max(classes, 2))
        for _, target in rows:
            found[target.unique()] += 1
        common = found >= presence.FEWEST_PER_CLASS
        return common[1:] if classes == 1 else common

    def held_out(self, name: str) -> list[Link]:
        """Return the links of an image, none of which has seen it."""
        return self.of_fold[self.fold[name]]

    def calibration(self, place: int) -> dict[str, float]:
        """Return how good the probabilities of the held-out images are under one kind of link."""
        facts = self.sample.facts
        gathered = Reliability(facts.num_classes, facts.ignore_index, self.activation)
        for name in self.images:
            logits, target = self.sample.rows[name]
            link = self.held_out(name)[place]
            gathered.add_pixels(link(logits[:, :, None, None], self.activation)[:, :, 0, 0], target)
        found = gathered.compute()
        return {key: found[key] for key in ("NLL", "Brier", "ECE", "Class_ECE")}


# ---------------------------------------------------------------------------------------------------- rows


class _Look:
    """Predicts images under each link, and keeps the rows for the fits of presence and threshold."""

    def __init__(
        self, evaluator: Evaluator, options: PredictOptions, links_of: Callable[[str], Sequence[Link]]
    ) -> None:
        self.evaluator, self.links_of = evaluator, links_of
        self.options = replace(options, presence="all")
        thresholds = sorted({*THRESHOLDS, options.threshold})
        self.sweep = ThresholdSweep(evaluator.facts, options.classes, evaluator.count_ignored, thresholds)
        self.rows: dict[str, list[Row]] = {}

    def add(self, part: Part) -> None:
        for i, name in enumerate(part.batch.names):
            self.at(name, part.logits[i], part.target[i])

    def at(self, name: str, logits: Tensor, target: Tensor) -> None:
        known: dict[Link, Row] = {}
        for link in self.links_of(name):
            if link not in known:
                known[link] = self._row(link(logits[None], self.evaluator.network.activation), target)
        self.rows[name] = [known[link] for link in self.links_of(name)]

    def _row(self, probs: Tensor, target: Tensor) -> Row:
        facts = self.evaluator.facts
        found = PROCEDURES["rankdice"](probs, self.options)
        assert found.scores is not None
        counts = count(found, target[None], facts.num_classes, facts.ignore_index, self.evaluator.count_ignored)
        scores = image_scores(counts)
        measured = scores.iou if self.options.metric == "iou" else scores.dice
        own = list(self.options.classes or range(facts.num_classes))
        columns = (probs.flatten(2).amax(2), found.scores, measured.nan_to_num(0.0), counts.target > 0)
        highest, expected, reached, present = (value[0, own].cpu() for value in columns)
        return Row(highest, expected, reached, present, self.sweep.scores(probs[0], target))


def _stacked(rows: dict[str, list[Row]], links: int) -> list[Row]:
    """Return the rows of all images, sorted by name, one below the other: a :class:`Row` per link."""
    ordered = [rows[name] for name in sorted(rows)]
    return [Row(*(torch.stack(x) for x in zip(*(one[k] for one in ordered), strict=True))) for k in range(links)]


class _Trial:
    """The scores of the held-out images under one kind of link."""

    def __init__(self, rows: Row, options: PredictOptions, links: _Links) -> None:
        self.learned = presence.learn(*rows[:4], prune=options.prune)
        pruned = rows.highest > (0.0 if options.prune is None else options.prune)
        self.pruned = float(presence.image_scores(pruned, rows.measured, rows.present).nanmean())
        thresholds = sorted({*THRESHOLDS, options.threshold})
        self.before = float(rows.sweep[:, thresholds.index(options.threshold)].nanmean())
        folds = torch.tensor([links.fold[name] for name in links.images])
        tuned = torch.full_like(rows.sweep[:, 0], nan)
        for fold in folds.unique():
            best = _best_threshold(rows.sweep[folds != fold], thresholds, options.threshold)
            tuned[folds == fold] = rows.sweep[folds == fold, thresholds.index(best)]
        self.tuned = float(tuned.nanmean())

    def value(self, procedure: str) -> float:
        """Return the score of a procedure if the fits that help it are kept."""
        if procedure == "T":
            return max(self.before, self.tuned)
        return self.pruned if self.learned.fit is None or self.learned.fitted is None else self.learned.fitted

    def figures(self) -> dict[str, float]:
        fitted = nan if self.learned.fitted is None else self.learned.fitted
        return {"T": self.before, "T_tuned": self.tuned, "rankdice": self.pruned, "presence": fitted}


def _best_threshold(sweep: Tensor, thresholds: Sequence[float], before: float) -> float:
    """Return the threshold with the highest mean score; of equal ones that nearest to the one used so far."""
    means = sweep.nanmean(0).nan_to_num(-1.0).tolist() if len(sweep) else [0.0] * len(thresholds)
    return max(zip(means, thresholds, strict=True), key=lambda pair: (pair[0], -abs(pair[1] - before)))[1]


# ---------------------------------------------------------------------------------------------------- decisions


def _decided(best: str, trials: dict[str, _Trial], rows: Row, options: PredictOptions, links: _Links) -> Fit:
    """Return what is kept of the fits, with ``rows`` of all images under the best link."""
    trial, facts = trials[best], links.sample.facts
    kept, threshold = None, options.threshold
    learned = presence.learn(*rows[:4], prune=options.prune)
    if trial.learned.fit is not None and learned.fit is not None:
        classes = range(facts.num_classes) if options.classes is None else options.classes
        kept = learned.fit | {"classes": list(classes), "metric": options.metric}
    if trial.tuned > trial.before:
        threshold = _best_threshold(rows.sweep, sorted({*THRESHOLDS, threshold}), threshold)
    if trial.learned.fit is None:
        learned = trial.learned
    return Fit(
        link=links.final[best],
        threshold=threshold,
        presence=kept,
        mode=None,
        images=len(rows.highest),
        figures={name: links.calibration(k) | trials[name].figures() for k, name in enumerate(trials)},
        chosen=best,
        notes=tuple(_notes(best, trial, learned, threshold, links)),
    )


def _notes(best: str, trial: _Trial, learned: presence.Learned, threshold: float, links: _Links) -> Iterable[str]:
    """Yield sentences on what is kept and why."""
    images, link = len(links.images), links.final[best]
    if SCALED not in links.final:
        yield (
            "Temperature: not kept, because it reached the end of its range. The network's outputs are not calibrated "
            "probabilities (was it trained with a proper loss?), or there are too few validation images."
        )
    elif best == OWN:
        yield "Temperature: not kept. On images held out, the scores are best without it."
    else:
        bias = ", and a bias per class" if link.bias is not None else ""
        yield f"Temperature: {link.temperature:.4f}{bias}."
    if learned.fit is None:
        yield f"Presence: not fitted. {learned.reason[0].upper()}{learned.reason[1:]}."
    else:
        yield f"Presence: fitted. rankdice scores {trial.pruned:.4f} without it and {trial.learned.fitted:.4f} with it."
    yield f"Threshold of T: {threshold:.2f}. mDice of T {trial.before:.4f} before, {trial.tuned:.4f} with a fitted one."
    if images < presence.FEW_IMAGES:
        yield f"Warning: {images} validation images are few. Fit on at least {presence.FEW_IMAGES}."


@torch.no_grad()
def _mode(seen: _Seen, evaluator: Evaluator, found: Fit, options: PredictOptions, procedure: str) -> dict[str, Any]:
    """Return the fields of :class:`Fit` that change if averaging over scales scores clearly higher."""
    if not isinstance(evaluator.network, Network):
        return {}  # saved probabilities have one view
    facts = evaluator.facts
    single = replace(evaluator.network, temperature=found.link.temperature, bias=found.link.bias)
    options = replace(options, threshold=found.threshold, fit=found.presence)
    own = slice(None) if options.classes is None else list(options.classes)
    scores: dict[str, tuple[float, float]] = {}
    for name, image, target in seen.tried:
        means = []
        for network in (single, replace(single, scales=SCALES)):
            prediction = PROCEDURES[procedure](network.probabilities(image[None]), options)
            counts = count(
                prediction,
                target[None].to(network.device),
                facts.num_classes,
                facts.ignore_index,
                evaluator.count_ignored,
            )
            means.append(float(image_scores(counts).dice[0, own].nanmean()))
        scores[name] = means[0], means[1]
    every = torch.tensor([pair for share in distributed.gather(scores) for pair in share.values()]).view(-1, 2)
    every = every[every.isfinite().all(dim=1)]
    if len(every) < presence.FEWEST_IMAGES:
        return {}
    gain = every[:, 1] - every[:, 0]
    clear = float(gain.mean()) > CLEAR * float(gain.std()) / len(gain) ** 0.5
    mode = "multiscale" if clear else "single"
    one, several = every.mean(dim=0).tolist()
    note = f"Mode: {mode}. On {len(gain)} images, mDice {one:.4f} in one view, {several:.4f} averaged over scales."
    return {"mode": mode, "notes": (*found.notes, note)}


# ---------------------------------------------------------------------------------------------------- words


def text(found: Fit, data: str) -> str:
    """Return the fit as a table and sentences; ``data`` says which images it was fitted on."""
    shown = ("NLL", "Brier", "ECE", "Class_ECE", "T", "T_tuned", "rankdice", "presence")
    titles = ["NLL", "Brier", "ECE", "class ECE", "T", "T tuned", "rankdice", "with presence"]
    rows = [
        [("* " if name == found.chosen else "  ") + name, *("-" if isnan(f[k]) else f"{f[k]:.4f}" for k in shown)]
        for name, f in found.figures.items()
    ]
    head = f"\n    ## Fitted on {found.images} validation images ({data}); scores of held-out images in five folds"
    return "\n".join([head, tables.plain(["  logits", *titles], rows), "", *(f"    {note}" for note in found.notes)])
