"""stack.json: which requests a store holds, how they came about, and digests that show a change."""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from grun.errors import ConfigError, RunError
from grun.files import content_hash, read_json
from grun.method.adapter import STACK_FILE
from grun.registry import unknown_name

FORMAT_VERSION = 1
MANIFEST_FILE = STACK_FILE

State = Literal["active", "disabled"]
Action = Literal["create", "add", "replace", "remove", "disable", "enable"]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a store."""

    request: str | None
    """Id of the request that it concerns; None: the store as a whole."""
    text: str
    """What is wrong, one sentence without a period."""

    def __str__(self) -> str:
        return self.text if self.request is None else f"request {self.request}: {self.text}"


@dataclass(frozen=True)
class Base:
    """The model that every adapter of the store was trained on."""

    name: str | None
    """Hub id or folder."""
    revision: str | None
    """Commit on the hub."""
    fingerprint: str
    """`grun.method.fingerprint` of its weights."""


@dataclass(frozen=True)
class Data:
    """What was forgotten, without its text."""

    rows: int
    """Number of forget rows."""
    hashes: tuple[str, ...]
    """Salted hash of each forget row, in their order (`grun.requests.forget_rows`)."""


@dataclass(frozen=True)
class Request:
    """One request to forget."""

    id: str
    """Name of the request: letters, digits, `.`, `_` and `-`."""
    folder: str
    """Folder under requests/: the id, or the id and a number (`ID@2`) once the request was replaced."""
    state: State
    """active: in force; disabled: kept, not in force."""
    time: str
    """When it was added, UTC, ISO 8601."""
    files: dict[str, str]
    """SHA-256 of each file of the folder."""
    data: Data
    """Its forget rows."""
    config: dict[str, Any]
    """Resolved options of `python -m grun unlearn`; empty or partial for an adapter that came without them."""
    metrics: dict[str, Any]
    """Whatever was measured when it was trained; may be empty."""
    beside: tuple[str, ...]
    """Ids of the requests that were in force while it was trained; empty: trained on the bare base."""
    text_stored: bool
    """Whether its folder holds the forget rows themselves."""
    note: str
    """The operator's words."""


@dataclass(frozen=True)
class Event:
    """Something that was done to the store."""

    time: str
    """UTC, ISO 8601."""
    action: Action
    """What was done."""
    request: str | None
    """Id of the request; None where the store was created."""
    files: str | None
    """Hash of the adapter's files where one was added."""
    digest: str
    """Hash of this event and of the digest before it."""


