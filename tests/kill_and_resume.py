"""Runs a command of `grun` many times and kills it (SIGKILL) where told, for tests/training/test_resume.py.

Each kill is {"after_step": N, "delay": seconds}, or {"in": "module.function", "call": N}: in the N-th call of that
function, where torch and safetensors leave half a file. Every attempt is a fork of the test's process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401
from forked import Fork

import grun.commands.finetune  # noqa: F401
from grun.cli import main

PATIENCE = 60
"""Seconds to wait for the moment of a kill."""


def stall(where: str, call: int, flag: Path) -> None:
    """Let the `call`-th call of the function `where` write half of its file, raise the flag and hang."""
    module_name, _, name = where.rpartition(".")
    module = importlib.import_module(module_name)
    real = getattr(module, name)
    calls = 0

    def half(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return real(*args, **kwargs)
        for target in args:  # others are atomic, and have no half
            if name in ("save", "save_model") and isinstance(target, str | Path):
                Path(target).write_bytes(b"half a file")
        flag.touch()
        time.sleep(PATIENCE)
        raise SystemExit("was not killed")

    setattr(module, name, half)


def log_file(folder: Path) -> int:
    """Which file the log is: a resumed run writes it anew."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "log.jsonl").stat().st_ino
    return 0


def steps_done(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "log.jsonl").read_bytes().count(b"\n")
    return 0


def attempt(arguments: list[str], folder: Path, kill: dict[str, Any] | None) -> dict[str, Any]:
    """One run of the command, killed or left alone: whether the kill struck, at which step, and what lay there then."""
    flag = folder.with_name(f"{folder.name}.flag")
    flag.unlink(missing_ok=True)
    earlier = log_file(folder)

    def run() -> int:
        if kill and "in" in kill:
            stall(kill["in"], kill["call"], flag)
        return main(arguments)

    child, deadline = Fork(run), time.monotonic() + PATIENCE
    while kill is not None and time.monotonic() < deadline:
        if child.poll() is not None:
            return {"killed": False, "why": "it had ended before"}
        if "in" in kill:
            now = flag.exists()
        else:
            now = log_file(folder) != earlier and steps_done(folder) >= kill["after_step"]
        if now:
            time.sleep(kill.get("delay", 0.0))
            os.kill(child.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    status = child.wait()
    if status == -signal.SIGKILL:
        return {"killed": True, "step": steps_done(folder), "files": sorted(map(str, folder.rglob("*")))}
    return {"killed": False, "status": status}
