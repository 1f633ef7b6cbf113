"""Tables of the classes that configs can name, and models of the arguments of each class."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticOmit

from utils.errors import UserError, did_you_mean

_LONGEST = 200  # characters of a value in a message

# Names in annotations of torch that it imports for type checkers only.
_NAMES = {"Callable": Callable, "Iterable": Iterable, "Optimizer": Any, "Any": Any}


class Problem(NamedTuple):
    """What is wrong in a config: the path of the field, and the text that says what was found and expected."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"

    def is_under(self, paths: Iterable[str]) -> bool:
        """Return whether the field is one of ``paths`` or lies below one."""
        return any(self.path == other or self.path.startswith(f"{other}.") for other in paths)


class Registry(Mapping[str, Any]):
    """A read-only table ``name -> class``.

    Args:
        kind: what the entries are, for messages ("model", "data set").
        entries: name -> class, or ``"package.module.Attribute"``, which is imported when it is first used.
        aliases: other spellings that old configs use -> name.
        refused: names that exist but cannot be used -> why, and what to use instead.
        provided: arguments that the program passes itself; a config may not set them.

    Looking up an unknown or refused name raises :class:`UserError`.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, Any],
        *,
        aliases: Mapping[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
        provided: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self.provided = tuple(provided)
        self.aliases = dict(aliases or {})
        self._refused = dict(refused or {})
        self._entries = {name: entry for name, entry in entries.items() if name not in self._refused}
        self._models: dict[str, type[Arguments]] = {}

    def canonical(self, name: str) -> str:
        """Return the entry's own name for ``name`` or an alias of it; raise UserError if there is none."""
        name = self.aliases.get(name, name)
        if name in self._refused:
            raise UserError(f"{self.kind} {name} cannot be used here: {self._refused[name]}")
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            raise UserError(f"there is no {self.kind} called {name!r}{hint} Known: {', '.join(self._entries)}")
        return name

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[self.canonical(name)]
        if not isinstance(entry, str):
            return entry
        module, _, attribute = entry.rpartition(".")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def constructors(self, name: str) -> Sequence[Callable[..., Any]]:
        """Return the callables that share an entry's arguments; the first one that knows a name gets it."""
        return (self[name],)

    # -- arguments

    def arguments(self, name: str) -> type[Arguments]:
        """Return the model of the arguments that a config may give an entry."""
        name = self.canonical(name)
        if name not in self._models:
            self._models[name] = argument_model(name, self.constructors(name), self.provided)
        return self._models[name]

    def problems(self, path: str, name: str, args: Mapping[str, Any]) -> list[Problem]:
        """Return what is wrong with an entry's name and arguments in a config, without building anything.

        Args:
            path: the section with ``type`` and ``args``, such as ``arch``.
            name, args: the ``type`` and ``args`` in it.
        """
        if name not in self:
            why = f"; {self._refused[name]}." if name in self._refused else did_you_mean(name, self)
            return [Problem(f"{path}.type", f"found {found(name)}{why} Allowed: {', '.join(self)}")]
        own = [name for name in args if name in self.provided]
        problems = [Problem(f"{path}.args.{name}", "set by the program, not by the config; remove it") for name in own]
        given = {key: value for key, value in args.items() if key not in own}
        return problems + self.arguments(name).problems(f"{path}.args", given)

    def check(self, name: str, args: Mapping[str, Any]) -> None:
        """Raise ValueError for arguments that are unknown, missing, or not as the constructor annotates them.

        Arguments that the program provides are not checked.
        """
        given = {key: value for key, value in args.items() if key not in self.provided}
        problems = self.arguments(name).problems("", given)
        if problems:
            raise ValueError("; ".join(str(problem).lstrip(".") for problem in problems))


# -- models of arguments ---------------------------------------------------------------------------------------


