"""Resume a run whose config may have changed: is it the same run, are scores comparable, and where does it continue?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from base import rng
from utils import checkpoint, distributed, optim
from utils import config as configs
from utils.config.schema import Config
from utils.errors import UserError, out_of_memory, plural, warn

# Arguments of loaders that do not change the data.
_LOADING = ("num_workers", "pin_memory", "cache")
# Fields that may change in the same run: how long it is, what it writes, what it runs on.
_FREE = (
    *("about", "n_gpu", "use_synch_bn", "deterministic", "tester", "test_loader", "predict.train", "predict.test"),
    *(f"trainer.{name}" for name in ("epochs", "save_dir", "save_period", "keep_last", "save_every_iters", "monitor")),
    *(f"trainer.{name}" for name in ("early_stop", "tensorboard", "log_dir", "log_per_iter", "val", "val_per_epochs")),
    *(f"trainer.{name}" for name in ("amp", "channels_last", "compile", "profile", "limit_batches")),
)
# Fields that change the monitored score, and fields below them that do not.
_SCORED = ("trainer.monitor", "trainer.limit_batches", "predict", "loss", "ignore_index", "val_loader")
_NOT_SCORED = ("predict.train", "predict.test")


def _below(path: str, sections: tuple[str, ...]) -> bool:
    return any(path == section or path.startswith(f"{section}.") for section in sections)


def _changes(before: Mapping[str, Any], config: Config) -> list[tuple[str, str]]:
    """Return the changed fields as (path, ``path: before -> now``), without those of how data is loaded."""
    with suppress(ValidationError):
        before = Config.model_validate(before).model_dump(mode="json")  # with the defaults of fields that are new
    changes = [(line.partition(":")[0], line) for line in configs.differences(before, config)]
    return [(path, line) for path, line in changes if path.rpartition(".")[2] not in _LOADING]


def changes_of_identity(before: Mapping[str, Any], config: Config) -> list[str]:
    """Return the changes that make it a different run: those of seed, model, optimizer, schedule, loss or data."""
    return [line for path, line in _changes(before, config) if not _below(path, _FREE)]


def changes_of_score(before: Mapping[str, Any], config: Config) -> list[str]:
    """Return the changes after which the monitored score cannot be compared with earlier ones."""
    sections = _SCORED if config.val_loader is not None else (*_SCORED, "train_loader", "seed")
    return [
        line
        for path, line in _changes(before, config)
        if _below(path, sections) and not _below(path, _NOT_SCORED) and path.rpartition(".")[2] != "data_dir"
    ]


def fingerprint(loader: Any) -> str:
    """Return a digest of the names of a loader's images, which identifies them."""
    if loader is None:
        return ""
    dataset = loader.dataset
    names = [str(entry.name) for entry in dataset.entries] if hasattr(dataset, "entries") else []
    indices = getattr(loader.batches, "indices", ())
    return hashlib.sha256(repr((len(dataset), list(map(int, indices)), names)).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """How an epoch is divided: batches (per process), batches per optimizer step, images, batch size, processes."""

    batches: int
    accumulate: int
    images: int
    batch_size: int
    processes: int

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch; the last one may use fewer batches."""
        return math.ceil(self.batches / self.accumulate)

    def steps_until(self, epoch: int, batch: int) -> int:
        """Return the number of optimizer steps before a batch of the epoch after ``epoch``."""
        return epoch * self.steps + math.ceil(batch / self.accumulate)

    def batch_at(self, state: Mapping[str, Any]) -> int:
        """Return the batch to continue with: that of the checkpoint, or the one at the same progress in this plan."""
        batch = int(state["batch"])
        before = state.get("plan") or {}
        epoch, earlier = state["epoch"], state["iteration"] - batch  # for checkpoints without the number of batches
        total = before.get("batches") or (epoch and earlier % epoch == 0 and earlier // epoch) or self.batches
        if total == self.batches and before.get("accumulate", self.accumulate) == self.accumulate:
            return min(batch, self.batches)
        if batch >= total:
            return self.batches
        reached = batch * self.batches // total
        return reached - reached % self.accumulate  # at the start of an optimizer step

    def describe(self) -> str:
        """Return the plan as text."""
        return (
            f"{self.batches} batches per epoch ({plural(self.images, 'image')}, batch size {self.batch_size}, "
            f"{plural(self.processes, 'process')}, accumulate {self.accumulate})"
        )

    def tell_change(self, state: Mapping[str, Any], epoch: int, batch: int, total: int) -> None:
        """Warn that the plan differs from that of the checkpoint."""
        before = state.get("plan")
        if before is None or before == asdict(self) or not distributed.is_main():
            return
        warn(
            f"now {self.describe()}; before {Plan(**before).describe()}. The run continues at the same "
            f"progress: {epoch} epochs and {batch} batches done, step {self.steps_until(epoch, batch)} of {total} of "
            "the learning rate schedule"
        )


def nothing_left(state: Mapping[str, Any], config: Config) -> str | None:
    """Return why the run of a checkpoint is finished and how to continue it anyway; None if it is not finished."""
    if state["epoch"] >= config.trainer.epochs:
        done = f"{state['epoch']} of {config.trainer.epochs} epochs are done"
        return f"{done}; train longer with --set trainer.epochs=N"
    stopped = 0 < config.trainer.early_stop <= state["not_improved_count"] and state["batch"] == 0
    if stopped and not changes_of_score(state["config"], config):
        return (
            f"the run stopped early in epoch {state['epoch']}: {config.trainer.monitor} had not improved in "
            f"{state['not_improved_count']} validations; to continue training, use --set trainer.early_stop=0 or a "
            "larger number"
        )
    return None


_NEW_RUN = "to start a new run from its weights: train.py --config CONFIG --weights CHECKPOINT"


@contextmanager
def refused_if_malformed() -> Iterator[None]:
    """Turn errors that the content of a checkpoint causes into a UserError; a full memory is not one of them."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"the checkpoint to resume is malformed ({type(error).__name__}: {str(error)[:200]}); {_NEW_RUN}"
        ) from None


