"""A folder of requests to forget.

    stack.json       the manifest: what is in force; it is replaced as a whole, and nothing counts before it is in it
    requests/ID/     an adapter's files (forget.jsonl too, if its text is to be stored)
    training/ID/     an adapter that is being trained
    reports/         what `requests verify` found

A process that is killed at any moment leaves the store as it was before or as it is afterwards. The next writer clears
away what else it left (`grun.runtime.files`). Whatever else lies in the folder is not the store's, and stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.data.rows import Row, hash_rows
from grun.errors import AdapterError, ConfigError, DataError, RunError, unknown_name
from grun.method.actions import EDIT
from grun.method.adapter import WEIGHTS_FILE
from grun.method.edits import LOREFT
from grun.method.gate import KEYWORDS
from grun.method.host import check_threshold
from grun.method.stack.combination import RULES
from grun.method.stack.folder import StoredRequests, copy_files, request_problems
from grun.method.stack.forget_rows import salted_hash, salted_hashes
from grun.method.stack.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Base,
    Data,
    Manifest,
    Problem,
    Request,
    State,
    check_id,
)
from grun.method.validation import validate
from grun.runtime.files import clear, file_hash, remove, sync, taken, target, write_json, writing
from grun.runtime.ownership import foreign, listed
from grun.training.checkpoints import CHECKPOINTS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

log = logging.getLogger(__name__)


class RequestStore(StoredRequests):
    """Requests to forget of one base model. Any number of processes may read it; one at a time may write."""

    def __init__(self, folder: Path, manifest: Manifest, key: Ed25519PrivateKey | None = None) -> None:
        """Use `open` or `create`."""
        super().__init__(folder, manifest)
        self._key = key
        self._writers = 0

    @classmethod
    def open(cls, folder: str | Path, key: Ed25519PrivateKey | None = None) -> RequestStore:
        """The store in `folder`; RunError if there is none, or if its manifest cannot be read.

        With `key` (`grun.requests.signing.read_key`) the head is signed at each change.
        """
        folder = Path(folder).expanduser()
        return cls(folder, Manifest.read(folder), key)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        rule: str = "sum",
        gate_threshold: float | None = None,
        false_positives: float | None = None,
        capacity: int | None = None,
        key: Ed25519PrivateKey | None = None,
    ) -> RequestStore:
        """A new, empty store.

        Args:
            folder: new or empty.
            rule: how edits are combined, a name of `grun.method.stack.combination.RULES`.
            gate_threshold: gate probability below which an edit is skipped; None: never.
            false_positives: share of rows to keep that may open a gate of any request; None: nothing is promised.
            capacity: requests that this is promised for.
            key: see `open`.

        Raises:
            ConfigError: the rule is unknown, the threshold no probability.
            RunError: something lies in the folder, or another process writes to it.
        """
        folder = target(folder, "store")
        if rule not in RULES:
            raise ConfigError(unknown_name("rule", rule, list(RULES)))
        check_threshold(gate_threshold)
        if (false_positives is None) != (capacity is None):
            raise ConfigError(
                "false_positives is for a store as a whole and needs capacity, the number of requests that it is "
                "promised for: set both, or none"
            )
        promised: dict[str, Any] = {"false_positives": false_positives, "capacity": capacity}
        empty = Manifest(FORMAT_VERSION, secrets.token_hex(32), None, rule, gate_threshold, (), (), "", **promised)
        store = cls(folder, empty.with_event("create", _now()), key)
        with store._locked():
            if (names := foreign(folder)) or (folder / MANIFEST_FILE).exists():
                there = (*names, MANIFEST_FILE)[0]
                raise RunError(f"{folder} is not empty (it holds {there}); name a new folder as store")
            clear(folder)
            store._commit(store.manifest)
        return store

    def training_folder(self, request_id: str) -> Path:
        """Where the adapter of a request is trained."""
        return self.folder / "training" / request_id

    # -- writing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer within the block, which may be nested: the manifest is read again, leftovers are cleared.

        Raises:
            RunError: another process is writing, or the manifest was changed by something else than this class, which
                a new digest would hide.
            ConfigError: it is signed, and there is no key.
        """
        if self._writers:
            yield
            return
        with self._locked(adopt=True):
            self.manifest = Manifest.read(self.folder)
            if problems := self.manifest.problems():
                raise RunError(f"{self.folder}: {problems[0]}; restore {MANIFEST_FILE} from a copy before changing it")
            if self.manifest.signature is not None and self._key is None:
                raise ConfigError(f"{self.folder} is signed at each change; set key=FILE")
            if self.manifest.format_version != FORMAT_VERSION:
                log.info("%s: from this change on the history stands for the content too (format 2)", self.folder)
            self._clear_leftovers()
            self._writers += 1
            try:
                yield
            finally:
                self._writers -= 1

    def add(
        self,
        request_id: str,
        adapter: Path,
        *,
        forget_rows: Sequence[Row],
        config: dict[str, Any],
        metrics: dict[str, Any] | None = None,
        beside: Sequence[str] = (),
        store_text: bool = False,
        note: str = "",
        replace: bool = False,
    ) -> Path:
        """Copy an adapter in and put it in force; returns its folder.

        Args:
            request_id: letters, digits, `.`, `_` and `-`; no dot in front.
            adapter: folder as `GrunModel.save_pretrained` writes it.
            forget_rows: what it forgets, at least one row; only salted hashes are kept.
            config: options it was trained with; they must hold no text of the rows.
            metrics: whatever was measured.
            beside: ids of the requests that were in force while it was trained.
            store_text: keep the rows themselves too.
            note: the operator's words.
            replace: the request is there already, and keeps its place.

        Raises:
            ConfigError: the id cannot be one, is there already (or is not, if it is to be replaced); beside names an
                unknown request.
            DataError: there are no forget rows.
            AdapterError: the adapter cannot be read, or was made on another base than the store's.
            RunError: another process is writing, or writing fails.
        """
        if not forget_rows:
            raise DataError(f"request {request_id}: there are no forget rows; a request forgets at least one")
        with self.writing():
            self.check_new(request_id, replace=replace)
            for other in beside:
                self.manifest.request(other)
            changed = dataclasses.replace(self.manifest, base=self._base_of(adapter))
            folder = self._new_folder(request_id)
            with writing(self.folder):
                copy_files(adapter, folder, text=forget_rows if store_text else None)
            salt, whole = self.manifest.salt, hash_rows(forget_rows)
            request = Request(
                id=request_id,
                folder=folder.name,
                state="active",
                time=_now(),
                files={file.name: file_hash(file) for file in sorted(folder.iterdir())},
                data=Data(len(forget_rows), salted_hashes(forget_rows, salt), salted_hash(whole, salt)),
                config=json.loads(json.dumps(config)),  # as it will be read again, so that the digest stays the same
                metrics=json.loads(json.dumps(metrics or {})),
                beside=tuple(beside),
                text_stored=store_text,
                note=note,
            )
            self._commit(changed.with_event("replace" if replace else "add", request.time, request))
            self._clear_leftovers()  # the adapter that was replaced, the training that is done
            return folder

    def remove(self, request_id: str) -> list[str]:
        """Take a request out of force and delete its files; returns the ids of those that had it in force in training.

        Raises:
            ConfigError: there is no such request.
            RunError: another process is writing, or writing fails.
        """
        with self.writing():
            self._commit(self.manifest.with_event("remove", _now(), self.manifest.request(request_id)))
            self._clear_leftovers()
            with writing(self.folder):
                remove(self.training_folder(request_id))
            return self.manifest.dependents(request_id)

    def set_state(self, request_id: str, state: State) -> None:
        """Put a request in force or out of it; its files stay. Errors: see `remove`."""
        with self.writing():
            request = self.manifest.request(request_id)
            if request.state != state:
                changed = dataclasses.replace(request, state=state)
                self._commit(self.manifest.with_event("enable" if state == "active" else "disable", _now(), changed))

    def check_new(self, request_id: str, *, replace: bool) -> None:
        """ConfigError unless a request of that id can be added, or replaced."""
        check_id(request_id)
        if replace:
            self.manifest.request(request_id)
        elif request_id.casefold() in [known.casefold() for known in self.manifest.ids()]:  # folders of some systems
            raise ConfigError(f"request {request_id!r} is there already; choose another id, or set replace=true")

    def extract(self, folder: Path, request_ids: Sequence[str]) -> RequestStore:
        """A store of its own in `folder`, which is not there yet, with some of the requests as they are now.

        The same requests give the same manifest, so that a training that reads it can go on after a kill.
        """
        manifest = dataclasses.replace(self.manifest, requests=(), history=())
        manifest = manifest.with_event("create", self.manifest.history[0].time)
        with writing(folder), taken(folder):
            for request in map(self.manifest.request, request_ids):
                new = folder / "requests" / request.folder
                copy_files(self.adapter_folder(request.id), new, names=list(request.files))
                manifest = manifest.with_event("add", request.time, request)
            part = RequestStore(folder, manifest)
            part._commit(manifest)
        return part

    # -- checking ---------------------------------------------------------------------------------------------------

    def check(self) -> list[Problem]:
        """Everything that is not as it was written: manifest, history, files, adapters, their base. Nothing is changed.

        RunError if the manifest cannot be read at all.
        """
        return self.while_nobody_writes(self._problems)

    def _problems(self) -> list[Problem]:
        folders = ("requests", "training", "reports")
        texts = [f"{name} is a symbolic link" for name in folders if (self.folder / name).is_symlink()]
        there = sorted((self.folder / "requests").glob("*"))
        known = {request.folder for request in self.manifest.requests}
        known |= {name.split("/")[1] for name in listed(self.folder) or () if name.startswith("requests/")}
        strange = [path.name for path in there if path.name not in known and os.path.lexists(path)]  # none just removed
        texts += [f"requests/{name} is not the store's; it stays as it is" for name in strange]
        found = [*self.manifest.problems(), *(Problem(None, text) for text in texts)]
        for request in self.manifest.requests:
            found += request_problems(request, self.adapter_folder(request.id), self.manifest.base)
        return found

    # -- inside -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, *, adopt: bool = False) -> Iterator[None]:
        """Be the one writer; `adopt`: of a store that an earlier version made, what the manifest names is its own."""
        names = [f"requests/{one.folder}/{name}" for one in self.manifest.requests for name in ("", *one.files)]
        with taken(self.folder, adopt=[MANIFEST_FILE, "requests/", *names] if adopt else []):
            yield

    def _commit(self, manifest: Manifest) -> None:
        """From here on `manifest` counts."""
        if self._key is not None:
            from grun.requests.signing import sign

            manifest = dataclasses.replace(manifest, signature=sign(manifest.head, self._key)).sealed()
        with writing(self.folder):
            write_json(self.folder / MANIFEST_FILE, manifest.to_dict())
            sync(self.folder)
        self.manifest = manifest

    def _base_of(self, adapter: Path) -> Base:
        """Base of the store, which is that of an adapter to be added; AdapterError if the adapter's is another."""
        config, base = validate(adapter).config, self.manifest.base
        if config.gate == "none":
            raise AdapterError(
                f"{adapter} has no gate, so it would act on every prompt; a store takes gated edits alone"
            )
        if config.action != EDIT:
            raise AdapterError(f"{adapter} has the action {config.action}; a store takes edits alone")
        if config.gate == KEYWORDS:
            raise AdapterError(f"{adapter} has the gate {KEYWORDS}; a store takes gates that read states alone")
        if config.edit != LOREFT:
            raise AdapterError(f"{adapter} has the edit {config.edit}; a store takes {LOREFT} alone")
        if not config.base_fingerprint:
            raise AdapterError(f"{adapter} does not say which base it was made on; save it again with this version")
        if base is None:
            return Base(config.base_model_name_or_path, config.base_revision, config.base_fingerprint)
        if config.base_fingerprint != base.fingerprint:
            raise AdapterError(
                f"{adapter} was made on another base (fingerprint {config.base_fingerprint}, "
                f"{config.base_model_name_or_path}) than this store's (fingerprint {base.fingerprint}, {base.name}); "
                "keep a store for each base"
            )
        return base

    def _new_folder(self, request_id: str) -> Path:
        """A folder that is not there yet."""
        parent = self.folder / "requests"
        names = itertools.chain([request_id], (f"{request_id}@{number}" for number in itertools.count(2)))
        return next(parent / name for name in names if not os.path.lexists(parent / name))

    def _clear_leftovers(self) -> None:
        """Delete what killed processes left, adapters that are no longer there, and trainings that are done."""
        named = {request.folder for request in self.manifest.requests}
        with writing(self.folder):
            for entry in (self.folder / "requests").glob("*"):
                if entry.name not in named:
                    remove(entry)
            for entry in (self.folder / "training").glob(".*"):
                remove(entry)
            for request in self.manifest.requests:
                folder = self.training_folder(request.id)
                trained = folder / WEIGHTS_FILE
                done = trained.is_file() and file_hash(trained) == request.files.get(WEIGHTS_FILE)
                if done or (folder.is_dir() and not trained.exists() and not (folder / CHECKPOINTS).exists()):
                    remove(folder)  # the second: half deleted, or nothing yet that another training could go on from


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
