"""The run: device, epochs, monitor, early stop, checkpoints, logs. What one epoch does is the subclass's."""

from __future__ import annotations

import math
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils import checkpoint, distributed, lr_scheduler, optim
from utils import config as configs
from utils.config.data_checks import built
from utils.config.schema import Config
from utils.errors import UserError
from utils.facts import Facts
from utils.logger import RunLog
from utils.losses.base import SegmentationLoss
from utils.predict.network import AMP_DTYPES

LATEST, BEST = "latest.pth", "best_model.pth"


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); its state has been saved."""


class BaseTrainer:
    """Owns a training run from its first iteration, or from a checkpoint, to its end.

    Args:
        config: the run.
        model: on the CPU or the device; moved and wrapped here.
        loss: called with logits ``(B, C, H, W)`` and labels ``(B, H, W)``.
        train_loader, val_loader: yield :class:`utils.batch.Batch`; ``val_loader`` may be None.
        facts: of the data.
        device: where this process computes.
        folder: the run's folder, see :func:`run_folder`.
        resume: a checkpoint's content to continue from.

    A subclass implements :meth:`_train_epoch` and :meth:`_validate`, both returning scores by name.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        loss: SegmentationLoss,
        train_loader: Any,
        val_loader: Any | None,
        facts: Facts,
        device: torch.device,
        folder: Path,
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.settings = config.trainer
        self.train_loader, self.val_loader = train_loader, val_loader
        self.facts = facts
        self.device = device
        self.folder = folder
        self.loss = loss.to(device)
        self.amp = AMP_DTYPES[self.settings.amp]
        self._build_model(model)
        self.optimizer = built(
            "optimizer.args",
            optim.build,
            config.optimizer.type,
            self.model,
            config.optimizer.differential_lr,
            config.optimizer.backbone_lr_factor,
            config.optimizer.no_decay_on_norm_and_bias,
            **config.optimizer.args,
        )
        self.batches = min(len(train_loader), self.settings.limit_batches or len(train_loader))
        self.steps_per_epoch = math.ceil(self.batches / self.settings.accumulate)
        self.scheduler = built(
            "lr_scheduler.args",
            lr_scheduler.build,
            config.lr_scheduler.type,
            self.optimizer,
            self.steps_per_epoch * self.settings.epochs,
            steps_per_epoch=self.steps_per_epoch if config.lr_scheduler.step == "epoch" else None,
            **config.lr_scheduler.args,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.settings.amp == "fp16")
        self.mode, _, self.monitored = self.settings.monitor.partition(" ")
        self.epoch = 0  # epochs finished
        self.batch = 0  # batches done in the next one
        self.iteration = 0  # batches done since the start
        self.best = math.inf if self.mode == "min" else -math.inf
        self.not_improved = 0
        self._train_scores: dict[str, Any] = {}
        self._rng: Mapping[str, Any] | None = None
        self._stop_signal: int | None = None
        if resume is not None:
            self._restore(resume)
        self._made = [] if resume is not None else _missing(folder, self._tensorboard_dir())
        self.log = RunLog(
            folder, self._tensorboard_dir(), distributed.is_main(), epoch=self.epoch, iteration=self.iteration
        )

    def _tensorboard_dir(self) -> Path | None:
        if not self.settings.tensorboard:
            return None
        return Path(self.settings.log_dir) / self.config.name / self.folder.name

    def _build_model(self, model: nn.Module) -> None:
        """Place the model on its device, and wrap it for several devices; ``self.model`` stays the bare one."""
        layout = torch.channels_last if self.settings.channels_last else torch.preserve_format
        if self.config.use_synch_bn and distributed.world_size() > 1:
            if self.device.type == "cuda":
                # torch's converter drops the activations inside timm's BatchNorms.
                layers = sys.modules.get("timm.layers", nn.SyncBatchNorm)
                model = layers.convert_sync_batchnorm(model)
            elif distributed.is_main():
                print(
                    "warning: use_synch_bn: torch synchronises batch norm on GPUs only; here each process has its own",
                    file=sys.stderr,
                )
        self.model = model.to(self.device).to(memory_format=layout)
        self.ema = None
        if self.settings.ema is not None:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.settings.ema), use_buffers=True)
        self.network = self._parallel(self.model)

    def _parallel(self, network: nn.Module) -> nn.Module:
        """Return the network as training calls it: compiled, and spread over processes or GPUs."""
        gpus = distributed.usable_gpus(self.config.n_gpu) if self.device.type == "cuda" else 0
        if distributed.world_size() == 1 and gpus > 1:
            if self.settings.compile:  # replicating torch.compile's wrapper takes the original's parameters away
                raise UserError(
                    "trainer.compile: torch cannot spread a compiled network over several GPUs from one process; set "
                    f"it to false, or start one process per GPU: torchrun --standalone --nproc_per_node {gpus} ..."
                )
            return nn.DataParallel(distributed.Autocast(network, self.amp), device_ids=list(range(gpus)))
        if self.settings.compile:
            network = cast("nn.Module", torch.compile(network))
        if distributed.world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # An auxiliary head whose loss has no weight gets no gradients; the processes must not wait for them.
            unused = not self.config.aux_weight
            network = nn.parallel.DistributedDataParallel(network, device_ids=ids, find_unused_parameters=unused)
        return network

    @property
    def deployed_model(self) -> nn.Module:
        """The weights that are validated, tested and deployed: the averaged ones where the run keeps them."""
        return self.model if self.ema is None else self.ema.module

    # -- the run -----------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run to the last epoch, an early stop or an interruption; return the last scores.

        Raises:
            Interrupted: after a signal, when the state is saved.
            UserError: a loss that is not finite, a full disk, data that cannot be used.
        """
        scores: dict[str, float] = {}
        try:
            if distributed.is_main():
                self._introduce()
            with self._signals():
                while self.epoch < self.settings.epochs:
                    epoch = self.epoch + 1
                    scores = self._train_epoch(epoch)
                    if self._validates(epoch):
                        scores |= self._validate(epoch)
                    if self._finish_epoch(epoch, scores):
                        break
            if distributed.is_main():
                final = {k: v for k, v in scores.items() if not k.startswith(configs.PER_CLASS_SCORES)}
                self.log.hparams(self._hparams(), final)
        except Interrupted:
            self._save_latest()
            raise
        finally:
            self.log.close()
            self._clear_away()
        return scores

    def _clear_away(self) -> None:
        """Remove the folders that this start made where it ended, in an error, before anything was learnt."""
        if self.iteration or not distributed.is_main() or any(self.folder.glob("*.pth")):
            return
        for path in self._made:
            if path in (self.folder, self._tensorboard_dir()):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):  # another run is in it by now
                    path.rmdir()

    def _introduce(self) -> None:
        """Write the resolved config into the run's folder, and print what is about to run."""
        text = configs.dump(self.config)
        (self.folder / "config.json").write_text(text, encoding="utf-8")
        checkpoint.remove_leftovers(self.folder)
        self.log.text("config", text)
        if self.settings.amp == "fp16" and self.device.type == "cpu":
            print(
                "warning: trainer.amp 'fp16' is made for GPUs; on the CPU it computes many times slower than 'off'",
                file=sys.stderr,
            )
        print(self.banner())

    def banner(self) -> str:
        """Return what is about to run, in a few lines."""
        settings, processes = self.settings, distributed.world_size()
        size = self.train_loader.batches.batch_size
        gpus = len(self.network.device_ids) if isinstance(self.network, nn.DataParallel) else 1
        parallel = (
            f"{processes} processes" if processes > 1 else f"{gpus} GPUs, DataParallel" if gpus > 1 else "1 process"
        )
        step = size * processes * settings.accumulate
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        validation = "none" if self.val_loader is None else f"{len(self.val_loader.dataset):,} images"
        lines = {
            "run": str(self.folder) + (f", continued from iteration {self.iteration}" if self.iteration else ""),
            "model": f"{self.config.arch.type}, {self.facts.num_classes} classes, {trainable / 1e6:.2f} M parameters",
            "data": f"{len(self.train_loader.dataset):,} training images, validation {validation}",
            "device": f"{_device_name(self.device)}, {parallel}, amp {settings.amp}",
            "batch": f"{size} per process x {processes} x accumulate {settings.accumulate} = {step} per optimizer step",
            "schedule": f"{settings.epochs} epochs of {self.batches} batches, {self.config.lr_scheduler.type}, "
            f"{self.config.optimizer.type}, loss {self.config.loss.type}",
            "predict": f"train {self.config.predict.train}, val {self.config.predict.val}; monitor {settings.monitor}",
        }
        notes = [("note", text) for text in self.config.notes]
        return "\n".join(f"    {name:<9}: {text}" for name, text in [*lines.items(), *notes])

    def _validates(self, epoch: int) -> bool:
        due = epoch % self.settings.val_per_epochs == 0 or epoch == self.settings.epochs
        return self.val_loader is not None and self.settings.val and due

    def _finish_epoch(self, epoch: int, scores: dict[str, float]) -> bool:
        """Log, choose the best, save; return whether to stop early."""
        self.epoch, self.batch, self._train_scores = epoch, 0, {}
        improved = self._improved(scores)
        self.log.record("epoch", epoch, self.iteration, scores)
        self._print_scores(epoch, scores, improved)
        last = epoch == self.settings.epochs
        stop = bool(self.settings.early_stop) and self.not_improved >= self.settings.early_stop
        periodic = epoch % self.settings.save_period == 0
        if improved or periodic or last or stop:
            self._save(improved=improved, periodic=periodic, latest=periodic or last or stop)
        if stop and distributed.is_main():
            print(f"early stop: {self.monitored} has not improved in {self.not_improved} validations")
        return stop

    def _improved(self, scores: dict[str, float]) -> bool:
        if self.mode == "off" or self.monitored not in scores:
            return False
        value = scores[self.monitored]
        better = value < self.best if self.mode == "min" else value > self.best  # nan is never better
        if better:
            self.best, self.not_improved = value, 0
        else:
            self.not_improved += 1
        return better

    def _print_scores(self, epoch: int, scores: Mapping[str, float], improved: bool) -> None:
        if not distributed.is_main():
            return
        print(f"\n    ## Epoch {epoch} of {self.settings.epochs}" + ("  (best so far)" if improved else ""))
        for name, value in scores.items():
            if not name.startswith(configs.PER_CLASS_SCORES) and not math.isnan(value):
                print(f"    {name:<24}: {value:.4f}")

    def _hparams(self) -> dict[str, Any]:
        flat: dict[str, Any] = {
            "arch": self.config.arch.type,
            "loss": self.config.loss.type,
            "optimizer": self.config.optimizer.type,
            "lr_scheduler": self.config.lr_scheduler.type,
            "batch_size": self.train_loader.batches.batch_size,
            "epochs": self.settings.epochs,
            "predict.val": self.config.predict.val,
            "seed": self.config.seed,
        }
        flat |= {f"arch.{k}": v for k, v in self.config.arch.args.items() if isinstance(v, str | int | float | bool)}
        numbers = {k: v for k, v in self.config.optimizer.args.items() if isinstance(v, int | float | bool)}
        return flat | {f"optimizer.{k}": v for k, v in numbers.items()}

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return everything that continuing needs, as plain data; every process takes part."""
        processes = distributed.gather({"rng": _rng_state(self.device), "train_scores": self._train_scores})
        return {
            "format": checkpoint.FORMAT,
            "arch": self.config.arch.type,
            "epoch": self.epoch,
            "batch": self.batch,
            "iteration": self.iteration,
            "state_dict": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": None if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": processes,
            "monitor_best": float(self.best),
            "not_improved_count": self.not_improved,
            "config": self.config.model_dump(),
            "facts": self.facts.to_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if "scheduler" not in state or "processes" not in state:
            raise UserError(
                "the checkpoint holds weights but not the state of a run of this framework, so it cannot be resumed; "
                "to start a new run from its weights: train.py --config CONFIG --weights CHECKPOINT"
            )
        before = state["config"]["optimizer"]["type"]
        if before != self.config.optimizer.type:
            raise UserError(
                f"optimizer.type: the checkpoint's is {before}, the config's {self.config.optimizer.type}; a run "
                "keeps its optimizer. To train on with another, start a new run from its weights (train.py --config "
                "CONFIG --weights CHECKPOINT)"
            )
        checkpoint.fill(self.model, state["state_dict"], "the checkpoint to resume")
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["ema_updates"])
        optim.restore(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.iteration = state["epoch"], state["batch"], state["iteration"]
        self.best, self.not_improved = state["monitor_best"], state["not_improved_count"]
        if len(state["processes"]) == distributed.world_size():
            own = state["processes"][distributed.rank()]
            self._rng, self._train_scores = own["rng"], own["train_scores"]
        elif distributed.is_main():
            print(
                f"warning: the run had {len(state['processes'])} processes, now {distributed.world_size()}; "
                "it continues, but not with the same random numbers",
                file=sys.stderr,
            )

    def _restore_rng(self) -> None:
        """Set the random number generators as they were; once, right before the first step after a resume."""
        if self._rng is not None:
            _set_rng_state(self._rng, self.device)
            self._rng = None

    def _save(self, improved: bool, periodic: bool, latest: bool) -> None:
        """Write the checkpoint once, under the first of its names, and link the others to it."""
        state = self.state()
        if not distributed.is_main():
            return
        names = [f"checkpoint-epoch{self.epoch}.pth"] if periodic else []
        names += [BEST] if improved else []
        names += [LATEST] if latest else []
        checkpoint.save(state, self.folder / names[0])
        for name in names[1:]:
            checkpoint.link(self.folder / names[0], self.folder / name)
        if periodic:
            self._prune()

    def _save_latest(self) -> None:
        """Save the run's state in the middle of an epoch."""
        state = self.state()
        if distributed.is_main():
            checkpoint.save(state, self.folder / LATEST)

    def _prune(self) -> None:
        if self.settings.keep_last is None:
            return
        numbered = {int(p.stem.removeprefix("checkpoint-epoch")): p for p in self.folder.glob("checkpoint-epoch*.pth")}
        for epoch in sorted(numbered)[: -self.settings.keep_last]:
            numbered[epoch].unlink()

    # -- signals -----------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the current optimizer step, save, and leave; a second one leaves at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: FrameType | None) -> None:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            self._stop_signal = number

        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _leave_if_asked(self) -> None:
        """Raise :class:`Interrupted` when a signal has come, to any process."""
        if distributed.any_process(self._stop_signal is not None, self.device):
            raise Interrupted

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch, from ``self.batch`` on; return its scores."""
        raise NotImplementedError

    def _validate(self, epoch: int) -> dict[str, float]:
        """Return the validation scores."""
        raise NotImplementedError


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _missing(*folders: Path | None) -> list[Path]:
    """Return the folders that do not exist, and those above them that do not either, the inner ones first."""
    missing = {p for folder in folders if folder is not None for p in (folder, *folder.parents) if not p.exists()}
    return sorted(missing, key=lambda path: len(path.parts), reverse=True)


def run_folder(config: Config) -> Path:
    """Return the folder of a new run, ``save_dir/name/loss/predict.val/MM-DD_HH-MM``; the same in every process."""
    parent = Path(config.trainer.save_dir) / config.name / config.loss.type / config.predict.val
    stamp = datetime.now().strftime("%m-%d_%H-%M")
    folder, number = parent / stamp, 1
    while folder.exists():
        number += 1
        folder = parent / f"{stamp}-{number}"
    return Path(distributed.broadcast(str(folder)))


def newest_run(config: Config) -> Path:
    """Return the resumable checkpoint of the config's newest run.

    Raises:
        UserError: there is none.
    """
    parent = Path(config.trainer.save_dir) / config.name / config.loss.type / config.predict.val
    found = [p for name in (LATEST, BEST, "checkpoint-epoch*.pth") for p in parent.glob(f"*/{name}")]
    if not found:
        raise UserError(f"-r auto: there is no run with a checkpoint below {parent}; start one without -r")
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.name == LATEST))


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed all generators of this process, each process differently; choose deterministic algorithms if asked."""
    own = seed + distributed.rank()
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def _rng_state(device: torch.device) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Stopwatch:
    """Seconds between calls, added up by name."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to ``name``."""
        now = time.perf_counter()
        self.totals[name] = self.totals.get(name, 0.0) + now - self._last
        self._last = now

    def start(self) -> None:
        """Begin a lap now."""
        self._last = time.perf_counter()
