"""Values that belong to the call in progress, not to the object that is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from threading import Condition
from typing import Any, Generic, Self, TypeVar
from weakref import WeakKeyDictionary

from grun.errors import ModelError

Value = TypeVar("Value")


class PerContext(Generic[Value]):
    """One value for each owner in each context (`contextvars`): every thread and asyncio task sees its own.

    Nothing of it is kept once the owner is gone.
    """

    def __init__(self, name: str) -> None:
        """Make it once, at the top of a module."""
        self._values: ContextVar[WeakKeyDictionary[object, Value]] = ContextVar(name)

    def get(self, owner: object) -> Value | None:
        """The value in this context, None if there is none."""
        values = self._values.get(None)
        return None if values is None else values.get(owner)

    def set(self, owner: object, value: Value | None) -> None:
        """Give `owner` another value, in this context alone."""
        values = WeakKeyDictionary(self._values.get({}))  # a copy: other contexts may share the one there was
        if value is None:
            values.pop(owner, None)
        else:
            values[owner] = value
        self._values.set(values)


WITHIN: PerContext[bool] = PerContext("pyvene_custom.within")
"""By `Calls`, whether this context is in one of them."""


class Calls:
    """Calls in progress, which run at the same time, and changes of what they run on, each of which runs alone."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._running = 0
        self._changing = False  # or about to

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Within the block nothing changes; a waiting change comes first. A call within a call is part of it."""
        if WITHIN.get(self):
            yield
            return
        with self._condition:
            self._condition.wait_for(lambda: not self._changing)
            self._running += 1
        WITHIN.set(self, True)
        try:
            yield
        finally:
            WITHIN.set(self, None)
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Within the block no call runs; it waits for those in progress. ModelError within one of them."""
        if WITHIN.get(self):
            raise ModelError("edits cannot be put on or taken off within a call of their model; do it after the call")
        with self._condition:
            self._condition.wait_for(lambda: not self._changing)
            self._changing = True
        try:
            with self._condition:
                self._condition.wait_for(lambda: not self._running)
            yield
        finally:
            with self._condition:
                self._changing = False
                self._condition.notify_all()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of a copied model no call is in progress."""
        return type(self)()
