"""Load the state of a checkpoint into a run, whose config may have changed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from base.resume import changes_of_score, fingerprint
from utils import checkpoint, distributed, optim
from utils.errors import UserError


def restore(run: Any, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Let a :class:`base.base_trainer.BaseTrainer` continue from a checkpoint.

    Returns:
        The states of the random number generators of this process; None if the number of processes has changed.

    Raises:
        UserError: the checkpoint has no training state, is malformed, or cannot be continued with this config.
    """
    try:
        return _restore(run, state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint to resume is malformed ({type(error).__name__}: {str(error)[:200]}); to start a new "
            "run from its weights: train.py --config CONFIG --weights CHECKPOINT"
        ) from None


def _restore(run: Any, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if "scheduler" not in state or "processes" not in state:
        raise UserError(
            "the checkpoint contains weights but no training state of this framework, so it cannot be resumed; "
            "to start a new run from its weights: train.py --config CONFIG --weights CHECKPOINT"
        )
    before = state["config"]["optimizer"]["type"]
    if before != run.config.optimizer.type:
        raise UserError(
            f"optimizer.type: the checkpoint has {before}, the config {run.config.optimizer.type}; a resumed run "
            "keeps its optimizer. To use another one, start a new run from its weights: train.py --config CONFIG "
            "--weights CHECKPOINT"
        )
    checkpoint.load_weights(run.model, state["state_dict"], "the checkpoint to resume")
    if run.ema is not None and state["ema"] is not None:
        run.ema.module.load_state_dict(state["ema"])
        run.ema.n_averaged.fill_(state["ema_updates"])
    optim.restore(run.optimizer, state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    _restore_progress(run, state)
    _restore_monitor(run, state)
    return _restore_process(run, state)


def _restore_progress(run: Any, state: Mapping[str, Any]) -> None:
    run.epoch, run.batch = state["epoch"], run.plan.batch_at(state)
    run.iteration = run.started = state["iteration"]
    step = run.plan.steps_until(run.epoch, run.batch)
    run.scheduler.load_state_dict(state["scheduler"] | {"last_step": step})
    run.plan.tell_change(state, run.epoch, run.batch, run.scheduler.total_steps)


def _restore_monitor(run: Any, state: Mapping[str, Any]) -> None:
    run.monitor.load_state_dict(state)
    changes = changes_of_score(state["config"], run.config)
    if state.get("validation", fingerprint(run.data.val)) != fingerprint(run.data.val):
        changes.append("the validation images have changed")
    if changes and run.monitor.mode != "off" and math.isfinite(run.monitor.best):
        if distributed.is_main():
            why = "; ".join(changes[:4])
            print(
                f"warning: the best {run.monitor.name} so far, {run.monitor.best:.4f}, cannot be compared with "
                f"scores from now on ({why}): the best model and early stopping start over",
                file=sys.stderr,
            )
        run.monitor.reset()


def _restore_process(run: Any, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if len(state["processes"]) == distributed.world_size():
        own = state["processes"][distributed.rank()]
        run.meter.load_state_dict(own["train_scores"] if run.batch else {})
        return own["rng"]
    if distributed.is_main():
        print(
            f"warning: the checkpoint contains the random states of {len(state['processes'])} processes, now there "
            f"are {distributed.world_size()}; the run continues, but with other random numbers",
            file=sys.stderr,
        )
    return None
