"""stack.json: which requests a store holds, how they came about, and digests that show a change."""

from __future__ import annotations

import re
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from grun.errors import AdapterError, ConfigError, RunError, unknown_name
from grun.method.adapter import CONFIG_FILE, STACK_FILE, WEIGHTS_FILE, read_regular
from grun.method.stack.forget_rows import salted_hash
from grun.runtime.files import content_hash
from grun.runtime.reading import decode, kind_of, parse_json, typed

FORMAT_VERSION = 2
WITHOUT_STATE = 1
"""Version whose events do not say what the manifest held; it is read, and the next change makes it the newer one."""
NEWER = ("whole", "state", "signature", "false_positives", "capacity")
"""Fields that came with version 2, or later."""
MANIFEST_FILE = STACK_FILE
TEXT_FILE = "forget.jsonl"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")
FILES = (*ADAPTER_FILES, TEXT_FILE)
"""All that a request's folder may hold; the text only where it is to be stored."""
LONGEST_ID = 100
"""Characters; file systems take names of 255 bytes."""

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
    """Salted hash of each forget row, in their order (`grun.method.stack.forget_rows`)."""
    whole: str | None = None
    """Salted hash of `hash_rows` of all of them, by which what a cache keeps of them is found."""


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
    """Hash of this event and of the digest before it. That of the last event is the store's head."""
    state: str | None = None
    """Hash of the manifest's content after the event, so that a head stands for all of it; None before version 2."""


@dataclass(frozen=True)
class Signature:
    """Whoever held the key has seen this head."""

    public_key: str
    """ed25519, 32 bytes, hex."""
    signature: str
    """Of the text `grun requests HEAD`, 64 bytes, hex."""


