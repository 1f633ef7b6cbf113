"""What one epoch of training does: steps, live scores, validation."""

from __future__ import annotations

import math
from collections import deque
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from base.base_trainer import BaseTrainer, Interrupted, Stopwatch
from utils import checkpoint, distributed
from utils.batch import Batch, Normalize
from utils.errors import UserError
from utils.evaluation import Decision, Evaluator, Part, evaluate
from utils.images.palette import colourise, displayable, grid
from utils.metrics import Metrics
from utils.optim import learning_rates
from utils.predict import PredictOptions, label_map, predict_logits
from utils.predict.network import Network
from utils.progress import progress_bar

# Pictures per validation in TensorBoard, and the longer side they are shown at.
PICTURES, PICTURE_SIZE = 6, 320
# Iterations that a profiler trace skips, warms up on, and records.
PROFILE_WAIT, PROFILE_WARMUP, PROFILE_ACTIVE = 2, 2, 6


class Trainer(BaseTrainer):
    """Trains one epoch at a time; see :class:`base.base_trainer.BaseTrainer` for the run around it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.normalize = Normalize(self.facts.mean, self.facts.std).to(self.device)
        self.options = PredictOptions.from_config(self.config.predict)
        # The batches whose loss has not been looked at yet: on a GPU looking waits, so it is done one step late.
        self._unchecked: deque[tuple[int, Batch, Tensor, torch.cuda.Event | None]] = deque()
        self.rates = learning_rates(self.optimizer)  # those that the last batch was trained with
        self._lag = 1 if self.device.type == "cuda" else 0

    # -- one step ----------------------------------------------------------------------------------------------

    def _forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, auxiliary heads included, and the logits."""
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

    def _backward(self, loss: Tensor, share: float, steps: bool) -> None:
        """Add the gradients of this batch, which is ``share`` of an optimizer step; take the step when it is full."""
        self.scaler.scale(loss * share).backward()
        if not steps:
            return
        if self.settings.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    # -- one epoch ---------------------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        self.network.train()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        meter = _Meter(self)
        first = self.batch
        self.train_loader.set_epoch(epoch, first)
        bar = progress_bar(desc=f"TRAIN ({epoch})", total=self.batches, initial=first)
        batches = iter(self.train_loader)
        self._restore_rng()  # after the iterator, which draws a random number of its own
        watch = Stopwatch()
        with bar, self._profiler() as profiler:
            for _ in range(first, self.batches):
                batch = next(batches)
                watch.lap("data")
                self._train_batch(batch, meter)
                watch.lap("compute")
                bar.update()
                meter.report(epoch, bar, watch)
                if profiler is not None:
                    profiler.step()
                self._after_batch()
        self._check_losses(0)
        return meter.finish()

    def _train_batch(self, batch: Batch, meter: _Meter) -> None:
        if isinstance(batch.images, list) or isinstance(batch.labels, list):
            sizes = " and ".join(sorted({f"{i.shape[2]} x {i.shape[1]}" for i in batch.images})[:3])
            raise UserError(
                f"train_loader: the images of a batch differ in size ({sizes}, such as {batch.names[0]}); give "
                'train_loader.args.crop_size with "augment": true, so that all are cut to one size'
            )
        images = self.normalize(batch.images.to(self.device, non_blocking=True))
        target = batch.labels.to(self.device, non_blocking=True)
        # The last optimizer step of an epoch may be made of fewer batches than `accumulate`.
        position = self.batch % self.settings.accumulate
        group = min(self.settings.accumulate, self.batches - (self.batch - position))
        steps = position + 1 == group
        self.rates = learning_rates(self.optimizer)
        with self._without_sync(steps):
            loss, logits = self._forward(images, target)
            self._watch(loss, batch)
            self._backward(loss, 1 / group, steps)
        self.batch += 1
        self.iteration += 1
        meter.update(loss.detach(), logits, target)

    def _without_sync(self, steps: bool) -> Any:
        """Let the processes exchange gradients only for the batch that completes an optimizer step."""
        if isinstance(self.network, nn.parallel.DistributedDataParallel) and not steps:
            return self.network.no_sync()
        return nullcontext()

    def _after_batch(self) -> None:
        """Save and leave where that is due, but never within an optimizer step: a checkpoint holds no gradients."""
        accumulate, every = self.settings.accumulate, self.settings.save_every_iters
        taken = (self.batch - 1) % accumulate + 1  # batches of the present step
        if taken < accumulate and self.batch < self.batches:
            return
        if every and self.iteration // every > (self.iteration - taken) // every:
            self._save_latest()
        self._leave_if_asked()

    def _profiler(self) -> Any:
        """Return a profiler for the first iterations of the run, or a context of None."""
        if not self.settings.profile or self.iteration or not distributed.is_main():
            return nullcontext()
        folder = self._tensorboard_dir() or self.folder
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=PROFILE_WAIT, warmup=PROFILE_WARMUP, active=PROFILE_ACTIVE, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
            record_shapes=True,
            profile_memory=True,
        )

    # -- losses that are not finite ----------------------------------------------------------------------------

    def _watch(self, loss: Tensor, batch: Batch) -> None:
        """Remember a loss until it can be looked at without waiting for the device."""
        seen, arrived = loss.detach(), None
        if self._lag:
            seen, arrived = seen.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._unchecked.append((self.iteration + 1, batch, seen, arrived))
        self._check_losses(self._lag)

    def _check_losses(self, lag: int) -> None:
        """Stop the run at a loss that is not finite, with all that is needed to find out why."""
        while len(self._unchecked) > lag:
            iteration, batch, seen, arrived = self._unchecked.popleft()
            if arrived is not None:
                arrived.synchronize()
            value = float(seen)
            if not math.isfinite(value):
                raise UserError(self._explain_loss(value, iteration, batch))

    def _explain_loss(self, value: float, iteration: int, batch: Batch) -> str:
        path = self.folder / f"bad-batch-iteration{iteration}-rank{distributed.rank()}.pth"
        rates = self.rates
        checkpoint.save(
            {
                "state_dict": self.model.state_dict(),
                "images": batch.images,
                "labels": batch.labels,
                "names": batch.names,
            },
            path,
        )
        return (
            f"the loss became {value} in iteration {iteration} (epoch {self.epoch + 1}), "
            f"learning rates {', '.join(f'{k} {v:g}' for k, v in rates.items())}, "
            f"images {', '.join(batch.names)}. The batch and the weights are in {path}. "
            "Try a lower learning rate, trainer.clip_grad_norm, or trainer.amp 'off' or 'bf16'"
        )

    # -- validation --------------------------------------------------------------------------------------------

    def evaluator(self) -> Evaluator:
        """Return what scores the deployed weights."""
        network = Network(
            self.deployed_model,
            self.facts,
            self.loss.activation,
            self.device,
            temperature=self.config.predict.temperature,
            amp=self.amp,
            channels_last=self.settings.channels_last,
        )
        return Evaluator(network, self.options.classes, self.config.predict.count_ignored, self.loss)

    def _validate(self, epoch: int) -> dict[str, float]:
        name = self.config.predict.val
        pictures = _Pictures(self, name)
        distributed.share_buffers(self.deployed_model)  # all score the network that the main process saves

        def look(part: Part) -> None:
            pictures.add(part)
            if distributed.world_size() == 1 and self._stop_signal is not None:
                raise Interrupted

        outcome = evaluate(
            self.evaluator(),
            self.val_loader,
            {name: Decision(name, self.options)},
            progress=lambda loader: progress_bar(loader, desc=f"EVAL ({epoch})"),
            on_part=look,
            limit_batches=self.settings.limit_batches,
        )
        self._leave_if_asked()
        result = outcome.metrics[name].compute()
        scores = {key: value for key, value in result.items() if isinstance(value, float)}
        scores["val_loss"] = outcome.loss
        tags = {f"val/{key}": value for key, value in scores.items()}
        for key in ("Class_Dice", "Class_IoU"):
            per_class = dict(zip(self.facts.class_names, result[key], strict=True))
            scores |= {f"{key}/{cls}": value for cls, value in per_class.items()}
            tags |= {f"val_{key}/{cls}": value for cls, value in per_class.items()}
        self.log.scalars(tags, self.iteration)
        pictures.write()
        return scores


