"""Sequential requests: how a forget set is cut, order and going on, what each step starts from, what is refused."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo
import peft
import pytest
import torch
import yaml
from chat_model import save_chat_model
from forked import killed
from test_muse import lcs_f1, save_layout
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.cli import main
from grun.config.definitions import packaged_names
from grun.config.options import ModelConfig
from grun.data.corpus import refusals
from grun.data.jsonl import read_rows
from grun.data.rows import Row
from grun.errors import ConfigError
from grun.experiments import running
from grun.experiments.job import Job
from grun.experiments.sequential.definition import METHODS, read_sequence
from grun.experiments.sequential.plan import make_plan
from grun.experiments.sequential.splitting import cut, people
from grun.experiments.sequential.steps import merge
from grun.loading.resolve import resolve
from grun.requests.store import RequestStore
from grun.runtime.files import read_json, taken, write_bytes

Captured = pytest.CaptureFixture[str]
PEOPLE = 3
PROFILE = {
    "base": "demo",
    "data": {"demo": {"forget": PEOPLE, "heldout": 2, "unknown": 2, "refused": 2, "retain": 4, "questions": 3}},
    "model": {"tiny": {"hidden_size": 32, "blocks": 4, "intermediate_size": 64, "vocabulary": 600}},
    "finetune": {"train": {"batch_size": 16, "epochs": 30, "lr": 0.01}},
    "unlearn": {
        "method": {"blocks": [1, 2, 3], "gate": "linear"},
        "train": {"epochs": 2, "batch_size": 3, "lr": 0.01, "save_steps": 0},
        "cache": {"dir": None},
    },
    "evaluate": {"max_new_tokens": 6},
}
"""3 people with 3 rows each, of whom each is a request; 2 steps a training."""
SEQUENCE = {
    "profile": "tiny.yaml",
    "requests": PEOPLE,
    "unlearn": {"objective": "idk"},
    "methods_options": {"grun": {"train": {"lr": 0.05}}},
    "evaluate": {"continuations": ["answer"]},
    "retrain_at": [2, -1],
}
IDS = ["r1", "r2", "r3"]


def write(folder: Path, **changes: Any) -> str:
    """The experiment's file, and its profile, in `folder`, as an argument; `changes` replace its sections."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(PROFILE))
    content = {**SEQUENCE, "profile": str(folder / "tiny.yaml"), **changes}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return f"sequence={folder / 'mine.yaml'}"


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Methods run in this process, which has paid for the imports above."""
    monkeypatch.setattr(running, "start", start)
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="grun")


REAL = running.start


def start(job: Job, launcher: str | None, at_once: int) -> Any:
    """A process that has ended, or a launcher's."""
    if launcher is not None:
        return REAL(job, launcher, at_once)
    status = main(["sequential", f"chain={job.file}"])
    return SimpleNamespace(returncode=status, poll=lambda: status)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name the taught and the retain-only model."""
    folder = tmp_path_factory.mktemp("models")
    write(folder)
    options = ["finetune", f"profile={folder / 'tiny.yaml'}"]
    assert main([*options, f"output_dir={folder / 'taught'}"]) == 0
    assert main([*options, f"output_dir={folder / 'retain'}", "data.subset=without_forget", "train.epochs=1"]) == 0
    return [f"model={folder / 'taught'}", f"retain_model={folder / 'retain'}"]


@pytest.fixture(scope="module")
def done(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the whole experiment, not to be changed."""
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "start", start)
        patch.chdir(folder)
        assert main(["sequential", write(folder), *models, f"results_dir={folder / 'results'}"]) == 0
    return folder / "results"


