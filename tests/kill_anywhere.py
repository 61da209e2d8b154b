"""Kills commands anywhere and gives them again, a program for tests/runtime/test_kills.py.

    python kill_anywhere.py FOLDER KILLS SEED CASE ...
    python kill_anywhere.py FOLDER PAIRS SEED pairs     (runs with other seeds in one folder at once, none killed)

Every attempt is a fork of this process, which pays for the imports once; so are the processes that sweep and sequential
start. A kill strikes before a change of a file or folder below FOLDER that is drawn from those which an undisturbed run
makes, or at a moment of it; it hits the process that makes the change, the command, or all of its processes at once, as
a power cut does. After one to three kills the command runs undisturbed, and what then lies there is compared with what
the undisturbed run left. Printed: one JSON line for each such row of kills.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import demo
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401
import yaml
from forked import Fork

import grun.commands.unlearn  # noqa: F401
import grun.evaluation.generation
import grun.evaluation.metrics
import grun.report.make
import grun.requests.store
from grun.cli import main
from grun.runtime import ownership, stopping
from grun.runtime.runs import first_difference

EARLY = 0.8
"""Part of an undisturbed run's time in which moments are drawn."""
PATIENCE = 120
"""Seconds until an attempt that hangs is a failure."""
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
VOLATILE = {"seconds", "peak_memory_bytes", "resumed_from", "cache", "digest"}
"""Keys of JSON files that depend on the way to a result."""
UNREAD = (".png", ".html", ".log", ".md", ".csv")
"""Endings of files that show seconds, are drawn, or are what a process said: they are there or not."""


class CommandFork(Fork):
    """A process that a command starts, as a fork of it; has of a Popen what is asked of one."""

    def __init__(self, command: Sequence[str], **streams: Any) -> None:
        self.returncode: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.environ[stopping.PARENT] = f"{parent} speaks"
            if "stdout" in streams:
                os.dup2(streams["stdout"].fileno(), 1)
                os.dup2(streams["stdout"].fileno(), 2)
            os._exit(main(list(command[command.index("grun") + 1 :])))


