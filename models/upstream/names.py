r"""How the names in published checkpoints become ours.

A model lists in its class attribute ``published_names`` rules ``(pattern, replacement)``. Wrappers' prefixes
(``module.``) are removed first. A key that is already one of ours is never changed, so both spellings load. Otherwise
rules are tried in order; a rule applies if its regular expression matches *at the beginning* of the key and

* its replacement, put in place of the match (``re.sub`` syntax, so ``\1`` works) with the rest of the key kept, gives
  a name that the model has; or
* its replacement is ``None``: the entry is dropped. Such rules come last. They mark what a model may do without
  (an auxiliary head that was not built, parameters that the published code never used).

If no rule applies, the first that matches gives the name to complain about. Several recorded names may become one of
ours (shared tensors); the first one counts. End patterns at a dot (``r"master_branch\.0\."``), so that no rule catches
a longer name by accident.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from base.base_model import BaseModel

Rules = tuple[tuple[str, str | None], ...]

RESNET_NAMES: Rules = (
    (r"backbone\.(?:initial|layer0)\.0\.", "backbone.conv1."),
    (r"backbone\.(?:initial|layer0)\.1\.", "backbone.bn1."),
)
RESNET_PARTS: Rules = (  # of models that have the parts of their ResNet themselves
    (r"initial\.0\.", "backbone.conv1."),
    (r"initial\.1\.", "backbone.bn1."),
    (r"layer", "backbone.layer"),
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


def pyramid_names(recorded: str) -> Rules:
    """Return the rules for ``pyramid``, a :class:`models.blocks.PyramidPooling`, and its recorded prefix."""
    prefix = re.escape(recorded)
    return (
        (prefix + r"\.stages\.(\d)\.1\.", r"pyramid.branches.\1.1.0."),
        (prefix + r"\.stages\.(\d)\.2\.", r"pyramid.branches.\1.1.1."),
        (prefix + r"\.bottleneck\.", "pyramid.fuse."),
    )


def strip_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the prefixes of DataParallel and torch.compile."""
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): tensor for key, tensor in state_dict.items()}


def candidates(key: str, rules: Rules) -> list[str | None]:
    """Return what each matching rule makes of ``key``, in order."""
    found: list[str | None] = []
    for pattern, replacement in rules:
        match = re.match(pattern, key)
        if match:
            found.append(None if replacement is None else match.expand(replacement) + key[match.end() :])
    return found


def translate(model: BaseModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state_dict`` under our names, by ``model.published_names`` (see the module's docstring)."""
    own = model.state_dict().keys()
    translated: dict[str, Tensor] = {}
    for key, tensor in strip_wrappers(state_dict).items():
        name: str | None = key
        if key not in own:
            found = candidates(key, model.published_names)
            name = next((c for c in found if c is None or c in own), found[0] if found else key)
        if name is not None:
            translated.setdefault(name, tensor)
    return translated
