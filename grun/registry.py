"""Named choices: a registry maps a name to an object, or to an import string resolved on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from grun.errors import ConfigError, unknown_name

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One named choice and the line that `python -m grun list` prints for it."""

    name: str
    value: T | str
    description: str


class Registry(Generic[T]):
    """Choices of one kind, in the order in which they were added."""

    def __init__(self, kind: str) -> None:
        """`kind` is the singular noun used in error messages, such as "gate"."""
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def add(self, name: str, value: T | str, description: str) -> None:
        """Register `value`, or the import string "package.module:attribute", under `name`."""
        if name in self._entries:
            raise ConfigError(f"{self.kind} {name!r} is registered twice; choose another name")
        self._entries[name] = Entry(name, value, description)

    def register(self, name: str, description: str) -> Callable[[T], T]:
        """Return a decorator that adds what it decorates."""

        def decorate(value: T) -> T:
            self.add(name, value, description)
            return value

        return decorate

    def get(self, name: str) -> T:
        """Return the choice called `name`, importing it if needed; ConfigError lists the known names."""
        if name not in self._entries:
            raise ConfigError(unknown_name(self.kind, name, list(self._entries)))
        value = self._entries[name].value
        if not isinstance(value, str):
            return value
        module, _, attribute = value.partition(":")
        try:
            found: T = getattr(importlib.import_module(module), attribute)
            return found
        except ModuleNotFoundError as error:
            raise ConfigError(f"{self.kind} {name!r} needs the missing package {error.name!r}; install it") from error

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def names(self) -> list[str]:
        """Names in the order in which they were added."""
        return list(self._entries)
