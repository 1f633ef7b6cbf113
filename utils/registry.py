"""Tables from the names a config may use to the classes behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from utils.errors import UserError, did_you_mean


class Registry(Mapping[str, Any]):
    """A read-only table ``name -> class`` whose entries are imported when they are first asked for.

    Args:
        kind: what the entries are, for messages ("model", "data set").
        entries: name -> ``"package.module.Attribute"``.
        aliases: other spellings that old configs use -> name.

    Looking up an unknown name raises :class:`UserError` with the nearest known name. Importing late keeps
    ``--help`` and config validation fast and lets one broken module fail alone.
    """

    def __init__(self, kind: str, entries: Mapping[str, str], aliases: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self._aliases = dict(aliases or {})

    def canonical(self, name: str) -> str:
        """Return the entry's own name for ``name`` or an alias of it; raise UserError if there is none."""
        name = self._aliases.get(name, name)
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            raise UserError(f"there is no {self.kind} called {name!r}{hint} Known: {', '.join(self._entries)}")
        return name

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self._entries[self.canonical(name)].rpartition(".")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
