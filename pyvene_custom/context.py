"""Values that belong to the call in progress, not to the object that is called."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

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
