"""Frozen rows in use: in memory, read from mapped files, or both; what is missing is found on disk or built.

A row lies in a shard, and a shard in a file of the cache's folder (`grun.cache.folder`), if there is one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.cache.folder import CacheFolder, Use
from grun.cache.shard import FrozenRow, Shard
from grun.cache.weights import cache_identity
from grun.config.checks import bytes_of
from grun.config.options import UnlearnConfig
from grun.data.encoding import EncodedRow
from grun.runtime import processes
from grun.runtime.files import content_hash, target
from grun.runtime.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Share = Callable[[Sequence[Any]], Sequence[Any]]
"""Of passes over rows those that this process makes, such as `processes.own`; `list`: all."""
Build = Callable[[list[EncodedRow], Share], Iterator[Shard]]
"""Given the distinct missing rows, yields shards (on the CPU) of its share of the passes that hold them all."""


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

    def __add__(self, other: Completed) -> Completed:
        """Both together."""
        return Completed(
            self.rows + other.rows,
            self.found + other.found,
            self.built + other.built,
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            "disk" if "disk" in (self.where, other.where) else "memory",
        )


@dataclass
class _Held:
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

        `folder` is where caches lie, each in a folder of its own; without one rows are held in memory alone. Rows that
        take more than `memory_budget` bytes are read from mapped files instead. `use` is the run that is noted.
        """
        self.folder = None if folder is None else folder / content_hash(dict(identity))[:16]
        """Folder of this cache."""
        self._files = None if self.folder is None else CacheFolder(self.folder, identity, use)
        self._budget = memory_budget
        self._held: list[_Held] = []
        self._places: dict[EncodedRow, tuple[_Held, int]] = {}
        self._said_over_budget = False

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
        build: Build,
        advance: Callable[[int], None] | None = None,
    ) -> Completed:
        """See that every one of `rows` is there: look on disk, and build what is missing.

        A folder that cannot be written to is no error: there is a warning, and the cache is kept in memory. Processes
        of a run, which all ask for the same rows, share the passes of a build, and read each other's files.

        Args:
            rows: duplicates are allowed.
            build: see `Build`.
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
        if any(processes.gathered(bool(missing))):
            with nullcontext() if self._files is None or not processes.is_first() else self._files.building():
                left = self._look_and_build(missing, build, report)
        if missing:
            raise ValueError(f"build left out {len(missing)} of {left} rows that it was asked for")
        if self._files is not None:
            self._files.note(held.path.name for held in self._held if held.path is not None)
        self._settle()
        seconds = time.monotonic() - started
        return Completed(len(distinct), asked - left, left, seconds, self.bytes_held, self.where)

    def _look_and_build(self, missing: dict[EncodedRow, None], build: Build, advance: Callable[[int], None]) -> int:
        """Take from disk, once the first process holds the folder, what is `missing`, and build the rest: how many."""
        if processes.is_first():
            self._find(missing, advance, repair=True)
        shared = processes.started() and all(processes.gathered(self._files is not None and self._files.is_writable))
        if not processes.is_first():
            self._find(missing, advance, repair=False)
        left = len(missing)
        if shared:
            with processes.agreed():
                self._build(missing, build, advance, processes.own)
            self._find(missing, advance, repair=False)  # what the others have made
        if missing:
            self._build(missing, build, advance, list)
        return left

    def _find(self, missing: dict[EncodedRow, None], advance: Callable[[int], None], *, repair: bool) -> None:
        """Take what is on disk of `missing` out of it; `repair` (under the lock): remove damaged files."""
        files = self._files
        if files is None:
            return
        for path in files.shards():
            if not missing:
                return
            found = files.read(path, missing)
            if found is None and repair and files.is_writable:
                if (repaired := files.repair(path)) is None:
                    continue
                path, found = repaired, files.read(repaired, missing)
            if found is not None:
                self._hold(_Held(*found, path, mapped=True), missing, advance)

    def _build(
        self, missing: dict[EncodedRow, None], build: Build, advance: Callable[[int], None], share: Share
    ) -> None:
        for shard in build(list(missing), share) if missing else ():
            used = [index for index, row in enumerate(shard.rows) if row in missing]
            path = None if self._files is None else self._files.write(shard)
            held = _Held(shard, used, path, mapped=False)
            self._hold(held, missing, advance)
            if self.bytes_held > self._budget:  # now: the whole may not fit
                self._map(held)

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
        over = self.bytes_held > self._budget
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
                f"{self._budget / 1e9:.2f} GB, and stays in memory: not all of it is on disk"
            )

    def _map(self, held: _Held) -> None:
        """Read a shard from its file from now on, if it has one that is still intact."""
        if held.mapped or held.path is None or self._files is None:
            return
        rows = {held.shard.rows[index] for index in held.used}
        found = self._files.read(held.path, rows)
        if found is None or len(found[1]) < len(rows):
            held.path = None
            return
        held.shard, held.used = found
        held.mapped = True
        self._place(held)


FrozenRows = Mapping[EncodedRow, FrozenRow] | PrefixStore
"""Where frozen rows are looked up."""


def store_of(
    base: PreTrainedModel,
    config: UnlearnConfig,
    code: Sequence[str],
    use: Use | None,
    *,
    on_disk: bool = True,
    **more: Any,
) -> PrefixStore:
    """Store in `cache.dir` (if `on_disk`), within `cache.memory_budget`, of values that `code` and `more` tell."""
    folder = target(config.cache.dir, "cache.dir") if on_disk and config.cache.dir is not None else None
    identity = cache_identity(base, config.model.path, folder, code, **more)
    budget = bytes_of("cache.memory_budget", config.cache.memory_budget)
    return PrefixStore(folder, identity, memory_budget=budget, use=use)


def fill(store: PrefixStore, what: str, rows: Sequence[EncodedRow], build: Build) -> Completed:
    """`PrefixStore.complete` with a bar, and one line on what it did; `what` is kept of rows."""
    with progress(what, len(rows)) as advance:
        done = store.complete(rows, build, advance)
    counts = f"{done.rows} rows: {done.found} found, {done.built} computed"
    log.info(f"{what} of {counts}, {done.seconds:.1f} s, {done.bytes / 1e9:.3f} GB in {done.where}")
    return done
