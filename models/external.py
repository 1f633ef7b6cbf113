"""Networks from elsewhere: any ``nn.Module`` that a Python function builds, or a network in a file."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from base.base_model import BaseModel, Outputs, resize_to
from models.network_files import FileNetwork, load_network
from utils.bounds import Side
from utils.errors import UserError, out_of_memory, warn
from utils.predict.network import unlink

#: How far the probabilities of a pixel may be from a sum of 1 (half precision).
_SUM_TOLERANCE = 1e-2


class External(BaseModel):
    """A network from outside this project; any input size that it accepts; logits (B, num_classes, H, W).

    The network maps images (B, in_channels, H, W), normalized by the loader's ``mean`` and ``std``, to a tensor, a
    mapping with ``"out"`` (and in training ``"aux"``), or an object with ``.logits``. Smaller logits are resized
    bilinearly.

    ``factory`` imports and runs code. A checkpoint with such a network is therefore only loaded with the config of its
    run on the command line, or with ``--trust-code``.

    Args:
        factory: ``"package.module:function"`` (or a class, or ``Class.method``), which returns an ``nn.Module``.
        args: its arguments. ``"$num_classes"`` and ``"$in_channels"`` stand for the data's numbers. A value
            ``{"factory": ..., "args": ...}`` is built first, for arguments that are objects.
        pretrained: additional arguments of the factory when training starts, such as
            ``{"encoder_weights": "imagenet"}``; left out when the weights of a checkpoint replace them. false: none.
        file: instead of ``factory``, a network in a file, for ``test.py`` and ``inference.py``: an exported program
            (``.pt2``), TorchScript, or ``.onnx`` (with onnxruntime).
        backbone: the submodule that is the backbone, such as ``"encoder"``, for ``differential_lr`` and
            ``freeze_backbone``.
        outputs: "logits", or "probabilities" if the network ends in the softmax or sigmoid that the loss implies.
        size_divisor: heights and widths must be multiples of this. Validation and inference pad images to such a size;
            ``crop_size`` must be a multiple.
        resize: for a file that accepts only one image size: resize images to it, and the logits back.
        freeze_backbone: only what is outside the backbone is trained.
        activation: what turns logits into probabilities, "softmax" or "sigmoid" (that of the loss). One channel always
            uses the sigmoid.

    Raises:
        ValueError: the arguments do not fit together, or ``backbone`` is not a submodule.
        UserError: the factory or the file cannot be used.
    """

    #: State dicts of the network alone fit, too.
    published_names = ((r"(?:model|net)\.", "network."), ("", "network."))

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        factory: str | None = None,
        args: dict[str, Any] | None = None,
        pretrained: bool | dict[str, Any] = False,
        file: str | None = None,
        backbone: str | None = None,
        outputs: Literal["logits", "probabilities"] = "logits",
        size_divisor: Side = 1,
        resize: bool = False,
        freeze_bn: bool = False,
        freeze_backbone: bool = False,
        activation: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        super().__init__(num_classes, in_channels)
        problems = {
            'set either factory ("package.module:function") or file ("net.pt2")': (factory is None) == (file is None),
            "pretrained must be a section of arguments of the factory, or false": pretrained is True,
            "args, pretrained and backbone are for a factory, not for a file": file
            and (args or pretrained or backbone),
            "resize is for a file; leave it out with factory": factory and resize,
            'freeze_backbone needs the backbone\'s name, such as backbone: "encoder"': freeze_backbone and not backbone,
        }
        for problem, is_so in problems.items():
            if is_so:
                raise ValueError(problem)
        self.outputs, self.size_divisor, self.resize = outputs, size_divisor, resize
        self.activation: Literal["softmax", "sigmoid"] = activation
        self.exclusive = activation == "softmax" and num_classes > 1  # the probabilities of a pixel sum to 1
        self.source = file or str(factory)
        if file is not None:
            self.network: nn.Module = load_network(file)
        else:
            numbers = {"$num_classes": num_classes, "$in_channels": in_channels}
            given = (args or {}) | (pretrained if isinstance(pretrained, dict) else {})
            self.network = _build(self.source, given, numbers)
            if not isinstance(self.network, nn.Module):
                raise UserError(f"arch.args.factory: {factory} returns {type(self.network).__name__}, not an nn.Module")
        if backbone is not None:
            self.backbone_name = f"network.{backbone}"
            if self.backbone_name not in dict(self.named_modules()):
                children = ", ".join(name for name, _ in self.network.named_children())
                raise ValueError(f"backbone: {factory} has no submodule {backbone!r}; it has {children}")
        if file is not None or pretrained:
            self.weights_from = file or f"{factory} with {pretrained}"
        self._checked: list[str] = []  # the outputs whose values were looked at; the copies of DataParallel share it
        if file is not None:
            self.eval()
        self.freeze(freeze_bn, freeze_backbone)

    def train(self, mode: bool = True) -> External:
        """Set training or evaluation mode; a network in a file has only the latter."""
        if mode and isinstance(self.network, FileNetwork):
            raise UserError(
                f"arch.args.file: {self.source} can be scored and used, not trained; train it with arch.args.factory"
            )
        super().train(mode)
        return self

    def logits(self, x: Tensor) -> Outputs:
        """Return the network's logits at its own resolution."""
        size = getattr(self.network, "size", None) if self.resize else None
        outputs = self._run(x if size is None else resize_to(x, size))
        found = {"out": _logits_of(outputs, self.source)}
        aux = outputs.get("aux") if self.training and isinstance(outputs, Mapping) else None
        if isinstance(aux, Tensor):
            found["aux"] = aux
        for name, values in found.items():
            tracing = torch.compiler.is_compiling()
            self._check_shape(name, values, None if tracing else len(x))
            if not values.is_meta and not tracing and name not in self._checked:
                self._checked.append(name)
                self._check_values(values.detach())
        if self.outputs == "probabilities":
            found = {name: unlink(values.float(), self.activation) for name, values in found.items()}
        return found if "aux" in found else found["out"]

    def _run(self, x: Tensor) -> Any:
        """Call the network; the errors of code from elsewhere become messages with the place of the error."""
        try:
            return self.network(x)
        except UserError:
            raise
        except Exception as error:  # whatever the user's code raises
            text = str(error).strip()
            of_the_run = "more than 1 value per channel" in text or out_of_memory(error)
            if of_the_run or torch.compiler.is_compiling():
                raise
            places = traceback.extract_tb(error.__traceback__)
            place = [p for p in places if Path(torch.__file__).parent not in Path(p.filename).parents][-1]
            raise UserError(
                f"arch.args: {self.source} cannot be run on images of shape {tuple(x.shape)}: {type(error).__name__}: "
                f"{' '.join(text.split())[:300]} ({place.filename}, line {place.lineno}). If it needs another number "
                'of channels, give it "$in_channels"; if it needs certain sizes, set size_divisor and crop_size'
            ) from error

    def _check_shape(self, name: str, values: Tensor, batch: int | None) -> None:
        if values.dim() != 4 or values.shape[1] != self.num_classes or batch not in (None, values.shape[0]):
            what = "outputs" if name == "out" else f"outputs {name!r}"
            raise UserError(
                f"arch.args: {self.source} returns {what} of shape {tuple(values.shape)}; expected ({batch or 'B'}, "
                f"{self.num_classes}, h, w), because the data has {self.num_classes} classes. Give the network this "
                "number of classes"
            )

    def _check_values(self, out: Tensor) -> None:
        """Raise UserError where the first values and ``outputs`` contradict each other; warn where they may."""
        lowest, highest = out.min().item(), out.max().item()
        inside = lowest >= 0 and highest <= 1 + _SUM_TOLERANCE
        sums = bool(((out.sum(dim=1) - 1).abs() < _SUM_TOLERANCE).all())
        if self.outputs == "probabilities":
            if inside and (sums or not self.exclusive):
                return
            one = ", with the sum 1 at every pixel (or a loss with sigmoids, docs/losses.md)" if self.exclusive else ""
            raise UserError(
                f"arch.args.outputs: found probabilities, but the outputs of {self.source} lie between "
                f"{lowest:.3g} and {highest:.3g}; expected 0 to 1{one}"
            )
        if inside and sums and self.num_classes > 1:
            raise UserError(
                f"arch.args.outputs: {self.source} returns probabilities (from 0 to 1, with the sum 1 at every pixel), "
                'not logits; write outputs: "probabilities"'
            )
        if inside and lowest < highest:
            warn(
                f"arch.args.outputs: the first outputs of {self.source} lie between {lowest:.3g} and {highest:.3g}; "
                'if it ends in a sigmoid, write outputs: "probabilities"'
            )

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]  # the base only declares it
        """The submodule that ``backbone`` names."""
        if self.backbone_name == "backbone":
            raise AttributeError("backbone")
        return self.get_submodule(self.backbone_name)


