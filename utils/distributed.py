"""One process or many: ranks, devices and gathering, over torch.distributed.

``torchrun`` starts the processes and sets ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``. Without it there is one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from utils.errors import UserError, warn


def under_torchrun() -> bool:
    """Return whether a launcher started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_as() -> tuple[int, int]:
    """Return this process's number and the number of processes, as the launcher says; (0, 1) without a launcher.

    Raises:
        UserError: the environment variables of the launcher are incomplete or wrong.
    """
    if not under_torchrun():
        return 0, 1
    own, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    whole = own.isdecimal() and world.isdecimal() and int(own) < int(world)
    if not whole or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UserError(
            f"the environment variables RANK ({own}) and WORLD_SIZE ({world}) are set, as torchrun sets them, but "
            f"{'MASTER_ADDR and MASTER_PORT are not' if whole else 'they are no number of a process'}. Start the "
            "processes with torchrun, or unset RANK and WORLD_SIZE"
        )
    return int(own), int(world)


def is_active() -> bool:
    """Return whether this process belongs to an initialized group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number, 0 when it is the only one."""
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_active() else 1


def is_main() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def is_first() -> bool:
    """Return :func:`is_main`; before the group is set up, from the launcher's environment variables."""
    return is_main() and launched_as()[0] == 0


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of their ranks, to every process."""
    if not is_active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Return the main process's value to every process."""
    if not is_active():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_dicts(value: dict[Any, Any]) -> dict[Any, Any]:
    """Return the entries of the dictionaries of all processes."""
    return {key: entry for share in gather(value) for key, entry in share.items()}


def any_process(*flags: bool) -> list[bool]:
    """Return for each flag whether it is set in any process."""
    if not is_active():
        return list(flags)
    total = torch.tensor(flags, dtype=torch.float32)  # on the CPU: gloo does not wait for the GPU's work
    dist.all_reduce(total)
    return [value > 0 for value in total.tolist()]


def lost_process(error: BaseException) -> bool:
    """Return whether an error means that another process of the group has ended."""
    gloo = isinstance(error, RuntimeError) and ("gloo" in str(error) or "closed by peer" in str(error))
    return gloo or isinstance(error, dist.DistError)


def share_buffers(module: nn.Module) -> None:
    """Give every process the main one's buffers: batch norm's statistics, which each has moved by its own batches."""
    if is_active():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


class Autocast(nn.Module):
    """Runs a network under autocast to a dtype, in any thread.

    The threads of ``torch.nn.DataParallel`` inherit whether autocast is on, but not its dtype: without this class,
    they would use float16 instead of bfloat16, without gradient scaling.

    Args:
        network: takes images.
        dtype: what to compute in; None: no autocast.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: torch.Tensor) -> Any:
        """Return what the network returns."""
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.network(images)


def choose_device(n_gpu: int) -> torch.device:
    """Return this process's device: its GPU where the config asks for one and there is one, else the CPU."""
    if n_gpu == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        # Configs ask for one GPU by default, without a need for it. Warn only if more, or certain ones, were chosen.
        asked = f"CUDA_VISIBLE_DEVICES or -d {visible}" if visible else f"n_gpu is {n_gpu}" if n_gpu > 1 else ""
        if asked and is_first():
            warn(f"no GPU found ({asked}): using the CPU")
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start fewer "
            "processes (torchrun --nproc_per_node)"
        )
    return torch.device("cuda", local)


def usable_gpus(n_gpu: int) -> int:
    """Return how many of the requested GPUs exist; warn if there are fewer."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpu > there > 0:  # if there is none, choose_device warns
        warn(f"n_gpu is {n_gpu}, but this machine has {there}; using {there}")
    return min(n_gpu, there)


@contextmanager
def process_group(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:  # noqa: B008
    """Join the group that torchrun set up, and leave it at the end; do nothing for a single process.

    Args:
        device: of this process.
        timeout: how long a process waits for the others.
    """
    if not under_torchrun():
        yield
        return
    launched_as()  # refuses what init_process_group would fail on
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo in addition to nccl: objects and flags of the host do not go through the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
        yield
    except Exception as error:
        if not lost_process(error):
            raise
        raise UserError("another process of this run has ended, so this one cannot continue") from None
    finally:
        if is_active():
            dist.destroy_process_group()


def needs_processes(use_synch_bn: bool, n_gpu: int) -> bool:
    """Return whether the run must be split into one process per GPU, and is not yet.

    Synchronized batch norm works across processes only (torch.nn.SyncBatchNorm).
    """
    return use_synch_bn and not under_torchrun() and usable_gpus(n_gpu) > 1


def launch(script: str, arguments: Sequence[str], processes: int) -> int:
    """Run ``script`` in several processes on this machine through torch's elastic launcher, as torchrun does.

    Returns the exit code: that of the process that failed first, else 0.
    """
    # Absent from builds of torch without torch.distributed.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    print(f"starting {processes} processes: torchrun --standalone --nproc_per_node {processes} {Path(script).name} ...")
    try:
        torchrun(["--standalone", "--nproc_per_node", str(processes), script, *arguments])
    except ChildFailedError as failure:
        # The process has printed its error; the launcher's report would only hide it.
        _, first = failure.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 1
    except SignalException as asked:  # the processes have been asked to stop, and have saved
        return 128 + asked.sigval
    return 0
