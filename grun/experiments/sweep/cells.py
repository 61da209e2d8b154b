"""One cell on disk, and carrying it out: unlearn, then evaluate, in one process.

RESULTS/cells/NAME.json is what is to be done, with a hash; NAME.outcome.json is how far it came, with the hash of what
it came of; NAME.handed_over.json says that a launcher has it. The run lies in RESULTS/NAME, its evaluation in
RESULTS/evaluation/NAME.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from grun.config.options import EvaluateConfig, UnlearnConfig
from grun.config.values import from_dict, with_sources
from grun.errors import ConfigError, GrunError, ModelError, RunError
from grun.runtime.files import content_hash, read_json, remove, taken
from grun.runtime.reading import DamagedFile
from grun.runtime.runs import RUN_FILE, identity
from grun.runtime.sealed import read_sealed, sealed_or_empty, write_sealed
from grun.version import __version__

log = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
REFERENCE = "retain_only"
State = Literal["open", "handed over", "done", "failed"]
Discard = Literal["nothing", "models", "weights"]


@dataclass
class Cell:
    """What one process does; its file holds these fields."""

    name: str
    unlearn: dict[str, Any] | None
    """Resolved options; None: the model of `evaluate` is evaluated as it is."""
    evaluate: dict[str, Any]
    """Resolved options."""
    base: dict[str, Any]
    """What tells the base model from another: see `base_identity`."""
    discard: Discard
    """What goes once it is evaluated: nothing, the weights of whole models, or of adapters too."""
    run_hash: str = ""
    """Of what decides the run."""
    hash: str = ""
    """Of what decides the run and its evaluation."""


def make_cell(
    name: str, unlearn: UnlearnConfig | None, evaluate: EvaluateConfig, base: dict[str, Any], discard: Discard
) -> Cell:
    """A cell with its hashes: over the options that decide results, the base model and grun's version."""
    options = None if unlearn is None else with_sources(unlearn)
    of_run = {**identity(options or {}, base=base), "version": __version__}
    run_hash = content_hash(of_run)
    asked = with_sources(evaluate)
    return Cell(name, options, asked, base, discard, run_hash, content_hash([run_hash, identity(asked)]))


def base_identity(path: str, revision: str | None) -> dict[str, Any]:
    """Path, names, sizes and modification times of a folder's weights, or hub id and revision.

    Raises:
        ModelError: it looks like a folder, and there is none, or it holds no weights.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
        if not files:
            raise ModelError(f"{path} holds no weights ({', '.join(WEIGHTS[:2])}); name a folder with a model")
        stats = [(file.name, file.stat()) for file in files]
        return {"path": path, "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"{path}: no such folder")
    return {"hub": path, "revision": revision}


class CellFiles:
    """Where one cell of a results folder keeps what."""

    def __init__(self, results: Path, name: str) -> None:
        """`results` is the sweep's folder."""
        self.results = results
        self.name = name
        self.run = results / name
        self.evaluation = results / "evaluation" / name
        self.reference = results / "evaluation" / REFERENCE
        self.cell = results / "cells" / f"{name}.json"
        self.outcome = results / "cells" / f"{name}.outcome.json"
        self.handed_over = results / "cells" / f"{name}.handed_over.json"
        self.log = results / "cells" / f"{name}.log"

    def read(self) -> Cell:
        """The cell; RunError if its file is missing or damaged."""
        try:
            return Cell(**read_sealed(self.cell))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{self.cell} cannot be read ({error}); the sweep's command writes it again") from error

    def write(self, cell: Cell) -> None:
        """Write the cell, unless it is there."""
        there = sealed_or_empty(self.cell)
        if there != asdict(cell):
            write_sealed(self.cell, asdict(cell))
        if there.get("hash") != cell.hash:
            remove(self.handed_over)

    def last(self) -> dict[str, Any]:
        """The outcome as it stands: hash, run_hash, state, seconds, error; empty if there is none."""
        return sealed_or_empty(self.outcome)

    def state(self, cell: Cell) -> State:
        """How far this very cell is; what was done under another hash, or is damaged by now, does not count."""
        outcome = self.last()
        if outcome.get("hash") == cell.hash:
            if outcome["state"] == "failed":
                return "failed"
            if outcome["state"] == "done" and self._evaluated():
                return "done"
        return "handed over" if sealed_or_empty(self.handed_over).get("hash") == cell.hash else "open"

    def damaged(self, cell: Cell) -> str | None:
        """What of a cell that was done, or may have been, is damaged or missing."""
        if self.outcome.is_file() and not self.last():
            return f"{self.outcome} is damaged"
        last = self.last()
        if (last.get("hash"), last.get("state")) == (cell.hash, "done") and not self._evaluated():
            return f"its evaluation {self.evaluation} is damaged or missing"
        return None

    def _evaluated(self) -> bool:
        """Whether there is an evaluation that can be read."""
        from grun.evaluation.plan import EVALUATION_FILE

        try:
            return "key" in read_json(self.evaluation / EVALUATION_FILE, expect=dict)
        except (OSError, DamagedFile):
            return False

    def record(self, cell: Cell, state: str, seconds: float = 0.0, error: str | None = None) -> None:
        """Write the outcome; `started` until the cell is done or failed.

        The cell owns its folders, and may remove what lies there, if there was nothing when it first started.
        """
        owned = self.last().get("owned", not (self.run.exists() or self.evaluation.exists()))
        of = {"hash": cell.hash, "run_hash": cell.run_hash, "owned": owned}
        write_sealed(self.outcome, {**of, "state": state, "seconds": round(seconds, 2), "error": error})

    def hand_over(self, cell: Cell) -> None:
        """Note that a launcher has the cell."""
        write_sealed(self.handed_over, {"hash": cell.hash})

    def discard(self, cell: Cell) -> None:
        """Remove the weights that are not to be kept; run.json, log and evaluation stay."""
        if cell.unlearn is None or cell.discard == "nothing":
            return
        if cell.discard == "models" and (self.run / "adapter_config.json").exists():
            return
        for pattern in WEIGHTS:
            for file in self.run.glob(pattern):
                remove(file)


