"""What `requests list` and `requests history` print."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from grun.errors import AdapterError
from grun.method.adapter import AdapterConfig
from grun.method.stack.manifest import Request
from grun.requests.store import RequestStore

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120
"""Columns of the table where stdout is no terminal."""


@dataclass(frozen=True)
class Line:
    """One request, as it is listed."""

    id: str
    state: str
    time: str
    rows: int
    blocks: list[int] | None
    """Edited blocks, 0-based; None, as the next two: the adapter cannot be read."""
    rank: int | None
    gate: str | None
    bytes: int
    """Size of its files."""
    beside: list[str]
    """Requests it was trained beside."""
    metrics: dict[str, Any]
    text_stored: bool
    note: str


def lines(store: RequestStore) -> list[Line]:
    """The requests of a store, in the order of adding."""
    return [_line(store, request) for request in store.manifest.requests]


def print_list(store: RequestStore, console: Console) -> None:
    """Print a table of the requests."""
    from rich.table import Table
    from rich.text import Text

    from grun.report.tables import readable

    manifest = store.manifest
    threshold = "" if manifest.gate_threshold is None else f", gate threshold {manifest.gate_threshold}"
    base = "none yet" if manifest.base is None else f"{manifest.base.name or 'unnamed'} ({manifest.base.fingerprint})"
    title = Text(readable(f"{store.folder}: base {base}, rule {manifest.rule}{threshold}"))
    table = Table(title=title, title_justify="left")
    for header in ("id", "state", "added (UTC)", "rows", "blocks", "rank", "gate", "KB", "trained beside", "metrics"):
        table.add_column(header, justify="right" if header in ("rows", "rank", "KB") else "left", overflow="fold")
    for line in lines(store):
        blocks = "?" if line.blocks is None else ",".join(map(str, line.blocks))
        metrics = ", ".join(f"{name} {value}" for name, value in line.metrics.items())
        cells = (
            line.id, line.state, line.time[:16].replace("T", " "), str(line.rows), blocks, str(line.rank or "?"),
            line.gate or "?", f"{line.bytes / 1000:.1f}", ", ".join(line.beside), metrics,
        )  # fmt: skip
        table.add_row(*(Text(readable(cell)) for cell in cells))
    console.print(table)


def list_as_json(store: RequestStore) -> str:
    """The same as JSON, one object a request."""
    return json.dumps([asdict(line) for line in lines(store)], indent=2, ensure_ascii=False)


def history(store: RequestStore) -> list[str]:
    """The events, one line each, oldest first."""
    return [
        f"{event.time}  {event.action:<8}{'' if event.request is None else event.request:<24}  {event.digest[:16]}"
        for event in store.manifest.history
    ]


def history_as_json(store: RequestStore) -> str:
    """The events as JSON."""
    return json.dumps([asdict(event) for event in store.manifest.history], indent=2)


def _line(store: RequestStore, request: Request) -> Line:
    folder = store.adapter_folder(request.id)
    try:
        config: AdapterConfig | None = AdapterConfig.read(folder)[0]
    except AdapterError:
        config = None
    return Line(
        id=request.id,
        state=request.state,
        time=request.time,
        rows=request.data.rows,
        blocks=None if config is None else config.blocks,
        rank=None if config is None else config.rank,
        gate=None if config is None else config.gate,
        bytes=sum(file.stat().st_size for file in folder.glob("*")),
        beside=list(request.beside),
        metrics=request.metrics,
        text_stored=request.text_stored,
        note=request.note,
    )
