"""Networks in files, which do not need their Python code: exported programs, TorchScript, ONNX."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoint.files import network_kind
from utils.errors import UserError, import_extra

#: Sizes (B, C, H, W) that a file takes; None where any will do.
Sizes = tuple[int | None, ...]


class FileNetwork(nn.Module):
    """A network from a file, for evaluation only: ``run`` maps images of ``sizes`` to the outputs of the network.

    ``dtype``: of the images that it takes; ``facts``: what :mod:`utils.export` wrote into the file, if it did.
    """

    def __init__(
        self,
        path: str,
        run: Callable[[Tensor], Any],
        sizes: Sizes,
        dtype: torch.dtype = torch.float32,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.dtype, self.facts = dtype, facts or {}
        self.path, self.batch = path, sizes[0]
        height, width = sizes[2:]
        self.size = (height, width) if height is not None and width is not None else None
        self.run = run  # a module is registered, so that `to` moves its weights
        # Modules without parameters have no device; this one follows `to`, and outputs go where it is.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def train(self, mode: bool = True) -> FileNetwork:
        """Stay in evaluation mode: exported networks have no other."""
        self.training = False
        return self

    def forward(self, x: Tensor) -> Any:
        """Run the network on images (B, C, H, W)."""
        x = x.to(self.dtype)
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            raise UserError(
                f"{self.path} takes images of {self.size[0]} x {self.size[1]} only, got {x.shape[-2]} x "
                f"{x.shape[-1]}: export it with dynamic height and width, or set arch.args.resize to true"
            )
        try:
            if self.batch is None or self.batch == x.shape[0]:
                return self._on_device(self.run(x))
            return torch.cat([self._part(part) for part in x.split(self.batch)])
        except UserError:
            raise
        except Exception as error:  # each of the three runtimes has its own
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"{self.path} cannot be run on images of shape {tuple(x.shape)}: {reason}") from error

    def _part(self, x: Tensor) -> Tensor:
        """Run one batch of the size that the file accepts; a shorter one is filled with copies of its first image."""
        missing = (self.batch or 0) - x.shape[0]
        found = self._on_device(self.run(torch.cat([x, x[:1].expand(missing, -1, -1, -1)])))
        if not isinstance(found, Tensor):
            raise UserError(
                f"{self.path} takes batches of {self.batch}; other batch sizes need a network whose "
                "output is one tensor"
            )
        return found[: x.shape[0]]

    def _on_device(self, outputs: Any) -> Any:
        if isinstance(outputs, (tuple, list)) and len(outputs) == 1:
            outputs = outputs[0]
        return outputs.to(self.place.device) if isinstance(outputs, Tensor) else outputs


def load_network(path: str) -> FileNetwork:
    """Return the network in a file: an exported program (``.pt2``), TorchScript, or ONNX.

    Raises:
        UserError: no such file, not one of these formats, or onnxruntime is not installed.
    """
    if not Path(path).is_file():
        raise UserError(f"arch.args.file: there is no file {path}")
    kind = network_kind(path)
    if kind is None:
        raise UserError(
            f"{path}: not a network in a file; expected a program of torch.export (.pt2), TorchScript or .onnx"
        )
    try:
        if kind == "torchscript":
            return FileNetwork(path, torch.jit.load(path, map_location="cpu").eval(), (None,) * 4)
        return _program(path) if kind == "pt2" else _onnx(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be loaded ({type(error).__name__}: {error})") from error


def _program(path: str) -> FileNetwork:
    extra = {"facts.json": ""}
    program = torch.export.load(path, extra_files=extra)
    inputs = program.graph_signature.user_inputs
    if len(inputs) != 1:
        raise UserError(f"{path}: takes {len(inputs)} inputs; expected one, the images")
    node = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == inputs[0])
    images, facts = node.meta["val"], json.loads(extra["facts.json"] or "{}")
    return FileNetwork(path, program.module(), _free(images.shape), images.dtype, facts)


def _onnx(path: str) -> FileNetwork:
    onnxruntime = import_extra("onnxruntime", path)
    providers = [p for p in onnxruntime.get_available_providers() if p in _PROVIDERS]
    session = onnxruntime.InferenceSession(path, providers=providers)
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    if len(inputs) != 1:
        raise UserError(f"{path}: takes {len(inputs)} inputs; expected one, the images")
    chosen = outputs[0] if len(outputs) == 1 else next((n for n in ("out", "logits") if n in outputs), None)
    if chosen is None:
        raise UserError(f'{path}: has the outputs {", ".join(outputs)}; expected one, or one named "out" or "logits"')

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run([chosen], {inputs[0].name: x.cpu().numpy()})[0])

    dtype, facts = _DTYPES.get(inputs[0].type, torch.float32), session.get_modelmeta().custom_metadata_map
    return FileNetwork(path, run, _free(inputs[0].shape), dtype, facts if "class_names" in facts else None)


_DTYPES = {"tensor(float16)": torch.float16, "tensor(double)": torch.float64}
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


def _free(shape: Sequence[Any]) -> Sizes:
    """Return sizes with None for those that are free (symbols of torch.export, names of ONNX)."""
    if len(shape) != 4:
        return (None,) * 4
    return tuple(size if type(size) is int else None for size in shape)
