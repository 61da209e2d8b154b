"""`python -m grun requests ACTION store=DIR key=value ...`."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from grun.config.options import CacheConfig, RequestsConfig, UnlearnConfig
from grun.config.values import describe
from grun.errors import ConfigError, RunError, unknown_name
from grun.loading.resolve import resolve

if TYPE_CHECKING:
    from grun.requests.store import RequestStore

ACTIONS = {
    "list": "the requests of the store",
    "add": "train a request and put it in force, or put in an adapter that is there (adapter=FOLDER)",
    "remove": "take a request out and delete its files",
    "disable": "take a request out of force, keep its files",
    "enable": "put it in force again",
    "verify": "check files, manifest and base, ask each request's own questions, write a dated report",
    "history": "what was done to the store, one line an event",
}
OPTIONS = {
    "list": ("format",),
    "add": (
        *("id", "adapter", "note", "store_text", "replace", "independent", "key"),
        *("rule", "gate_threshold", "false_positives", "capacity"),
    ),
    "remove": ("id", "retrain", "purge", "key"),
    "disable": ("id", "key"),
    "enable": ("id", "key"),
    "verify": ("files_only", "recall_at_most", "batch_size", "max_new_tokens", "head", "public_key"),
    "history": ("format",),
}
"""Own options of each action, and store; verify takes those of the model too, add those of unlearn."""


def requests(arguments: Sequence[str]) -> int:
    """Run one action; the exit status is 1 where `verify` finds something wrong. Results go to stdout."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise ConfigError(f"requests needs an action: {', '.join(ACTIONS)}; then store=DIR and options, key=value")
    action, rest = arguments[0], list(arguments[1:])
    if action not in ACTIONS:
        raise ConfigError(unknown_name("action", action, list(ACTIONS)))
    own, of_unlearn = _split(action, rest)
    options: RequestsConfig = resolve("requests", own)
    _check(action, options)
    if action in ("list", "history"):
        _print(action, options)
    elif action == "add":
        _add(options, of_unlearn)
    elif action == "remove":
        _remove(options)
    elif action == "verify":
        return _verify(options)
    else:
        from grun.requests.adding import opened

        opened(options).set_state(str(options.id), "active" if action == "enable" else "disabled")
    return 0


def _split(action: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Own options of an action, and those of `unlearn`; ConfigError for one that the action does not have."""
    every = [key for key, _, _ in describe(RequestsConfig)]
    known = [*OPTIONS[action], "store", *(key for key in every if action == "verify" and key.startswith("model."))]
    of_training = [key for key, _, _ in describe(UnlearnConfig)] if action == "add" else []
    own: list[str] = []
    of_unlearn: list[str] = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"argument {argument!r} is not key=value")
        if key not in known and key not in of_training:
            others = [name for name, keys in OPTIONS.items() if key in keys]
            if others:
                raise ConfigError(f"option {key} is for requests {' and '.join(others)}; leave it out of {action}")
            raise ConfigError(unknown_name("option", key, [*known, *of_training], "--help"))
        (own if key in known else of_unlearn).append(argument)
    return own, of_unlearn


def _check(action: str, options: RequestsConfig) -> None:
    if options.store is None:
        raise ConfigError(f"requests {action} needs store=DIR, the folder of the requests")
    if "id" in OPTIONS[action] and options.id is None:
        raise ConfigError(f"requests {action} needs id=ID, the name of a request")
    if options.head is not None and re.fullmatch("[0-9a-fA-F]{16,64}", options.head) is None:
        raise ConfigError(f"head={options.head} must be 16 to 64 hex digits, as `requests verify` prints them")


def _print(action: str, options: RequestsConfig) -> None:
    from grun.requests import listing
    from grun.requests.store import RequestStore

    store = RequestStore.open(str(options.store))
    if options.format == "json":
        print(listing.as_json(store, action))
    elif action == "history":
        print(*listing.history(store), sep="\n")
    else:
        from rich.console import Console

        listing.print_list(store, Console(width=None if sys.stdout.isatty() else listing.WIDTH))


def _add(options: RequestsConfig, arguments: Sequence[str]) -> None:
    from grun.requests.adding import add
    from grun.requests.store import RequestStore

    with contextlib.redirect_stdout(sys.stderr):
        folder = add(options, arguments)
    store = RequestStore.open(str(options.store))
    if options.replace:
        _print_dependents(store, str(options.id), store.manifest.dependents(str(options.id)), "the former")
    print(folder)


def _remove(options: RequestsConfig) -> None:
    """Remove a request, and print what else of it there is; `purge` removes what the cache holds of it."""
    from grun.commands import cache
    from grun.report.tables import readable
    from grun.requests.adding import opened, remove

    store, request_id = opened(options), str(options.id)
    manifest = store.manifest
    cached_in = str((manifest.request(request_id).config.get("cache") or {}).get("dir", CacheConfig().dir))
    shards = cache.shards_in(Path(cached_in).expanduser())
    used = cache.uses_by(shards, request_id, store.folder, partial(manifest.is_data_of, request_id))
    with contextlib.redirect_stdout(sys.stderr):
        dependents = remove(store, request_id, retrain=options.retrain)
    if not options.retrain:
        _print_dependents(store, request_id, dependents, "the removed")
    count = f"{len(used)} shard{'s' * (len(used) != 1)} of {cached_in}"
    busy = None
    if used and options.purge:
        try:
            cache.remove(used)
            print(f"removed too: {count}")
        except RunError as error:  # the request is gone: what is left is to be listed all the same
            busy = error
    uses = [use for of_shard in used.values() for use in of_shard]
    if used and (busy or not options.purge):
        print(f"left of {request_id}: {count}, whose tokens decode to its text; purge=true removes them, and now")
        hashes = {use.data["forget"] for use in uses if "forget" in use.data}
        print(*(f"  {cache.remove_command(cached_in, data)}" for data in sorted(hashes)), sep="\n")
    for run in sorted({use.run for use in uses}):
        if not Path(run).is_relative_to(store.folder.resolve()) and Path(run).exists():
            print(readable(f"left of {request_id}: {run}, a run on its data, which is not the store's"))
    if busy is not None:
        raise busy


def _print_dependents(store: RequestStore, removed: str, dependents: Sequence[str], which: str) -> None:
    if dependents:
        print(f"trained beside {which} {removed}, and to be trained again: {', '.join(dependents)}")
    for name in dependents:
        words = ["python", "-m", "grun", "requests", "add", f"store={store.folder}", f"id={name}", "replace=true"]
        if "objective" not in store.manifest.request(name).config:  # it came in without its options
            words += ["adapter=FOLDER", "data.forget=FILE", "data.retain=FILE"]
        print(f"  {shlex.join(words)}")


def _verify(options: RequestsConfig) -> int:
    from grun.requests.verify import in_markdown, verify

    with contextlib.redirect_stdout(sys.stderr):
        found, path = verify(options)
    print(in_markdown(found), *([] if path is None else [path]), sep="\n")
    return 1 if found.problems else 0


def usage() -> str:
    """Lines of the help: the actions."""
    width = max(map(len, ACTIONS))
    return "\n".join(
        ["python -m grun requests ACTION store=DIR [key=value ...]   (docs/requests.md)", ""]
        + [f"  {name:<{width}}  {text}" for name, text in ACTIONS.items()]
        + ["", "`add` takes the options of `unlearn` too."]
    )
