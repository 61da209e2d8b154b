"""Stopping: SIGTERM ends a command as Ctrl-C does, and the processes that a command started end with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

PARENT = "GRUN_PARENT"
"""Variable with the process that started this one and is not to be outlived; `PID speaks` where that process itself
prints that it was interrupted."""
PATIENCE = 10.0
"""Seconds that a process gets to end by itself."""
TOGETHER = 1.0
"""Seconds within which further signals are one with the first, as a terminal and a parent send it both."""
REMINDER = 3.0
"""Seconds after which an interrupt is raised again: C code that runs Python, such as an import, may swallow one."""
_PR_SET_PDEATHSIG = 1


class _Asked:
    """What signals have asked of the command that runs."""

    number: int | None = None
    """The first signal."""
    at = 0.0
    ending = False
    """Whether the command is over, so that a further signal has nothing left to stop."""
    waiting = False
    """Whether it waits for processes that it has asked to end."""
    parent_reports = False


def asked() -> bool:
    """Whether a signal has asked the command to stop."""
    return _Asked.number is not None


def status() -> int:
    """Exit status of a command that was interrupted: 143 by SIGTERM, else 130. From here on signals stop nothing."""
    _Asked.ending = True
    return 128 + (_Asked.number or signal.SIGINT)


def parent_reports() -> bool:
    """Whether the process that started this one prints that it was interrupted."""
    return _Asked.parent_reports


def _stop(number: int, frame: Any) -> None:
    now = time.monotonic()
    again = asked() and now - _Asked.at < TOGETHER
    _Asked.number, _Asked.at = _Asked.number or number, now
    signal.setitimer(signal.ITIMER_REAL, REMINDER, REMINDER)
    if not again and not _Asked.ending:
        raise KeyboardInterrupt


def _remind(number: int, frame: Any) -> None:
    if not _Asked.ending and not _Asked.waiting:
        raise KeyboardInterrupt


@contextlib.contextmanager
def by_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT raise KeyboardInterrupt; a signal that the process ignores stays ignored.

    Outside the main thread, where Python allows no handler, nothing is changed.
    """
    _Asked.number, _Asked.ending, _Asked.waiting = None, False, False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, _stop)
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _remind)
    try:
        _end_with_parent()
        yield
    finally:
        if asked():
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(status: int) -> NoReturn:
    """End the process with `status`.

    One that was interrupted ends at once: shutting Python down takes seconds, in which a further signal would change
    the status, and Python itself changes it where the interrupt came while a C extension ran Python code.
    """
    if asked():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _end_with_parent() -> None:
    """Have the kernel (Linux) send SIGTERM when the process that `PARENT` names, or torchrun, ends, however it does."""
    pid, _, speaks = os.environ.pop(PARENT, "").partition(" ")
    _Asked.parent_reports = bool(speaks)
    if not pid.isdecimal() and "TORCHELASTIC_RUN_ID" in os.environ:
        pid = str(os.getppid())
    if not pid.isdecimal() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:  # it ended before that
        os.kill(os.getpid(), signal.SIGTERM)


def start(command: Sequence[str] | str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process of this package, which does not outlive this one; `options` are Popen's."""
    environment = {**(options.pop("env", None) or os.environ), PARENT: f"{os.getpid()} speaks"}
    return subprocess.Popen(command, env=environment, **options)


@contextlib.contextmanager
def ended(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """However the block ends, so do `children`: by SIGTERM, and where that takes too long, by SIGKILL."""
    try:
        yield
    finally:
        running = [child for child in children if child.poll() is None]
        _Asked.waiting = True
        try:
            for child in running:
                _send(child, signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE
            while any(child.poll() is None for child in running) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:  # also if a second signal does not let it wait
            for child in running:
                if child.poll() is None:
                    _send(child, signal.SIGKILL)
                    child.wait()
            _Asked.waiting = False


def _send(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a process; with it those that it started, if it has a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(child.pid) == child.pid:
            os.killpg(child.pid, number)
        else:
            os.kill(child.pid, number)
