"""Check arguments from a config against the constructors that will take them, without building anything."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

from utils.errors import did_you_mean


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a function or of a class's constructor (without ``self``)."""
    return {
        name: parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def check_arguments(
    path: str,
    owner: str,
    targets: Collection[Callable[..., Any]],
    args: Mapping[str, Any],
    provided: Collection[str] = (),
) -> list[str]:
    """Return one message per problem with ``args``; an empty list when the call would be accepted.

    Args:
        path: where the arguments stand in the config, such as ``arch.args``.
        owner: what takes them, such as ``PSPNet``.
        targets: the callables among which the arguments are shared out.
        args: the arguments given.
        provided: names the program passes itself; the config may not set them.
    """
    # The first target that knows a name gets it.
    known = {name: (target, p) for target in reversed(list(targets)) for name, p in parameters(target).items()}
    settable = [name for name in known if name not in provided]
    problems = []
    for name, value in args.items():
        if name in provided:
            problems.append(f"{path}.{name}: set by the program, not by the config; remove it")
        elif name not in known:
            listing = ", ".join(settable) or "none"
            problems.append(
                f"{path}.{name}: {owner} takes no such argument{did_you_mean(name, settable)} Allowed: {listing}"
            )
        else:
            problems += _check_type(f"{path}.{name}", known[name][0], name, value)
    for name, (_, parameter) in known.items():
        if parameter.default is parameter.empty and name not in provided and name not in args:
            problems.append(f"{path}.{name}: {owner} needs this argument and the config does not give it")
    return problems


def _check_type(path: str, target: Callable[..., Any], name: str, value: Any) -> list[str]:
    adapter = _adapter(target, name)
    if adapter is None:
        return []
    try:
        # Through JSON, so that a list is a fine tuple, while "3" is still not a fine int.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        # A class (a tensor, say) can come from no JSON: only where nothing else is expected is it worth a word.
        details = [e for e in error.errors() if e["type"] != "is_instance_of" and "isinstance" not in e["msg"]]
        messages = [e["msg"].removeprefix("Input ").rstrip(".") for e in details or error.errors()]
        return [f"{path}: found {json.dumps(value)}; {' or '.join(dict.fromkeys(messages))}"]
    return []


@cache
def _adapter(target: Callable[..., Any], name: str) -> TypeAdapter[Any] | None:
    """Return a validator for the parameter's annotation, or None where there is nothing to check by."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hint = typing.get_type_hints(function).get(name)
    except (NameError, TypeError):
        return None
    if hint is None or hint is Any:
        return None
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeError):
        return None
