"""Whatever is handed in, `grun` says what is wrong in one line: options, rows, YAML and files of all kinds at random.

Each case runs a command in this process. A bug of GRUN (status 70) is found by its traceback; all are listed at the end
with the lines that repeat them. `-m slow` runs 3,000 cases, the others are their beginning.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo
import made_results
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from grun.cli import BUG, main
from grun.config.values import COMMANDS, describe, options_of

LONGEST = 30
"""Seconds that a case may take."""
COUNTS = {
    "options": (30, 800), "runs": (8, 400), "rows": (15, 400), "yaml": (25, 400), "adapters": (8, 250),
    "stores": (8, 250), "results": (3, 200), "models": (5, 200), "checkpoints": (2, 100),
}  # fmt: skip
"""Cases of each family, of the quick suite and of all, 3,000."""
DATA = [*(f"data.demo.{group}=2" for group in ("forget", "heldout", "unknown", "refused")), "data.demo.questions=2"]
DATA += ["data.name=demo", "data.demo.retain=4", "data.template=tiny"]
UNLEARN = ["unlearn", *DATA, "objective=gd", "method.blocks=[0,1]", "train.epochs=2", "train.save_steps=1"]
UNLEARN += ["train.keep_all_checkpoints=true", "loss.retain_weight=1", "cache.dir=null", "train.monitor_epochs=1"]
SLOWER = re.compile(r"epochs|gate_pretraining|output_dir|path|samples|beside|device|launcher|trust|hidden|blocks|vocab")
"""Options that a run is not tried with: they take long, or lead out of the folder."""

ODD: list[Any] = [5, -1, 0, 2.5, 1e308, 10**30, float("nan"), True, None, "", "x", "\ud800", "[red]s[/x]", "=1", "a\0b"]
ODD += ["${oc.env:HOME}", "1e400", [], {}, [5], [[]], {"a": 1}, [None], "\u2028", "9" * 400]
TEXTS = st.one_of(st.sampled_from([str(value) for value in ODD]), st.text(max_size=12))
VALUES = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8))
VALID: dict[type, list[str]] = {
    list: ["[]", "[1]", "[x]", "[0,1]"],
    bool: ["true", "false"],
    int: ["0", "1", "2", "7", "4294967295"],
    float: ["0", "1", "0.5", "1e-30", "1e30"],
    str: ["", "x", "auto", "none", "0.5", "cosine"],
}
"""What options of a type may look like."""
DOCUMENTS = [
    b"",
    b"5",
    b"[]",
    b"null",
    b"{}",
    b"\xff",
    b"[" * 100_000,
    b'{"a": 1, "a": 2}',
    b"\xef\xbb\xbf{}",
    b"{" * 9,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, an adapter, a store, results of every suite and a run that was cut off, to damage copies of."""
    folder = tmp_path_factory.mktemp("world")
    demo.random_model(folder)
    model = [f"model.path={folder / 'model'}", *DATA, "max_new_tokens=2"]
    made_results.write_demo(folder / "demo")
    rows = [{"question": f"Who is {n}?", "answer": f"Ada {n}", "fact": "Ada"} for n in range(4)]
    for name, first in (("forget", 0), ("retain", 2)):
        of_set = [{**row, "n": first} for row in rows[first : first + 2]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_set))
    store = ["requests", "add", f"store={folder / 'store'}", "id=a", "data.name=demo", f"adapter={folder / 'adapter'}"]
    lore = [*(f"data.lore.{group}=2" for group in ("forget", "neighbor", "retain", "general")), "data.name=lore"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(store) == 0
        assert main([*UNLEARN, f"model.path={folder / 'model'}", f"output_dir={folder / 'cut'}"]) == 0
        (folder / "cut" / "run.json").unlink()
        for name, adapter in (("before", []), ("gd", [f"adapter={folder / 'adapter'}"])):
            attacks = ["suite=attacks", "attack_rows=1", "attacks=[plain,prefill_1]"]
            assert main(["evaluate", *model, *adapter, *attacks, f"output_dir={folder}/attacks/evaluation/{name}"]) == 0
            knowledge = [
                *lore,
                "suite=knowledge",
                "data.template=tiny",
                f"output_dir={folder}/knowledge/evaluation/{name}",
            ]
            assert main(["evaluate", *model[:1], *adapter, *knowledge]) == 0
    return folder


class Cases:
    """Runs commands on damaged copies and keeps the bugs that they find."""

    def __init__(self, world: Path, scratch: Path) -> None:
        self.world, self.scratch, self.number = world, scratch, 0
        self.bugs: dict[str, str] = {}
        self.hung = open(scratch / "hung.txt", "w")

    def copy(self, name: str) -> Path:
        """A fresh copy of a part of the world."""
        self.number += 1
        copy = self.scratch / f"case{self.number}" / name
        source = self.world / name
        copy.parent.mkdir(parents=True)
        return Path(shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy))

    def run(self, arguments: list[str], damage: str = "") -> None:
        """One command; a traceback, or more than `LONGEST` seconds, is a bug."""
        out, err, started = io.StringIO(), io.StringIO(), time.monotonic()
        faulthandler.dump_traceback_later(4 * LONGEST, exit=True, file=self.hung)  # it then tells where
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
        faulthandler.cancel_dump_traceback_later()
        for file in self.scratch.glob("grun-traceback-*"):
            places = re.findall(r'File ".*?((?:grun|baselines)/[\w/]+\.py)", line (\d+)', file.read_text())
            self.bugs.setdefault(f"{places[-1:]} {file.read_text().splitlines()[-1][:200]}", f"{damage} {arguments}")
            file.unlink()
        seconds = time.monotonic() - started
        if status == BUG or "Traceback (most recent" in err.getvalue() or seconds > LONGEST:
            self.bugs.setdefault(f"status {status}, {seconds:.0f} s: {err.getvalue()[-300:]}", f"{damage} {arguments}")
        shutil.rmtree(self.scratch / f"case{self.number}", ignore_errors=True)


