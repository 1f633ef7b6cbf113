"""One epoch of training, and validation."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from base.base_trainer import STEADIER, BaseTrainer, Interrupted
from base.parallel import without_sync
from base.pictures import Pictures
from base.runs import LATEST, tensorboard_folder
from utils import checkpoint, distributed, finite
from utils.batch import Batch, Normalize
from utils.errors import UserError, plural
from utils.evaluation import Decision, Evaluator, Limited, Part, evaluate
from utils.optim import learning_rates
from utils.predict import predict_logits
from utils.predict.network import Network
from utils.progress import live_scores, progress_bar

# Iterations that a profiler trace skips, warms up on, and records.
PROFILE_WAIT, PROFILE_WARMUP, PROFILE_ACTIVE = 2, 2, 6


class Trainer(BaseTrainer):
    """Trains one epoch at a time; see :class:`base.base_trainer.BaseTrainer` for the run around it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.normalize = Normalize(self.data.facts.mean, self.data.facts.std).to(self.device)
        self._stop_requested = False  # in any process
        self._images = 0  # since the last report

    # -- one step ----------------------------------------------------------------------------------------------

    def _train_batch(self, batch: Batch) -> None:
        stacked, labels = _of_one_size(batch)
        images = self.normalize(stacked.to(self.device, non_blocking=True))
        target = labels.to(self.device, non_blocking=True)
        # The last optimizer step of an epoch may use fewer batches than `accumulate`.
        position = self.batch % self.plan.accumulate
        batches_of_step = min(self.plan.accumulate, self.plan.batches - (self.batch - position))
        completes_step = position + 1 == batches_of_step
        self.rates = learning_rates(self.optimizer)
        with without_sync(self.network, completes_step):
            loss, logits = self._forward(images, target)
            pending = _Pending(loss)
            self.scaler.scale(loss * (1 / batches_of_step)).backward()
        self._check_loss(pending, batch, images, completes_step)
        if completes_step:
            self._step()
        self.batch += 1
        self.iteration += 1
        self._images += len(target)
        predict = self.config.predict
        prediction = predict_logits(
            predict.train, logits, self.loss.activation, predict.temperature, self.options, predict.bias
        )
        self.meter.update(loss.detach(), prediction, target)
        if completes_step:
            self._mark()

    def _forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, auxiliary heads included, and the logits.

        Training needs gradients and auxiliary outputs; all other passes go through utils.predict.network.
        """
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            output = self.network(images)
        if isinstance(output, Tensor):
            return self.loss(output, target), output.detach()
        loss = self.loss(output["out"], target)
        if self.config.aux_weight:
            loss = loss + self.config.aux_weight * self.loss(output["aux"], target)
        return loss, output["out"].detach()

    def _step(self) -> None:
        if self.settings.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _check_loss(self, loss: _Pending, batch: Batch, images: Tensor, completes_step: bool) -> None:
        """Stop the run if the loss is not finite, before the loss changes the weights.

        When the batch completes an optimizer step, the processes also exchange whether one of them should stop, and
        then all stop together.
        """
        value = loss.value()
        bad = not math.isfinite(value)
        if completes_step:
            somewhere_bad, self._stop_requested = distributed.any_process(bad, self.stop.received is not None)
            if somewhere_bad and not bad:
                raise UserError("the loss of another process is not finite; see its message")
        if bad:
            raise UserError(self._explain_loss(value, batch, images))

    def _explain_loss(self, value: float, batch: Batch, images: Tensor) -> str:
        iteration = self.iteration + 1
        path = self.folder / f"bad-batch-iteration{iteration}-rank{distributed.rank()}.pth"
        weights = self.model.state_dict()
        checkpoint.save(
            {"state_dict": weights, "images": batch.images, "labels": batch.labels, "names": batch.names}, path
        )
        where = finite.explain(self.model, images)
        return (
            f"the loss became {value} in iteration {iteration} (epoch {self.epoch + 1}), "
            f"{self._rates()}, images {', '.join(batch.names)}{f'; {where}' if where else ''}. The batch and the "
            f"weights are in {path}. {STEADIER}"
        )

    # -- one epoch ---------------------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        self.network.train()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._restore_rng()
        self.data.train.set_epoch(epoch, self.batch)
        watch = Stopwatch()
        bar = progress_bar(desc=f"TRAIN ({epoch})", total=self.plan.batches, initial=self.batch)
        batches = iter(self.data.train)
        with bar, self._profiler() as profiler:
            while self.batch < self.plan.batches:
                batch = self._next(batches)
                watch.lap("data")
                self._train_batch(batch)
                watch.lap("compute")
                bar.update()
                self._report(epoch, bar, watch)
                if profiler is not None:
                    profiler.step()
                self._after_batch()
        self.meter.gather()
        return self.meter.scores()

    def _next(self, batches: Any) -> Batch:
        batch = next(batches, None)
        if batch is None:
            skipped = list(getattr(self.data.train, "skipped", ()))
            raise UserError(
                f"the training data ended after {self.batch} of {self.plan.batches} batches of the epoch: "
                f"{plural(len(skipped), 'file')} could not be read ({'; '.join(skipped[:3])})"
            )
        return batch

    def _after_batch(self) -> None:
        """Save or stop if it is time to, but never within an optimizer step: checkpoints do not contain gradients."""
        accumulate, every = self.plan.accumulate, self.settings.save_every_iters
        taken = (self.batch - 1) % accumulate + 1  # batches of the present step
        if taken < accumulate and self.batch < self.plan.batches:
            return
        if every and self.iteration // every > (self.iteration - taken) // every:
            self._save([LATEST])
        if self._stop_requested or self.plan.processes == 1 and self.stop.received is not None:
            raise Interrupted

    def _report(self, epoch: int, bar: Any, watch: Stopwatch) -> None:
        """Show and log the scores every ``log_per_iter`` iterations."""
        if self.iteration % self.settings.log_per_iter and self.batch != self.plan.batches:
            return
        scores = self.meter.scores()
        bar.set_postfix_str(live_scores({key.removeprefix("train_"): value for key, value in scores.items()}), False)
        recent = self.meter.take_recent_loss()
        if self._point.iteration == self.iteration:
            self._mark()  # so that a resumed run does not report these losses again
        timing = self._timing(watch)
        rates = {f"lr/{name}": rate for name, rate in self.rates.items()}
        self.log.record("train", epoch, self.iteration, {"loss": recent, **rates}, timing)
        tags = {"train/loss": recent, **rates, **{f"time/{k}": v for k, v in timing.items()}}
        tags |= {f"train/{key.removeprefix('train_')}": value for key, value in scores.items() if key != "train_loss"}
        self.log.scalars(tags, self.iteration)
        self._images = 0
        watch.restart()

    def _timing(self, watch: Stopwatch) -> dict[str, float]:
        elapsed = sum(watch.totals.values()) or math.nan
        timing = {
            "images_per_second": self._images * self.plan.processes / elapsed,
            "data_wait_share": watch.totals.get("data", 0.0) / elapsed,
        }
        if self.device.type == "cuda":
            timing["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return timing

    def _profiler(self) -> Any:
        """Return a profiler for the first iterations of a run, else a context manager that yields None."""
        if not self.settings.profile or self.iteration or not distributed.is_main():
            return nullcontext()
        folder = tensorboard_folder(self.config, self.folder) or self.folder
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=PROFILE_WAIT, warmup=PROFILE_WARMUP, active=PROFILE_ACTIVE, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
            record_shapes=True,
            profile_memory=True,
        )

    # -- validation --------------------------------------------------------------------------------------------

    def evaluator(self) -> Evaluator:
        """Return the evaluator of the deployed weights."""
        facts, activation = self.data.facts, self.loss.activation
        network = Network.from_config(self.deployed_model, facts, activation, self.config, device=self.device)
        return Evaluator(network, self.options.classes, self.config.predict.count_ignored, self.loss)

    def _validate(self, epoch: int) -> dict[str, float]:
        name = self.config.predict.val
        pictures = Pictures(self.data.facts, name, self.options)
        self._check_weights(self.deployed_model)
        distributed.share_buffers(self.deployed_model)  # all processes score the network that the main process saves
        # After a stop or an error the processes are at different batches and cannot gather anything from each other.
        self._processes = distributed.gather(self._process())

        def look(part: Part) -> None:
            if self.log.writer is not None:
                pictures.add(part)
            if self.stop.received is not None:
                raise Interrupted

        outcome = evaluate(
            self.evaluator(),
            Limited(self.data.val, batches=self.settings.limit_batches),
            {name: Decision(name, self.options)},
            title=f"EVAL ({epoch})",
            on_part=look,
        )
        if any(distributed.any_process(self.stop.received is not None)):
            raise Interrupted
        self._processes = None
        metrics = outcome.metrics[name]
        result = metrics.compute()
        self._check_monitored(metrics)
        scores = {key: value for key, value in result.items() if isinstance(value, float)}
        scores["val_loss"] = outcome.loss
        tags = {f"val/{key}": value for key, value in scores.items()}
        for key in ("Class_Dice", "Class_IoU"):
            per_class = dict(zip(self.data.facts.class_names, result[key], strict=True))
            scores |= {f"{key}/{cls}": value for cls, value in per_class.items()}
            tags |= {f"val_{key}/{cls}": value for cls, value in per_class.items()}
        self.log.scalars(tags, self.iteration)
        if pictures.rows:
            self.log.image("val/input_target_prediction", pictures.draw(), self.iteration)
        return scores

    def _check_monitored(self, metrics: Any) -> None:
        """Raise an error if no validation image has what the monitored score needs."""
        section, _, name = self.monitor.name.partition("/")
        if self.monitor.mode == "off" or section.startswith("train_"):
            return
        of_classes = section.endswith(("Dice", "IoU"))
        classes = [self.data.facts.class_names.index(name)] if name else metrics.classes
        counts = [row["counts"] for row in metrics.images]
        if not any((c.target[classes] if of_classes else c.pixels).any() for c in counts):
            any_of = "the classes of interest" if of_classes else "any class"
            what = f"the class {name!r}" if name else f"pixels of {any_of}"
            raise UserError(
                f"trainer.monitor: no validation image has {what}, so {self.monitor.name} cannot be computed. Monitor "
                "another score, such as 'max Mean_Dice' or 'min val_loss', or add such images to val_loader"
            )


class _Pending:
    """A number on its way from the device, which continues to compute meanwhile."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.detach()
        self._arrived: torch.cuda.Event | None = None
        if number.device.type == "cuda":
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(self._number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def value(self) -> float:
        """Wait for the number and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)


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

    def restart(self) -> None:
        """Set all totals to zero and start the next lap."""
        self.__init__()  # type: ignore[misc]


def _of_one_size(batch: Batch) -> tuple[Tensor, Tensor]:
    if isinstance(batch.images, list) or isinstance(batch.labels, list):
        sizes = " and ".join(sorted({f"{i.shape[2]} x {i.shape[1]}" for i in batch.images})[:3])
        raise UserError(
            f"train_loader: the images of a batch differ in size ({sizes}, such as {batch.names[0]}); set "
            'train_loader.args.crop_size with "augment": true, which crops all images to one size'
        )
    return batch.images, batch.labels
