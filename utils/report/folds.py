"""Cross-validation: the checkpoints of all folds, each scored on the images that it held out, as one result."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils import tables
from utils.checkpoint import LoadedModel
from utils.config.data_checks import check_facts
from utils.errors import UserError, plural
from utils.evaluation import Decision, Evaluation
from utils.evaluation.comparison import BASELINE
from utils.report.scoring import Scoring
from utils.report.text import INDENT, WIDTH

# Scores with a table of all folds on the screen; results.json has all scores.
PER_FOLD = {"Mean_Dice": "mDice", "Mean_IoU": "mIoU"}
# Lines of the protocol that folds may differ in.
OF_EACH = ("epoch", "views", "temperature", "threshold", "fitted")


class Fold(NamedTuple):
    """A checkpoint, and the names of the images that it was trained on and that it is scored on."""

    checkpoint: str
    trained: frozenset[str]
    held_out: frozenset[str]


def check(folds: Sequence[Fold]) -> None:
    """Check that each image is held out by exactly one checkpoint, and not used for its training.

    Raises:
        UserError: naming the checkpoints and an image.
    """
    every = frozenset().union(*(fold.trained | fold.held_out for fold in folds))
    seen: dict[str, str] = {}
    for fold in folds:
        if leaked := fold.trained & fold.held_out:
            raise UserError(
                f"--folds: {fold.checkpoint} was trained on {_images(leaked)} that it would be scored on; train it "
                "with the same val_fold in all its loaders"
            )
        for name in sorted(fold.held_out):
            if name in seen:
                twice = fold.held_out & next(other.held_out for other in folds if other.checkpoint == seen[name])
                raise UserError(
                    f"--folds: {seen[name]} and {fold.checkpoint} both held out {_images(twice)}; pass one "
                    "checkpoint of each fold"
                )
            seen[name] = fold.checkpoint
    if missing := every - seen.keys():
        raise UserError(
            f"--folds: none of the {len(folds)} checkpoints held out {_images(missing)}; pass the checkpoints of "
            "all folds: one val_fold [k, n] for each k from 0 to n - 1"
        )


def check_models(models: Sequence[LoadedModel]) -> None:
    """Check that all folds have the same classes, and are scored on the same ones.

    Raises:
        UserError: naming the checkpoint that differs from the first one.
    """
    first = models[0]
    for other in models[1:]:
        check_facts(first.config, first.facts, {f"--folds {other.path}": other.facts})
        for field in ("CoI", "count_ignored"):
            values = [getattr(model.config.predict, field) for model in (first, other)]
            if values[0] != values[1]:
                raise UserError(
                    f"--folds: predict.{field} is {values[0]} in {first.path} and {values[1]} in {other.path}; set "
                    f"it for all of them with --set predict.{field}=..."
                )


def _images(names: frozenset[str]) -> str:
    return f"{plural(len(names), 'image')} (such as {min(names)})"


def folder_of(checkpoints: Sequence[str]) -> Path:
    """Return the default folder of the results: ``folds`` in the deepest folder that contains all checkpoints."""
    return Path(os.path.commonpath([Path(path).absolute().parent for path in checkpoints])) / "folds"


def score(scorings: Sequence[Scoring]) -> tuple[dict[str, Any], Evaluation]:
    """Score every checkpoint on its images; return the content of ``results.json``, and the outcome of all images."""
    outcomes = [
        scoring.evaluate(f"TEST {k} of {len(scorings)}", decisions=decisions)
        for k, (scoring, decisions) in enumerate(zip(scorings, _aligned(scorings), strict=True), 1)
    ]
    pooled = Evaluation.merged(outcomes)
    each = [scoring.results(outcome) for scoring, outcome in zip(scorings, outcomes, strict=True)]
    return combined(scorings[0].results(pooled), each), pooled


def _aligned(scorings: Sequence[Scoring]) -> list[dict[str, Decision]]:
    """Return the decisions of all folds under the same names.

    The fit differs between folds, so one of them may have no ``T_tuned``, or its ``max`` may be ``max_present``. A
    single procedure keeps its name.
    """
    own = [scoring.decisions for scoring in scorings]
    if not scorings[0].everything:
        return [{scorings[0].procedure: decision} for of_fold in own for decision in of_fold.values()]
    longest = max(own, key=len)
    return [
        {name: of_fold.get(name, Decision("T", scoring.options)) for name in longest}
        for of_fold, scoring in zip(own, scorings, strict=True)
    ]


def combined(content: Mapping[str, Any], folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of ``results.json``.

    Args:
        content: :func:`utils.report.results` over the images of all folds; it stays at the top.
        folds: the results of each fold, for ``folds``. ``spread`` contains mean and standard deviation of every score
            of every procedure over the folds.
    """
    protocol = dict(content["protocol"])
    protocol["checkpoint"] = ", ".join(fold["protocol"]["checkpoint"] for fold in folds)
    protocol["folds"] = len(folds)
    for key in OF_EACH:
        values = [fold["protocol"][key] for fold in folds]
        if any(value != values[0] for value in values):
            protocol[key] = f"of each fold: {', '.join(tables.number(value) for value in values)}"
    spread = {name: _spread([fold["procedures"][name] for fold in folds]) for name in content["procedures"]}
    return {**content, "protocol": protocol, "folds": list(folds), "spread": spread}


def _spread(values: Sequence[Any]) -> dict[str, Any]:
    """Return mean and standard deviation (n - 1) of numbers; of mappings, those of each key."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _spread([value.get(key) for value in values]) for key in first}
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
    }


def text(content: Mapping[str, Any], details: bool = False) -> str:
    """Return the tables of the folds for the screen; ``details``: see :func:`utils.report.text`."""
    folds, spread, pooled = content["folds"], content["spread"], content["procedures"]
    shown = [p for p in pooled if details or len(pooled) == 1 or p in (BASELINE, content["protocol"]["deployed"])]
    parts = []
    for key, title in PER_FOLD.items():
        rows = [
            [str(k), str(fold["protocol"]["images"]), *(tables.number(fold["procedures"][p][key]) for p in pooled)]
            for k, fold in enumerate(folds)
        ]
        rows += [[kind, "", *(tables.number(spread[p][key][kind]) for p in pooled)] for kind in ("mean", "std")]
        rows.append(["all", str(content["protocol"]["images"]), *(tables.number(pooled[p][key]) for p in pooled)])
        parts.append(f"\n{INDENT}## {title} of each fold\n")
        parts.append(tables.plain(["fold", "images", *pooled], rows, INDENT, WIDTH))
    rows = [
        [name, *(_cell(spread[p]["Class_Dice"][name]) for p in shown)]
        for name in next(iter(pooled.values()))["Class_Dice"]
    ]
    parts.append(f"\n{INDENT}## Class Dice, mean ± standard deviation over the folds\n")
    parts.append(tables.plain(["class", *shown], rows, INDENT, WIDTH))
    return "\n".join(parts)


def _cell(score: Mapping[str, Any]) -> str:
    return f"{tables.number(score['mean'])} ± {tables.number(score['std'])}"