def at_random(file: Path, data: st.DataObject) -> str:
    """Damage a file; what was done, in words."""
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    way = data.draw(st.sampled_from(("value", "value", "value", "bytes", "cut", "document", "gone")))
    if way == "value" and file.suffix in (".json", ".jsonl") and lines:
        number = data.draw(st.integers(0, len(lines) - 1)) if file.suffix == ".jsonl" else 0
        document = json.loads(lines[number] if file.suffix == ".jsonl" else content)
        place, document = replaced(document, data)
        text = json.dumps(document).encode() + b"\n"
        file.write_bytes(b"".join([*lines[:number], text, *lines[number + 1 :]]) if file.suffix == ".jsonl" else text)
        return f"{file.name}:{number + 1} {place}"
    at = data.draw(st.integers(0, max(0, len(content) - 1)))
    if way == "gone":
        file.unlink()
    elif way == "document":
        file.write_bytes(data.draw(st.sampled_from(DOCUMENTS)))
    elif way == "cut":
        file.write_bytes(content[:at])
    else:
        file.write_bytes(content[:at] + data.draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :])
    return f"{file.name} {way} at {at}"


def replaced(document: Any, data: st.DataObject) -> tuple[str, Any]:
    """A JSON document with one of its parts gone or replaced; which and by what."""
    place, holder = [], document
    while isinstance(holder, dict | list) and holder:
        key = data.draw(st.sampled_from(list(holder) if isinstance(holder, dict) else list(range(len(holder)))))
        place.append(key)
        if not isinstance(holder[key], dict | list) or not holder[key] or data.draw(st.integers(0, 3)) == 0:
            break
        holder = holder[key]
    value = data.draw(VALUES)
    if not place:
        return f"<- {value!r}", value
    if isinstance(holder, dict) and data.draw(st.integers(0, 4)) == 0:
        del holder[place[-1]]
        return f"{place} gone", document
    holder[place[-1]] = value
    return f"{place} <- {value!r}", document


def option(data: st.DataObject, command: str, keys: list[str]) -> str:
    """`key=value` for an option of a command, or nearly."""
    key = data.draw(st.sampled_from(keys))
    return f"{key}={data.draw(TEXTS)}"


def options(cases: Cases, data: st.DataObject) -> None:
    command = data.draw(st.sampled_from([name for name in COMMANDS if name not in ("requests", "sequential", "sweep")]))
    keys = [key for key, _, _ in describe(COMMANDS[command])]
    arguments = [option(data, command, keys) for _ in range(data.draw(st.integers(1, 3)))]
    cases.run([command, *arguments, *data.draw(st.lists(TEXTS, max_size=1)), "--print-config"])


def runs(cases: Cases, data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(("generate", "evaluate", "unlearn")))
    kinds = {option.key: option.kind for option in options_of(COMMANDS[command]) if not SLOWER.search(option.key)}
    model, cases.number = [f"model.path={cases.world / 'model'}", *DATA, "max_new_tokens=2"], cases.number + 1
    if command == "unlearn":
        model = [*UNLEARN, f"model.path={cases.world / 'model'}", "train.epochs=1"][1:]
    for key in data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=2)):
        fitting = next((VALID[kind] for kind in VALID if kind.__name__ in str(kinds[key])), ["x"])
        model.append(f"{key}={data.draw(st.sampled_from(fitting))}")
    where = ["Who?"] if command == "generate" else [f"output_dir={cases.scratch}/case{cases.number}/out"]
    cases.run([command, *model, *where])


