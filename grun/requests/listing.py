"""What `requests list` and `requests history` print."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from grun.method.stack.manifest import Request
from grun.requests.rates import adapter_config, promise
from grun.requests.store import RequestStore

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120
"""Columns of the table where stdout is no terminal."""


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
    lines = [_line(store, request) for request in manifest.requests]
    promised = any(line["bound"] is not None for line in lines)
    hidden = ("text_stored", "note", *(() if promised else ("bound", "calibration", "recall")))
    headers = ["id", "state", "added (UTC)", "rows", "blocks", "rank", "gate"]
    headers += ["bound", "n", "recall"] if promised else []
    for header in (*headers, "KB", "trained beside", "metrics"):
        numbers = ("rows", "rank", "KB", "bound", "n", "recall")
        table.add_column(header, justify="right" if header in numbers else "left", overflow="fold")
    for line in lines:
        cells = {
            **line,
            "time": line["time"][:16].replace("T", " "),
            "blocks": "?" if line["blocks"] is None else ",".join(map(str, line["blocks"])),
            "bytes": f"{line['bytes'] / 1000:.1f}",
            **{name: "-" if line[name] is None else f"{line[name]:.3g}" for name in ("bound", "calibration", "recall")},
            "beside": ", ".join(line["beside"]),
            "metrics": ", ".join(f"{name} {value}" for name, value in line["metrics"].items()),
        }
        shown = [value for key, value in cells.items() if key not in hidden]
        table.add_row(*(Text(readable("?" if value is None else str(value))) for value in shown))
    console.print(table)
    if promised or manifest.false_positives is not None:
        console.print(Text(readable(f"False positives: {promise(store)}.")))


def history(store: RequestStore) -> list[str]:
    """The events, one line each, oldest first."""
    return [
        f"{event.time}  {event.action:<8}{'' if event.request is None else event.request:<24}  {event.digest[:16]}"
        for event in store.manifest.history
    ]


def as_json(store: RequestStore, action: str) -> str:
    """The same of `list` or `history` as JSON, an object for each request or event."""
    requests, events = store.manifest.requests, store.manifest.history
    lines = [_line(store, one) for one in requests] if action == "list" else [asdict(event) for event in events]
    return json.dumps(lines, indent=2, ensure_ascii=False)


def _line(store: RequestStore, request: Request) -> dict[str, Any]:
    """One request as it is listed; blocks, rank and gate are None where its adapter cannot be read."""
    config = adapter_config(store, request.id)
    return {
        "id": request.id,
        "state": request.state,
        "time": request.time,
        "rows": request.data.rows,
        **{name: getattr(config, name, None) for name in ("blocks", "rank", "gate")},
        **{name: getattr(config, f"gate_{name}", None) for name in ("bound", "calibration", "recall")},
        "bytes": sum(file.stat().st_size for file in store.adapter_folder(request.id).glob("*")),
        "beside": list(request.beside),
        "metrics": request.metrics,
        "text_stored": request.text_stored,
        "note": request.note,
    }
