"""Where an experiment keeps what; nothing of it is made here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from grun.data.rows import Row
from grun.runtime.files import write_text

BEFORE, RETAIN_ONLY = "before", "retain_only"


class ExperimentFiles:
    """Paths in a results folder."""

    def __init__(self, results: Path) -> None:
        """`results` is the experiment's folder."""
        self.results = results
        self.experiment = results / "experiment.json"
        self.data = results / "data"
        self.forget = self.data / "forget.jsonl"
        """All requests together."""
        self.retain = self.data / "retain.jsonl"

    def request(self, name: str) -> Path:
        """Forget rows of one request."""
        return self.data / "requests" / f"{name}.jsonl"

    def asked(self, name: str) -> Path:
        """Forget rows of all requests up to that one."""
        return self.data / "asked" / f"{name}.jsonl"

    def kept(self, name: str) -> Path:
        """All that is taught but for those."""
        return self.data / "kept" / f"{name}.jsonl"

    def retain_beside(self, name: str) -> Path:
        """Retain rows, and forget rows of all requests before that one."""
        return self.data / "retain_and_earlier" / f"{name}.jsonl"

    def evaluation(self, name: str) -> Path:
        """Evaluation of one of the two models that nothing was done to."""
        return self.results / "evaluation" / name


class ChainFiles:
    """Paths of one method."""

    def __init__(self, results: Path, method: str) -> None:
        """`results` is the experiment's folder."""
        self.folder = results / method
        self.chain = self.folder / "chain.json"
        self.store = self.folder / "store"

    def run(self, name: str) -> Path:
        """What training for a request made: an adapter, or a model."""
        return self.folder / "runs" / name

    def merged(self, name: str) -> Path:
        """The model after a request whose LoRA was merged."""
        return self.folder / "merged" / name

    def evaluation(self, name: str) -> Path:
        """Evaluation after a request."""
        return self.folder / "evaluation" / name

    def step(self, name: str) -> Path:
        """Record of a request that is done."""
        return self.folder / "steps" / f"{name}.json"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, one file whole or absent."""
    write_text(path, "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows))