def restore(run: Any, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Let a :class:`base.base_trainer.BaseTrainer`, whose config may have changed, continue from a checkpoint.

    Returns:
        The states of the random number generators of this process; None if the number of processes has changed.

    Raises:
        UserError: the checkpoint has no training state, is malformed, or cannot be continued with this config.
    """
    with refused_if_malformed():
        if "scheduler" not in state or "processes" not in state:
            raise UserError(
                "the checkpoint contains weights but no training state of this framework, so it cannot be resumed; "
                f"{_NEW_RUN}"
            )
        before = state["config"]["optimizer"]["type"]
        if before != run.config.optimizer.type:
            raise UserError(
                f"optimizer.type: the checkpoint has {before}, the config {run.config.optimizer.type}; a resumed run "
                f"keeps its optimizer; {_NEW_RUN}"
            )
        return _restore(run, state)


def _restore(run: Any, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    checkpoint.load_weights(run.model, state["state_dict"], "the checkpoint to resume")
    if run.ema is not None:  # the average may begin here
        run.ema.module.load_state_dict(state["ema"] or run.model.state_dict())
        run.ema.n_averaged.fill_(state["ema_updates"] or 0)
    optim.restore(run.optimizer, state["optimizer"])
    if state["scaler"]:  # empty if the run did not use fp16 so far
        run.scaler.load_state_dict(state["scaler"])
    run.epoch, run.batch = state["epoch"], run.plan.batch_at(state)
    run.iteration = run.started = state["iteration"]
    step = run.plan.steps_until(run.epoch, run.batch)
    run.scheduler.load_state_dict(state["scheduler"] | {"last_step": step})
    run.plan.tell_change(state, run.epoch, run.batch, run.scheduler.total_steps)
    _restore_monitor(run, state)
    if len(state["processes"]) == distributed.world_size():
        own = state["processes"][distributed.rank()]
        run.meter.load_state_dict(own["train_scores"] if run.batch else {})
        rng.set_state(own["rng"], run.gpus)  # a try; it is done again right before the first step
        return own["rng"]
    if distributed.is_main():
        warn(
            f"the checkpoint contains the random states of {len(state['processes'])} processes, but now there are "
            f"{distributed.world_size()}; the run continues with other random numbers"
        )
    return None


def _restore_monitor(run: Any, state: Mapping[str, Any]) -> None:
    run.monitor.load_state_dict(state)
    changes = changes_of_score(state["config"], run.config)
    if state.get("validation", fingerprint(run.data.val)) != fingerprint(run.data.val):
        changes.append("the validation images have changed")
    if changes and run.monitor.mode != "off" and math.isfinite(run.monitor.best):
        if distributed.is_main():
            warn(
                f"the best {run.monitor.name} so far, {run.monitor.best:.4f}, cannot be compared with scores from now "
                f"on ({'; '.join(changes[:4])}): the best model and early stopping start over"
            )
        run.monitor.reset()
