"""Runs a command of `grun` many times and kills it (SIGKILL) where told; a program for tests/training/test_resume.py.

    python kill_and_resume.py PLANS.json

A plan is {"arguments": [...], "folder": ..., "kills": [...]}; each kill is {"after_step": N, "delay": seconds}, or
{"in": "module.function", "call": N}: in the N-th call of that function, where torch and safetensors leave half a file.
Every attempt is a fork of this process, which pays for the imports once. A last attempt is left alone. Printed: one
JSON line for each plan, a list of its attempts.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import grun.commands.finetune
import grun.commands.unlearn  # noqa: F401
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
    flag = folder.with_name(f"{folder.name}.flag")
    flag.unlink(missing_ok=True)
    earlier = log_file(folder)
    child = os.fork()
    if child == 0:
        with open(folder.with_name(f"{folder.name}.output"), "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            torch.set_num_threads(1)
            if kill and "in" in kill:
                stall(kill["in"], kill["call"], flag)
            os._exit(main(arguments))
    deadline = time.monotonic() + PATIENCE
    while kill is not None and time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return {"killed": False, "why": "it had ended before"}
        if "in" in kill:
            now = flag.exists()
        else:
            now = log_file(folder) != earlier and steps_done(folder) >= kill["after_step"]
        if now:
            time.sleep(kill.get("delay", 0.0))
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return {"killed": True, "step": steps_done(folder), "files": sorted(map(str, folder.rglob("*")))}
    output_text = folder.with_name(f"{folder.name}.output").read_text()
    return {"killed": False, "status": os.waitstatus_to_exitcode(status), "output": output_text[-2000:]}


if __name__ == "__main__":
    gc.freeze()  # Trainer collects garbage; what is imported here need not be looked through in every fork
    for plan in json.loads(Path(sys.argv[1]).read_text()):
        attempts = [attempt(plan["arguments"], Path(plan["folder"]), one) for one in [*plan["kills"], None]]
        print(json.dumps(attempts), flush=True)
