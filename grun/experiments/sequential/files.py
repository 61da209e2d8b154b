"""Where an experiment keeps what all its methods share; nothing of it is made here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from grun.data.rows import Row
from grun.runtime.files import write_text

BEFORE, RETAIN_ONLY = "before", "retain_only"


class ExperimentFiles:
    """Paths in a results folder."""

    def __init__(self, results: Path) -> None:
        """`results` is the experiment's folder."""
        self.results = results
        self.experiment = results / "experiment.json"
        self.forget = results / "data" / "forget.jsonl"
        """All requests together."""
        self.retain = results / "data" / "retain.jsonl"

    def rows(self, kind: Literal["requests", "asked", "kept", "retain_and_earlier"], name: str) -> Path:
        """Rows that belong to the request `name`.

        Args:
            kind: its forget rows; those of all requests up to it; all that is taught but for these; retain rows and
                the forget rows of all requests before it.
            name: id of the request.
        """
        return self.results / "data" / kind / f"{name}.jsonl"

    def evaluation(self, name: str) -> Path:
        """Evaluation of one of the two models that nothing was done to."""
        return self.results / "evaluation" / name

    def chain(self, method: str) -> Path:
        """File of a method's chain (`grun.experiments.sequential.chain`)."""
        return self.results / method / "chain.json"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, one file whole or absent."""
    write_text(path, "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows))
