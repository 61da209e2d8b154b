"""A job is what one process of an experiment does: a cell of a sweep, a method's way through sequential requests.

It is a file NAME.json, which holds what is to be done. Next to it lie NAME.outcome.json (how far it came, and the hash
of what decides that), NAME.handed_over.json (a launcher has it) and NAME.log (what its process printed). After a kill
the same command goes on: what is done is passed over, what was cut off resumes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from grun.errors import ConfigError, GrunError, RunError
from grun.runtime.files import remove, taken
from grun.runtime.reading import first_line
from grun.runtime.sealed import read_sealed, sealed_or_empty, write_sealed

log = logging.getLogger(__name__)

J = TypeVar("J", bound="Job")
State = Literal["open", "handed over", "done", "failed"]


class Job:
    """A job. Subclasses are dataclasses whose first field is `file`; the others are the file's content."""

    command: ClassVar[str]
    """Command of GRUN whose option `option` carries out a job's file, RESULTS/`pattern`."""
    option: ClassVar[str]
    pattern: ClassVar[str]
    shown: ClassVar[bool] = False
    """Whether it prints on this terminal, rather than into its log, where it is the only one that runs."""
    file: Path
    name: str
    hash: str
    """Of all that decides its result."""

    def missing(self) -> str | None:
        """What of its results is missing or damaged, once it is done."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Remove what it left when something else decided its result."""

    def tidy(self) -> None:
        """Remove what nobody needs once it is done."""

    def marks(self) -> dict[str, Any]:
        """What its outcome records, whatever became of it."""
        return {"hash": self.hash}

    @property
    def results(self) -> Path:
        """Folder of the experiment."""
        return self.file.parent.parent

    def sibling(self, ending: str) -> Path:
        """A file next to its own, such as NAME.log."""
        return self.file.with_name(self.file.name.removesuffix("json") + ending)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The job of a file; RunError if that is missing or damaged."""
        make: Any = cls
        try:
            job: Self = make(path, **read_sealed(path))
            return job
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}); the {cls.command} command writes it again") from error

    def write(self) -> None:
        """Write its file, unless it is there."""
        fields: Any = self
        content = {name: value for name, value in asdict(fields).items() if name != "file"}
        if sealed_or_empty(self.file) != json.loads(json.dumps(content)):
            write_sealed(self.file, content)

    def last(self) -> dict[str, Any]:
        """The outcome as it stands: hash, state, seconds, error; empty if there is none."""
        return sealed_or_empty(self.sibling("outcome.json"))

    def state(self) -> State:
        """How far this very job is; what was done under another hash, or is damaged by now, does not count."""
        last = self.last()
        if last.get("hash") == self.hash:
            if last["state"] == "failed":
                return "failed"
            if last["state"] == "done" and self.missing() is None:
                return "done"
        return "handed over" if sealed_or_empty(self.sibling("handed_over.json")).get("hash") == self.hash else "open"

    def damaged(self) -> str | None:
        """What is damaged or missing of a job that was done, or may have been."""
        last = self.last()
        if not last and self.sibling("outcome.json").is_file():
            return f"{self.sibling('outcome.json')} is damaged"
        return self.missing() if (last.get("hash"), last.get("state")) == (self.hash, "done") else None

    def record(self, state: str, seconds: float = 0.0, error: str | None = None) -> None:
        """Write the outcome: `started`, `done` or `failed`."""
        outcome = {**self.marks(), "state": state, "seconds": round(seconds, 2), "error": error}
        with taken(self.results, lock="outcomes", wait=True):
            write_sealed(self.sibling("outcome.json"), outcome)

    def hand_over(self) -> None:
        """Note that a launcher has it."""
        with taken(self.results, lock="outcomes", wait=True):
            write_sealed(self.sibling("handed_over.json"), {"hash": self.hash})


def run_job(kind: type[J], path: Path, carry_out: Callable[[J], None]) -> None:
    """Carry out the job of the file `path`, or what is left of it, in this process, and write its outcome.

    A process that finds another at work on the same job waits for it.

    Raises:
        ConfigError: `path` is no such job's file.
        Exception: whatever the job raised; the outcome has its first line.
    """
    if not path.is_file() or not path.match(kind.pattern):
        raise ConfigError(
            f"{kind.option}={path} is no {kind.option}'s file; expected RESULTS/{kind.pattern}, which the "
            f"{kind.command} command writes"
        )
    with taken(path.parent.parent, lock=f"{path.parent.name}-{path.name.removesuffix('.json')}", wait=True):
        job = kind.read(path)
        if job.state() == "done":
            log.info("%s is done already", job.name)
            return
        job.prepare()
        job.record("started")
        started = time.monotonic()
        try:
            carry_out(job)
        except Exception as error:
            named = "" if isinstance(error, GrunError) else f"{type(error).__name__}: "
            job.record("failed", time.monotonic() - started, named + first_line(error))
            raise
        job.record("done", time.monotonic() - started)
        remove(job.sibling("handed_over.json"))
        job.tidy()
