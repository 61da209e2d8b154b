"""Processes of cells: some at a time on this machine, or handed to a launcher such as a cluster's queue."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grun.errors import ConfigError
from grun.experiments.sweep.cells import Cell, CellFiles
from grun.runtime import stopping
from grun.runtime.files import append

log = logging.getLogger(__name__)

PLACE = "{command}"
"""Where a launcher's text gets the cell's command."""
POLL_SECONDS = 0.1


@dataclass
class Standing:
    """How the cells of a results folder stand."""

    done: list[str] = field(default_factory=list)
    handed_over: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name -> error line."""

    @property
    def settled(self) -> bool:
        """Whether nothing is under way any more."""
        return not self.handed_over

    def lines(self) -> list[str]:
        """For a reader."""
        counts = f"{len(self.done)} done, {len(self.failed)} failed, {len(self.handed_over)} handed over"
        told = [counts, *(f"failed: {name}: {error}" for name, error in self.failed.items())]
        if self.handed_over:
            told.append(
                "the same command shows the state later; resubmit=true hands over again what the launcher has lost"
            )
        elif self.failed:
            told.append("the same command tries again what failed")
        return told


def cell_command(path: Path) -> list[str]:
    """The command that carries out the cell of the file `path`."""
    return [sys.executable, "-m", "grun", "sweep", f"cell={path}"]


def check_launcher(launcher: str, results: Path) -> None:
    """ConfigError if the launcher's text or the command in it could not be run by a shell.

    The command stands between quotes of the user's in the text, so it may hold none, nor blanks within a word.
    """
    if PLACE not in launcher:
        raise ConfigError(
            f"launcher={launcher!r} has no {PLACE}, where the command of a cell goes; such as "
            "launcher=\"sbatch --wrap '{command}'\""
        )
    for what, text in (("results_dir", str(results)), ("the path of Python", sys.executable)):
        if re.fullmatch(r"[A-Za-z0-9_./:=,@%+~-]+", text) is None or text.startswith("~"):
            raise ConfigError(
                f"{what} ({text}) has characters that a shell reads in its own way; with a launcher it must have "
                "letters, digits and ./_-+=,:@% alone"
            )


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(files: CellFiles, launcher: str | None, jobs: int) -> subprocess.Popen[bytes]:
    """Start a cell's process, or the launcher's, with its output going to the cell's log."""
    command = cell_command(files.cell)
    environment = dict(os.environ)
    if launcher is None:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, processors() // jobs)))
    with append(files.log) as output:
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, "env": environment}
        if launcher is None:
            return stopping.start(command, **streams)
        line = launcher.replace(PLACE, " ".join(command))
        return subprocess.Popen(line, shell=True, start_new_session=True, **streams)


def run_cells(
    results: Path, cells: Sequence[Cell], *, jobs: int, launcher: str | None, resubmit: bool = False
) -> Standing:
    """Carry out the cells that are not done, `jobs` at a time, and say how all of them stand.

    What a launcher has already is not handed over again unless `resubmit`. A cell that fails does not stop the others.
    """
    places = {cell.name: CellFiles(results, cell.name) for cell in cells}
    standing = Standing()
    waiting: list[Cell] = []
    for cell in cells:
        files = places[cell.name]
        files.write(cell)
        state = files.state(cell)
        if state == "done":
            files.discard(cell)
            standing.done.append(cell.name)
        elif state == "handed over" and not resubmit:
            standing.handed_over.append(cell.name)
        else:
            if damaged := files.damaged(cell):
                log.warning("%s is done again: %s", cell.name, damaged)
            if state == "failed":
                log.info("%s had failed (%s) and is tried again", cell.name, files.last().get("error"))
                files.record(cell, "started")  # so that the old error is not read as a new one
            waiting.append(cell)
    if standing.done and waiting:
        log.info("%d of %d done before", len(standing.done), len(cells))
    running: dict[str, tuple[Cell, subprocess.Popen[bytes], float]] = {}
    started: list[subprocess.Popen[bytes]] = []
    spent: list[float] = []
    with stopping.ended(started):
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                log.info("%s: %s", "handing over" if launcher else "start", cell.name)
                started.append(start(places[cell.name], launcher, jobs))
                running[cell.name] = (cell, started[-1], time.monotonic())
            for name, (cell, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                seconds = time.monotonic() - began
                _collect(cell, places[name], process.returncode, launcher, standing)
                if name in standing.done:
                    spent.append(seconds)
                left = len(waiting) + len(running)
                still = _about(sum(spent) / len(spent) * left / jobs) if spent and left else ""
                log.info("%s: %s", _ending(name, standing, seconds), _count(standing, len(cells)) + still)
            if running:
                time.sleep(POLL_SECONDS)
    order = [cell.name for cell in cells]
    standing.done.sort(key=order.index)
    standing.failed = {name: standing.failed[name] for name in order if name in standing.failed}
    return standing


def _collect(cell: Cell, files: CellFiles, status: int, launcher: str | None, standing: Standing) -> None:
    """Enter into `standing` what a process left that has ended with `status`."""
    state = files.state(cell)
    if state == "done":
        standing.done.append(cell.name)
    elif state == "failed":
        standing.failed[cell.name] = f"{files.last().get('error')} ({files.log})"
    elif launcher is not None and status == 0:
        files.hand_over(cell)
        standing.handed_over.append(cell.name)
    else:
        what = "the launcher" if launcher is not None else "its process"
        how = f"signal {-status}" if status < 0 else f"status {status}"
        error = f"{what} ended with {how} before the cell was done; its output: {files.log}"
        if files.last().get("hash") == cell.hash:  # else it says what lies there, of other options
            files.record(cell, "failed", error=error)
        standing.failed[cell.name] = error


def _ending(name: str, standing: Standing, seconds: float) -> str:
    if name in standing.done:
        return f"done: {name}, {seconds:.0f} s"
    if name in standing.failed:
        return f"failed: {name}, {seconds:.0f} s"
    return f"handed over: {name}"


def _count(standing: Standing, total: int) -> str:
    return f"{len(standing.done)} of {total} done"


def _about(seconds: float) -> str:
    if seconds < 90:
        return f", about {max(1, round(seconds))} s still"
    if seconds < 5400:
        return f", about {round(seconds / 60)} min still"
    return f", about {seconds / 3600:.1f} h still"
