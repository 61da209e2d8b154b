"""Carrying out the jobs of an experiment: several processes at a time, or through a launcher such as a cluster's queue.

A launcher is a name (`processes`, `submitit` and parameters of its executor), or a shell's text with `{command}`.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grun.errors import ConfigError
from grun.experiments.job import Job, State
from grun.runtime import stopping
from grun.runtime.files import append
from grun.runtime.reading import first_line, parse_yaml

log = logging.getLogger(__name__)

PLACE = "{command}"
"""Where a launcher's text gets the command of a job."""
POLL_SECONDS = 0.1


def check_launcher(launcher: str, results: Path) -> None:
    """ConfigError if the launcher is unknown or could not start a job.

    The command stands between quotes of the user's in a shell's text, so it may hold none, nor blanks within a word.
    """
    if launcher == "processes":
        return
    if launcher.split()[:1] == ["submitit"]:
        with tempfile.TemporaryDirectory() as folder:  # nothing is made in results yet
            _executor(launcher, Path(folder))
        return
    if PLACE not in launcher:
        raise ConfigError(
            f"launcher={launcher!r} has no {PLACE}, where the command of a job goes, such as "
            "launcher=\"sbatch --wrap '{command}'\"; or name processes or submitit"
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


def job_command(job: Job) -> list[str]:
    """The command that carries out a job."""
    return [sys.executable, "-m", "grun", job.command, f"{job.option}={job.file}"]


def start(job: Job, launcher: str | None, at_once: int) -> subprocess.Popen[bytes] | None:
    """Start a job's process, or the launcher's, which prints into the job's log; None: it is in a queue."""
    command = job_command(job)
    if launcher is None and job.shown and at_once == 1:
        return stopping.start(command)
    if launcher is not None and PLACE not in launcher:
        line = f"exec {shlex.join(command)} >>{shlex.quote(str(job.sibling('log')))} 2>&1"
        _executor(launcher, job.file.parent, name=job.name).submit(subprocess.call, line, shell=True)
        return None
    environment = dict(os.environ)
    if launcher is None:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, processors() // at_once)))
    with append(job.sibling("log")) as output:
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, "env": environment}
        if launcher is None:
            return stopping.start(command, **streams)
        line = launcher.replace(PLACE, " ".join(command))
        return subprocess.Popen(line, shell=True, start_new_session=True, **streams)


def _executor(launcher: str, folder: Path, **parameters: Any) -> Any:
    """Executor of submitit, which keeps its files in `folder`; words after the name are parameters, key=value."""
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            "launcher=submitit needs the package submitit, which is not installed: "
            "pip install 'grun-unlearning[cluster]'"
        ) from error
    for word in launcher.split()[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"launcher={launcher!r}: {word} is not key=value, a parameter of submitit's executor")
        parameters[key] = parse_yaml(value, f"launcher: {word}")
    try:
        executor = submitit.AutoExecutor(folder / "submitit", cluster=parameters.pop("cluster", None))
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"launcher={launcher!r}: {first_line(error)}") from error
    return executor


@dataclass
class Standing:
    """How the jobs of a results folder stand."""

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
        lines = [counts, *(f"failed: {name}: {error}" for name, error in self.failed.items())]
        if self.handed_over:
            lines.append(
                "the same command shows the state later; resubmit=true hands over again what the launcher has lost"
            )
        elif self.failed:
            lines.append("the same command tries again what failed")
        return lines


def run_jobs(
    jobs: Sequence[Job], *, at_once: int, launcher: str | None, resubmit: bool = False, before: Standing | None = None
) -> Standing:
    """Carry out the jobs that are not done, `at_once` at a time; how all of them stand, after those `before`.

    What a launcher has already is not handed over again unless `resubmit`. A job that fails does not stop the others.
    """
    launcher = None if launcher == "processes" else launcher
    standing = Standing()
    waiting = _unfinished(jobs, standing, resubmit)
    if standing.done and waiting:
        log.info("%d of %d done before", len(standing.done), len(jobs))
    running: list[tuple[Job, subprocess.Popen[bytes] | None, float]] = []
    started: list[subprocess.Popen[bytes]] = []
    spent: list[float] = []
    with stopping.ended(started):
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                log.info("%s: %s", "handing over" if launcher else "start", job.name)
                process = start(job, launcher, at_once)
                started += [] if process is None else [process]
                running.append((job, process, time.monotonic()))
            for entry in [entry for entry in running if entry[1] is None or entry[1].poll() is not None]:
                running.remove(entry)
                job, process, began = entry
                ending = _collect(job, 0 if process is None else process.returncode, launcher, standing)
                seconds = time.monotonic() - began
                spent += [seconds] if ending == "done" else []
                left = len(waiting) + len(running)
                still = f", {about(sum(spent) / len(spent) * left / at_once)}" if spent and left else ""
                took = "" if ending == "handed over" else f", {seconds:.0f} s"
                log.info("%s: %s%s: %d of %d done%s", ending, job.name, took, len(standing.done), len(jobs), still)
            if running:
                time.sleep(POLL_SECONDS)
    order = [job.name for job in jobs]
    before = before or Standing()
    return Standing(
        before.done + sorted(standing.done, key=order.index),
        before.handed_over + standing.handed_over,
        before.failed | {name: standing.failed[name] for name in order if name in standing.failed},
    )


def _unfinished(jobs: Sequence[Job], standing: Standing, resubmit: bool) -> list[Job]:
    """Jobs to be started; those that are done or with a launcher are entered into `standing`."""
    waiting = []
    for job in jobs:
        job.write()
        state = job.state()
        if state == "done":
            job.tidy()
            standing.done.append(job.name)
        elif state == "handed over" and not resubmit:
            standing.handed_over.append(job.name)
        else:
            if damaged := job.damaged():
                log.warning("%s is done again: %s", job.name, damaged)
            if state == "failed":
                log.info("%s had failed (%s) and is tried again", job.name, job.last().get("error"))
                job.record("started")  # so that the old error is not read as a new one
            waiting.append(job)
    return waiting


def _collect(job: Job, status: int, launcher: str | None, standing: Standing) -> State:
    """Enter into `standing` what a process left that has ended with `status`."""
    state = job.state()
    printed = job.sibling("log") if job.sibling("log").is_file() else None
    if state == "done":
        standing.done.append(job.name)
    elif state == "failed":
        standing.failed[job.name] = f"{job.last().get('error')}{f' ({printed})' if printed else ''}"
    elif launcher is not None and status == 0:
        job.hand_over()
        standing.handed_over.append(job.name)
        return "handed over"
    else:
        what = "the launcher" if launcher is not None else "its process"
        how = f"signal {-status}" if status < 0 else f"status {status}"
        error = f"{what} ended with {how} before it was done" + (f"; its output: {printed}" if printed else "")
        if job.last().get("hash") == job.hash:  # else that is of other options
            job.record("failed", error=error)
        standing.failed[job.name] = error
        return "failed"
    return state


def about(seconds: float) -> str:
    """How long something still takes, in words."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s still"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min still"
    return f"about {seconds / 3600:.1f} h still"