@dataclass(frozen=True)
class Manifest:
    """Content of stack.json. Every change gives a new one, sealed by a digest over all of it."""

    format_version: int
    salt: str
    """32 random bytes, hex: the key of the forget rows' hashes."""
    base: Base | None
    """Set by the first request that is added."""
    rule: str
    """How edits of several requests are combined, a name of `grun.method.stack.combination.RULES`."""
    gate_threshold: float | None
    """Gate probability below which an edit is skipped; None: never."""
    requests: tuple[Request, ...]
    """In the order of adding."""
    history: tuple[Event, ...]
    """Oldest first."""
    digest: str
    """Hash of all the rest."""
    signature: Signature | None = None
    """Of the head; None: it is not signed."""
    false_positives: float | None = None
    """Largest share of rows to keep that may open the gate of any request; None: nothing is promised."""
    capacity: int | None = None
    """Requests that this is promised for, each with the same share of it."""

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Manifest of the store in `folder`; RunError if there is none, or a key or a type is not as written here."""
        path = folder / MANIFEST_FILE
        try:
            values = parse_json(decode(read_regular(path), str(path), RunError), str(path), RunError)
        except FileNotFoundError as error:
            raise RunError(
                f"{folder} is no request store: {MANIFEST_FILE} is missing; `python -m grun requests add` makes one"
            ) from error
        except AdapterError as error:
            raise RunError(str(error)) from error
        if not isinstance(values, dict):
            raise RunError(f"{path}: expected an object, found {kind_of(values)}; restore it from a copy")
        version = values.get("format_version")
        if version not in (WITHOUT_STATE, FORMAT_VERSION):
            raise RunError(f"{path}: format version {version}, not {FORMAT_VERSION}; use the GRUN that wrote it")
        manifest: Manifest = typed(cls, values, str(path), RunError)
        if wrong := manifest._wrong():
            raise RunError(f"{path}: {wrong}; restore it from a copy")
        return manifest

    def _wrong(self) -> str | None:
        """What of the content this package cannot have written, whatever its digest says."""
        signed = self.signature or Signature("0" * 64, "0" * 128)
        hexadecimal = {"salt": (self.salt, 64), "public_key": (signed.public_key, 64)}
        for name, (text, digits) in (hexadecimal | {"signature": (signed.signature, 128)}).items():
            if re.fullmatch(f"[0-9a-f]{{{digits}}}", text) is None:
                return f"{name}: expected {digits} hex digits"
        for request in self.requests:
            if not is_id(request.id) or not re.fullmatch(re.escape(request.id) + r"(@\d+)?", request.folder):
                return f"request {request.id!r} cannot lie in the folder {request.folder!r}"
            if foreign := sorted(set(request.files) - set(FILES)):
                return f"request {request.id!r} has no file {foreign[0]!r}"
        return "two requests have the same id" if len(set(self.ids())) != len(self.requests) else None

    def to_dict(self) -> dict[str, Any]:
        """What stack.json holds."""
        return dict(_plain(self))

    def sealed(self) -> Manifest:
        """The same with the digest that belongs to its content."""
        return replace(self, digest=_digest(self))

    @property
    def head(self) -> str | None:
        """Digest of the last event, which stands for all before it and for the content; None: there is no event."""
        return self.history[-1].digest if self.history else None

    def since(self, head: str) -> tuple[Event, ...] | None:
        """Events after that of the head (64 hex digits, or the first 16 or more); None: no event has it."""
        for number, event in enumerate(self.history, start=1):
            if len(head) >= 16 and event.digest.startswith(head.lower()):
                return self.history[number:]
        return None

    def request(self, request_id: str) -> Request:
        """The request of that id; ConfigError names the nearest ones."""
        for request in self.requests:
            if request.id == request_id:
                return request
        raise ConfigError(unknown_name("request", request_id, self.ids()))

    def ids(self, *, active: bool = False) -> list[str]:
        """Ids in the order of adding; `active`: of the requests in force alone."""
        return [request.id for request in self.requests if request.state == "active" or not active]

    def is_data_of(self, request_id: str, hash_of_rows: str) -> bool:
        """Whether a `hash_rows` is that of a request's forget rows."""
        return self.request(request_id).data.whole == salted_hash(hash_of_rows, self.salt)

    def dependents(self, request_id: str) -> list[str]:
        """Ids of the requests that were trained with that one in force."""
        return [request.id for request in self.requests if request_id in request.beside]

    def with_event(self, action: Action, time: str, request: Request | None = None) -> Manifest:
        """The manifest after something was done to a request, as it then is; sealed but not signed.

        `files` are noted where an adapter came in. A request that is added comes last, another one keeps its place.
        """
        requests = self.requests
        if request is not None:
            requests = tuple(request if other.id == request.id else other for other in requests)
            requests += (request,) if action == "add" else ()
            requests = tuple(other for other in requests if action != "remove" or other.id != request.id)
        files = content_hash(request.files) if request is not None and action in ("add", "replace") else None
        newest = replace(self, format_version=FORMAT_VERSION, requests=requests, signature=None)
        event = Event(time, action, None if request is None else request.id, files, "", _state(newest))
        event = replace(event, digest=_chained(self.head or self.salt, event))
        return replace(newest, history=(*self.history, event)).sealed()

    def problems(self) -> list[Problem]:
        """Traces of a change that this package did not make: digest, chain of events, and whether they lead here."""
        found = []
        if self.digest != _digest(self):
            found.append(f"{MANIFEST_FILE} was changed: its digest does not match its content")
        before = self.salt
        for number, event in enumerate(self.history, start=1):
            if event.digest != _chained(before, event):
                found.append(f"the history was changed: event {number} does not follow the one before")
                break
            before = event.digest
        there = {request.id: (request.state, content_hash(request.files)) for request in self.requests}
        if _replayed(self.history) != there:
            found.append("the history does not lead to the requests that are there")
        state = self.history[-1].state if self.history else None
        if not found and state != _state(self) and (state is not None or self.format_version != WITHOUT_STATE):
            found.append("the content is not what it was after the last event of the history")
        return [Problem(None, text) for text in found]


def is_id(text: str) -> bool:
    """Whether a text may be a request's id, which is a folder's name too."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", text) is not None


def check_id(text: str) -> None:
    """ConfigError unless a text may be a request's id."""
    if not is_id(text) or len(text) > LONGEST_ID:
        raise ConfigError(
            f"id={text[:LONGEST_ID]!r} cannot be a request's id: it is made of letters, digits, '.', '_' and '-', "
            f"{LONGEST_ID} at most, and does not begin with '.'"
        )


def _digest(manifest: Manifest) -> str:
    return content_hash({key: value for key, value in manifest.to_dict().items() if key != "digest"})


def _state(manifest: Manifest) -> str:
    """Hash of what a manifest holds besides its history and what follows from that."""
    names = ("format_version", "salt", "base", "rule", "gate_threshold", "requests")
    later = [value for value in (manifest.false_positives, manifest.capacity) if value is not None]
    return content_hash([*(_plain(getattr(manifest, name)) for name in names), *later])


def _chained(before: str, event: Event) -> str:
    return content_hash([before, {key: value for key, value in _plain(event).items() if key != "digest"}])


def _plain(value: Any) -> Any:
    """`value` as JSON holds it; nothing is copied, unlike by `asdict`, for the sake of stores of thousands.

    Fields that came later are left out where they are None, so that digests stay as they are.
    """
    if is_dataclass(value):
        return {name: _plain(part) for name, part in vars(value).items() if part is not None or name not in NEWER}
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
