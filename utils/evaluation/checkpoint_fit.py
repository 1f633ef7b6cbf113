"""Put a fit into a checkpoint, take it out, and describe it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isnan
from typing import Any

import torch

from utils.checkpoint import LoadedModel, fit_not_used
from utils.config.schema import Config, Predict
from utils.errors import plural
from utils.evaluation import Evaluator, fitting
from utils.evaluation.fitting import Fit
from utils.predict import PredictOptions

# What a checkpoint needs to be used. What a run needs to continue stays in the original.
NEEDED = ("format", "arch", "epoch", "iteration", "state_dict", "ema", "monitor_best", "facts")


def fit(loaded: LoadedModel, loader: Any, device: torch.device, limit: int | None = None) -> Fit:
    """Fit on a loader of validation data (:func:`utils.evaluation.fitting.fit`), at most ``limit`` images."""
    predict = loaded.config.predict
    options = PredictOptions.from_config(predict)
    return fitting.fit(
        Evaluator(loaded.network(device), options.classes, predict.count_ignored),
        loader,
        options,
        limit,
        predict.test,
    )


def text(found: Fit, config: Config) -> str:
    """Return the fit for the screen."""
    return fitting.text(found, _data(config))


def _data(config: Config) -> str:
    """Return which validation images there are, in words."""
    part, origin = (config.val_loader, "") if config.val_loader else (config.train_loader, "held out of")
    return " ".join(str(x) for x in (origin, part.type, part.args.get("split")) if x)


def with_fit(state: Mapping[str, Any], config: Config, found: Fit) -> dict[str, Any]:
    """Return the content of a checkpoint with the fit in its config.

    Other fields of its config stay as they are in the checkpoint: what the command line changed for this run (devices,
    folders) does not belong to the model. ``calibration`` keeps where the fit comes from and what it replaced.

    Args:
        state: content of the checkpoint.
        config: of the run; used if the checkpoint has no config of this project.
        found: the fit.
    """
    stored = without_fit(state).get("config")
    own = json.loads(json.dumps(stored)) if isinstance(stored, Mapping) else config.model_dump()
    section = dict(own["predict"]) if isinstance(own.get("predict"), Mapping) else {}
    new = found.fields()
    record = {
        "images": found.images,
        "data": _data(config),
        "replaced": {name: section[name] for name in new if name in section},
        "found": new,
        "figures": {
            name: {key: None if isnan(value) else value for key, value in row.items()}
            for name, row in found.figures.items()
        },
        "kept": found.chosen,
    }
    return {**state, "config": own | {"predict": section | new}, "calibration": record}


def without_fit(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint as it was before a fit was put in."""
    record, config = state.get("calibration"), state.get("config")
    if not isinstance(record, Mapping) or "replaced" not in record or not isinstance(config, Mapping):
        return dict(state)
    predict = {k: v for k, v in config["predict"].items() if k not in record["found"]} | dict(record["replaced"])
    return {k: v for k, v in state.items() if k != "calibration"} | {"config": {**config, "predict": predict}}


def for_use(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint without what only continuing a run needs."""
    return {key: state[key] for key in (*NEEDED, "config", "calibration") if key in state}


def note(state: Mapping[str, Any], config: Config) -> str | None:
    """Return where temperature, threshold and presence come from; None if they were not fitted."""
    record = state.get("calibration")
    if not isinstance(record, Mapping) or "found" not in record:
        return None
    changed = fit_not_used(state, config.predict.model_dump())
    if changed:
        return f"fitted on validation data, but {', '.join(changed)} are overridden in this run"
    images = f"{plural(record['images'], 'validation image')} ({record['data']})"
    kept = _kept(record)
    if not kept:
        return (
            f"nothing: a fit on {images} kept no value, so temperature, threshold and presence are those of the config"
        )
    return f"{', '.join(kept)} {'was' if len(kept) == 1 else 'were'} fitted on {images}"


def _kept(record: Mapping[str, Any]) -> list[str]:
    """Return in words what the fit changed; a value that it did not keep is the one that was there before."""
    found = record["found"]
    before = {name: field.default for name, field in Predict.model_fields.items()} | record.get("replaced", {})
    words = {
        "temperature": f"temperature {found['temperature']:.4f}",
        "bias": "a bias per class",
        "threshold": f"threshold {found['threshold']:.2f}",
        "presence_fit": "presence",
        "mode": f"mode {found.get('mode')}",
    }
    return [text for name, text in words.items() if name in found and found[name] != before[name]]