class Arguments(BaseModel):
    """The arguments of one constructor as a config may give them."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )

    @classmethod
    def problems(cls, path: str, args: Mapping[str, Any]) -> list[Problem]:
        """Return one problem per wrong, unknown or missing argument; ``path``: of the arguments."""
        try:
            # Through JSON: a list is a valid tuple there, while "3" is still not a valid int.
            cls.model_validate_json(json.dumps(args, default=_plain_value))
        except ValidationError as error:
            details: dict[str, list[Any]] = {}
            for detail in error.errors():
                details.setdefault(str(detail["loc"][0]), []).append(detail)
            return [Problem(f"{path}.{name}", cls._text(name, args, wrong)) for name, wrong in details.items()]
        return []

    @classmethod
    def _text(cls, name: str, args: Mapping[str, Any], details: Sequence[Any]) -> str:
        if details[0]["type"] == "extra_forbidden":
            allowed = ", ".join(cls.model_fields) or "none"
            return f"{cls.__name__} takes no such argument{did_you_mean(name, cls.model_fields)} Allowed: {allowed}"
        if name not in args:
            return f"{cls.__name__} needs this argument, but it is missing"
        # JSON cannot contain an instance of a class (a tensor): mention it only if nothing else is expected.
        details = [d for d in details if d["type"] != "is_instance_of" and "isinstance" not in d["msg"]] or details
        return f"found {found(args[name])}; {' or '.join(dict.fromkeys(expected(d) for d in details))}"


def _plain_value(value: Any) -> Any:
    """Return numbers of NumPy and torch as those of Python; anything else that JSON does not have as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def found(value: Any) -> str:
    """Return a value of a config as JSON, shortened if it is long."""
    text = json.dumps(value, default=_plain_value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def expected(detail: Any) -> str:
    """Return what pydantic expected in place of one wrong value."""
    return detail["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")


def argument_model(owner: str, targets: Iterable[Callable[..., Any]], provided: Sequence[str] = ()) -> type[Arguments]:
    """Return a model of the named arguments of constructors: their types, limits, defaults and documentation.

    Args:
        owner: the name that configs use.
        targets: the callables; the first one that knows a name decides.
        provided: arguments to leave out.
    """
    fields: dict[str, Any] = {}
    for target in targets:
        meanings = documented(target)
        for parameter in signature(target).parameters.values():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.name not in provided:
                default = ... if parameter.default is parameter.empty else parameter.default
                field = Field(default, description=meanings.get(parameter.name))
                fields.setdefault(parameter.name, (_annotation(parameter), field))
    return create_model(owner, __base__=Arguments, **fields)


def signature(target: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a callable, annotations evaluated where possible."""
    try:
        return inspect.signature(target, locals=_NAMES, eval_str=True)
    except (NameError, TypeError, AttributeError):
        return inspect.signature(target)


def _annotation(parameter: inspect.Parameter) -> Any:
    """Return the type to check an argument by; Any where there is none that pydantic can check."""
    kind = parameter.annotation
    if kind is parameter.empty or isinstance(kind, str):
        return Any
    try:
        TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeError):
        return Any
    except PydanticUserError:  # a type that brings its own config
        pass
    return kind


def documented(target: Callable[..., Any]) -> dict[str, str]:
    """Return what the ``Args:`` part of a docstring says about each argument (``a, b: text`` is about both).

    A class inherits the texts of its parents. The texts are for readers of configs: ``None`` becomes ``null``, and
    Sphinx markup becomes Markdown.
    """
    owners = reversed(target.__mro__) if isinstance(target, type) else (target,)
    return {name: text for owner in owners for name, text in _own_arguments(owner.__doc__ or "").items()}


def _own_arguments(docstring: str) -> dict[str, str]:
    match = re.search(r"^Args\b.*:\n((?:[ \t]+.*\n?|\n)*)", inspect.cleandoc(docstring), re.MULTILINE)
    if match is None:
        return {}
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(match[1]).splitlines():
        start = re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): ", line)
        if start:
            names = start[1].split(", ")
            line = line[start.end() :]
        for name in names:
            meanings[name] = f"{meanings.get(name, '')} {line.strip()}".strip()
    for name, text in meanings.items():
        text = re.sub(r":[a-z]+:`~?([^`]*)`", r"`\1`", text.replace("``", "`"))
        meanings[name] = re.sub(r"\bNone\b", "null", text).removesuffix(".")
    return meanings


class LenientSchema(GenerateJsonSchema):
    """JSON Schema of types that also allow what JSON does not have (tensors): that alternative is left out."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Any:
        """Leave the alternative out."""
        raise PydanticOmit


def json_schema(model: type[BaseModel], **options: Any) -> dict[str, Any]:
    """Return the JSON Schema of a model, the same with every version of pydantic since 2.10."""
    return _plain(model.model_json_schema(schema_generator=LenientSchema, **options))


def _plain(value: Any) -> Any:
    """Drop what only some versions of pydantic write: titles, and that an object may have any property."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    dropped = [("title", str), ("additionalProperties", bool)]
    return {
        key: _plain(v)
        for key, v in value.items()
        if not any(key == name and isinstance(v, kind) and v is not False for name, kind in dropped)
        and not (key == "anyOf" and v == [])  # nothing that JSON has: a function
    }
