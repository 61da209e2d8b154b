"""A cache of what training leaves constant: kept in memory, in files that runs and processes share, or in both.

A row lies in a shard, and a shard in one safetensors file that is whole or absent and never changed afterwards.
Reading needs no lock; building and removing happen under one. Whatever is read is checked against its checksum first,
and computed again where that fails.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grun.cache.shard import DamagedShard, FrozenRow, Shard, read_shard, write_shard
from grun.data.encoding import EncodedRow
from grun.errors import RunError
from grun.runtime.files import BusyError, content_hash, read_json, remove, taken, write_json
from grun.runtime.progress import progress
from grun.runtime.reading import typed

log = logging.getLogger(__name__)

IDENTITY_FILE = "identity.json"
SUFFIX = ".safetensors"
SHARD_FILE = re.compile(r"\d{8}-[0-9a-f]{8}\.safetensors")
USE_FILE = re.compile(r"use-[0-9a-f]{16}\.json")
_OWN = re.compile(rf"{SHARD_FILE.pattern}|{USE_FILE.pattern}|identity\.json|\.lock")
"""Files of a cache; an earlier version kept no list of them."""


@dataclass(frozen=True)
class Use:
    """A run that wrote or read shards: by it they are found when what it was given is to be gone."""

    run: str
    """Its folder."""
    model: str | None
    """Hub id or folder; None: a model in memory."""
    data: dict[str, str]
    """Hash of each of its data sets, as in its run_identity.json."""
    request: str | None
    """Id of the request that it trained, in a store of requests."""
    store: str | None
    """Folder of that store."""
    shards: tuple[str, ...] = ()
    """Names of the files."""


def read_use(path: Path) -> Use | None:
    """The run that a file notes; None where it is no such file, or not as it was written."""
    if not USE_FILE.fullmatch(path.name) or path.is_symlink():
        return None
    with contextlib.suppress(OSError, RunError, ValueError):
        use: Use = typed(Use, read_json(path), str(path))
        return use
    return None


@dataclass
class Completed:
    """What `PrefixStore.complete` did."""

    rows: int
    """Distinct rows asked for."""
    found: int
    """Rows of them now taken from disk."""
    built: int
    """Rows of them now computed; what is neither was in use before."""
    seconds: float
    """Time it took, waiting for another process included."""
    bytes: int
    """Bytes of all rows in use."""
    where: str
    """memory, or disk where rows are read from mapped files."""


@dataclass
class _Held:
    """A shard in use."""

    shard: Shard
    used: list[int]
    path: Path | None
    """File that holds the used rows too."""
    mapped: bool
    """The tensors are that file's."""

    def __post_init__(self) -> None:
        self.bytes = self.shard.bytes_of(self.used)


