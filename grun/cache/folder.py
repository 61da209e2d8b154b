"""A cache's folder: shards in files that runs and processes share, and notes of the runs that used them.

A file is whole or absent and never changed afterwards. Reading needs no lock; building and removing happen under one.
Whatever is read is checked against its checksum first; a damaged file is removed, and what was intact of it kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import uuid
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grun.cache.shard import DamagedShard, Shard, read_shard, write_shard
from grun.data.encoding import EncodedRow
from grun.errors import RunError
from grun.runtime.files import BusyError, content_hash, read_json, remove, taken, write_json
from grun.runtime.reading import typed

log = logging.getLogger(__name__)

IDENTITY_FILE = "identity.json"
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


class CacheFolder:
    """The files of one cache. Once it cannot be written to, a warning is logged and nothing is written any more."""

    def __init__(self, path: Path, identity: Mapping[str, Any], use: Use | None) -> None:
        """Nothing is read or written yet; `use`: the run that is noted next to the shards, None: none is."""
        self.path = path
        self.is_writable = True
        self._identity = json.loads(json.dumps(dict(identity), sort_keys=True, default=str))
        self._hash = content_hash(dict(identity))
        self._use = use

    def shards(self) -> list[Path]:
        """Files of shards, in the order of writing."""
        return [self.path / name for name in sorted(_names(self.path)) if SHARD_FILE.fullmatch(name)]

    def read(self, path: Path, wanted: Container[EncodedRow]) -> tuple[Shard, list[int]] | None:
        """A file's shard and the indices of the wanted rows in it; None if it is damaged or there is none."""
        try:
            stored = read_shard(path, self._hash)
        except (DamagedShard, OSError):
            return None
        last = {row: index for index, row in enumerate(stored.shard.rows) if row in wanted}
        indices = list(last.values())
        return (stored.shard, indices) if stored.intact(indices) == indices else None

    def repair(self, path: Path) -> Path | None:
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
        new = self.write(shard) if intact else None
        if new is not None:  # its rows are of the runs that used the old one
            for file in new.parent.glob("use-*.json"):
                if (use := read_use(file)) is not None and path.name in use.shards:
                    with contextlib.suppress(OSError, RunError):
                        write_json(file, asdict(replace(use, shards=(*use.shards, new.name))))
        return new

    def note(self, shards: Iterable[str]) -> None:
        """Note the run that uses shards, before they are written; where that fails they have no known user."""
        if self._use is None or not self.is_writable:
            return
        new = set(shards) - set(self._use.shards)
        if not new:
            return
        path = self.path / f"use-{content_hash(asdict(replace(self._use, shards=())))[:16]}.json"
        with (
            contextlib.suppress(OSError, RunError),
            taken(self.path, lock="use", wait=True, adopt=_own(self.path)),
        ):
            known = read_use(path) or self._use
            self._use = replace(self._use, shards=tuple(sorted({*self._use.shards, *new, *known.shards})))
            write_json(path, asdict(self._use))

    def write(self, shard: Shard) -> Path | None:
        """File of a shard, newly written; None: it could not be written, or is not to be."""
        if not self.is_writable:
            return None
        numbers = [int(path.name.partition("-")[0]) for path in self.shards() if path.name[:8].isdecimal()]
        path = self.path / f"{max(numbers, default=0) + 1:08d}-{uuid.uuid4().hex[:8]}.safetensors"
        self.note([path.name])
        try:
            write_shard(path, shard, self._hash)
        except OSError as error:
            self._give_up(error)
            return None
        return path

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Hold the folder, and clear away what a killed process left in it."""
        with contextlib.ExitStack() as stack:
            if self.is_writable:
                same = self._stored_identity() == self._identity
                old = _own(self.path) if same else []
                try:
                    try:
                        stack.enter_context(taken(self.path, adopt=old))
                    except BusyError:
                        log.info(f"another process builds this cache; waiting for it ({self.path})")
                        stack.enter_context(taken(self.path, adopt=old, wait=True))
                    if not same:  # for people to read, what the folder's name stands for
                        write_json(self.path / IDENTITY_FILE, self._identity)
                except OSError as error:
                    self._give_up(error)
            yield

    def _stored_identity(self) -> Any:
        with contextlib.suppress(OSError, ValueError):
            return read_json(self.path / IDENTITY_FILE)
        return None

    def _give_up(self, error: OSError) -> None:
        if self.is_writable:
            self.is_writable = False
            reason = error.strerror or str(error) or type(error).__name__
            log.warning(f"{self.path} cannot be written to ({reason}); the cache is kept in memory for this run")


def remove_shards(folder: Path, shards: Collection[str]) -> None:
    """Remove shards from a cache's folder, and the rest of it if none is left; RunError: it is being built."""
    with taken(folder, adopt=_own(folder)):
        for name in shards:
            remove(folder / name)
        left = [name for name in _names(folder) if SHARD_FILE.fullmatch(name)]
        for path in (folder / name for name in _names(folder) if USE_FILE.fullmatch(name)):
            use = read_use(path)
            if use is not None and (kept := [shard for shard in use.shards if shard in left]):
                write_json(path, asdict(replace(use, shards=tuple(kept))))
            else:
                remove(path)
    if not left:
        remove(folder)


def _own(folder: Path) -> list[str]:
    return [name for name in _names(folder) if _OWN.fullmatch(name)]


def _names(folder: Path) -> list[str]:
    """What lies in a folder; nothing where there is none."""
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []
