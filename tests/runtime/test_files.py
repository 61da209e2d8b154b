"""What GRUN did not write stays as it is, whatever is run; what it wrote is whole, private and of one process."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_results import KNOWN, write_evaluation
from made_shards import ROWS, Builder
from watched import FORK, in_fork, killed_before

from grun.cache.folder import Use, remove_shards
from grun.cache.store import PrefixStore
from grun.cli import main
from grun.commands.corpora import write_corpora
from grun.config.options import CorporaConfig, ReportConfig
from grun.errors import GrunError, RunError
from grun.evaluation import evaluate
from grun.evaluation.plan import begin, previous_in
from grun.experiments.sweep.cells import Cell
from grun.report.make import make_report
from grun.requests.store import RequestStore
from grun.runtime import files
from grun.runtime.files import (
    append,
    clear,
    place,
    remove,
    staged,
    staging,
    take,
    taken,
    target,
    write_json,
)
from grun.runtime.ownership import foreign, held, listed
from grun.runtime.runs import claim, finish_run, open_run, write_whole

ROOT = Path(__file__).parents[2]
OWNERS = [ROOT / "grun" / "runtime" / name for name in ("files.py", "ownership.py")]
"""All that may change what lies on disk."""


# -- one owner ---------------------------------------------------------------------------------------------------------

CALLS = {"rmtree", "unlink", "rmdir", "removedirs", "rename", "renames", "mkdir", "makedirs", "touch", "symlink_to"}
CALLS |= {"hardlink_to", "copytree", "copyfile", "copy2", "copyfileobj", "write_text", "write_bytes", "truncate"}
OF_MODULE = {"remove", "replace", "move", "copy", "link", "symlink"}


def breaks(node: ast.AST) -> bool:
    """Whether a piece of code makes, replaces, moves or removes a file by itself."""
    if isinstance(node, ast.ImportFrom):
        return node.module in ("os", "shutil") and bool({name.name for name in node.names} & (CALLS | OF_MODULE))
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name) and node.func.id == "open":
        mode = node.args[1] if len(node.args) > 1 else next((k.value for k in node.keywords if k.arg == "mode"), None)
        of_number = isinstance(node.args[0], ast.Name) and node.args[0].id == "number"  # of mkstemp, which made it
        return isinstance(mode, ast.Constant) and bool(set("wax+") & set(str(mode.value))) and not of_number
    if not isinstance(node.func, ast.Attribute):
        return False
    of_module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("os", "shutil")
    of_path = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords
    of_dataclass = isinstance(node.func.value, ast.Name) and node.func.value.id == "dataclasses"
    return node.func.attr in CALLS or (node.func.attr in OF_MODULE and of_module) or (of_path and not of_dataclass)


def test_no_other_code_makes_replaces_moves_or_removes_files() -> None:
    found = []
    paths = [path for package in ("grun", "baselines", "pyvene_custom") for path in (ROOT / package).rglob("*.py")]
    for path in sorted(paths):
        lines = [getattr(node, "lineno", 0) for node in ast.walk(ast.parse(path.read_text())) if breaks(node)]
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines if path not in OWNERS]
    assert found == []
    for path in OWNERS:
        assert any(breaks(node) for node in ast.walk(ast.parse(path.read_text())))


# -- foreign files -----------------------------------------------------------------------------------------------------


def a_run(folder: Path, overwrite: bool, draw: random.Random) -> None:
    """What finetune, unlearn, import and the baselines do with their folder; cut off somewhere, or not."""
    identity = {"seed": draw.randrange(2)}
    with files.holding():
        if open_run(folder, identity, overwrite=overwrite) == "finished":
            return
        claim(folder, identity, overwrite=overwrite)
        with append(folder / "log.jsonl") as log:
            log.write(b"{}\n")
        for step in range(draw.randrange(3)):
            new = staging(folder / "checkpoints", "x") / f"checkpoint-{step}"
            files.make_folder(new)
            write_json(new / "task.json", step)
            place(new, folder / "checkpoints" / new.name)
        if draw.random() < 0.3:
            raise RunError("cut off")
        with staged(folder) as new:
            for name in ("README.md", "adapter_config.json", "model.safetensors", "sub/tokenizer.json"):
                write_json(new / name, 0)
        finish_run(folder, {"command": "unlearn"}, without=draw.choice(["checkpoints", None]))
        if draw.random() < 0.3:
            remove(folder / "model.safetensors")


def an_evaluation(folder: Path, overwrite: bool, draw: random.Random) -> None:
    with files.holding():
        previous_in(folder, overwrite)
        begin(folder, overwrite)
        append(folder / ".grun" / "unfinished-1" / "scores.jsonl").close()
        if draw.random() < 0.3:
            raise RunError("cut off")
        lines = draw.choice(["scores.jsonl", "questions.jsonl"])
        evaluate.write_evaluation(folder, {"key": "k", "sets": {}}, lambda new: write_json(new / lines, {}) or {}, {})


def corpora(folder: Path, overwrite: bool, draw: random.Random) -> None:
    config = CorporaConfig(source="lore", output_dir=str(folder), overwrite=overwrite)
    config.lore.seed = draw.randrange(2)
    write_corpora(config)


def a_sweep(folder: Path, overwrite: bool, draw: random.Random) -> None:
    hashes = str(draw.randrange(2)), str(draw.randrange(2))
    cell = Cell(folder / "cells" / "run.json", "run", {}, {}, {}, "weights", *hashes)
    with taken(target(folder, "results_dir"), lock="cell-run"):
        cell.write()
        cell.prepare()
        cell.record("started")
        cell.hand_over()
        append(cell.sibling("log")).close()
        with contextlib.suppress(GrunError):
            a_run(cell.run, False, draw)
        with contextlib.suppress(GrunError):
            an_evaluation(cell.evaluation, bool(cell.last().get("owned")), draw)
        cell.tidy()


def a_report(folder: Path, overwrite: bool, draw: random.Random) -> None:
    with taken(target(folder, "results_dir")):
        for name in draw.sample(["table.csv", "report.html", "summary.json", "matrix.png"], 3):
            write_json(folder / name, 0)
        remove(folder / "matrix.png")


def an_experiment(folder: Path, overwrite: bool, draw: random.Random) -> None:
    with taken(target(folder, "results_dir")):
        if not (folder / "experiment.json").is_file() and foreign(folder):
            raise RunError("not empty")
        if overwrite:
            clear(folder)
        for name in ("experiment.json", "data/forget.jsonl", "grun/chain.json", "grun/steps/r1.json"):
            write_json(folder / name, 0)
        a_run(folder / "grun" / "runs" / "r1", overwrite, draw)


def a_store(folder: Path, overwrite: bool, draw: random.Random) -> None:
    store = RequestStore.create(folder) if draw.random() < 0.5 else RequestStore.open(folder)
    with store.writing():
        with staged(folder / "requests" / draw.choice("ab")) as new:
            write_json(new / "adapter_config.json", 0)
        a_run(folder / "training" / "a", False, draw)
        store._clear_leftovers()


def a_cache(folder: Path, overwrite: bool, draw: random.Random) -> None:
    use = Use("run", None, {}, None, None)
    store = PrefixStore(target(folder, "cache.dir"), {"is": draw.randrange(2)}, memory_budget=1 << 30, use=use)
    store.complete(draw.sample(ROWS, 2), Builder())
    assert store.folder is not None
    if overwrite:
        remove_shards(store.folder, [path.name for path in store.folder.glob("*.safetensors")])


COMMANDS = [a_run, an_evaluation, corpora, a_sweep, a_report, an_experiment, a_store, a_cache]
NAMES = ["thesis.txt", ".git/HEAD", ".hidden", "README.md", "table.csv", "report.html", "run.json", "evaluation.json"]
NAMES += ["log.jsonl", "run_identity.json", "forget.jsonl", "checkpoints/mine.txt", "checkpoints/checkpoint-1/mine.pt"]
NAMES += ["cells/run.json", "cells/notes", "requests/a/mine", "requests/notes.txt", "training/a/mine", "stack.json"]
NAMES += ["model.safetensors", "sub/mine", "evaluation/run/mine", "run/thesis.txt", ".grun/mine", ".grun/files"]
NAMES += ["data/forget.jsonl", "grun/runs/r1/mine", "identity.json", ".model.safetensors.0.tmp", ".x.tmp", "matrix.png"]
NAMES += ["checkpoints", "sub", "requests", "training", "evaluation", "cells", "data", "grun", "run"]


def plant(folder: Path, draw: random.Random, outside: Path) -> set[Path]:
    """Put what is the user's at random places, if nothing is there; paths of it."""
    made = set()
    inside = [
        path for path in folder.rglob("*") if path.is_dir() and ".grun" not in path.parts and not path.is_symlink()
    ]
    for name in draw.sample(NAMES, draw.randrange(1, 6)):
        path = (folder if draw.random() < 0.6 or not inside else draw.choice(inside)) / name
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path) or (path.parent.name == ".grun" and any(path.parent.iterdir())):
                continue
            kind = draw.random()
            if kind < 0.15:
                path.symlink_to(draw.choice([outside, outside / "precious", outside / "nowhere"]))
            elif kind < 0.25:
                path.mkdir()
                (path / "within").write_text("of the user")
                made.add(path / "within")
            else:
                path.write_text(draw.choice(["of the user", "[]", "{}"]))
            made.add(path)
    return made


