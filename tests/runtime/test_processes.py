"""Two processes (gloo, on the CPU) give what one gives, fail as one, and lose nothing when one of them dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
import two_processes
from made_shards import ROWS, assert_right, shard_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from two_processes import CASES, STEPS, evaluate_arguments, resumable, run_case, unlearn_arguments
from watched import in_fork, logged

from grun.cache.shard import Shard, read_shard
from grun.cache.store import PrefixStore, Share
from grun.cli import main
from grun.data.encoding import EncodedRow, collate
from grun.errors import ConfigError, RunError
from grun.evaluation.journal import Journal
from grun.runtime import processes, sharding
from grun.training.task import cut, deal
from grun.training.train import train

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(two_processes.__file__)
SAME = {"rel": 1e-6, "abs": 1e-12}
"""What the project promises; in float64 the order of sums leaves 1e-12 or so."""
MARK = "from a journal"
PATIENCE = 240
"""Seconds until a launch that hangs is a failure."""


@pytest.fixture(scope="module", autouse=True)
def sockets() -> None:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        pytest.skip(f"processes cannot reach each other here: {error}")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests", **more}


def launch(mode: str, folder: Path) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), mode, str(folder)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ended = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(started, ended, strict=True)]


def assert_same_log(found: Path, expected: Path, **tolerance: float) -> None:
    lines, wanted = logged(found), logged(expected)
    assert len(lines) == len(wanted)
    for one, other in zip(lines, wanted, strict=True):
        assert one == pytest.approx(other, **(tolerance or SAME))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process does, and then what two do."""
    made = tmp_path_factory.mktemp("processes")
    assert demo.finetune(made / "taught") == 0
    with two_processes.short_passes():
        assert main(unlearn_arguments(made, "one")) == 0
    shutil.copytree(made / "one", made / "adapter")
    assert main(evaluate_arguments(made, "evaluated-by-one")) == 0
    task, config = resumable()
    train(task, config, made / "saved-by-one", seed=0)
    shutil.copytree(made / "saved-by-one", made / "whole")
    shutil.rmtree(made / "saved-by-one" / "checkpoints" / f"checkpoint-{STEPS}")
    cut_off(made)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(PROGRAM), "checks", str(made)],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return made


def cut_off(made: Path) -> None:
    """Journals as three processes leave them that are killed: a few lines each, of one the last one torn."""

    def killed(*_: Any) -> None:
        raise RunError("killed before anything was written")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grun.evaluation.evaluate._write", killed)
        assert main(evaluate_arguments(made, "cut-off")) == 1
    (journals,) = made.glob("cut-off/.grun/unfinished-*")
    for name in ("scores", "generations"):
        lines = (journals / f"{name}.jsonl").read_text().splitlines(keepends=True)
        assert len(lines) > 3
        (journals / f"{name}.jsonl").write_text(lines[0])
        (journals / f"{name}-1.jsonl").write_text(lines[1] + lines[2][:-5])
        (journals / f"{name}-2.jsonl").write_text(lines[3])
    numbers, answers = json.loads(lines[3].partition(" ")[2])
    (journals / "generations-2.jsonl").unlink()
    write_journal(journals / "generations-2.jsonl", {tuple(numbers): [[MARK, *rest] for _, *rest in answers]})


def write_journal(path: Path, results: dict[tuple[int, ...], list[Any]]) -> None:
    with Journal[Any](path.parent, path.stem, lambda value: value) as journal:
        for numbers, values in results.items():
            journal.add(numbers, values)


@pytest.fixture(scope="module")
def findings(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"findings-{rank}.json").read_text()) for rank in range(2)]


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_the_steps_of_two_processes_are_those_of_one(case: str, folder: Path, tmp_path: Path) -> None:
    """Ragged rows, other numbers of tokens in each share, and steps in which one process has no row; float64."""
    run_case(case, tmp_path)
    assert len(logged(tmp_path)) == STEPS
    assert_same_log(folder / f"two-{case}", tmp_path)


