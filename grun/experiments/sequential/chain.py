"""One method's way through the requests: the file of its job, and the record of each step.

RESULTS/METHOD/chain.json holds what is to be done. RESULTS/METHOD/steps/ID.json is written when a request has been
served and measured; only then does the model before it go.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.errors import RunError
from grun.experiments.job import Job
from grun.experiments.models import remove_weights
from grun.experiments.sequential.files import ExperimentFiles
from grun.runtime.files import content_hash, remove
from grun.runtime.reading import DamagedFile
from grun.runtime.runs import identity
from grun.runtime.sealed import read_sealed, write_sealed
from grun.version import __version__


@dataclass
class Chain(Job):
    """What one process does."""

    command, option, pattern, shown = "sequential", "chain", "*/chain.json", True
    file: Path
    method: str
    requests: dict[str, list[int]]
    """Id -> places of its rows in the forget set, in the order of asking."""
    at: list[int]
    """Requests after which there is a step, from 1."""
    model: str
    """Folder or hub id of the model that knows everything."""
    retain_model: str | None
    """The same of one that was never taught any request."""
    base: dict[str, Any]
    """What tells these models from others."""
    unlearn: dict[str, Any]
    """Resolved options, but for the data."""
    finetune: dict[str, Any]
    """The same, of retraining."""
    evaluate: dict[str, Any]
    rule: str
    independent: bool
    earlier_as_retain: bool
    subjects: dict[str, list[str]]
    """Id -> `data.subjects` of its GRUN adapter; empty: they are given none."""

    def __post_init__(self) -> None:
        """Names and hash of the job."""
        self.name, self.hash = self.method, content_hash(json.loads(json.dumps(self.identity())))  # as it is read
        self.folder, self.experiment = self.file.parent, ExperimentFiles(self.results)
        self.store, self.ids = self.folder / "store", list(self.requests)

    def identity(self) -> dict[str, Any]:
        """What decides the result of a step. Which steps there are does not."""
        own: dict[str, Any] = {"base": self.base, "requests": self.requests, "version": __version__}
        own["evaluate"] = identity(self.evaluate)["config"]
        trained = "finetune" if self.method == "retrain" else "unlearn"
        own[trained] = identity(getattr(self, trained))["config"]
        if self.method == "grun":
            own |= {"rule": self.rule, "independent": self.independent, "earlier_as_retain": self.earlier_as_retain}
            own |= {"subjects": self.subjects} if self.subjects else {}
        return own

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

    def write_step(self, name: str, record: dict[str, Any]) -> None:
        """Write the record of a request that is done."""
        write_sealed(self.step(name), {**record, "chain": self.hash})

    def read_step(self, name: str) -> dict[str, Any]:
        """The record of a request served by this very chain; RunError if it is damaged or another's."""
        path = self.step(name)
        try:
            record = read_sealed(path)
            if record.pop("chain", None) == self.hash:
                return record
            wrong = f"{path} is of another experiment"
        except DamagedFile:
            wrong = f"{path} is damaged"
        raise RunError(
            f"{wrong}, and the model that it came of may be gone; restore it from a copy, or overwrite=true begins "
            "the experiment again"
        )

    def missing(self) -> str | None:
        """The first step that cannot be read, if all were done."""
        for number in self.at:
            try:
                self.read_step(self.ids[number - 1])
            except (OSError, RunError) as error:
                return str(error)
        return None

    def tidy(self) -> None:
        """Remove the whole models of every step."""
        for number in self.at:
            self.discard(number)

    def discard(self, number: int) -> None:
        """Remove whole models that no further request needs, once the request of `number` is done."""
        if self.method == "retrain":
            remove_weights(self.run(self.ids[number - 1]))
        elif number > 1 and self.method == "full":
            remove_weights(self.run(self.ids[number - 2]))
        elif number > 1 and self.method == "lora":
            remove(self.merged(self.ids[number - 2]))
