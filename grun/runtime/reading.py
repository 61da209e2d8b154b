"""Reading what users hand in and what earlier runs wrote: text, JSON and YAML, each refused in one line where damaged.

No message quotes content, which may be the very text that is to be forgotten: they name file, line, field and the type
that was found.
"""

from __future__ import annotations

import functools
import json
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, Literal, TypeVar

from grun.errors import ConfigError, DataError, GrunError, RunError

T = TypeVar("T")

DEPTH = 60
"""Deepest nesting that is read, far above what any file of ours or of the field has."""
YAML_NODES = 100_000
"""Most values of a YAML text once its aliases stand for what they name."""
AGAIN = "make it again with overwrite=true, or restore it from a copy"
_LONG_NUMBER = re.compile(r"\d{19}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS: dict[Any, str] = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
_KINDS |= {tuple: "a list", int: "a whole number", float: "a number"}


class DamagedFile(RunError, ValueError):
    """A file that an earlier run wrote, or a part of it, is not what was written."""


def kind_of(value: Any) -> str:
    """What a JSON value is, in words, for errors that must not quote it."""
    if isinstance(value, str):
        return "a text" if value.strip() else "an empty text"
    return _KINDS[type(value)]


def fields_in(record: Mapping[str, Any]) -> str:
    """Names of a record's fields, for errors; what does not look like a name may be content, and is counted."""
    names = [name for name in record if re.fullmatch(r"[A-Za-z_][\w.-]{0,39}", str(name))]
    return ", ".join([*names, *([f"{len(record) - len(names)} more"] if len(record) > len(names) else [])]) or "none"


def read_fields(record: Any, where: str, kinds: Mapping[str, Any]) -> list[Any]:
    """Values of the fields of a user's row, each of its kind, such as str; object takes any.

    DataError names the first that is missing or of another kind.
    """
    wanted = ", ".join(kinds)
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object with {wanted}")
    for name, kind in kinds.items():
        if name not in record:
            raise DataError(f"{where}: field {name!r} is missing; a row needs {wanted}; it has: {fields_in(record)}")
        if not isinstance(record[name], kind):
            raise DataError(f"{where}: field {name!r} must be {_KINDS[kind]}; it is {kind_of(record[name])}")
    return [record[name] for name in kinds]


def decode(data: bytes, where: str, error: type[GrunError] = DataError) -> str:
    """UTF-8 text without the mark that some editors put in front; `where` names the file, or a line of it."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as reason:
        raise error(f"{where}: not UTF-8 ({reason.reason} at byte {reason.start}); save it as UTF-8") from reason


def read_text(path: Path, error: type[GrunError] = DataError) -> str:
    """A UTF-8 file; `error` where it is not there, cannot be read or is something else."""
    try:
        return decode(path.read_bytes(), str(path), error)
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror or reason}") from reason


def parse_json(text: str, where: str, error: type[GrunError] = DataError, *, finite: bool = True) -> Any:
    """Value of a JSON text.

    Refused are what other readers understand otherwise, or what breaks later: the same key twice in an object, NaN and
    Infinity (if `finite`), integers beyond 64 bits, half a surrogate pair, and nesting beyond `DEPTH`.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise error(f"{where}: a key stands twice in one object; leave one of them out")
        return found

    def integer(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
            raise error(f"{where}: an integer of {len(digits)} digits; expected 64 bits at most, or write it as a text")
        return int(digits)

    def constant(name: str) -> float:
        raise error(f"{where}: {name} is not valid JSON; expected a finite number or null")

    hooks: dict[str, Any] = {"object_pairs_hook": once}
    if _LONG_NUMBER.search(text):
        hooks["parse_int"] = integer
    if finite:
        hooks["parse_constant"] = constant
    try:
        value = json.loads(text, **hooks)
    except json.JSONDecodeError as reason:
        place = f" line {reason.lineno}" if "\n" in text.rstrip("\n") else ""
        raise error(f"{where}{place}: not valid JSON ({reason.msg} at column {reason.colno})") from reason
    except RecursionError as reason:
        raise error(f"{where}: nested more than {DEPTH} deep; expected plain fields") from reason
    if text.count("[") + text.count("{") > DEPTH and _too_deep(value):
        raise error(f"{where}: nested more than {DEPTH} deep; expected plain fields")
    if _SURROGATE.search(text) and any(not is_unicode(part) for part in texts_in(value)):
        raise error(f"{where}: half a surrogate pair (\\ud800 to \\udfff alone), which is no character; remove it")
    return value


def read_json(path: Path, error: type[GrunError] = DamagedFile, *, expect: type | None = None) -> Any:
    """Value of a JSON file; `expect` dict or list refuses anything else. What is not there is a FileNotFoundError.

    As of `parse_json`, but that files of ours may hold NaN, which a diverged run gives.
    """
    value = parse_json(decode(path.read_bytes(), str(path), error), str(path), error, finite=False)
    if expect is not None and not isinstance(value, expect):
        raise error(f"{path}: expected {_KINDS[expect]}, found {kind_of(value)}; {AGAIN}")
    return value


def read_json_lines(path: Path, kind: Any) -> Iterator[tuple[str, Any]]:
    """Value of each line of a file of ours, of the type `kind`, after the words that name it; empty ones aside."""
    # Not splitlines(): generated text may hold other line separators, which JSON leaves as they are.
    for number, line in enumerate(read_text(path, DamagedFile).split("\n"), start=1):
        if line:
            where = f"{path}, line {number}"
            yield where, typed(kind, parse_json(line, where, DamagedFile, finite=False), where)


def parse_yaml(text: str, where: str) -> Any:
    """Value of a YAML text; ConfigError for what is damaged, for tags, bombs of aliases and `${...}`.

    Options are plain values: nothing in them is looked up, neither elsewhere in the file nor in the environment.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_plain(text, where)
    try:
        _check_nodes(text, where)
        # As options are read everywhere: 1e-3 is a number, and there are no dates.
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{where}: {in_one_line(error)}") from error
    check_plain(read, where)
    return read["value"]


def check_plain(value: Any, where: str) -> None:
    """ConfigError for a text in an option's value that is none: `${...}`, half a surrogate pair, a NUL."""
    for text in texts_in(value):
        if "${" in text:
            raise ConfigError(f"{where}: ${{...}} is not read in options; write the value itself")
        if not is_unicode(text):
            raise ConfigError(f"{where}: holds what is no Unicode text (half a surrogate pair); write it as UTF-8")
        if "\0" in text:
            raise ConfigError(f"{where}: holds a NUL character; remove it")


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from texts_in(key)
            yield from texts_in(part)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for part in value:
            yield from texts_in(part)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def first_line(error: BaseException) -> str:
    """First line of the message of an exception, its type where there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def in_one_line(error: BaseException) -> str:
    """The message of an exception in one line of at most 300 characters, its type where there is none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def typed(kind: Any, value: Any, where: str, error: type[GrunError] = DamagedFile) -> Any:
    """`value`, as JSON gives it, as an instance of the annotation `kind`; `error` names the place where it is none.

    A dataclass wants its fields and no others; a TypedDict knows some keys of many, and leaves the others as they are.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (origin is Literal and value in arguments):
        return value
    if is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(typing.cast(Hashable, kind))
        needed = {field.name for field in fields_of(kind) if field.default is field.default_factory is MISSING}
        for name in [*value, *hints]:
            if (name in value) != (name in hints) and (name in value or name in needed):
                raise error(f"{where}: {'unknown' if name in value else 'missing'} key {name!r}; {AGAIN}")
        parts = {name: typed(hints[name], part, f"{where}: {name}", error) for name, part in value.items()}
        return typing.cast(Any, kind)(**parts)
    if typing.is_typeddict(kind) and isinstance(value, dict):
        missing = sorted(kind.__required_keys__ - value.keys())
        if missing:
            raise error(f"{where} lacks {', '.join(missing)}; {AGAIN}")
        hints = _hints(kind)
        return {name: typed(hints.get(name, Any), part, f"{where}: {name}", error) for name, part in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        if {*map(type, value)} <= {arguments[0], int if arguments[0] is float else arguments[0]}:
            return origin(value)  # at once: tables hold a number for every token
        parts_of = [typed(arguments[0], part, f"{where}[{number}]", error) for number, part in enumerate(value)]
        return origin(parts_of)
    if origin is dict and isinstance(value, dict):
        if arguments[0] is int and not all(re.fullmatch(r"-?\d{1,9}", name) for name in value):
            raise error(f"{where}: expected numbers as keys; {AGAIN}")
        return {
            arguments[0](name): typed(arguments[1], part, f"{where}: {name}", error) for name, part in value.items()
        }
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        fitting = [choice for choice in arguments if choice is not type(None) and _may_be(choice, value)]
        return typed((fitting or [arguments[0]])[0], value, where, error)
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise error(f"{where}: expected {_in_words(kind)}, found {kind_of(value)}; {AGAIN}")


def _may_be(kind: Any, value: Any) -> bool:
    outer = typing.get_origin(kind) or (dict if is_dataclass(kind) or typing.is_typeddict(kind) else kind)
    return type(value) is (list if outer is tuple else outer) or (outer is float and type(value) is int)


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if is_dataclass(kind) or typing.is_typeddict(kind):
        return "an object"
    outer: Any = typing.get_origin(kind) or kind
    if outer in _KINDS:
        return str(_KINDS[outer])
    return " or ".join(_in_words(part) for part in typing.get_args(kind))


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    """Annotation of each field; looking them up takes longer than all the rest."""
    return typing.get_type_hints(typing.cast(type, kind))


def _too_deep(value: Any) -> bool:
    """Whether lists and objects are nested beyond `DEPTH`, found without recursion."""
    level = [value]
    for _ in range(DEPTH + 1):
        outer = [part for part in level if isinstance(part, dict | list)]
        level = [inner for part in outer for inner in (part.values() if isinstance(part, dict) else part)]
    return any(isinstance(part, dict | list) for part in level)


def _check_nodes(text: str, where: str) -> None:
    """ConfigError for tags, deep nesting and aliases that stand for too much, before anything is built of the text."""
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"{where}: the alias *{event.anchor} stands before or within what it names")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            total += 1
            if event.tag is not None and event.tag != "!":
                raise ConfigError(f"{where}: tags such as {event.tag!r} are not read; write the value itself")
            if isinstance(event, yaml.ScalarEvent):
                sizes.update({event.anchor: 1} if event.anchor else {})
            else:
                open_nodes.append((event.anchor, total))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            anchor, before = open_nodes.pop()
            sizes.update({anchor: total - before + 1} if anchor else {})
        if len(open_nodes) > DEPTH or total > YAML_NODES:
            raise ConfigError(f"{where}: nested more than {DEPTH} deep, or more than {YAML_NODES:,} values")
