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
