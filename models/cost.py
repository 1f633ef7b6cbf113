"""What a network costs to run: parameters, operations, time, memory."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import models

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Cost:
    """What one forward pass over one image costs."""

    parameters: int  # elements, shared ones counted once
    gflops: float  # 1e9 floating-point operations of convolutions (two per multiply-add)
    output_stride: int  # of the deepest features
    seconds: float  # of the fastest evaluation pass
    megabytes: float | None  # peak memory of weights and activations; None where the platform does not report it


def measure(name: str, args: dict[str, Any], size: int, classes: int, device: str, repeats: int) -> Cost:
    """Measure one network in this process; the memory is right if nothing ran here before."""
    parameters, gflops = count(name, args, size, classes)
    before = _peak_megabytes(device)
    model = models.build(name, classes, **args).to(device).eval()
    x = torch.randn(1, model.in_channels, size, size, device=device)
    seconds = float("inf")
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            model(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            seconds = min(seconds, time.perf_counter() - start)
    after = _peak_megabytes(device)
    memory = None if before is None or after is None else after - before
    return Cost(parameters, gflops, model.output_stride, seconds, memory)


def count(name: str, args: dict[str, Any], size: int, classes: int) -> tuple[int, float]:
    """Return the parameters and GFLOPs of one forward pass, without computing anything."""
    with torch.device("meta"):
        model = models.build(name, classes, **args).eval()
        x = torch.empty(1, model.in_channels, size, size)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    return model.count_parameters(), counter.get_total_flops() / 1e9


def _peak_megabytes(device: str) -> float | None:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
