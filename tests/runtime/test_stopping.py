"""SIGTERM ends a command as Ctrl-C does, and no process that it started outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grun.cli import exit_status, main
from grun.runtime import stopping

ROOT = Path(__file__).resolve().parents[2]
LINE = "interrupted; the same command resumes\n"
PATIENCE = 20
"""Seconds until something that should have ended long ago is a failure."""


def signaled(number: int) -> Callable[[Any], int]:
    """A command that is signaled while it waits."""

    def command(*_: Any) -> int:
        os.kill(os.getpid(), number)
        time.sleep(PATIENCE)
        return 0

    return command


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_is_a_clean_stop_like_ctrl_c_and_the_callers_handlers_are_put_back(
    number: int, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(*_: Any) -> None:
        raise AssertionError("the caller's handler was called")

    monkeypatch.setattr("grun.commands.unlearn.unlearn", signaled(number))
    before = {each: signal.signal(each, mine) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert main(["unlearn"]) == status
        assert [signal.getsignal(each) for each in before] == [mine, mine]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err == LINE


def test_an_interrupt_that_a_library_turned_into_its_own_error_is_still_one(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        try:
            return signaled(signal.SIGTERM)()
        except KeyboardInterrupt as error:
            raise ImportError("numpy failed to import") from error

    assert exit_status(command) == 143
    assert capsys.readouterr().err == LINE


def test_what_comes_a_second_time_disturbs_neither_the_end_nor_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    ended = []

    def command() -> int:
        try:
            return signaled(signal.SIGTERM)()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            ended.append(True)

    assert exit_status(command) == 143
    assert ended == [True] and capsys.readouterr().err == LINE


def test_an_interrupt_that_was_swallowed_comes_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As C code does that runs Python and clears its errors."""
    monkeypatch.setattr(stopping, "REMINDER", 0.1)
    started = time.monotonic()

    def command() -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signaled(signal.SIGTERM)()
        time.sleep(PATIENCE)
        return 0

    assert exit_status(command) == 143
    assert time.monotonic() - started < PATIENCE / 2
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert capsys.readouterr().err == LINE


def test_in_another_thread_no_handler_is_set() -> None:
    found: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(
        target=lambda: found.append(exit_status(lambda: int(signal.getsignal(signal.SIGTERM) is before)))
    )
    thread.start()
    thread.join()
    assert found == [1]


# -- processes that are started ---------------------------------------------------------------------------------------

CELL = """
import os, sys, time
from grun.cli import exit_status
def work():
    open(sys.argv[1], "w").write(str(os.getpid()))
    time.sleep(60)
raise SystemExit(exit_status(work))
"""
"""Says which process it is, and waits."""
STUBBORN = CELL.replace("import os", "import signal, os").replace("def", "signal.signal(15, signal.SIG_IGN)\ndef", 1)
PARENT = """
import sys
from pathlib import Path
from grun.runtime import stopping
from grun.cli import exit_status
from grun.experiments import running
from grun.experiments.sequential.chain import Chain
from grun.experiments.sweep.cells import Cell
folder, program, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
stopping.PATIENCE = 0.5
running.job_command = lambda job: [sys.executable, "-c", program, str(folder / job.name)]
jobs = [
    Cell(folder / "results" / "cells" / f"{name}.json", name, None, {}, {}, "nothing", "", name)
    for name in ("one", "two")
]
if kind == "sequential":
    rest = ({}, [], "", None, {}, {}, {}, {}, "sum", True, False, {})
    jobs = [Chain(folder / "results" / "grun" / "chain.json", "one", *rest)]
launcher = sys.argv[4] if len(sys.argv) > 4 else None
stopping.leave(exit_status(lambda: running.run_jobs(jobs, at_once=len(jobs), launcher=launcher)))
"""
SCRIPT = """
set -euo pipefail
. scripts/stages.sh
STAGES=finetune
say() { :; }
COMMAND=(finetune); MODULE=grun
PYTHON=$1
run_for_folder finetune
"""
"""A cmd_*.sh at work."""


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def children_of(folder: Path, names: list[str]) -> list[int]:
    """Processes that cells wrote down."""
    files = [folder / name for name in names]
    until(lambda: all(file.is_file() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def run(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=environment, cwd=ROOT, **pipes)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc; other systems do not report the end of a parent")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("kind", ["sweep", "sequential", "stubborn sweep", "launcher"])
def test_no_child_outlives_its_parent(kind: str, number: int, tmp_path: Path) -> None:
    if number == signal.SIGKILL and kind in ("stubborn sweep", "launcher"):
        pytest.skip("what ignores SIGTERM, or is another's program, is not reached")
    parent = PARENT
    program = STUBBORN if kind.startswith("stubborn") else CELL
    if kind == "launcher":
        (tmp_path / "cell.py").write_text(CELL)
        place = [f"{sys.executable} {tmp_path / 'cell.py'} {tmp_path}/$(basename {{command}}); true"]
        parent = parent.replace('[sys.executable, "-c", program, str(folder / job.name)]', "[job.name]")
    process = run([sys.executable, "-c", parent, str(tmp_path), program, kind, *(place if kind == "launcher" else [])])
    children = children_of(tmp_path, ["one"] if kind == "sequential" else ["one", "two"])
    process.send_signal(number)
    if number == signal.SIGTERM:
        time.sleep(0.1)
        process.send_signal(number)  # twice, as supervisors do
    _, said = process.communicate(timeout=PATIENCE)
    until(lambda: not any(map(alive, children)))
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert said.count(LINE) == 1 and "Traceback" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_script_that_is_stopped_stops_its_command(number: int, tmp_path: Path) -> None:
    python = tmp_path / "python"
    (tmp_path / "cell.py").write_text(CELL)
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'cell.py'} {tmp_path / 'one'}\n")
    python.chmod(0o755)
    process = run(["bash", "-c", SCRIPT, "cmd", str(python)])
    children = children_of(tmp_path, ["one"])
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    until(lambda: not any(map(alive, children)))
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert said == LINE  # the command's


def test_ended_waits_for_a_child_and_gives_its_status(tmp_path: Path) -> None:
    child = stopping.start([sys.executable, "-c", "raise SystemExit(5)"])
    with stopping.ended([child]):
        assert child.wait() == 5
