"""Published checkpoints: names, structure, and what to do when weights do not fit.

**The convention.** A model lists in its class attribute ``published_names`` how the names recorded in
published checkpoints become ours: a tuple of rules ``(pattern, replacement)``. For each key, after an
optional ``module.`` is taken off, the first rule whose regular expression matches *at the beginning* of the
key applies:

* a replacement string is put in place of the match (``re.sub`` syntax, so ``\\1`` works), the rest of the
  key stays;
* ``None`` marks an entry that our model may do without (never used there, or a second name of a shared
  tensor): it is dropped where the model has no entry of that very name.

Keys that match no rule keep their name, and a key that is already one of ours is never changed, so both
spellings load; several recorded names may become one of ours (shared tensors), the first one counts.
Patterns should end at a dot (``r"master_branch\\.0\\."``), so that no rule catches a longer name by
accident.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from base.base_model import BaseModel


Rules = tuple[tuple[str, str | None], ...]

RESNET_NAMES: Rules = (
    (r"backbone\.(?:initial|layer0)\.0\.", "backbone.conv1."),
    (r"backbone\.(?:initial|layer0)\.1\.", "backbone.bn1."),
)
XCEPTION_NAMES: Rules = (
    (r"backbone\.(block\d+)\.skip\.", r"backbone.\1.shortcut.0."),
    (r"backbone\.(block\d+)\.skipbn\.", r"backbone.\1.shortcut.1."),
    (r"backbone\.(block\d+)\.rep\.(\d)\.conv1\.", r"backbone.\1.body.\2.depthwise."),
    (r"backbone\.(block\d+)\.rep\.", r"backbone.\1.body."),
    (r"backbone\.(conv[345])\.conv1\.", r"backbone.\1.depthwise."),
)
ASPP_NAMES: Rules = (
    *((rf"ASSP\.aspp{i + 1}\.", f"aspp.branches.{i}.") for i in range(6)),
    (r"ASSP\.avg_pool\.1\.", "aspp.image_pooling.1.0."),
    (r"ASSP\.avg_pool\.2\.", "aspp.image_pooling.1.1."),
    (r"ASSP\.conv1\.", "aspp.fuse.0."),
    (r"ASSP\.bn1\.", "aspp.fuse.1."),
)
SKIP_DECODER_NAMES: Rules = (
    (r"decoder\.conv1\.", "decoder.reduce_low.0."),
    (r"decoder\.bn1\.", "decoder.reduce_low.1."),
    (r"decoder\.output\.([01])\.", r"decoder.refine.0.\1."),
    (r"decoder\.output\.3\.", "decoder.refine.1.0."),
    (r"decoder\.output\.4\.", "decoder.refine.1.1."),
    (r"decoder\.output\.7\.", "decoder.classifier."),
)


def pyramid_names(recorded: str, ours: str) -> Rules:
    """Return the rules for a :class:`models.blocks.PyramidPooling`, given both prefixes without the last dot."""
    prefix = re.escape(recorded)
    return (
        (prefix + r"\.stages\.(\d)\.1\.", ours + r".branches.\1.1.0."),
        (prefix + r"\.stages\.(\d)\.2\.", ours + r".branches.\1.1.1."),
        (prefix + r"\.bottleneck\.", ours + ".fuse."),
    )


def translate(model: BaseModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state_dict`` under our names, by ``model.published_names`` (see the module's docstring)."""
    own = model.state_dict()
    rules = [(re.compile(pattern), replacement) for pattern, replacement in model.published_names]
    translated: dict[str, Tensor] = {}
    for recorded, tensor in state_dict.items():
        key = recorded.removeprefix("module.")
        if key not in own:
            renamed = _rename(key, rules)
            if renamed is None:
                continue
            key = renamed
        translated.setdefault(key, tensor)
    return translated


def _rename(key: str, rules: list[tuple[re.Pattern[str], str | None]]) -> str | None:
    for pattern, replacement in rules:
        match = pattern.match(key)
        if match:
            return None if replacement is None else match.expand(replacement) + key[match.end() :]
    return key


def load_weights(model: BaseModel, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights under our names or the published ones, with or without ``module.``, into ``model``.

    Raises:
        UserError: entries are missing, unknown or of another shape; says which, and what probably went wrong.
    """
    own = model.state_dict()
    weights = translate(model, state_dict)
    missing = [k for k in own if k not in weights]
    unexpected = [k for k in weights if k not in own]
    reshaped = [k for k in weights if k in own and weights[k].shape != own[k].shape]
    if missing or unexpected or reshaped:
        raise UserError(f"the weights do not fit {type(model).__name__}: {missing} {unexpected} {reshaped}")
    model.load_state_dict(weights)
