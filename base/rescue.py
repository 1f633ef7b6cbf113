"""Messages for errors in the middle of a run."""

from __future__ import annotations

import torch

from utils import distributed
from utils.errors import UserError


def explained(error: Exception) -> str | None:
    """Return a message that tells the user the cause of an error and its fix; None if the error is a bug."""
    text = str(error).strip()
    if isinstance(error, UserError):
        return text
    if distributed.lost_process(error):
        return "another process of this run has ended, so this one cannot continue; its message gives the cause"
    if "DataLoader worker (pid" in text:
        return (
            f"a process that loads the data was killed ({text.splitlines()[0]}); most often the memory is full: "
            "lower num_workers, batch_size or crop_size in train_loader.args"
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        first = text.splitlines()[0] if text else "no memory left"
        return f"out of memory: {first[:300]}; lower batch_size or crop_size, raise trainer.accumulate, or use amp bf16"
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}"
    return None
