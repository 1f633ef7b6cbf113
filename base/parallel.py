"""Prepare a network for training: compile it, and distribute it over processes or GPUs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn

from utils import distributed
from utils.checkpoint import EXTERNAL
from utils.config.schema import Config
from utils.errors import UserError, warn
from utils.predict.network import AMP_DTYPES


def place(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Return the model on its device, with the memory format and the batch norm of the config."""
    if config.use_synch_bn and distributed.world_size() > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif distributed.is_main():
            warn("use_synch_bn: torch synchronizes batch norm only on GPUs; here each process uses its own statistics")
    layout = torch.channels_last if config.trainer.channels_last else torch.preserve_format
    return model.to(device).to(memory_format=layout)


def wrap(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Return the model compiled and distributed as the config says; both share their parameters.

    Raises:
        UserError: the config asks for a compiled network on several GPUs from one process.
    """
    gpus = distributed.usable_gpus(config.n_gpu) if device.type == "cuda" else 0
    if distributed.world_size() == 1 and gpus > 1:
        if config.trainer.compile:  # replicas of a compiled network lose their parameters
            raise UserError(
                "trainer.compile: torch cannot run a compiled network on several GPUs from one process. Set it to "
                f"false, or start one process per GPU: torchrun --standalone --nproc_per_node {gpus} ..."
            )
        amp = AMP_DTYPES[config.trainer.amp]
        return nn.DataParallel(distributed.Autocast(model, amp), device_ids=list(range(gpus)))
    network = cast("nn.Module", torch.compile(model)) if config.trainer.compile else model
    if distributed.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        # Parameters without gradients, for which the processes must not wait: those of the auxiliary head if its loss
        # has weight 0, and what a network from elsewhere may have and not use.
        unused = not config.aux_weight or config.arch.type == EXTERNAL
        network = nn.parallel.DistributedDataParallel(network, device_ids=ids, find_unused_parameters=unused)
    return network


def gpus_of(network: nn.Module, device: torch.device) -> list[int]:
    """Return the numbers of the GPUs that this process computes on."""
    if isinstance(network, nn.DataParallel):
        return list(network.device_ids)
    return [device.index or 0] if device.type == "cuda" else []


def without_sync(network: nn.Module, completes_step: bool) -> AbstractContextManager[object]:
    """Return a context in which processes exchange gradients only if the batch completes an optimizer step."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not completes_step:
        return network.no_sync()
    return nullcontext()
