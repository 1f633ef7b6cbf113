"""Find where a network's numbers stop being finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bad_weights(model: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer that contains NaN or infinity; None if all are finite."""
    named = [(name, value) for name, value in model.state_dict().items() if value.is_floating_point()]
    if not named:
        return None
    finite = torch.stack([value.isfinite().all() for _, value in named]).tolist()  # waits for the device once
    return next((name for (name, _), fine in zip(named, finite, strict=True) if not fine), None)


@torch.no_grad()
def bad_layer(model: nn.Module, images: Tensor) -> str | None:
    """Return the name of the first layer whose output for ``images`` is not finite; None if all are finite.

    The model runs once more in its present mode: batch norm's statistics and the random state change.
    """
    found: list[str] = []

    def hook(name: str) -> object:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not found and not output.isfinite().all():
                found.append(name or type(model).__name__)

        return look

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if not any(m.children())]  # type: ignore[arg-type]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def explain(model: nn.Module, images: Tensor) -> str:
    """Describe where the numbers of a network stop being finite; empty if all are finite."""
    weights = bad_weights(model)
    if weights is not None:
        return f"the weights {weights} are not finite (NaN or infinity)"
    layer = bad_layer(model, images)
    return "" if layer is None else f"the first layer whose output is not finite is {layer}"
