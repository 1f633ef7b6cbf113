"""The training run: epochs, the best model, checkpoints, logs. A subclass implements what one epoch does."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from base import parallel, rng, runs
from base.banner import banner, hyper_parameters, warn_about_precision
from base.base_dataloader import BaseDataLoader
from base.meter import Meter, Monitor
from base.resume import Plan, fingerprint, restore
from base.runs import BEST, EPOCH, LATEST
from base.signals import StopSignals
from utils import checkpoint, distributed, files, finite, optim
from utils import config as configs
from utils.config import building
from utils.config.schema import Config
from utils.errors import UserError, out_of_memory, plural
from utils.facts import Facts
from utils.logger import RunLog
from utils.losses.base import SegmentationLoss
from utils.metrics import Metrics
from utils.predict import PredictOptions
from utils.predict.network import AMP_DTYPES

STEADIER = "Try a lower learning rate, trainer.clip_grad_norm, or trainer.amp 'off' or 'bf16'"


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); its state has been saved."""


@dataclass(frozen=True)
class Data:
    """Loaders that yield :class:`utils.batch.Batch` (``val`` may be None), and the facts about their data."""

    train: Any
    val: Any | None
    facts: Facts

    def close(self) -> None:
        """Stop the loaders' worker processes."""
        for loader in (self.train, self.val):
            if isinstance(loader, BaseDataLoader):
                loader.close()


@dataclass(frozen=True)
class _Point:
    """The state besides the weights that a batch changes, as it was between two optimizer steps."""

    batch: int
    iteration: int
    process: dict[str, Any]