def test_the_cached_engine_on_two_processes_gives_the_adapter_of_one(folder: Path) -> None:
    """In float32, by the command; 1e-5 is ten times what its rounding makes of 12 steps of AdamW."""
    assert_same_log(folder / "two", folder / "one", rel=1e-5, abs=1e-6)
    found, expected = (load_file(folder / name / "adapter_model.safetensors") for name in ("two", "one"))
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    run = json.loads((folder / "two" / "run.json").read_text())
    assert run["engine"] == "cached" and run["steps"] == 12
    assert sorted(path.name for path in (folder / "two").iterdir()) == sorted(
        path.name for path in (folder / "one").iterdir()
    )


def cached_in(folder: Path) -> dict[EncodedRow, list[bytes]]:
    """What a cache holds of each row, byte for byte."""
    found = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            identity = file.metadata()["identity"].partition(":")[2]
        shard = read_shard(path, identity).shard
        for index, row in enumerate(shard.rows):
            parts = vars(shard.row(index)).values()
            found[row] = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts]
    return found


def test_two_processes_fill_the_cache_together_with_the_bytes_that_one_puts_there(folder: Path) -> None:
    one, two = (cached_in(folder / f"{name}-cache") for name in ("one", "two"))
    assert len(one) > 20 and two == one
    files = [len(list((folder / f"{name}-cache").glob("*/*.safetensors"))) for name in ("one", "two")]
    assert files[1] > files[0]  # of each process