def run_cell(path: Path) -> None:
    """Carry out the cell of the file `path`, unless it is done, and write its outcome.

    A process that finds another at work on the same cell waits for it.

    Raises:
        ConfigError: `path` is no cell's file.
        Exception: whatever unlearning or evaluation raised; the outcome has its first line.
    """
    if not path.is_file() or path.parent.name != "cells":
        raise ConfigError(f"cell={path} is no cell's file; expected RESULTS/cells/NAME.json, which the sweep writes")
    files = CellFiles(path.parent.parent, path.name.removesuffix(".json"))
    with taken(files.results, lock=f"cell-{files.name}", wait=True):
        cell = files.read()
        if files.state(cell) == "done":
            log.info("%s is done already", cell.name)
            return
        _clear(cell, files)
        files.record(cell, "started")
        with _recorded(cell, files):
            _carry_out(cell, files)
        files.discard(cell)


@contextmanager
def _recorded(cell: Cell, files: CellFiles) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        line = first if isinstance(error, GrunError) else f"{type(error).__name__}: {first}"
        files.record(cell, "failed", time.monotonic() - started, line)
        raise
    files.record(cell, "done", time.monotonic() - started)
    remove(files.handed_over)


def _clear(cell: Cell, files: CellFiles) -> None:
    """Remove what the cell itself left under other options; unlearn and evaluate refuse what lies there from others."""
    last = files.last()
    if not last.get("owned"):
        return
    without_weights = (files.run / RUN_FILE).exists() and not any(files.run.glob("*.safetensors"))
    if last.get("run_hash") != cell.run_hash or without_weights:
        remove(files.run)
    if last.get("hash") != cell.hash:
        remove(files.evaluation)


def _carry_out(cell: Cell, files: CellFiles) -> None:
    from grun.evaluation.evaluate import EVALUATION_FILE, evaluate
    from grun.evaluation.suites.base import evaluate_suite

    asked: EvaluateConfig = from_dict("evaluate", cell.evaluate)
    if cell.unlearn is not None:
        from grun.commands.unlearn import unlearn

        config: UnlearnConfig = from_dict("unlearn", cell.unlearn)
        config.output_dir = str(files.run)
        unlearn(config)
        if not any(file for pattern in WEIGHTS for file in files.run.glob(pattern)):
            raise RunError(
                f"{files.run} holds a finished run without its weights, and {files.outcome} no longer says that the "
                "sweep removed them; remove the folder, and the same command makes it again"
            )
        gc.collect()  # a whole model and its reference, before another is loaded
        if (files.run / "adapter_config.json").exists():
            asked.adapter = str(files.run)
        else:
            asked.model.path = str(files.run)
    asked.overwrite = bool(files.last().get("owned"))
    if asked.suite != "answers":
        evaluate_suite(asked, files.evaluation)
        return
    if cell.name != REFERENCE and (files.reference / EVALUATION_FILE).is_file():
        asked.reference = str(files.reference)
    evaluate(asked, files.evaluation)