class Counter:
    """Counts changes of files below a folder, over all processes of an attempt, and kills before one of them."""

    def __init__(self, root: Path) -> None:
        self.root = f"{root}/"
        self.memory = mmap.mmap(-1, 16)

    def count(self, kill_at: int, group: bool) -> None:
        """From now on in this process and its forks: `kill_at` is the number of the change, 0 for none."""
        self.memory[:8] = bytes(8)

        def changed(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = arguments
                if not isinstance(flags, int) or not flags & WRITES:
                    return
            elif event in CHANGES:
                path = arguments[0]
            else:
                return
            name = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
            if name.startswith(self.root) or not name.startswith("/"):  # else of a cache of the system's
                (done,) = struct.unpack("q", self.memory[:8])
                self.memory[:8] = struct.pack("q", done + 1)
                if done + 1 == kill_at:
                    os.killpg(0, signal.SIGKILL) if group else os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(changed)

    @property
    def done(self) -> int:
        return int(struct.unpack("q", self.memory[:8])[0])


def begin(arguments: list[str], output: str, counter: Counter | None = None, **kill: Any) -> int:
    """A fork that runs a command, in a process group of its own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(output, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        stopping.start = CommandFork  # type: ignore[assignment]
        if counter is not None:
            counter.count(kill.get("change", 0), kill["who"] == "all")
        os._exit(main(arguments))
    return child


def attempt(arguments: list[str], counter: Counter, kill: dict[str, Any]) -> dict[str, Any]:
    """Run a command, and kill it as `kill` says; what became of it."""
    output = counter.root.rstrip("/") + ".output"
    child = begin(arguments, output, counter, **kill)
    started = time.monotonic()
    if "after" in kill:
        time.sleep(kill["after"])
        number = signal.SIGTERM if kill["who"] == "SIGTERM" else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if kill["who"] == "all" else os.kill)(child, number)
    status: int | str = "hangs"
    while time.monotonic() - started < PATIENCE:
        if (ended := os.waitpid(child, os.WNOHANG)) != (0, 0):
            status = os.waitstatus_to_exitcode(ended[1])
            break
        time.sleep(0.002)
    orphans = still_there(child)
    said = Path(output).read_text(errors="replace")
    return {**kill, "status": status, "orphans": orphans, "said": said[-1500:], "seconds": time.monotonic() - started}


def still_there(group: int) -> bool:
    """Whether processes of a group outlive the first of them by more than they need to end; none does afterwards."""
    deadline = time.monotonic() + stopping.PATIENCE
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.005)
        os.killpg(group, signal.SIGKILL)
        return True
    return False


def snapshot(root: Path) -> dict[str, Any]:
    """What lies below a folder, caches aside: bytes of files, JSON without what depends on the way."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name.split("/")[0] == "cache":
            continue
        if path.is_dir():
            found[f"{name}/"] = None
        elif name.endswith(f"{ownership.PRIVATE}/{ownership.LIST_FILE}"):
            of = path.parent.parent  # names of what is gone by now may stand there still
            found[name] = {one for one in ownership.listed(of) or () if (of / one).exists()}
        elif path.suffix in UNREAD:
            found[name] = None
        elif path.suffix == ".json":
            found[name] = plain(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def plain(value: Any) -> Any:
    """JSON without what depends on the way, and without digests of what does."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return re.sub("[0-9a-f]{64}", "", value) if isinstance(value, str) else value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of files that are not as they should be, and in what."""
    return [
        f"{name} is {'left over' if name not in expected else 'missing'}"
        if name not in found or name not in expected
        else f"{name} is another: {apart(found[name], expected[name])}"
        for name in sorted({*found, *expected})
        if name not in found or name not in expected or found[name] != expected[name]
    ]


def apart(one: Any, other: Any) -> str:
    """Where two values differ."""
    if isinstance(one, set):
        return str(sorted(one ^ other))
    return first_difference(one, other) if isinstance(one, dict) else ""


# -- the commands -----------------------------------------------------------------------------------------------------


def sequence(root: Path) -> list[str]:
    tiny = {"hidden_size": 32, "blocks": 4, "intermediate_size": 64, "vocabulary": 600}
    profile = {
        "base": "demo",
        "data": {"demo": {"forget": 2, "heldout": 1, "unknown": 1, "refused": 1, "retain": 4, "questions": 3}},
        "model": {"tiny": tiny},
        "unlearn": {
            "method": {"blocks": [1, 2, 3], "gate": "linear"},
            "train": {"epochs": 2, "batch_size": 3, "save_steps": 1},
            "cache": {"dir": None},
        },
        "evaluate": {"max_new_tokens": 4, "continuations": ["answer"]},
    }
    options = {"profile": str(root / "tiny.yaml"), "requests": 2, "unlearn": {"objective": "gd"}}
    (root / "tiny.yaml").write_text(yaml.safe_dump(profile))
    (root / "sequence.yaml").write_text(yaml.safe_dump(options))
    return ["sequential", f"sequence={root / 'sequence.yaml'}", "methods=[grun,lora]"]


def sweep(root: Path) -> list[str]:
    definition = {
        "profile": "demo",
        "axes": {"objective": ["gd"], "method.parametrization": ["full", "grun"]},
        "unlearn": {
            "data": {"demo": {"forget": 2, "heldout": 2, "unknown": 2, "refused": 2, "retain": 4, "questions": 3}},
            "method": {"blocks": [1, 2, 3], "gate": "linear"},
            "train": {"epochs": 2, "batch_size": 5, "save_steps": 1},
            "cache": {"dir": None},
        },
        "evaluate": {"max_new_tokens": 4, "data": {"limit": 4}, "continuations": ["answer"]},
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(definition))
    return ["sweep", f"sweep={root / 'sweep.yaml'}", "jobs=2", "discard_models=true"]


def commands(root: Path) -> dict[str, tuple[list[str], list[str]]]:
    """By case: the command, whose results go to root/work, and one that makes what lies there before."""
    taught, work = root / "taught", root / "work"
    model, cache = f"model.path={taught}", f"cache.dir={work / 'cache'}"
    unlearn = [*demo.DATA, *demo.TRAINING, model, "objective=npo", "method.dropout=0.2", "train.save_steps=2"]
    evaluate = [*demo.DATA, model, "max_new_tokens=4", "batch_size=16", "data.limit=6"]
    add = ["requests", "add", f"store={work / 'store'}", *unlearn, cache]
    finetune = ["finetune", *demo.DATA, *demo.MODEL, "train.save_steps=2", f"output_dir={work / 'taught'}"]
    return {
        "unlearn": (["unlearn", *unlearn, "train.monitor_epochs=1", f"output_dir={work / 'run'}", cache], []),
        "evaluate": (["evaluate", *evaluate, f"adapter={root / 'adapter'}", f"output_dir={work / 'evaluation'}"], []),
        "finetune": (finetune, []),
        "requests": ([*add, "id=second", "data.demo.seed=1"], [*add, "id=first"]),
        "sequential": ([*sequence(root), f"model={taught}", f"results_dir={work / 'results'}"], []),
        "sweep": ([*sweep(root), f"model={taught}", f"results_dir={work / 'results'}"], []),
    }


def in_a_fork(arguments: list[str], counter: Counter) -> int:
    """Run a command undisturbed; how many changes it makes."""
    done = attempt(arguments, counter, {"who": "none"})
    assert done["status"] == 0, done
    return counter.done


def drawn(random_: random.Random, changes: int, seconds: float) -> dict[str, Any]:
    """A kill before a change, or at a moment, which lies within a run that is faster than the one of `seconds` too."""
    if random_.random() < 0.7:
        return {"change": random_.randint(1, changes), "who": random_.choice(["all", "one"])}
    return {"after": random_.uniform(0.02, EARLY * seconds), "who": random_.choice(["all", "command", "SIGTERM"])}


def run_case(root: Path, name: str, kills: int, random_: random.Random) -> None:
    """Kill one command `kills` times, and print what came of it."""
    work, before = root / "work", root / "before"
    arguments, first = commands(root)[name]
    counter = Counter(work)
    for folder in (work, before):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir()
    if first:
        in_a_fork(first, counter)
    shutil.copytree(work, before)
    started = time.monotonic()
    changes = in_a_fork(arguments, counter)
    seconds, expected = time.monotonic() - started, snapshot(work)
    while kills > 0:
        shutil.rmtree(work)
        shutil.copytree(before, work)
        asked = [drawn(random_, changes, seconds) for _ in range(min(kills, random_.randint(1, 3)))]
        kills -= len(asked)
        attempts = [attempt(arguments, counter, kill) for kill in asked]
        last = attempt(arguments, counter, {"who": "none"})
        if name == "requests" and "is there already" in last["said"]:  # it was in; the next writer clears up
            last = attempt(["requests", "enable", arguments[2], "id=first"], counter, {"who": "none"})
        wrong = differences(snapshot(work), expected) if last["status"] == 0 else [f"the command failed: {last}"]
        row = {"case": name, "changes": changes, "seconds": seconds, "attempts": attempts, "wrong": wrong}
        print(json.dumps(row), flush=True)


def run_pairs(root: Path, count: int, random_: random.Random) -> None:
    """Give two commands with other seeds the same folder at once, `count` times."""
    work, (arguments, _) = root / "work", commands(root)["unlearn"]
    expected = []
    for seed in (1, 2):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        in_a_fork([*arguments, f"seed={seed}"], Counter(work))
        expected.append(snapshot(work))
    for _ in range(count):
        shutil.rmtree(work)
        work.mkdir()
        order = random_.sample([0, 1], 2)
        started: dict[int, int] = {}
        for which in order:
            started[which] = begin([*arguments, f"seed={which + 1}"], f"{work}.{which}.output")
            time.sleep(random_.choice([0.0, random_.uniform(0, 0.5)]))
        ends = {which: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for which, child in started.items()}
        said = [Path(f"{work}.{which}.output").read_text(errors="replace")[-500:] for which in (0, 1)]
        won = [which for which, status in ends.items() if status == 0]
        wrong = differences(snapshot(work), expected[won[0]]) if len(won) == 1 else [f"{len(won)} runs succeeded"]
        refused = [said[which] for which in (0, 1) if which not in won]
        print(
            json.dumps({"case": "pairs", "statuses": sorted(ends.values()), "said": refused, "wrong": wrong}),
            flush=True,
        )


if __name__ == "__main__":
    root, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    cases = sys.argv[4:]
    os.chdir(root)
    grun.requests.store._now = lambda: "2026-01-01T00:00:00+00:00"
    grun.report.make.make_report = lambda config: {}  # pictures, which take seconds
    gc.freeze()
    with contextlib.redirect_stdout(sys.stderr):
        nothing = Counter(root)
        in_a_fork(["finetune", *demo.DATA, *demo.MODEL, f"output_dir={root / 'taught'}"], nothing)
        unlearned = [f"model.path={root / 'taught'}", f"output_dir={root / 'adapter'}", "cache.dir=null"]
        in_a_fork(["unlearn", *demo.DATA, *demo.TRAINING, *unlearned], nothing)
    if cases == ["pairs"]:
        run_pairs(root, count, random.Random(seed))
    for number, case in enumerate(cases if cases != ["pairs"] else []):
        run_case(root, case, count // len(cases) + (number < count % len(cases)), random.Random(f"{seed} {case}"))
