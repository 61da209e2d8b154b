"""Peak memory of a process while it works, with and without the pages of mapped files (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")
INTERVAL = 0.002
"""Seconds between two looks."""


def peak_of(work: Callable[[], object]) -> dict[str, float]:
    """Bytes before `work` (loaded, anonymous) and at their peak within it: anonymous, and all that is resident.

    What the kernel holds of mapped files can be dropped at any time and is no part of the anonymous memory.
    """
    if not STATUS.exists():
        raise SystemExit("memory is read from /proc/self/status, which only Linux has")
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading has freed
    loaded = resident()[0]
    peak = [loaded, 0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak[:] = map(max, peak, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return {"loaded": loaded, "peak_anonymous": peak[0], "peak": peak[1]}


def resident() -> tuple[int, int]:
    """Anonymous and all resident memory of this process, bytes."""
    values = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(values["RssAnon"].split()[0]) * 1024, int(values["VmRSS"].split()[0]) * 1024


def addresses() -> int:
    """Peak of the addresses that this process had in use, mapped files and libraries included, bytes."""
    values = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(values["VmPeak"].split()[0]) * 1024
