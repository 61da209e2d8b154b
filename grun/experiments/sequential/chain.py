"""One method's way through the requests, as its file says it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grun.errors import RunError
from grun.runtime.files import content_hash
from grun.runtime.reading import DamagedFile
from grun.runtime.runs import identity
from grun.runtime.sealed import read_sealed, write_sealed
from grun.version import __version__


@dataclass
class Chain:
    """What one process does; its file holds these fields."""

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

    @property
    def ids(self) -> list[str]:
        """Ids of the requests in their order."""
        return list(self.requests)

    def identity(self) -> dict[str, Any]:
        """What decides the result of a step. Which steps there are does not."""
        own: dict[str, Any] = {"base": self.base, "requests": self.requests, "version": __version__}
        own["evaluate"] = identity(self.evaluate)["config"]
        own["finetune" if self.method == "retrain" else "unlearn"] = identity(
            self.finetune if self.method == "retrain" else self.unlearn
        )["config"]
        if self.method == "grun":
            own |= {"rule": self.rule, "independent": self.independent, "earlier_as_retain": self.earlier_as_retain}
        return own

    @classmethod
    def read(cls, path: Path) -> Chain:
        """The chain of a file; RunError if it is missing or damaged."""
        try:
            return cls(**read_sealed(path))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}); the experiment's command writes it again") from error

    def write(self, path: Path) -> None:
        """Write the file."""
        write_sealed(path, asdict(self))

    def hash(self) -> str:
        """Of `identity`; of a chain that was read from its file."""
        return content_hash(self.identity())

    def write_step(self, path: Path, record: dict[str, Any]) -> None:
        """Write the record of a step that is done."""
        write_sealed(path, {**record, "chain": self.hash()})

    def read_step(self, path: Path) -> dict[str, Any]:
        """The record of a step of this very chain; RunError if it is damaged or another's."""
        try:
            record = read_sealed(path)
            if record.pop("chain", None) == self.hash():
                return record
            wrong = f"{path} is of another experiment"
        except DamagedFile:
            wrong = f"{path} is damaged"
        raise RunError(
            f"{wrong}, and the model that it came of may be gone; restore it from a copy, or overwrite=true begins "
            "the experiment anew"
        )


@dataclass(frozen=True)
class Served:
    """What serving a request led to."""

    model: str
    """Folder or hub id of the model that is asked."""
    adapter: Path | None
    """Adapter, or store of adapters, on it."""
    run: Path | None
    """Folder of the training, with its run.json; None: of somebody else's."""