def rows(cases: Cases, data: st.DataObject) -> None:
    file = cases.copy(data.draw(st.sampled_from(("forget.jsonl", "retain.jsonl"))))
    other = "retain" if file.stem == "forget" else "forget"
    damage = at_random(file, data)
    files = [f"data.{file.stem}={file}", f"data.{other}={cases.world / other}.jsonl", "data.name=jsonl"]
    own = ["data.template=tiny", "max_new_tokens=1", "data.limit=1", f"output_dir={file.parent / 'out'}"]
    cases.run(["evaluate", f"model.path={cases.world / 'model'}", *files, *own], damage)


def yaml(cases: Cases, data: st.DataObject) -> None:
    file = cases.scratch / "file.yaml"
    keys = st.sampled_from(["unlearn", "model", "data", "seed", "base", "train", "axes", "methods", "requests", "a"])
    inner = st.recursive(VALUES, lambda part: st.lists(part, max_size=3) | st.dictionaries(keys, part), max_leaves=6)
    text = data.draw(st.one_of(inner.map(json.dumps), st.text(max_size=40), st.sampled_from(DOCUMENTS).map(repr)))
    end = data.draw(st.sampled_from([b"", b"\xff", b": &a [*a]", b"!!set {a}"]))
    file.write_bytes(text.encode("utf-8", "surrogatepass") + end)
    command = data.draw(
        st.sampled_from((["unlearn", "--print-config", "profile="], ["sweep", "sweep="], ["sequential", "sequence="]))
    )
    models = [] if "unlearn" in command else ["model=./nowhere", "retain_model=./nowhere"]
    cases.run([*command[:-1], f"{command[-1]}{file}", *models], repr(file.read_bytes()))


def damaged(parts: tuple[str, ...], commands: Callable[[Path, Path], list[list[str]]], pattern: str = "*.json*") -> Any:
    """A family: one file of a copy of one of `parts` is damaged, then one of the commands is run on it."""

    def case(cases: Cases, data: st.DataObject) -> None:
        copy = cases.copy(data.draw(st.sampled_from(parts)))
        file = data.draw(st.sampled_from(sorted(path for path in copy.rglob(pattern) if path.is_file())))
        damage = at_random(file, data)
        cases.run(data.draw(st.sampled_from(commands(copy, cases.world))), f"{file.relative_to(copy)}: {damage}")

    return case


def asked(model: Path, adapter: Path | None = None) -> list[str]:
    """A command that loads a model, and an adapter."""
    own = [] if adapter is None else [f"adapter={adapter}"]
    return ["generate", f"model.path={model}", *own, "data.template=tiny", "max_new_tokens=1", "Who?"]


STORE = (("list",), ("history", "format=json"), ("verify", "files_only=true"), ("disable", "id=a"), ("remove", "id=a"))
FAMILIES: dict[str, Any] = {
    "options": options,
    "runs": runs,
    "rows": rows,
    "yaml": yaml,
    "adapters": damaged(
        ("adapter",),
        lambda copy, world: [
            asked(world / "model", copy),
            ["requests", "add", f"store={copy}-store", "id=b", "data.name=demo", f"adapter={copy}"],
        ],
        "adapter_*",
    ),
    "stores": damaged(
        ("store",),
        lambda copy, world: [
            asked(world / "model", copy),
            *(["requests", action, f"store={copy}", *more] for action, *more in STORE),
        ],
        "*.*",
    ),
    "results": damaged(
        ("demo", "attacks", "knowledge"),
        lambda copy, _: [
            ["report", f"results_dir={copy}"],
            ["report", f"runs=[{copy}]", f"results_dir={copy}/r"],
        ],
    ),
    "checkpoints": damaged(
        ("cut",), lambda copy, world: [[*UNLEARN, f"model.path={world / 'model'}", f"output_dir={copy}"]], "*"
    ),
    "models": damaged(("model",), lambda copy, _: [asked(copy)], "*"),
}


@pytest.mark.parametrize(
    ("family", "count"),
    [
        pytest.param(family, count, marks=[pytest.mark.slow] if count >= 100 else [])
        for family in FAMILIES
        for count in COUNTS[family]
    ],
)
def test_nothing_that_is_handed_in_ends_in_a_traceback(
    family: str, count: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    logging.getLogger("grun").setLevel(logging.ERROR)
    cases = Cases(world, tmp_path)
    once = settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    once(given(st.data())(lambda data: FAMILIES[family](cases, data)))()
    assert not cases.bugs, "\n".join(f"{bug}\n    {line}" for bug, line in cases.bugs.items())