def _build(factory: str, args: Mapping[str, Any], numbers: Mapping[str, int]) -> Any:
    """Call ``package.module:name`` with arguments in which placeholders and nested factories are replaced."""
    function = _function(factory)
    given = {name: _value(value, numbers) for name, value in args.items()}
    try:
        return function(**given)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"arch.args: {factory} raised {type(error).__name__}: {error}") from error


def _function(factory: str) -> Any:
    module, colon, attribute = factory.partition(":")
    if not (module and colon and attribute):
        raise UserError(f'arch.args.factory: found {factory!r}; expected "package.module:function"')
    try:
        found: Any = import_module(module)
    except ImportError as error:
        raise UserError(
            f"arch.args.factory: cannot import {module} ({error}); install its package with pip, or put the folder of "
            "your code on PYTHONPATH"
        ) from error
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        raise UserError(f"arch.args.factory: {module} has no function {attribute}")
    return found


def _value(value: Any, numbers: Mapping[str, int]) -> Any:
    if isinstance(value, Mapping) and "factory" in value:
        return _build(str(value["factory"]), value.get("args") or {}, numbers)
    if isinstance(value, Mapping):
        return {key: _value(inner, numbers) for key, inner in value.items()}
    if isinstance(value, list):
        return [_value(inner, numbers) for inner in value]
    return numbers.get(value, value) if isinstance(value, str) else value


def _logits_of(outputs: Any, source: str) -> Tensor:
    found = outputs
    if isinstance(found, (tuple, list)) and len(found) == 1:
        found = found[0]
    if not isinstance(found, Tensor):
        found = getattr(outputs, "logits", None)
        if found is None and isinstance(outputs, Mapping):
            found = outputs.get("out", outputs.get("logits"))
    if not isinstance(found, Tensor):
        what = f"a mapping with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else _name_of(outputs)
        raise UserError(
            f'arch.args: {source} returns {what}; expected a tensor, a mapping with "out", or .logits. Name a function '
            "that returns a module with such outputs"
        )
    return found


def _name_of(outputs: Any) -> str:
    count = f" of {len(outputs)}" if isinstance(outputs, (tuple, list)) else ""
    return f"{type(outputs).__name__}{count}"