def filled_by(rank: int, folder: Path, port: int, dies: bool) -> None:
    """Complete a store as one of two processes; the second one dies in its first pass if `dies`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    made: list[Any] = []

    def build(rows: list[EncodedRow], share: Share) -> Iterator[Shard]:
        for piece in share([rows[:2], rows[2:4], rows[4:]]):
            if dies and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(len(piece))
            yield shard_of(piece)

    try:
        with processes.connected():
            store = PrefixStore(folder / "cache", {"model": "a"}, memory_budget=1 << 30)
            done = store.complete(ROWS, build)
            assert_right(store)
            made += [done.found, done.built]
    except RunError as error:
        made.append(str(error))
    (folder / f"made-by-{rank}").write_text(json.dumps(made))


@pytest.mark.parametrize("dies", [False, True])
def test_passes_of_a_build_are_dealt_out_and_one_that_dies_in_it_ends_the_other(dies: bool, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pair = [in_fork(filled_by, rank, tmp_path, port, dies) for rank in range(2)]
    for one in pair:
        one.join(PATIENCE)
    first = json.loads((tmp_path / "made-by-0").read_text())
    if dies:
        assert first[:2] == [2, 2] and first[2].startswith("another process of this run ended") and len(first) == 3
    else:
        assert first == [2, 2, 0, 6] and json.loads((tmp_path / "made-by-1").read_text()) == [2, 0, 6]


def test_a_run_resumes_with_another_number_of_processes(folder: Path, findings: list[dict[str, Any]]) -> None:
    assert [found["resumed"] for found in findings] == [STEPS // 2, STEPS // 2]
    assert_same_log(folder / "saved-by-one", folder / "whole")
    shutil.rmtree(folder / "saved-by-two" / "checkpoints" / f"checkpoint-{STEPS}")
    task, config = resumable()
    assert train(task, config, folder / "saved-by-two", seed=0).resumed_from == STEPS // 2
    assert_same_log(folder / "saved-by-two", folder / "whole")


def test_a_loss_that_is_not_finite_in_one_process_stops_both_at_the_same_step(
    folder: Path, findings: list[dict[str, Any]]
) -> None:
    (kind, message), (other, _) = (found["nan"] for found in findings)
    assert (kind, other) == ("RunError", "Elsewhere")
    assert message.startswith("the loss is nan at step 5; training stopped")
    assert [path.name for path in (folder / "nan" / "checkpoints").iterdir()] == ["checkpoint-4"]


# -- what processes exchange -----------------------------------------------------------------------------------------


def test_an_error_in_one_process_is_raised_there_and_ends_the_other(findings: list[dict[str, Any]]) -> None:
    first, second = findings
    assert (first["fails in 0"], second["fails in 0"][0]) == (["ConfigError", "only here"], "Elsewhere")
    assert (first["fails in 1"][0], second["fails in 1"]) == ("Elsewhere", ["ConfigError", "only here"])
    assert (first["fails first"][0], second["fails first"][0]) == ("ConfigError", "Elsewhere")


def test_values_are_those_of_the_first_process_or_of_all(findings: list[dict[str, Any]]) -> None:
    for found in findings:
        assert found["of first"] == "by 0"
        assert found["summed"] == {"a": 3.0}
        assert found["merged"] == {"0": "here", "1": "here"}


def test_the_first_process_alone_says_where_the_result_is_and_what_went_wrong(
    folder: Path, findings: list[dict[str, Any]]
) -> None:
    first, second = findings
    for name, result in (("unlearn", "two"), ("again", "two"), ("evaluate", "evaluated-by-two")):
        assert first[name] == [0, f"{folder / result}\n", []]
        assert second[name] == [0, "", []]
    for name, text in (("other", "holds another run"), ("missing", "/nowhere.jsonl")):
        status, out, errors = first[name]
        assert status != 0 and out == "" and len(errors) == 1 and text in errors[0]
        assert second[name][0] != 0 and second[name][1:] == ["", []]


def test_what_a_process_refuses_before_it_is_connected_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for rank in ("0", "1"):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        for arguments in (["generate", "question"], ["unlearn", "train.lr=-1"]):
            assert main(arguments) == 2
        said.append(capsys.readouterr().err.count("error: "))
    assert said == [2, 0]


CONFIGS = sorted((ROOT / "grun" / "config" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_each_launch_config_is_one_that_accelerate_reads_and_says_whether_it_was_run(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert file.read_text().startswith(("# run: ", "# not run: "))
    config = load_config_from_file(str(file))
    assert config.num_processes > 1 and not config.use_cpu
    assert getattr(config, "mixed_precision", None) == "no"  # train.precision decides


def test_launch_configs_are_packaged() -> None:
    assert {file.stem for file in CONFIGS} == {"ddp", "fsdp", "zero3", "zero3_two_nodes"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "config/*/*.yaml" in project["tool"]["setuptools"]["package-data"]["grun"]


def test_sharded_weights_exclude_what_needs_the_whole_model_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sharding.check_possible(looks=True, needs_reference=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharding.check_possible(looks=False, needs_reference=False)
    with pytest.raises(ConfigError, match="train.monitor_epochs"):
        sharding.check_possible(looks=True, needs_reference=False)
    with pytest.raises(ConfigError, match="untouched model in every step"):
        sharding.check_possible(looks=False, needs_reference=True)


# -- weights that are cut --------------------------------------------------------------------------------------------


def test_weights_and_optimizer_states_that_are_cut_are_gathered_whole_and_taken_back(
    findings: list[dict[str, Any]],
) -> None:
    """torch's `fully_shard` on the CPU, in float64; accelerate, which calls it in a run, does so on GPUs alone."""
    first, second = (found["sharded"] for found in findings)
    for step in range(2):
        whole, cut_norm = first[f"norms {step}"]
        assert cut_norm == pytest.approx(whole, rel=1e-9)
        assert second[f"norms {step}"] == first[f"norms {step}"]
    assert first["holds"] > 10 and second["holds"] == 0
    assert first["apart"] < 1e-9 and first["tied"]


# -- a process that dies ----------------------------------------------------------------------------------------------


