"""`python -m grun cache list | remove`: what training keeps on disk of the rows it was given, and whose it is.

A shard holds hidden states and tokens, which decode to the text that is to be forgotten. Next to it lies for each run
that wrote or read it a `use-HASH.json` (`grun.cache.folder`): the run's folder, its model, hashes of its data, and the
request of a store of requests that it trained.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from grun.cache.folder import IDENTITY_FILE, SHARD_FILE, Use, read_use, remove_shards
from grun.cache.weights import MEMORY_FILE, is_memory
from grun.config.options import CacheCommandConfig
from grun.errors import ConfigError, unknown_name
from grun.loading.resolve import resolve
from grun.method.stack.manifest import Manifest
from grun.runtime.files import content_hash, taken
from grun.runtime.files import remove as remove_written
from grun.runtime.reading import read_json

ACTIONS = {
    "list": "the shards of cache.dir: size, age, model, data, and the runs or requests that used them",
    "remove": "remove those that request=ID, data=HASH or all=true names",
}


@dataclass(frozen=True)
class Shard:
    """A file of frozen rows, and what is known of it."""

    path: Path
    bytes: int
    time: str
    """When it was written, UTC, ISO 8601."""
    uses: tuple[Use, ...]
    """Empty: an earlier version wrote it, and whose data it holds is not known."""


def cache(arguments: Sequence[str]) -> int:
    """Run one action; results go to stdout."""
    action = next(iter(arguments), "")
    if action not in ACTIONS:
        known = f"cache needs an action: {', '.join(ACTIONS)}; then options, key=value"
        raise ConfigError(unknown_name("action", action, list(ACTIONS)) if action and "=" not in action else known)
    options: CacheCommandConfig = resolve("cache", list(arguments[1:]))
    shards = shards_in(Path(options.dir).expanduser())
    chosen = _chosen(shards, options)
    if action == "list":
        _print(chosen, options)
        return 0
    if not (options.all or options.request or options.data):
        raise ConfigError("cache remove needs request=ID, data=HASH or all=true; `cache list` shows what there is")
    remove(shard.path for shard in chosen)
    memory = Path(options.dir).expanduser() / MEMORY_FILE  # of weights' files: their paths and hashes
    if options.all and is_memory(memory):
        with taken(memory.parent, adopt=[MEMORY_FILE]):
            remove_written(memory)
    print(f"removed {counted(chosen)} from {options.dir}")
    unknown = [shard for shard in shards if not shard.uses and shard not in chosen]
    if unknown:
        print(f"left: {counted(unknown)} of unknown data, by an earlier version; all=true removes them too")
    return 0


def shards_in(folder: Path) -> list[Shard]:
    """Shards below a `cache.dir`; what is not as `CacheFolder` names and writes it is left out."""
    found = []
    for key in sorted(path for path in folder.glob("*") if _is_ours(path)):
        uses = [(use, set(use.shards)) for use in map(read_use, sorted(key.glob("use-*.json"))) if use is not None]
        for path in sorted(key.glob("*.safetensors")):
            if SHARD_FILE.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                status = path.stat()
                written = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="seconds")
                of_it = tuple(use for use, names in uses if path.name in names)
                found.append(Shard(path, status.st_size, written, of_it))
    return found


def uses_by(
    shards: Iterable[Shard], request: str, store: Path | None, is_data: Callable[[str], bool]
) -> dict[Path, list[Use]]:
    """By shard its uses by a request of a store (None: of any): by its training, or by one on data that `is_data`."""

    def matches(use: Use) -> bool:
        of_store = store is None or (use.store is not None and Path(use.store) == store.resolve())
        return (use.request == request and of_store) or is_data(use.data.get("forget", ""))

    found = {shard.path: [use for use in shard.uses if matches(use)] for shard in shards}
    return {path: uses for path, uses in found.items() if uses}


def remove(shards: Iterable[Path]) -> None:
    """Remove shards, and what noted their use alone; RunError where one is being written."""
    names: dict[Path, list[str]] = {}
    for path in shards:
        names.setdefault(path.parent, []).append(path.name)
    for folder, of_folder in names.items():
        remove_shards(folder, of_folder)


def remove_command(folder: str, data: str) -> str:
    """The command that removes what was made of data of that hash."""
    return shlex.join(["python", "-m", "grun", "cache", "remove", f"dir={folder}", f"data={data[:16]}"])


def usage() -> str:
    """Lines of the help: the actions."""
    lines = ["python -m grun cache ACTION [key=value ...]   (docs/formats.md)", ""]
    return "\n".join(lines + [f"  {name:<6}  {text}" for name, text in ACTIONS.items()])


def _chosen(shards: list[Shard], options: CacheCommandConfig) -> list[Shard]:
    if options.data is not None and len(options.data) < 8:
        raise ConfigError(
            f"data={options.data} must be 8 hex digits or more of a data hash, as `cache list` prints them"
        )
    store = None if options.store is None else Path(options.store).expanduser()
    if options.request is not None:
        used = uses_by(shards, options.request, store, _data_of(store, options.request))
        shards = [shard for shard in shards if shard.path in used]
    if options.data is not None:
        start = options.data.lower()
        shards = [one for one in shards if any(h.startswith(start) for use in one.uses for h in use.data.values())]
    return shards


def _data_of(store: Path | None, request: str) -> Callable[[str], bool]:
    """Whether a hash of forget rows is that of a request which is in a store; never if it is not."""
    manifest = None if store is None else Manifest.read(store)
    if manifest is not None and request in manifest.ids():
        return partial(manifest.is_data_of, request)
    return lambda _: False


def _is_ours(folder: Path) -> bool:
    """Whether a folder is named after the identity that lies in it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return bool(content_hash(read_json(folder / IDENTITY_FILE))[:16] == folder.name)
    except (OSError, ValueError):
        return False


def counted(shards: Sequence[Shard]) -> str:
    """Number and size of shards, in words."""
    return f"{len(shards)} shard{'s' * (len(shards) != 1)}, {sum(shard.bytes for shard in shards) / 1e6:.1f} MB"


def _print(shards: Sequence[Shard], options: CacheCommandConfig) -> None:
    if options.format == "json":
        values: list[dict[str, Any]] = [{**asdict(shard), "path": str(shard.path)} for shard in shards]
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return
    from grun.report.tables import readable

    for shard in shards:
        models = ", ".join(dict.fromkeys(use.model or "in memory" for use in shard.uses)) or "model unknown"
        hashes = ", ".join(dict.fromkeys(f"{name} {h[:12]}" for use in shard.uses for name, h in use.data.items()))
        users = dict.fromkeys(use.run if use.request is None else f"request {use.request}" for use in shard.uses)
        name = os.path.join(shard.path.parent.name, shard.path.name)
        print(readable(f"{name}  {shard.bytes / 1e6:.1f} MB  {shard.time[:16]}  {models}"))
        print(readable(f"    data: {hashes or 'unknown'}; used by: {', '.join(users) or 'unknown'}"))
    print(f"{counted(shards)} in {options.dir}")
