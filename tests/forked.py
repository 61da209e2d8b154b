"""Commands in forks of the test's process, which has paid for the imports: seconds saved a command."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

import grun.commands.unlearn  # noqa: F401
from grun.runtime.files import append

PATIENCE = 120
"""Seconds to wait for the moment of a kill."""


class Fork:
    """A process that runs `run`, with its output in `log`, as subprocess has it."""

    def __init__(self, run: Callable[[], Any], log: Path | None = None) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            if log is not None:
                with append(log) as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
            torch.set_num_threads(1)
            status = 70
            try:
                status = int(run())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.005)
        return status


def killed(run: Callable[[], Any], moment: Callable[[], bool]) -> None:
    """Run in a fork, which is killed at the moment, with the processes it started."""

    def grouped() -> Any:
        os.setsid()
        return run()

    fork, started = Fork(grouped), time.monotonic()
    while not moment():
        assert fork.poll() is None and time.monotonic() - started < PATIENCE
        time.sleep(0.002)
    os.killpg(fork.pid, signal.SIGKILL)
    fork.wait()