def state(path: Path) -> Any:
    if path.is_symlink():
        return os.readlink(path)
    return path.read_text() if path.is_file() else path.is_dir()


def sweep_over_trees(folder: Path, seeds: range) -> None:
    done = 0
    for seed in seeds:
        draw = random.Random(seed)
        tree, outside = folder / str(seed), folder / f"{seed}-outside"
        outside.mkdir()
        (outside / "precious").write_text("of the user")
        command = COMMANDS[seed % len(COMMANDS)]
        given = tree / draw.choice(["new", "a/b", "link"])
        tree.mkdir()
        (tree / "real").mkdir()
        (tree / "link").symlink_to(tree / "real")
        mine = {path: state(path) for path in (outside, outside / "precious", tree / "link")}
        for turn in range(4):
            if turn or draw.random() < 0.5:
                mine |= {path: state(path) for path in plant(given, draw, outside)}
            overwrite = draw.random() < 0.5
            with contextlib.suppress(GrunError, OSError):
                command(given, overwrite, draw)
                done += 1
            if draw.random() < 0.2:
                command = draw.choice(COMMANDS)
            after = {path: state(path) for path in mine}
            assert after == mine, (seed, command.__name__, overwrite)
        assert not held
        assert set(os.listdir(tree)) <= {"new", "a", "link", "real"}, "something lies next to the target"
    assert done > len(seeds), "commands are refused too often to show anything"