@dataclass(frozen=True)
class Manifest:
    """Content of stack.json. Every change gives a new one, sealed by a digest over all of it."""

    format_version: int
    salt: str
    """32 random bytes, hex: the key of the forget rows' hashes."""
    base: Base | None
    """Set by the first request that is added."""
    rule: str
    """How edits of several requests are combined, a name of `grun.method.combination.RULES`."""
    gate_threshold: float | None
    """Gate probability below which an edit is skipped; None: never."""
    requests: tuple[Request, ...]
    """In the order of adding."""
    history: tuple[Event, ...]
    """Oldest first."""
    digest: str
    """Hash of all the rest."""

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Manifest of the store in `folder`; RunError if there is none, or a key or a type is not as written here."""
        path = folder / MANIFEST_FILE
        try:
            values = read_json(path)
        except FileNotFoundError as error:
            raise RunError(
                f"{folder} is no request store: {MANIFEST_FILE} is missing; `python -m grun requests add` makes one"
            ) from error
        except ValueError as error:
            raise RunError(f"{path} is not valid JSON ({error}); restore it from a copy") from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise RunError(f"{path}: format version {version}, not {FORMAT_VERSION}; use the GRUN that wrote it")
        manifest: Manifest = _typed(cls, values, str(path))
        for request in manifest.requests:
            if not is_id(request.id) or not re.fullmatch(re.escape(request.id) + r"(@\d+)?", request.folder):
                raise RunError(
                    f"{path}: request {request.id!r} cannot lie in the folder {request.folder!r}; restore it"
                )
        ids = [request.id for request in manifest.requests]
        if len(set(ids)) != len(ids):
            raise RunError(f"{path}: two requests have the same id; restore it from a copy")
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """What stack.json holds."""
        values: dict[str, Any] = _plain(self)
        return values

    def sealed(self) -> Manifest:
        """The same with the digest that belongs to its content."""
        return replace(self, digest=_digest(self))

    def request(self, request_id: str) -> Request:
        """The request of that id; ConfigError names the nearest ones."""
        for request in self.requests:
            if request.id == request_id:
                return request
        raise ConfigError(unknown_name("request", request_id, self.ids()))

    def ids(self, *, active: bool = False) -> list[str]:
        """Ids in the order of adding; `active`: of the requests in force alone."""
        return [request.id for request in self.requests if request.state == "active" or not active]

    def dependents(self, request_id: str) -> list[str]:
        """Ids of the requests that were trained beside that one."""
        return [request.id for request in self.requests if request_id in request.beside]

    def with_event(self, action: Action, time: str, request: Request | None = None) -> Manifest:
        """The same with one more event, sealed; `files` are noted where an adapter came in."""
        files = content_hash(request.files) if request is not None and action in ("add", "replace") else None
        event = Event(time, action, None if request is None else request.id, files, "")
        before = self.history[-1].digest if self.history else self.salt
        event = replace(event, digest=_chained(before, event))
        return replace(self, history=(*self.history, event)).sealed()

    def problems(self) -> list[Problem]:
        """Traces of a change that this package did not make: digest, chain of events, and whether they lead here."""
        found = []
        if self.digest != _digest(self):
            found.append(Problem(None, f"{MANIFEST_FILE} was changed: its digest does not match its content"))
        before = self.salt
        for number, event in enumerate(self.history, start=1):
            if event.digest != _chained(before, event):
                found.append(Problem(None, f"the history was changed: event {number} does not follow the one before"))
                break
            before = event.digest
        if _replayed(self.history) != {
            request.id: (request.state, content_hash(request.files)) for request in self.requests
        }:
            found.append(Problem(None, "the history does not lead to the requests that are there"))
        return found


def is_id(text: str) -> bool:
    """Whether a text may be a request's id, which is a folder's name too."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", text) is not None


def check_id(text: str) -> None:
    """ConfigError unless a text may be a request's id."""
    if not is_id(text):
        raise ConfigError(
            f"id={text!r} cannot be a request's id: it is made of letters, digits, '.', '_' and '-', and does not "
            "begin with '.'"
        )


def _digest(manifest: Manifest) -> str:
    return content_hash({key: value for key, value in manifest.to_dict().items() if key != "digest"})


def _chained(before: str, event: Event) -> str:
    return content_hash([before, {key: value for key, value in _plain(event).items() if key != "digest"}])


def _plain(value: Any) -> Any:
    """`value` as JSON holds it; nothing is copied, unlike by `asdict`, for the sake of stores of thousands."""
    if is_dataclass(value):
        return {name: _plain(part) for name, part in vars(value).items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _replayed(history: tuple[Event, ...]) -> dict[str, tuple[str, str | None]]:
    """State and hash of the files of each request that the events leave."""
    left: dict[str, tuple[str, str | None]] = {}
    for event in history:
        if event.request is None:
            continue
        if event.action == "remove":
            left.pop(event.request, None)
        elif event.action in ("add", "replace"):
            left[event.request] = ("active", event.files)
        elif event.request in left:
            left[event.request] = ("disabled" if event.action == "disable" else "active", left[event.request][1])
    return left


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    """Annotation of each field; looking them up takes longer than all the rest."""
    return typing.get_type_hints(typing.cast(type, kind))


def _typed(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, as an instance of the annotation `kind`; RunError names the place where it is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(typing.cast(Hashable, kind))
        for name in [*value, *hints]:
            if (name in value) != (name in hints):
                raise RunError(f"{where}: {'unknown' if name in value else 'missing'} key {name!r}; restore it")
        return typing.cast(Any, kind)(**{name: _typed(hints[name], value[name], f"{where}: {name}") for name in hints})
    if kind is Any:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], part, f"{where}[{number}]") for number, part in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {str(name): _typed(arguments[1], part, f"{where}.{name}") for name, part in value.items()}
    if origin is Literal and value in arguments:
        return value
    if origin is types.UnionType:
        return None if value is None else _typed(arguments[0], value, where)
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise RunError(f"{where}: {value!r} is not what is expected there ({_name(kind)}); restore it from a copy")


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)