class PrefixStore:
    """Frozen rows of one identity: a model, its precision, its edited blocks and all else that decides their values.

    Several processes may use one folder at a time; within a process, one thread uses one store.
    """

    def __init__(
        self, folder: Path | None, identity: Mapping[str, Any], *, memory_budget: int, use: Use | None = None
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: where caches lie, each in a folder of its own; None: memory alone.
            identity: of the cache, as JSON can hold it.
            memory_budget: bytes; if the rows in use take more, they are read from mapped files instead of memory.
            use: the run that is noted next to the shards; None: none is.
        """
        self._use = use
        self.memory_budget = memory_budget
        self._identity = dict(identity)
        self._hash = content_hash(self._identity)
        self.folder = None if folder is None else folder / self._hash[:16]
        """Folder of this cache."""
        self._writable = folder is not None
        self._held: list[_Held] = []
        self._places: dict[EncodedRow, tuple[_Held, int]] = {}
        self._said_over_budget = False

    @property
    def rows(self) -> int:
        """Number of rows in use."""
        return len(self._places)

    @property
    def bytes_held(self) -> int:
        """Bytes of the rows in use, in memory or mapped."""
        return sum(held.bytes for held in self._held)

    @property
    def where(self) -> str:
        """Disk where rows are read from mapped files, else memory."""
        return "disk" if any(held.mapped for held in self._held) else "memory"

    def __getitem__(self, row: EncodedRow) -> FrozenRow:
        """Views of a row that `complete` was asked for."""
        held, index = self._places[row]
        return held.shard.row(index)

    def complete(
        self,
        rows: Sequence[EncodedRow],
        build: Callable[[list[EncodedRow]], Iterator[Shard]],
        advance: Callable[[int], None] | None = None,
    ) -> Completed:
        """See that every one of `rows` is there: look on disk, and build what is missing.

        A folder that cannot be written to is no error: there is a warning, and the cache is kept in memory.

        Args:
            rows: duplicates are allowed.
            build: given the distinct missing rows, yields shards (on the CPU) that hold them all.
            advance: called after every shard with the number of rows that it made available.

        Raises:
            ValueError: `build` left rows out.
        """
        started = time.monotonic()
        distinct = dict.fromkeys(rows)
        missing = {row: None for row in distinct if row not in self._places}
        asked, report = len(missing), advance or (lambda count: None)
        self._find(missing, report, repair=False)
        left = len(missing)
        if missing:
            with self._building():
                self._find(missing, report, repair=self._writable)
                left = len(missing)
                if missing:
                    self._build(missing, build, report)
        self._note(held.path.name for held in self._held if held.path is not None)
        self._settle()
        seconds = time.monotonic() - started
        return Completed(len(distinct), asked - left, left, seconds, self.bytes_held, self.where)

    def _find(self, missing: dict[EncodedRow, None], advance: Callable[[int], None], *, repair: bool) -> None:
        """Take what is on disk of `missing` out of it; `repair` (under the lock): remove damaged files."""
        for path in self._files():
            if not missing:
                return
            taken = self._read(path, missing)
            if taken is None and repair:
                if (repaired := self._repair(path)) is None:
                    continue
                path, taken = repaired, self._read(repaired, missing)
            if taken is not None:
                self._hold(_Held(*taken, path, mapped=True), missing, advance)

    def _build(
        self,
        missing: dict[EncodedRow, None],
        build: Callable[[list[EncodedRow]], Iterator[Shard]],
        advance: Callable[[int], None],
    ) -> None:
        asked = len(missing)
        for shard in build(list(missing)):
            used = [index for index, row in enumerate(shard.rows) if row in missing]
            held = _Held(shard, used, self._write(shard), mapped=False)
            self._hold(held, missing, advance)
            if self.bytes_held > self.memory_budget:  # now: the whole may not fit
                self._map(held)
        if missing:
            raise ValueError(f"build left out {len(missing)} of {asked} rows that it was asked for")

    def _hold(self, held: _Held, missing: dict[EncodedRow, None], advance: Callable[[int], None]) -> None:
        if not held.used:
            return
        self._held.append(held)
        self._place(held)
        before = len(missing)
        for index in held.used:
            missing.pop(held.shard.rows[index], None)
        advance(before - len(missing))

    def _place(self, held: _Held) -> None:
        self._places.update((held.shard.rows[index], (held, index)) for index in held.used)

    def _settle(self) -> None:
        """Bring the rows in use to where the budget wants them."""
        over = self.bytes_held > self.memory_budget
        for held in self._held:
            if over:
                self._map(held)
            elif held.mapped:
                held.shard = held.shard.select(held.used)
                held.used, held.mapped = list(range(len(held.used))), False
                self._place(held)
        if over and not self._said_over_budget and not all(held.mapped for held in self._held):
            self._said_over_budget = True
            log.warning(
                f"the cache takes {self.bytes_held / 1e9:.2f} GB, more than its budget of "
                f"{self.memory_budget / 1e9:.2f} GB, and stays in memory: not all of it is on disk"
            )

    def _map(self, held: _Held) -> None:
        """Read a shard from its file from now on, if it has one that is still intact."""
        if held.mapped or held.path is None:
            return
        rows = {held.shard.rows[index] for index in held.used}
        taken = self._read(held.path, rows)
        if taken is None or len(taken[1]) < len(rows):
            held.path = None
            return
        held.shard, held.used = taken
        held.mapped = True
        self._place(held)

    def _files(self) -> list[Path]:
        """Files of shards, in the order of writing."""
        if self.folder is None:
            return []
        try:
            return [self.folder / name for name in sorted(os.listdir(self.folder)) if SHARD_FILE.fullmatch(name)]
        except OSError:
            return []

    def _read(self, path: Path, wanted: Container[EncodedRow]) -> tuple[Shard, list[int]] | None:
        """A file's shard and the indices of the wanted rows in it; None if it is damaged or there is none."""
        try:
            stored = read_shard(path, self._hash)
        except (DamagedShard, OSError):
            return None
        last = {row: index for index, row in enumerate(stored.shard.rows) if row in wanted}
        indices = list(last.values())
        return (stored.shard, indices) if stored.intact(indices) == indices else None

    def _repair(self, path: Path) -> Path | None:
        """Remove a damaged file; where it now lies if some of its rows were intact."""
        try:
            stored = read_shard(path, self._hash)
            intact = stored.intact(range(len(stored.shard.rows)))
            reason = f"{len(stored.shard.rows) - len(intact)} of its rows are not what was written"
            shard = stored.shard.select(intact)
        except DamagedShard as error:
            intact, reason = [], str(error)
        except OSError:  # it vanished, or cannot be opened for now
            return None
        log.warning(f"{path} is damaged and is removed ({reason}); what it held is computed again")
        try:
            remove(path)
        except OSError as error:
            self._give_up(error)
        new = self._write(shard) if intact else None
        if new is not None:  # its rows are of the runs that used the old one
            for file in new.parent.glob("use-*.json"):
                if (use := read_use(file)) is not None and path.name in use.shards:
                    with contextlib.suppress(OSError, RunError):
                        write_json(file, asdict(replace(use, shards=(*use.shards, new.name))))
        return new

    def _note(self, shards: Iterable[str]) -> None:
        """Note the run that uses shards, before they are written; where that fails they have no known user."""
        if self.folder is None or self._use is None or not self._writable:
            return
        new = set(shards) - set(self._use.shards)
        if not new:
            return
        path = self.folder / f"use-{content_hash(asdict(replace(self._use, shards=())))[:16]}.json"
        with (
            contextlib.suppress(OSError, RunError),
            taken(self.folder, lock="use", wait=True, adopt=_own(self.folder)),
        ):
            known = read_use(path) or self._use
            self._use = replace(self._use, shards=tuple(sorted({*self._use.shards, *new, *known.shards})))
            write_json(path, asdict(self._use))

    @staticmethod
    def remove(folder: Path, shards: Collection[str]) -> None:
        """Remove shards from a cache's folder, and the rest of it if none is left; RunError: it is being built."""
        with taken(folder, adopt=_own(folder)):
            for name in shards:
                remove(folder / name)
            left = [name for name in os.listdir(folder) if SHARD_FILE.fullmatch(name)]
            for path in (folder / name for name in os.listdir(folder) if USE_FILE.fullmatch(name)):
                use = read_use(path)
                if use is not None and (kept := [shard for shard in use.shards if shard in left]):
                    write_json(path, asdict(replace(use, shards=tuple(kept))))
                else:
                    remove(path)
        if not left:
            remove(folder)

    def _write(self, shard: Shard) -> Path | None:
        """File of a shard, newly written; None: it could not be written, or is not to be."""
        if self.folder is None or not self._writable:
            return None
        numbers = [int(path.name.partition("-")[0]) for path in self._files() if path.name[:8].isdecimal()]
        path = self.folder / f"{max(numbers, default=0) + 1:08d}-{uuid.uuid4().hex[:8]}{SUFFIX}"
        self._note([path.name])
        try:
            write_shard(path, shard, self._hash)
        except OSError as error:
            self._give_up(error)
            return None
        return path

    @contextlib.contextmanager
    def _building(self) -> Iterator[None]:
        """Hold the cache's folder, in which what a killed process left is cleared away; without a folder, nothing."""
        with contextlib.ExitStack() as stack:
            if self.folder is not None and self._writable:
                values = json.loads(json.dumps(self._identity, sort_keys=True, default=str))
                same = self._stored_identity() == values
                old = _own(self.folder) if same else []
                try:
                    try:
                        stack.enter_context(taken(self.folder, adopt=old))
                    except BusyError:
                        log.info(f"another process builds this cache; waiting for it ({self.folder})")
                        stack.enter_context(taken(self.folder, adopt=old, wait=True))
                    if not same:  # for people to read, what the folder's name stands for
                        write_json(self.folder / IDENTITY_FILE, values)
                except OSError as error:
                    self._give_up(error)
            yield

    def _stored_identity(self) -> Any:
        assert self.folder is not None
        with contextlib.suppress(OSError, ValueError):
            return read_json(self.folder / IDENTITY_FILE)
        return None

    def _give_up(self, error: OSError) -> None:
        """Write no more."""
        if self._writable:
            self._writable = False
            reason = error.strerror or str(error) or type(error).__name__
            log.warning(f"{self.folder} cannot be written to ({reason}); the cache is kept in memory for this run")


def _own(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if _OWN.fullmatch(name)] if folder.is_dir() else []


FrozenRows = Mapping[EncodedRow, FrozenRow] | PrefixStore
"""Where frozen rows are looked up."""


def fill(
    store: PrefixStore, what: str, rows: Sequence[EncodedRow], build: Callable[[list[EncodedRow]], Iterator[Shard]]
) -> Completed:
    """`PrefixStore.complete` with a bar, and one line on what it did; `what` is kept of rows."""
    with progress(what, len(rows)) as advance:
        done = store.complete(rows, build, advance)
    counts = f"{done.rows} rows: {done.found} found, {done.built} computed"
    log.info(f"{what} of {counts}, {done.seconds:.1f} s, {done.bytes / 1e9:.3f} GB in {done.where}")
    return done
