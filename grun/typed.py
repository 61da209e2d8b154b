"""What JSON gives, as instances of dataclasses: every key known, every value of the type that its field names."""

from __future__ import annotations

import functools
import math
import reprlib
import types
import typing
from collections.abc import Callable, Hashable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

from grun.errors import GrunError


def typed(kind: Any, value: Any, where: str, error: Callable[[str], GrunError]) -> Any:
    """`value` as an instance of the annotation `kind`; a field with a default may be missing.

    Args:
        kind: a dataclass, or what may stand in one: str, int, float (finite), bool, Any, list, tuple, dict, Literal,
            and `... | None`.
        value: as `json` gives it.
        where: names the place in messages, such as a file.
        error: makes what is raised of "PLACE: what is wrong".
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        hints, optional = _fields(typing.cast(Hashable, kind))
        for name in [*value, *hints]:
            if name not in hints or (name not in value and name not in optional):
                raise error(f"{where}: {'unknown' if name in value else 'missing'} key {name!r}")
        parts = {name: typed(hints[name], part, f"{where}: {name}", error) for name, part in value.items()}
        return typing.cast(Any, kind)(**parts)
    if kind is Any:
        return value
    if origin in (list, tuple) and isinstance(value, list):
        return origin(typed(arguments[0], part, f"{where}[{number}]", error) for number, part in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {str(name): typed(arguments[1], part, f"{where}.{name}", error) for name, part in value.items()}
    if origin is types.UnionType:
        return None if value is None else typed(arguments[0], value, where, error)
    if (origin is Literal and value in arguments) or (type(value) is kind and _is_sound(value)):
        return value
    if kind is float and type(value) is int and abs(value) < 2**53:
        return value
    raise error(f"{where}: {reprlib.repr(value)} is not what is expected there ({_name(kind)})")


def _is_sound(value: Any) -> bool:
    """Whether a number is finite, and a text one that can be written: no half of a surrogate pair."""
    if type(value) is str:
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    return type(value) is not float or math.isfinite(value)


@functools.cache
def _fields(kind: Hashable) -> tuple[dict[str, Any], set[str]]:
    """Annotation of each field, and those with a default; looking them up takes longer than all the rest."""
    of_kind = fields(typing.cast(Any, kind))
    optional = {field.name for field in of_kind if (field.default, field.default_factory) != (MISSING, MISSING)}
    return typing.get_type_hints(typing.cast(type, kind)), optional


def _name(kind: Any) -> str:
    return str(kind) if typing.get_origin(kind) or not hasattr(kind, "__name__") else str(kind.__name__)