class _Meter:
    """The live scores of a training epoch, kept on the device between looks."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        facts, options = trainer.facts, trainer.options
        self.metrics = Metrics(
            facts.num_classes,
            facts.ignore_index,
            classes=options.classes,
            count_ignored=trainer.config.predict.count_ignored,
        )
        saved = trainer._train_scores
        self.metrics.load_state_dict({k: v.to(trainer.device) for k, v in saved.get("metrics", {}).items()})
        self.loss = (
            saved["loss"].to(trainer.device) if saved else torch.zeros(2, dtype=torch.float64, device=trainer.device)
        )
        self.recent: list[Tensor] = list(saved["recent"]) if saved else []
        self.images = 0

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        """Add one batch, without waiting for the device."""
        trainer = self.trainer
        prediction = predict_logits(
            trainer.config.predict.train,
            logits,
            trainer.loss.activation,
            trainer.config.predict.temperature,
            trainer.options,
        )
        self.metrics.update(prediction, target)
        self.recent.append(loss)
        self.images += len(target)
        # In place: a new tensor per iteration would be one more kernel for nothing.
        self.loss[0] += loss
        self.loss[1] += 1
        trainer._train_scores = {"metrics": self.metrics.state_dict(), "loss": self.loss, "recent": self.recent}

    def scores(self) -> dict[str, float]:
        """Return the scores so far; waits for the device."""
        result = self.metrics.compute()
        total, count = self.loss.tolist()
        return {
            "train_loss": total / count if count else math.nan,
            **{f"train_{key}": result[key] for key in ("Mean_Dice", "Mean_IoU", "Pixel_Accuracy")},
        }

    def report(self, epoch: int, bar: Any, watch: Stopwatch) -> None:
        """Show and log the scores every ``log_per_iter`` iterations."""
        trainer = self.trainer
        last = trainer.batch == trainer.batches
        if trainer.iteration % trainer.settings.log_per_iter and not last:
            return
        scores = self.scores()
        bar.set_postfix_str(
            f"Loss {scores['train_loss']:.3f} | PixelAcc {scores['train_Pixel_Accuracy']:.3f} "
            f"mIoU {scores['train_Mean_IoU']:.3f} mDice {scores['train_Mean_Dice']:.3f} |",
            refresh=False,
        )
        recent = torch.stack(self.recent).mean().item() if self.recent else math.nan
        timing = self._timing(watch)
        rates = {f"lr/{name}": rate for name, rate in trainer.rates.items()}
        trainer.log.record("train", epoch, trainer.iteration, {"loss": recent, **rates}, timing)
        tags = {"train/loss": recent, **rates, **{f"time/{k}": v for k, v in timing.items()}}
        tags |= {f"train/{key.removeprefix('train_')}": value for key, value in scores.items() if key != "train_loss"}
        trainer.log.scalars(tags, trainer.iteration)
        self.recent = []
        self.images = 0
        watch.totals.clear()
        watch.start()
        trainer._train_scores = {"metrics": self.metrics.state_dict(), "loss": self.loss, "recent": self.recent}

    def _timing(self, watch: Stopwatch) -> dict[str, float]:
        elapsed = sum(watch.totals.values()) or math.nan
        timing = {
            "images_per_second": self.images * distributed.world_size() / elapsed,
            "data_wait_share": watch.totals.get("data", 0.0) / elapsed,
        }
        if self.trainer.device.type == "cuda":
            timing["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.trainer.device) / 2**30
        return timing

    def finish(self) -> dict[str, float]:
        """Return the scores of the epoch over all processes."""
        others = distributed.gather(_to_cpu(self.metrics.state_dict(), self.loss))
        if len(others) > 1:
            self.metrics.reset()
            for state, _ in others:
                share = Metrics(self.metrics.num_classes)
                share.load_state_dict(state)
                self.metrics.merge([share])
            self.loss = torch.stack([loss for _, loss in others]).sum(dim=0)
        return self.scores()


def _to_cpu(state: dict[str, Tensor], loss: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {key: value.cpu() for key, value in state.items()}, loss.cpu()


class _Pictures:
    """Input, target and prediction of the first validation images, side by side for TensorBoard."""

    def __init__(self, trainer: Trainer, procedure: str) -> None:
        self.trainer, self.procedure = trainer, procedure
        self.cells: list[np.ndarray] = []

    def add(self, part: Part) -> None:
        """Keep what is still missing of the grid."""
        wanted = PICTURES - len(self.cells) // 3
        if wanted <= 0 or self.trainer.log.writer is None:
            return
        facts = self.trainer.facts
        labels = label_map(self.procedure, part.probs[:wanted], self.trainer.options).cpu().numpy()
        target = part.target[:wanted].cpu().long()
        targets = torch.where(target == facts.ignore_index, 255, target).numpy()
        for image, target, predicted in zip(part.batch.images, targets, labels, strict=False):
            picture = displayable(image.permute(1, 2, 0).cpu().numpy())
            step = max(1, -(-max(picture.shape[:2]) // PICTURE_SIZE))
            for cell in (picture, colourise(target, facts.palette), colourise(predicted, facts.palette)):
                self.cells.append(cell[::step, ::step])

    def write(self) -> None:
        """Write the grid: one row per image, input, target and prediction."""
        if self.cells:
            picture = grid(self.cells, columns=3)
            self.trainer.log.image("val/input_target_prediction", picture, self.trainer.iteration)