def test_when_a_process_is_killed_the_other_ends_with_one_line_and_the_run_resumes(folder: Path) -> None:
    (status, out, err), (killed, _, _) = launch("killed", folder)
    assert killed < 0
    assert status == 1 and out == ""
    assert err.count("error: another process of this run ended") == err.count("error: ") == 1
    assert "Traceback" not in err
    kept = {path.name for path in (folder / "killed" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-6"}
    again = unlearn_arguments(folder, "killed", "train.save_steps=2", "method.dropout=0.2")
    assert main(again) == 0
    assert main(unlearn_arguments(folder, "undisturbed", "train.save_steps=2", "method.dropout=0.2")) == 0
    assert json.loads((folder / "killed" / "run.json").read_text())["resumed_from"] == 6
    assert_same_log(folder / "killed", folder / "undisturbed", rel=1e-5, abs=1e-6)


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_two_processes_evaluate_as_one(folder: Path) -> None:
    one, two = (folder / f"evaluated-by-{number}" for number in ("one", "two"))
    for name in ("generations.jsonl", "gates.jsonl", "scores.jsonl"):
        assert (two / name).read_bytes() == (one / name).read_bytes()  # every batch is the same, whoever runs it
    found, expected = (json.loads((path / "evaluation.json").read_text()) for path in (two, one))
    for metrics in ("sets", "overall", "gate"):
        assert found[metrics] == expected[metrics]
    assert not list(folder.glob(".evaluated*"))


def test_an_evaluation_goes_on_from_the_journals_of_another_number_of_processes(
    folder: Path, findings: list[dict[str, Any]]
) -> None:
    assert findings[0]["goes on"] == [0, f"{folder / 'cut-off'}\n", []]
    found, whole = (folder / name for name in ("cut-off", "evaluated-by-one"))
    assert (found / "scores.jsonl").read_bytes() == (whole / "scores.jsonl").read_bytes()
    answers, expected = (
        [json.loads(line)["text"] for line in (path / "generations.jsonl").read_text().splitlines()]
        for path in (found, whole)
    )
    assert 0 < answers.count(MARK) < len(answers)  # asked for no more
    assert all(answer in (MARK, other) for answer, other in zip(answers, expected, strict=True))


def test_a_journal_reads_what_other_processes_left_beside_it(tmp_path: Path) -> None:
    write_journal(tmp_path / "scores.jsonl", {(0,): [10]})
    write_journal(tmp_path / "scores-1.jsonl", {(1, 2): [11, 12], (3,): [13]})
    (tmp_path / "scores-1.jsonl").write_bytes((tmp_path / "scores-1.jsonl").read_bytes()[:-4])
    write_journal(tmp_path / "generations.jsonl", {(7,): [17]})
    with Journal(tmp_path, "scores", int) as journal:
        assert journal.known == {0: 10, 1: 11, 2: 12}
        journal.add([3], [13])
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 2


# -- who runs what ----------------------------------------------------------------------------------------------------


def batches(sizes: list[int]) -> list[dict[str, Any]]:
    return [{"answer": collate([EncodedRow((1,) * size, (2,))], 0)} for size in sizes]


@pytest.mark.parametrize(("sizes", "workers"), [([5, 1, 3, 3, 9], 2), ([4, 4], 3), ([2], 4), ([1, 2, 3, 4], 2)])
def test_every_micro_batch_counts_once_and_all_processes_run_as_many(sizes: list[int], workers: int) -> None:
    made = batches(sizes)
    dealt = [deal(made, workers, worker) for worker in range(workers)]
    assert {len(mine) for mine in dealt} == {-(-len(sizes) // workers)}
    counting = [id(batch) for mine in dealt for batch, counts in mine if counts]
    assert sorted(counting) == sorted(map(id, made))


def test_work_is_dealt_out_evenly() -> None:
    work = [sum(part["answer"].input_ids.numel() for part, _ in deal(batches([9, 8, 2, 1]), 2, w)) for w in range(2)]
    assert work == [12, 12]  # tokens, an answer token in each row


def test_rows_are_cut_so_that_each_process_gets_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(piece) for piece in cut(range(12), 4)] == [4, 4, 4]
    monkeypatch.setattr("grun.runtime.processes.count", lambda: 2)
    assert [len(piece) for piece in cut(range(12), None)] == [6, 6]
    assert [len(piece) for piece in cut(range(12), 4)] == [3, 3, 3, 3]
    assert [len(piece) for piece in cut(range(13), None)] == [6, 7]
    assert [len(piece) for piece in cut(range(1), None)] == [1]
    assert sum(map(list, cut(range(13), 2)), []) == list(range(13))