class BaseTrainer:
    """A training run, from its first iteration or from a checkpoint to its end.

    A subclass implements :meth:`_train_epoch` and :meth:`_validate`; both return scores by name.

    Args:
        model: it is moved to the device and wrapped here.
        loss: called with logits ``(B, C, H, W)`` and labels ``(B, H, W)``.
        folder: the folder of the run, see :mod:`base.runs`.
    """

    log: RunLog

    def __init__(
        self, config: Config, model: nn.Module, loss: SegmentationLoss, data: Data, device: torch.device, folder: Path
    ) -> None:
        self.config, self.settings = config, config.trainer
        self.data, self.device, self.folder = data, device, folder
        self.loss = loss.to(device)
        self.amp = AMP_DTYPES[self.settings.amp]
        loader = data.train
        self.plan = Plan(
            batches=min(len(loader), self.settings.limit_batches or len(loader)),
            accumulate=self.settings.accumulate,
            images=len(loader.dataset),
            batch_size=loader.batches.batch_size,
            processes=distributed.world_size(),
        )
        self.model = parallel.place(model, config, device)
        self.network = parallel.wrap(self.model, config, device)
        self.gpus = parallel.gpus_of(self.network, device)
        average = None if self.settings.ema is None else get_ema_multi_avg_fn(self.settings.ema)
        self.ema = average and AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.optimizer = building.build_optimizer(config, self.model)
        self.scheduler = building.build_schedule(config, self.optimizer, self.plan.steps)
        self.rates = optim.learning_rates(self.optimizer)  # those that the last batch was trained with
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.settings.amp == "fp16")
        self.options = PredictOptions.from_config(config.predict)
        classes, count_ignored = self.options.classes, config.predict.count_ignored
        counts = Metrics(data.facts.num_classes, data.facts.ignore_index, classes=classes, count_ignored=count_ignored)
        self.meter = Meter(counts, device)
        self.monitor = Monitor(self.settings)
        self.validates = data.val is not None and self.settings.val
        self.stop = StopSignals()
        self.epoch = 0  # epochs finished
        self.batch = 0  # batches done in the next one
        self.iteration = self.started = 0  # batches done since the start, and when this process began
        self._buffers: list[Tensor] = []  # of the model, as they were at self._point
        self._rng: Mapping[str, Any] | None = None
        self._processes: list[dict[str, Any]] | None = None

    @property
    def deployed_model(self) -> nn.Module:
        """The model that is validated, tested and deployed: the averaged one if the run averages weights."""
        return self.model if self.ema is None else self.ema.module

    # -- the run -----------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run to the last epoch, an early stop or an interruption; return the last scores.

        Raises:
            Interrupted: after a signal; the state is saved.
            UserError: the loss is not finite, the disk is full, or the data cannot be used; the state is saved.
        """
        with self.stop:
            try:
                self._begin()
                scores = self._epochs()
                self.log.close(finished=True)
                return scores
            except Interrupted:
                self._save([LATEST])
                raise
            except Exception as error:
                self.stop.ignore()
                self._rescue(error)
            finally:
                self.data.close()
                if hasattr(self, "log"):
                    self.log.close()

    def _begin(self) -> None:
        """Write the resolved config into the folder of the run, open the logs, and print a summary of the run."""
        self._mark()
        tensorboard = runs.tensorboard_folder(self.config, self.folder)
        main = distributed.is_main()
        self.log = RunLog(self.folder, tensorboard, main, self.epoch, self.iteration, self.batch)
        if not main:
            return
        text = configs.dump(self.config)
        checkpoint.remove_leftovers(self.folder)
        files.write_text(self.folder / "config.json", text)
        self.log.text("config", text, self.iteration)
        compared = ["val/Mean_Dice", "val/Mean_IoU", "val/val_loss"] if self.validates else ["train/Mean_Dice"]
        self.log.hparams(hyper_parameters(self), [*compared, "train/loss"])
        warn_about_precision(self)
        print(banner(self))

    def _epochs(self) -> dict[str, float]:
        scores: dict[str, float] = {}
        while self.epoch < self.settings.epochs:
            epoch = self.epoch + 1
            scores = self._train_epoch(epoch)
            due = epoch % self.settings.val_per_epochs == 0 or epoch == self.settings.epochs
            if due and self.validates:
                scores |= self._validate(epoch)
            if self._finish_epoch(epoch, scores):
                break
        return scores

    def _finish_epoch(self, epoch: int, scores: dict[str, float]) -> bool:
        """Log the scores, keep the best model, save; return whether to stop early."""
        self.epoch, self.batch = epoch, 0
        self.meter.reset()
        self._mark()
        improved = self.monitor.update(scores)
        self.log.record("epoch", epoch, self.iteration, scores)
        self._print_scores(epoch, scores, improved)
        ends = epoch == self.settings.epochs or self.monitor.stops
        periodic = epoch % self.settings.save_period == 0
        names = [EPOCH.format(epoch)] if periodic else []
        names += [BEST] if improved else []
        names += [LATEST] if periodic or ends else []
        if names:
            self._save(names)
        if periodic and distributed.is_main():
            runs.prune(self.folder, self.settings.keep_last, epoch)
        if self.monitor.stops and distributed.is_main():
            waited = plural(self.monitor.not_improved, "validation")
            print(f"early stop: {self.monitor.name} has not improved in {waited}")
        return self.monitor.stops

    def _print_scores(self, epoch: int, scores: Mapping[str, float], improved: bool) -> None:
        if not distributed.is_main():
            return
        print(f"\n    ## Epoch {epoch} of {self.settings.epochs}" + ("  (best so far)" if improved else ""))
        for name, value in scores.items():
            if not name.startswith(configs.PER_CLASS_SCORES) and not math.isnan(value):
                print(f"    {name:<24}: {value:.4f}")

    # -- errors ------------------------------------------------------------------------------------------------

    def _mark(self) -> None:
        """Keep the state between two optimizer steps; after an error, this state is saved."""
        self._point = _Point(self.batch, self.iteration, self._process())
        buffers = list(self.model.buffers())
        if len(self._buffers) != len(buffers):
            self._buffers = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._buffers, buffers)  # a few kernels for all of them

    def _rewind(self) -> None:
        """Go back to the state that :meth:`_mark` kept; the weights have not changed since."""
        point = self._point
        self.batch, self.iteration = point.batch, point.iteration
        for buffer, kept in zip(self.model.buffers(), self._buffers, strict=True):
            buffer.data.copy_(kept)
        rng.set_state(point.process["rng"], self.gpus)
        self.meter.load_state_dict(point.process["train_scores"])

    def _rescue(self, error: Exception) -> NoReturn:
        """Save the run after an error, print how to continue, and raise the error again."""
        where = ""
        if hasattr(self, "_point") and distributed.is_main():
            self._rewind()
            where = self._save_after_error()
        said = explained(error)
        if said is None:
            print(where, file=sys.stderr)
            raise error
        raise UserError(f"{said}\n{where}" if where else said) from None

    def _save_after_error(self) -> str:
        """Save without the other processes, which may have ended; return how to continue."""
        latest = self.folder / LATEST
        if self.iteration > self.started and finite.bad_weights(self.model) is None:
            try:
                checkpoint.save(self.state([LATEST], alone=True), latest)
            except UserError as error:
                return f"the run could not be saved: {error}"
            return f"the run is saved up to iteration {self.iteration}; continue with: python train.py -r {latest}"
        kept = [p for p in (latest, self.folder / BEST) if p.exists()]
        return f"to continue from the last checkpoint: python train.py -r {kept[0]}" if kept else ""

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _process(self) -> dict[str, Any]:
        """Return the state of this process: random number generators, and scores of the epoch so far."""
        return {"rng": rng.state(self.gpus), "train_scores": self.meter.state_dict() if self.batch else {}}

    def state(self, names: list[str] | None = None, alone: bool = False) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain data.

        Args:
            names: the files that the state is written to.
            alone: do not wait for the other processes, and leave out their random states. Otherwise, all processes
                take part (during validation, their states from before it are used).
        """
        processes = self._processes or ([self._process()] if alone else distributed.gather(self._process()))
        return {
            "format": checkpoint.FORMAT,
            "arch": self.config.arch.type,
            "names": names or [],
            "epoch": self.epoch,
            "batch": self.batch,
            "iteration": self.iteration,
            "plan": asdict(self.plan),
            "state_dict": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": None if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": processes,
            **self.monitor.state_dict(),
            "validation": fingerprint(self.data.val),
            "config": self.config.model_dump(),
            "facts": self.data.facts.to_dict(),
        }

    def _save(self, names: list[str]) -> None:
        """Write a checkpoint once, under the first of its names, and link the others to it; refuse bad weights."""
        self._check_weights(self.model)
        state = self.state(names)
        if distributed.is_main():
            self.log.flush()
            checkpoint.save(state, self.folder / names[0])
            for name in names[1:]:
                checkpoint.link(self.folder / names[0], self.folder / name)

    def _check_weights(self, model: nn.Module) -> None:
        bad = finite.bad_weights(model)
        if bad is not None:
            raise UserError(
                f"after iteration {self.iteration} ({self._rates()}) the weights {bad} are not finite (NaN or "
                f"infinity). {STEADIER}"
            )

    def _rates(self) -> str:
        return f"learning rates {', '.join(f'{name} {rate:g}' for name, rate in self.rates.items())}"

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; call it before :meth:`train`. See :func:`base.resume.restore`."""
        self._rng = restore(self, state)

    def _restore_rng(self) -> None:
        """Restore the random number generators, once, right before the first step after a resume."""
        if self._rng is not None:
            rng.set_state(self._rng, self.gpus)
            self._rng = None
            self._mark()

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch from batch ``self.batch`` on; return its scores."""
        raise NotImplementedError

    def _validate(self, epoch: int) -> dict[str, float]:
        """Return the validation scores."""
        raise NotImplementedError


def explained(error: Exception) -> str | None:
    """Return a message that tells the user the cause of an error and its fix; None if the error is a bug."""
    text = str(error).strip()
    if isinstance(error, UserError):
        return text
    if distributed.lost_process(error):
        return "another process of this run has ended, so this one cannot continue; its message gives the cause"
    if "DataLoader worker (pid" in text:
        return (
            f"a process that loads the data was killed ({text.splitlines()[0]}); usually the memory is full: lower "
            "num_workers, batch_size or crop_size in train_loader.args"
        )
    if out_of_memory(error):
        first = text.splitlines()[0] if text else "no memory left"
        return f"out of memory: {first[:300]}; lower batch_size or crop_size, raise trainer.accumulate, or use amp bf16"
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}"
    return None