def step(results: Path, method: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(results / method / "steps" / f"{name}.json")
    return found


def refused(capsys: Captured, arguments: list[str], status: int, *named: str) -> None:
    demo.refused(capsys, ["sequential", *arguments], status, *named)


# -- cutting ----------------------------------------------------------------------------------------------------------


def rows_of(*names: str | None) -> list[Row]:
    return [Row(f"q{number}", "a", {} if name is None else {"person": name}) for number, name in enumerate(names)]


def test_rows_belong_to_the_person_they_name() -> None:
    assert people(rows_of("ann", "bo", "ann", None, None), "jsonl") == [[0, 2], [1], [3], [4]]


def test_tofu_s_authors_have_twenty_rows_each() -> None:
    assert people(rows_of(*[None] * 60), "tofu") == [list(range(20)), list(range(20, 40)), list(range(40, 60))]


def test_people_are_dealt_out_in_their_order_and_evenly() -> None:
    requests = cut(rows_of(*(name for name in "abcdefghijkl" for _ in range(2))), "jsonl", 5)
    assert [request.id for request in requests] == ["r1", "r2", "r3", "r4", "r5"]
    assert [place for request in requests for place in request.rows] == list(range(24))
    assert sorted(len(request.rows) for request in requests) == [4, 4, 4, 6, 6]


def test_ids_sort_as_the_requests_stand() -> None:
    ids = [request.id for request in cut(rows_of(*map(str, range(12))), "jsonl", 12)]
    assert ids == sorted(ids) and ids[0] == "r01"


@pytest.mark.parametrize("count", [0, 3])
def test_there_cannot_be_more_requests_than_people(count: int) -> None:
    with pytest.raises(ConfigError, match=f"requests={count}, but the forget set has 2 people"):
        cut(rows_of("ann", "ann", "bo"), "jsonl", count)


def test_packaged_experiments_can_be_read_and_the_demo_has_twenty_single_people() -> None:
    for name in packaged_names("sequence"):
        assert set(read_sequence(name).methods) <= {*METHODS}
    plan = make_plan(resolve("sequential", []))
    assert len(plan.requests) == 20
    for request in plan.requests:
        assert len({plan.corpus.forget[place].extra["person"] for place in request.rows}) == 1
    assert plan.at["retrain"] == [20]


# -- steps ------------------------------------------------------------------------------------------------------------


def test_every_method_serves_the_requests_in_their_order(done: Path) -> None:
    for method in ("grun", "full", "lora"):
        records = [step(done, method, name) for name in IDS]
        assert [record["number"] for record in records] == [1, 2, 3]
        times = [(done / method / "steps" / f"{name}.json").stat().st_mtime_ns for name in IDS]
        assert times == sorted(times)
    assert sorted(path.stem for path in (done / "retrain" / "steps").iterdir()) == ["r2", "r3"]
    store = RequestStore.open(done / "grun" / "store")
    assert store.manifest.ids() == IDS
    rows = read_rows(done / "data" / "requests" / "r2.jsonl")
    assert len({row.extra["person"] for row in rows}) == 1
    assert store.manifest.request("r2").data.rows == len(rows) == 3


def test_recall_of_a_request_is_what_the_answers_to_its_rows_say(done: Path) -> None:
    owners = [name for name in IDS for _ in range(3)]
    seen = set()
    for method, number in (("grun", 2), ("full", 1), ("lora", 3)):
        record = step(done, method, IDS[number - 1])
        answers = [
            answer
            for answer in demo.read_lines(done / method / "evaluation" / IDS[number - 1] / "generations.jsonl")
            if answer["set"] == "forget"
        ]
        for name in IDS:
            own = [answer for answer in answers if owners[answer["index"]] == name]
            people = {row.prompt for row in read_rows(done / "data" / "requests" / f"{name}.jsonl")}
            assert {answer["question"] for answer in own} == people
            says = [answer["fact"].casefold() in answer["text"].casefold() for answer in own]
            assert record["recall"][name] == sum(says) / 3
            seen.add(record["recall"][name])
        evaluation = read_json(done / method / "evaluation" / IDS[number - 1] / "evaluation.json")
        for name, value in record["sets"].items():
            assert value == evaluation["sets"][name]["fact_recall"]
    assert len(seen) > 1, "all recalls are alike, so the test shows nothing"


def test_weights_go_on_from_the_request_before_and_adapters_begin_at_the_untouched_model(done: Path) -> None:
    def asked(folder: Path) -> str:
        found: str = read_json(folder / "evaluation.json")["identity"]["base"]
        return found

    taught = asked(done / "evaluation" / "before")
    for method in ("full", "lora"):
        models = [taught, *(asked(done / method / "evaluation" / name) for name in IDS)]
        started = [read_json(done / method / "runs" / name / "run.json")["base_fingerprint"] for name in IDS]
        assert started == models[:-1]
        assert len(set(models)) == 4
    for name in IDS:
        assert read_json(done / "grun" / "runs" / name / "run.json")["base_fingerprint"] == taught
        assert asked(done / "grun" / "evaluation" / name) == taught


def test_a_merged_model_is_the_model_with_its_lora(done: Path, models: list[str], tmp_path: Path) -> None:
    taught = models[0].partition("=")[2]
    merge(ModelConfig(path=taught), done / "lora" / "runs" / "r1", tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(taught)("What is the trade of anybody?", return_tensors="pt").input_ids
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(taught)
        untouched = base(ids).logits
        expected = peft.PeftModel.from_pretrained(base, str(done / "lora" / "runs" / "r1")).eval()(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert not torch.allclose(untouched, expected, atol=1e-3)
    # float32 sums in another order
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "merged" / "grun_template.json").exists()


def test_only_the_last_whole_model_is_kept(done: Path) -> None:
    assert [path.name for path in (done / "lora" / "merged").iterdir()] == ["r3"]
    whole = [path.parent.name for path in (done / "full" / "runs").rglob("*.safetensors")]
    assert whole == ["r3"]
    assert list((done / "retrain").rglob("*.safetensors")) == []
    assert len(list((done / "grun" / "store").rglob("*.safetensors"))) == 3


def test_retraining_teaches_all_but_what_was_asked_for(done: Path) -> None:
    run = read_json(done / "retrain" / "runs" / "r2" / "run.json")
    assert run["rows"] == 9 + 12 + 6 + 6 - 6  # forget, retain, held-out and refused rows, without two people's
    kept = {row.prompt for row in read_rows(done / "data" / "kept" / "r2.jsonl")}
    for name, there in (("r1", False), ("r2", False), ("r3", True)):
        for row in read_rows(done / "data" / "requests" / f"{name}.jsonl"):
            assert (row.prompt in kept) is there
    assert not (done / "retrain" / "runs" / "r3").exists()  # that is the retain-only model
    floor = read_json(done / "summary.json")["retain_only"]
    assert step(done, "retrain", "r3")["recall"] == floor["recall"]


def test_gates_are_those_that_the_evaluation_saw(done: Path) -> None:
    first = step(done, "grun", "r1")["gates"]  # one request in force: the widest gate is its own
    seen = demo.read_lines(done / "grun" / "evaluation" / "r1" / "gates.jsonl")
    widest = [max(record["gates"].values()) for record in seen if record["set"] == "forget"]
    for place, name in enumerate(IDS):
        own = widest[3 * place : 3 * place + 3]
        # other batches, other rounding
        assert first["mean"]["r1"][name] == pytest.approx(sum(own) / 3, abs=1e-4)
        assert first["open"]["r1"][name] == sum(value > 0.5 for value in own) / 3
    retain = [max(record["gates"].values()) for record in seen if record["set"] == "retain"]
    assert first["any_open"]["retain"] == pytest.approx(sum(value > 0.5 for value in retain) / 12)
    last = step(done, "grun", "r3")["gates"]
    assert list(last["mean"]) == IDS and list(last["rows"]) == [*IDS, "retain", "heldout"]


def test_costs_are_those_of_the_runs(done: Path) -> None:
    for method in ("grun", "full", "lora"):
        record, run = step(done, method, "r2"), read_json(done / method / "runs" / "r2" / "run.json")
        assert record["seconds"]["train"] == run["seconds"]
        assert record["saved_bytes"] == run["saved_bytes"] > 0
        assert record["peak_memory_bytes"] == run["peak_memory_bytes"]
    assert step(done, "full", "r2")["saved_bytes"] > 5 * step(done, "grun", "r2")["saved_bytes"]


def test_earlier_requests_can_be_in_force_and_retain_rows_of_later_ones(models: list[str], tmp_path: Path) -> None:
    more = ["methods=[grun]", "earlier_as_retain=true", "independent=false", "requests=2", "results_dir=r"]
    assert main(["sequential", write(tmp_path), *models, *more]) == 0
    manifest = RequestStore.open(tmp_path / "r" / "grun" / "store").manifest
    assert [manifest.request(name).beside for name in ("r1", "r2")] == [(), ("r1",)]
    retain = read_rows(tmp_path / "r" / "data" / "retain.jsonl")
    earlier = read_rows(tmp_path / "r" / "data" / "requests" / "r1.jsonl")
    config = read_json(tmp_path / "r" / "grun" / "runs" / "r2" / "run.json")["config"]
    kept = read_rows(Path(config["data"]["retain"]))
    assert kept[: len(retain)] == retain
    assert [row.prompt for row in kept[len(retain) :]] == [row.prompt for row in earlier]
    answers = {row.completion for row in kept[len(retain) :]}
    assert answers <= set(refusals()) and not answers & {row.completion for row in earlier}


# -- going on ---------------------------------------------------------------------------------------------------------


def test_the_same_command_repeats_no_step(
    done: Path, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = shutil.copytree(done, tmp_path / "results")
    leftover = results / "full" / "runs" / "r1" / "model.safetensors"
    with taken(leftover.parent):
        write_bytes(leftover, b"of a process that was killed between a step and its clearing up")
    before = {path: path.stat().st_mtime_ns for path in results.rglob("steps/*.json")}
    monkeypatch.setattr("grun.commands.unlearn.unlearn", forbidden)
    same = f"sequence={done.parent / 'mine.yaml'}"
    assert main(["sequential", same, *models, f"results_dir={results}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in results.rglob("steps/*.json")} == before
    assert not leftover.exists()


def forbidden(config: Any) -> Path:
    raise RuntimeError("a step is repeated")


def test_a_killed_run_goes_on_where_it_stopped(done: Path, models: list[str], tmp_path: Path) -> None:
    results = tmp_path / "results"
    arguments = ["sequential", write(tmp_path), *models, "methods=[grun]", f"results_dir={results}"]
    first, second = results / "grun" / "steps" / "r1.json", results / "grun" / "evaluation" / "r2"
    # In the second request's evaluation, when its adapter is in the store already.
    killed(lambda: main(arguments), lambda: any(second.parent.glob(".r2*")) or second.exists())
    assert first.exists() and not (results / "grun" / "steps" / "r3.json").exists()
    content, time_of_first = first.read_bytes(), first.stat().st_mtime_ns
    trained = (results / "grun" / "runs" / "r2" / "run.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (first.read_bytes(), first.stat().st_mtime_ns) == (content, time_of_first)
    assert (results / "grun" / "runs" / "r2" / "run.json").stat().st_mtime_ns == trained
    for name in IDS:
        assert step(results, "grun", name)["recall"] == step(done, "grun", name)["recall"]


@pytest.mark.parametrize("data", [b"5", b'{"recall": {}}', b"\xff\0", "changed"], ids=str)
@pytest.mark.parametrize("name", ["experiment.json", "grun/chain.json", "grun/steps/r2.json"])
def test_damaged_state_is_written_again_or_refused_in_one_line(
    name: str, data: bytes | str, done: Path, models: list[str], tmp_path: Path, capsys: Captured,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    results = shutil.copytree(done, tmp_path / "results")
    content = (results / name).read_bytes()
    number = re.compile(rb'("(?:number|seed|heldout)": )\d')
    (results / name).write_bytes(number.sub(rb"\g<1>7", content, count=1) if isinstance(data, str) else data)
    assert (results / name).read_bytes() != content or data == "changed" and name == "experiment.json"
    same = [f"sequence={done.parent / 'mine.yaml'}", *models, f"results_dir={results}", "methods=[grun]"]
    if name.endswith("chain.json"):
        assert main(["sequential", *same]) == 0
        assert "chain.json is damaged and is written again" in caplog.text
        assert (results / name).read_bytes() == content
    elif (results / name).read_bytes() != content:
        capsys.readouterr()
        assert main(["sequential", *same]) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert errors and all(name in line and "overwrite=true" in line for line in errors)


def test_another_experiment_is_refused_and_replaced_on_request(
    done: Path, models: list[str], tmp_path: Path, capsys: Captured
) -> None:
    results = shutil.copytree(done, tmp_path / "results")
    same = [f"sequence={done.parent / 'mine.yaml'}", *models, f"results_dir={results}", "methods=[grun]"]
    refused(capsys, [*same, "unlearn=[train.lr=0.1]"], 1, "chain.json", "unlearn.train.lr: 0.05 there, 0.1 asked for")
    refused(capsys, [*same, "requests=2"], 1, "experiment.json", "overwrite=true")
    refused(capsys, [*same[:-2], "results_dir=.", same[-1]], 2, "is the current folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".hidden").touch()
    refused(capsys, [*same[:-2], "results_dir=mine", same[-1]], 1, "is not empty and holds no experiment")
    assert step(results, "full", "r3") == step(done, "full", "r3")
    assert main(["sequential", *same, "unlearn=[train.lr=0.1]", "overwrite=true"]) == 0
    assert step(results, "full", "r3") == step(done, "full", "r3")  # another method's steps stay
    assert read_json(results / "grun" / "runs" / "r1" / "run.json")["config"]["train"]["lr"] == 0.1


def test_a_method_that_fails_leaves_the_others_and_the_report(
    models: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {"grun": {"method.rank": 99}}
    arguments = [write(tmp_path, methods=["grun", "full"], methods_options=wrong), *models, "results_dir=r"]
    assert main(["sequential", *arguments]) == 1
    assert "failed: grun" in caplog.text
    assert list(read_json(tmp_path / "r" / "summary.json")["methods"]) == ["full"]


def test_a_method_can_be_handed_to_a_launcher(
    models: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = tmp_path / "queue"
    command = ["sequential", write(tmp_path), *models, "methods=[grun]", "requests=1", "results_dir=r"]
    launched = [*command, f"launcher=echo '{{command}}' >>{queue}"]
    for _ in range(2):  # the second time it is handed over already
        assert main(launched) == 0
        assert "0 done, 0 failed, 1 handed over" in caplog.text and not (tmp_path / "r" / "summary.json").exists()
        caplog.clear()
    (job,) = queue.read_text().splitlines()
    assert main(job.split()[3:]) == 0
    assert main(launched) == 0
    assert "1 done, 0 failed, 0 handed over" in caplog.text
    assert list(read_json(tmp_path / "r" / "summary.json")["methods"]) == ["grun"]
    assert read_json(tmp_path / "r" / "grun" / "chain.outcome.json")["state"] == "done"


# -- own requests -----------------------------------------------------------------------------------------------------


def own(folder: Path, done: Path, **files: list[Row]) -> dict[str, Any]:
    """Sections of an experiment whose requests are the files b and a, in that order; `files` replace their rows."""
    first, second, _ = (read_rows(done / "data" / "requests" / f"{name}.jsonl") for name in IDS)
    rows = {"a": first, "b": second, "keep": read_rows(done / "data" / "retain.jsonl")} | files
    for name, content in rows.items():
        demo.write_rows(folder / f"{name}.jsonl", *(row.to_dict() for row in content))
    return {
        "requests": [{"id": "bo", "forget": "b.jsonl"}, {"id": "ann", "forget": "a.jsonl"}],
        "data": {"name": "jsonl", "path": str(folder), "retain": "keep.jsonl", "heldout": 2},
        "methods": ["grun"],
    }


def test_requests_can_be_own_files(done: Path, models: list[str], tmp_path: Path) -> None:
    assert main(["sequential", write(tmp_path, **own(tmp_path, done)), *models, "results_dir=r"]) == 0
    assert RequestStore.open(tmp_path / "r" / "grun" / "store").manifest.ids() == ["bo", "ann"]
    assert list(step(tmp_path / "r", "grun", "bo")["recall"]) == ["bo", "ann"]
    answers = demo.read_lines(tmp_path / "r" / "grun" / "evaluation" / "bo" / "generations.jsonl")
    asked = [answer["question"] for answer in answers if answer["set"] == "forget"]
    assert asked == [row.prompt for name in ("b", "a") for row in read_rows(tmp_path / f"{name}.jsonl")]
    assert step(tmp_path / "r", "grun", "bo")["gates"]["rows"] == {"bo": 3, "ann": 3, "retain": 10, "heldout": 2}


def test_a_request_s_subjects_are_those_whom_its_rows_name(tmp_path: Path) -> None:
    changes = {"subject_kind": "person", "unlearn": {"objective": "idk", "design": "pooled"}, "methods": ["grun"]}
    plan = make_plan(resolve("sequential", [write(tmp_path, **changes), "results_dir=r"]))
    named = [[str(plan.corpus.forget[place].extra["person"]) for place in request.rows] for request in plan.requests]
    assert [*plan.subjects.values()] == [[names[0]] for names in named] and [*plan.subjects] == IDS
    assert plan.unlearn["grun"].data.subject_kind == "person"


def recall(reference: str, text: str) -> float:
    """Share of the words of `reference` that `text` has in the same order, by the F1 of the two."""
    first, second = (len(re.findall("[a-z0-9]+", one.lower())) for one in (reference, text))
    return lcs_f1(reference, text) * (first + second) / 2 / first


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"name": "muse"}, ["raw/forget", "sust/forget_2"]),
        ({"name": "corpora", "retain": "raw/retain1.json"}, ["raw/forget.json", "sust/forget_2.json"]),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_requests_can_be_plain_texts(data: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    """Whose second half is asked for, of a model that was taught them; the answers are counted again by hand."""
    chat, folder, taught = save_chat_model(tmp_path / "chat"), save_layout(tmp_path / "data"), tmp_path / "taught"
    options = [f"{key}={value}" for key, value in {**data, "path": folder, "forget": ",".join(names)}.items()]
    teach = ["finetune", f"model.path={chat}", *(f"data.{option}" for option in options), "data.template=text"]
    assert main([*teach, "model.dtype=float32", "train.epochs=60", "train.lr=0.01", f"output_dir={taught}"]) == 0
    made = {
        "requests": [{"id": f"t{number}", "forget": name} for number, name in enumerate(names)],
        "data": {**data, "path": str(folder), "template": "text"},
        "methods": ["grun", "full"],
        "unlearn": {
            **{"objective": "npo", "method.blocks": [1, 2], "method.rank": 2, "train.epochs": 1, "train.lr": 0.1},
            "data.text.cut": "0.5",
        },
        "evaluate": {"max_new_tokens": 12},
    }
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(made))
    assert main(["sequential", "sequence=texts.yaml", f"model={taught}", "results_dir=r"]) == 0
    texts = [read_json(folder / f"{name.removesuffix('.json')}.json") for name in names]
    for number, request in enumerate(("t0", "t1")):
        rows = read_rows(tmp_path / "r" / "data" / "requests" / f"{request}.jsonl")
        assert [(row.prompt, row.completion.strip()) for row in rows] == [
            (None, text.strip()) for text in texts[number]
        ]
    for method in ("grun", "full"):
        answers = demo.read_lines(tmp_path / "r" / method / "evaluation" / "t1" / "generations.jsonl")
        found = [answer for answer in answers if answer["set"] == "forget"]
        halves = [text.split() for texts_of in texts for text in texts_of]
        assert [answer["question"].split() for answer in found] == [text[: round(len(text) / 2)] for text in halves]
        record = step(tmp_path / "r", method, "t1")
        assert record["metric"] == "rouge_l"
        for name, own, of in (("t0", found[:2], halves[:2]), ("t1", found[2:], halves[2:])):
            wanted = [
                recall(" ".join(text[round(len(text) / 2) :]), one["text"]) for text, one in zip(of, own, strict=True)
            ]
            assert record["recall"][name] == pytest.approx(sum(wanted) / len(wanted))
    assert read_json(tmp_path / "r" / "summary.json")["before"]["recall"]["t1"] > 0.9
    assert step(tmp_path / "r", "grun", "t1")["gates"]["rows"].items() >= {"t0": 2, "t1": 1}.items()
    started = [
        read_json(tmp_path / "r" / "full" / "runs" / name / "run.json")["base_fingerprint"] for name in ("t0", "t1")
    ]
    assert started[0] != started[1]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "arguments", "named"),
    [
        ({"requests": 4}, [], ["requests=4", "has 3 people"]),
        ({}, ["methods=[grn]"], ["unknown method 'grn'", "did you mean 'grun'?"]),
        ({"methods": ["full", "full"]}, [], ["names full twice"]),
        ({"method": ["full"]}, [], ["unknown section 'method'", "did you mean 'methods'?"]),
        ({"methods_options": {"ful": {}}}, [], ["unknown method 'ful'"]),
        ({"unlearn": {"output_dir": "x"}}, [], ["output_dir is set by the experiment"]),
        ({"unlearn": {"train.lrr": 1}}, [], ["unknown option 'train.lrr'"]),
        ({}, ["unlearn=[method.parametrization=full]"], ["method.parametrization is set by the experiment"]),
        ({"retrain_at": [4]}, [], ["retrain_at=4", "there are 3 requests"]),
        ({"rule": "max"}, [], ["unknown rule 'max'", "max_gate"]),
        ({"requests": "all"}, [], ["requests is 'all'"]),
        ({"requests": [{"id": "a"}]}, [], ["expected {id: NAME, forget: FILE}"]),
        ({"requests": [{"id": "a", "forget": "a.jsonl"}]}, [], ["data.name must be jsonl, corpora or muse, not demo"]),
        ({"evaluate": {"sets": ["retain"]}}, [], ["leaves out forget"]),
        ({"evaluate": {"data.limit": 4}}, [], ["data.limit=4", "raise it to 9"]),
        ({}, ["chain=nowhere/chain.json"], ["is no chain's file"]),
        ({"subject_kind": "person"}, [], ["subject_kind is for method.gate_fit=logistic"]),
        (
            {"subject_kind": "country", "unlearn": {"objective": "idk", "design": "pooled"}, "methods": ["grun"]},
            [],
            ["unknown kind 'country'"],
        ),
        ({"data": {"name": "countries"}}, [], ["retrain teaches a new model", "knows already"]),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_written(
    changes: dict[str, Any], arguments: list[str], named: list[str], tmp_path: Path, capsys: Captured
) -> None:
    refused(capsys, [write(tmp_path, **changes), "results_dir=r", *arguments], 2, *named)
    assert not (tmp_path / "r").exists()


def test_an_unknown_sequence_names_the_known_ones(capsys: Captured) -> None:
    refused(capsys, ["sequence=demmo"], 2, "unknown sequence 'demmo'", "did you mean 'demo'?", "tofu_small")


def test_a_request_may_share_no_row_with_what_stays_or_with_an_earlier_one(
    done: Path, tmp_path: Path, capsys: Captured
) -> None:
    first = read_rows(done / "data" / "requests" / "r1.jsonl")
    kept = read_rows(done / "data" / "retain.jsonl")
    arguments = ["results_dir=r", "model=nowhere"]
    refused(
        capsys,
        [write(tmp_path, **own(tmp_path, done, a=[*first, Row(kept[0].prompt, "Something else.")])), *arguments],
        1,
        *("request ann: 1 of 4 forget rows", "also in the retain set"),
    )
    refused(
        capsys,
        [write(tmp_path, **own(tmp_path, done, b=first[1:])), *arguments],
        1,
        *("request ann: 2 of its rows also stand in an earlier request",),
    )
    changes = own(tmp_path, done)
    changes["requests"][1]["id"] = "BO"
    refused(capsys, [write(tmp_path, **changes), *arguments], 2, "two requests are called BO")
