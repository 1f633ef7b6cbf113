"""A summary of a run, as text and as hyperparameters for TensorBoard."""

from __future__ import annotations

import textwrap
from typing import Any

import torch

from base import parallel
from utils.errors import plural, warn


def banner(run: Any) -> str:
    """Return a summary of a :class:`base.base_trainer.BaseTrainer` in a few lines."""
    config, settings, plan = run.config, run.settings, run.plan
    gpus = len(parallel.gpus_of(run.network, run.device))
    classes = plural(run.data.facts.num_classes, "class")
    spread = plural(plan.processes, "process")
    spread = f"{gpus} GPUs, DataParallel" if gpus > 1 else spread
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    backbone = getattr(run.model, "backbone", None)
    validation = "none" if run.data.val is None else f"{len(run.data.val.dataset):,} images"
    weights = getattr(run.model, "weights_from", "") or getattr(backbone, "weights_from", "") or "random weights"
    gpu = run.device.type == "cuda"
    device = torch.cuda.get_device_name(run.device) if gpu else f"CPU, {plural(torch.get_num_threads(), 'thread')}"
    lines = {
        "run": str(run.folder) + (f", continued from iteration {run.iteration}" if run.iteration else ""),
        "model": f"{config.arch.type}, {classes}, {trainable / 1e6:.2f} M parameters",
        "weights": f"of iteration {run.iteration}" if run.iteration else weights,
        "data": f"{plan.images:,} training images, validation {validation}",
        "device": f"{device}, {spread}, amp {settings.amp}",
        "batch": f"{plan.batch_size} per process x {plan.processes} x accumulate {plan.accumulate} = "
        f"{plan.batch_size * plan.processes * plan.accumulate} per optimizer step",
        "schedule": f"{plural(settings.epochs, 'epoch')} of {plural(plan.batches, 'iteration')}, "
        f"{config.lr_scheduler.type}, {config.optimizer.type}, loss {config.loss.type}",
        "predict": f"train {config.predict.train}, val {config.predict.val}; monitor {settings.monitor}",
    }
    shown = [f"    {name:<9}: {text}" for name, text in lines.items()]
    notes = [
        textwrap.fill(text, 100, initial_indent="    note     : ", subsequent_indent=" " * 15) for text in config.notes
    ]
    return "\n".join([*shown, *notes])


def warn_about_precision(run: Any) -> None:
    """Warn that fp16 is slow on a CPU."""
    if run.settings.amp == "fp16" and run.device.type == "cpu":
        warn("trainer.amp 'fp16' is made for GPUs; on a CPU it is many times slower than 'off'")


def hyper_parameters(run: Any) -> dict[str, Any]:
    """Return the settings by which runs are compared in TensorBoard."""
    config = run.config
    flat: dict[str, Any] = {
        "arch": config.arch.type,
        "loss": config.loss.type,
        "optimizer": config.optimizer.type,
        "lr_scheduler": config.lr_scheduler.type,
        "batch_size": run.plan.batch_size,
        "epochs": run.settings.epochs,
        "predict.val": config.predict.val,
        "seed": config.seed,
    }
    flat |= {f"arch.{k}": v for k, v in config.arch.args.items() if isinstance(v, str | int | float | bool)}
    numbers = {k: v for k, v in config.optimizer.args.items() if isinstance(v, int | float | bool)}
    return flat | {f"optimizer.{k}": v for k, v in numbers.items()}