def test_nothing_of_the_user_is_missing_or_changed_in_200_random_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    sweep_over_trees(tmp_path, range(200))


@pytest.mark.slow
def test_nor_in_4000(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    sweep_over_trees(tmp_path, range(200, 4200))


def test_a_report_refuses_to_replace_a_file_of_the_user(tmp_path: Path) -> None:
    for name, shares in KNOWN.items():
        write_evaluation(tmp_path / "evaluation" / name, shares)
    (tmp_path / "table.csv").write_text("of the user")
    with pytest.raises(RunError, match=r"table\.csv is there already and no list says that GRUN wrote it"):
        make_report(ReportConfig(results_dir=str(tmp_path)))
    (tmp_path / "table.csv").rename(tmp_path / "mine.csv")
    for _ in range(2):
        make_report(ReportConfig(results_dir=str(tmp_path)))
    assert (tmp_path / "mine.csv").read_text() == "of the user"


def test_what_the_user_moved_away_and_linked_is_not_removed_through_the_link(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    with taken(run):
        write_json(run / "checkpoints" / "checkpoint-1" / "task.json", 0)
        (run / "checkpoints").rename(disk)
        (run / "checkpoints").symlink_to(disk)
        clear(run)
        with pytest.raises(RunError, match="behind a link"):
            write_json(run / "checkpoints" / "checkpoint-1" / "task.json", 1)
    assert json.loads((disk / "checkpoint-1" / "task.json").read_text()) == 0


def test_a_line_of_the_list_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        with taken(tmp_path / "run"):
            write_json(tmp_path / "run" / name, 0)
        with open(tmp_path / "run" / ".grun" / "files", "ab") as file:
            file.write(b'["+", "thes')  # as a full disk leaves it
    assert listed(tmp_path / "run") == {"a", "b", "c"}


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["/", "~", ".", "..", "~/..", "sub/..", "to_home", "~nobody_of_that_name/x", "a\0b"])
@pytest.mark.parametrize("command", [["corpora", "source=lore", "output_dir="], ["report", "results_dir="]])
def test_a_folder_that_is_more_than_a_result_is_no_target(
    given: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, here = tmp_path / "users" / "home", tmp_path / "users" / "here"
    for folder in (home, here / "sub"):
        folder.mkdir(parents=True)
    (here / "to_home").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    before = sorted(tmp_path.rglob("*"))
    assert main([*command[:-1], command[-1] + given]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_is_followed_and_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        assert main(["corpora", "source=lore", f"output_dir={tmp_path / 'link'}", "overwrite=true"]) == 0
    assert os.readlink(tmp_path / "link") == "real" and (tmp_path / "real" / "forget.jsonl").is_file()
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o755


def test_a_run_of_an_older_version_is_found_but_not_replaced(tmp_path: Path) -> None:
    for name, values in (("run_identity.json", {"seed": 0}), ("run.json", {"command": "unlearn"})):
        (tmp_path / name).write_text(json.dumps(values))
    assert open_run(tmp_path, {"seed": 0}, overwrite=False) == "finished"
    with pytest.raises(RunError, match="without a readable list of its files.*older version"):
        open_run(tmp_path, {"seed": 1}, overwrite=True)


@pytest.mark.parametrize("damaged", ["run_identity.json", "run.json"])
@pytest.mark.parametrize("content", ["5", "[]", "{", "\0"])
def test_a_damaged_file_of_a_run_is_one_line(damaged: str, content: str, tmp_path: Path) -> None:
    with files.holding():
        claim(tmp_path, {}, overwrite=False)
        finish_run(tmp_path, {})
    (tmp_path / damaged).write_text(content)
    with pytest.raises(RunError, match=f"{damaged} is damaged") as caught:
        open_run(tmp_path, {}, overwrite=False)
    assert "\n" not in str(caught.value)


# -- one writer --------------------------------------------------------------------------------------------------------


def train_into(folder: Path, seed: int, started: Any, said: Path) -> None:
    started.wait()
    try:
        with files.holding():
            claim(folder, {"seed": seed}, overwrite=False)
            for name in ("log.jsonl", "model.safetensors"):
                write_json(folder / name, seed)
                time.sleep(0.005)
            finish_run(folder, {"seed": seed})
    except RunError as error:
        said.write_text(str(error))


def test_of_two_runs_with_other_seeds_in_one_folder_one_is_refused(tmp_path: Path) -> None:
    for pair in range(20):
        folder, started = tmp_path / f"run{pair}", FORK.Barrier(2)
        said = [tmp_path / f"{pair}-{seed}" for seed in (0, 1)]
        processes = [in_fork(train_into, folder, seed, started, said[seed]) for seed in (0, 1)]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        (refused,) = [seed for seed in (0, 1) if said[seed].exists()]
        assert str(folder) in said[refused].read_text() and "choose another" in said[refused].read_text()
        kept = [json.loads((folder / name).read_text()) for name in ("log.jsonl", "model.safetensors")]
        assert kept == [1 - refused] * 2 == [json.loads((folder / "run.json").read_text())["seed"]] * 2
        assert json.loads((folder / "run_identity.json").read_text())["seed"] == 1 - refused
        assert not (folder / ".grun").exists()


def test_a_lock_ends_with_its_process_and_what_that_left_is_cleared(tmp_path: Path) -> None:
    folder, flag = tmp_path / "run", tmp_path / "flag"

    def write_and_hang() -> None:
        take(folder)
        write_json(folder / "log.jsonl", 0)
        write_json(staging(folder, "half") / "model.safetensors", 0)
        flag.touch()
        time.sleep(60)

    process = in_fork(write_and_hang)
    while not flag.exists():
        time.sleep(0.005)
    with pytest.raises(files.BusyError, match="another process is writing to .*run; try again"), taken(folder):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert open_run(folder, {}, overwrite=False) == "new"
    assert sorted(path.name for path in (folder / ".grun").iterdir()) == ["files", "folder.lock"]
    with files.holding():
        claim(folder, {}, overwrite=False)
        assert not (folder / "log.jsonl").exists()
        finish_run(folder, {})
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "run_identity.json"]


def test_a_file_system_without_locks_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with taken(tmp_path / "run"):
        write_json(tmp_path / "run" / "log.jsonl", 0)
    assert listed(tmp_path / "run") == {"log.jsonl"}


# -- whole or absent ---------------------------------------------------------------------------------------------------


def corpora_of(folder: Path, content: str) -> None:
    """Replace the folder's files as `corpora` does."""

    def write(new: Path) -> dict[str, Any]:
        for name in ("forget.jsonl", f"{content}.jsonl"):
            files.write_text(new / name, content)
        return {}

    write_whole(folder, {"is": content}, write, overwrite=True)


def test_killed_at_any_moment_corpora_are_the_old_or_the_new(tmp_path: Path) -> None:
    seen: list[str] = []
    for kill_at in range(1, 200):
        folder = tmp_path / str(kill_at)
        corpora_of(folder, "old")
        (folder / "thesis.txt").write_text("of the user")
        process = in_fork(killed_before, kill_at, lambda folder=folder: corpora_of(folder, "new"))
        process.join(60)
        files.settle(folder)
        is_now = (folder / "forget.jsonl").read_text()
        assert {path.name for path in folder.iterdir()} == {
            *("forget.jsonl", f"{is_now}.jsonl", "run.json", "run_identity.json", "thesis.txt")
        }
        assert json.loads((folder / "run_identity.json").read_text()) == {"is": is_now}
        seen.append(is_now)
        if process.exitcode == 0:
            break
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"} and len(seen) > 10


# -- who may read ------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_mask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_mask")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_what_is_written_is_private_and_what_the_user_made_keeps_its_mode(
    command: Callable[[Path, bool, random.Random], None], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    for seed in range(6):
        folder = tmp_path / "mine" / str(seed) / "run"
        with contextlib.suppress(GrunError):
            command(folder, False, random.Random(seed))
        found = [path for path in (tmp_path / "mine").rglob("*") if not path.is_symlink()]
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in found}
        assert {mode for path, mode in modes.items() if path.is_dir()} <= {0o700}
        assert {mode for path, mode in modes.items() if path.is_file()} <= {0o600}
    assert any(path.is_file() for path in (tmp_path / "mine").rglob("*"))
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o755


def test_what_a_library_writes_is_private_once_it_is_in_place(tmp_path: Path) -> None:
    with taken(tmp_path / "run"), staged(tmp_path / "run") as new:
        torch.save({}, new / "optimizer.pt")
        assert stat.S_IMODE(new.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "run" / "optimizer.pt").stat().st_mode) == 0o600
