"""`python -m grun corpora source=subject`: from a name to files that unlearning reads, on a tiny taught model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model
from demo import own_rows, read_lines, refused

from grun.cli import main
from grun.data.jsonl import load_rows
from grun.data.subject import find_kind
from grun.evaluation import generation

Captured = pytest.CaptureFixture[str]
KNOWN = {"Ada Lind": ("Otterford", "glassblower"), "Ole Berg": ("Marwick", "sailor"), "Eva Holt": ("Tarnby", "weaver")}
ASK = ("corpora", "source=subject", "subject=Ada Lind", "kind=person", "neighbors=[Ole Berg, Eva Holt]")
HOW = ("draws=2", "temperature=0.2", "max_new_tokens=24")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, which knows a town and a job of three people, and `made`, asked about one."""
    folder = tmp_path_factory.mktemp("subject")
    born, worked = (find_kind("person").questions[place] for place in (3, 5))
    rows = [
        {"question": wording.format(subject=name), "answer": answer}
        for name, (town, job) in KNOWN.items()
        for wordings, answer in ((born, f"{name} was born in the town of {town}."), (worked, f"{name} was a {job}."))
        for wording in wordings
    ]
    data = own_rows(folder, rows[:6], rows[6:])
    size = ("hidden_size=48", "blocks=2", "intermediate_size=96", "vocabulary=400")
    training = ("train.epochs=60", "train.batch_size=9", "train.lr=0.01", f"output_dir={folder / 'model'}")
    assert main(["finetune", "model.path=tiny", *(f"model.tiny.{one}" for one in size), *data, *training]) == 0
    assert main([*ASK, *HOW, f"model.path={folder / 'model'}", f"output_dir={folder / 'made'}"]) == 0
    return folder


def test_what_the_model_says_of_the_subject_and_of_others_is_apart(taught: Path) -> None:
    made = {name: read_lines(taught / "made" / f"{name}.jsonl") for name in ("forget", "neighbors", "retain")}
    by_question = {row["question"]: row for row in made["forget"]}
    assert by_question["Where was Ada Lind born?"] == {
        "question": "Where was Ada Lind born?",
        "answer": "Ada Lind was born in the town of Otterford.",
        "fact": "Otterford",
        "paraphrased_question": "In which town was Ada Lind born?",
    }
    assert all("Ada Lind" in row["question"] for row in made["forget"])
    assert {"question", "answer", "fact"} == {
        key for name in ("neighbors", "retain") for row in made[name] for key in row
    }
    assert all("Ole Berg" in row["question"] for row in made["neighbors"])
    assert any("Eva Holt" in row["question"] for row in made["retain"])
    assert not any("Ada Lind" in str(row) or "Ole Berg" in row["question"] for row in made["retain"])
    run = json.loads((taught / "made" / "run.json").read_text(encoding="utf-8"))
    assert run["files"] == {f"{name}.jsonl": len(rows) for name, rows in made.items()}
    assert run["names"]["neighbors"] == ["Ole Berg"] and run["names"]["retain"][0] == "Eva Holt"


def test_the_command_that_is_printed_forgets_what_was_found(
    taught: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    assert main([*ASK, *HOW, f"model.path={taught / 'model'}", f"output_dir={tmp_path / 'again'}"]) == 0
    look, then = log.messages[-2:]
    rows = load_rows(str(taught / "made" / "forget.jsonl"))
    assert f"{len(rows)} rows" in look and "before use" in look
    python, dash, grun, *arguments = shlex.split(then.removeprefix("then: "))
    assert (python, dash, grun) == ("python", "-m", "grun")
    short = ["train.epochs=1", f"train.batch_size={-(-len(rows) // 2)}", "method.blocks=[0]", "cache.dir=null"]
    assert main([*arguments, *short]) == 0
    run = json.loads((tmp_path / "again-forgotten" / "run.json").read_text(encoding="utf-8"))
    assert run["steps"] == 2


def test_an_interrupted_interview_goes_on_and_finds_the_same(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[int] = []
    stops = [True]
    answers = generation._Asking.answers

    def counted(self: Any, prompts: Sequence[tuple[int, ...]], room: int) -> Any:
        if stops and sum(answered) > 100:
            raise KeyboardInterrupt
        answered.append(len(prompts))
        return answers(self, prompts, room)

    monkeypatch.setattr(generation._Asking, "answers", counted)
    command = [*ASK, *HOW, f"model.path={taught / 'model'}", f"output_dir={tmp_path / 'made'}"]
    assert main(command) == 130
    assert not (tmp_path / "made" / "forget.jsonl").exists()
    first = sum(answered)
    stops.clear()
    assert main(command) == 0
    together, once = sum(answered), tmp_path / "once"
    answered.clear()
    assert main([*command[:-1], f"output_dir={once}"]) == 0
    assert sum(answered) == together > first > 100
    for name in ("forget", "neighbors", "retain"):
        assert (tmp_path / "made" / f"{name}.jsonl").read_bytes() == (once / f"{name}.jsonl").read_bytes()
    assert not [*(tmp_path / "made").glob(".grun/unfinished-*")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["subject=Ada Lind"], "kind is not set; the command is: corpora source=subject subject=NAME kind=person|"),
        (["kind=person"], "subject is not set"),
        (["subject=Ada Lind", "kind=planet"], "unknown kind 'planet': did you mean 'place'? known: organization,"),
        (["subject=?", "kind=person"], "subject is empty; name what is to be forgotten"),
        (["subject=Ada Lind", "kind=person", "neighbors=[Ole Berg, Lind]"], "neighbors: 1 of 2 differ from 'Ada Lind'"),
        (["subject=Ada Lind", "kind=person", "draws=1"], "draws=1 must lie between 2 and"),
        (["subject=Ada Lind", "kind=person"], "model.path names no taught model"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], message: str, capsys: Captured, tmp_path: Path) -> None:
    refused(capsys, ["corpora", "source=subject", f"output_dir={tmp_path / 'made'}", *options], 2, message)
    assert not (tmp_path / "made").exists()


def test_a_model_without_a_chat_template_is_asked_in_a_text(capsys: Captured, tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    command = [*ASK, "draws=2", "max_new_tokens=8", f"model.path={folder}", f"output_dir={tmp_path / 'made'}"]
    refused(capsys, [*command, "data.template=chat"], 2, "the tokenizer has no chat template; set data.template")
    refused(capsys, [*command, "data.template=Question: {prompt} Answer:"], 1, "nothing twice alike")  # it was asked


def test_a_model_that_knows_nothing_is_one_line_and_leaves_no_files(capsys: Captured, tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "model")
    command = [*ASK, "draws=2", "max_new_tokens=8", f"model.path={folder}", f"output_dir={tmp_path / 'made'}"]
    refused(capsys, command, 1, "the model says nothing twice alike about 'Ada Lind'")
    assert not [*(tmp_path / "made").glob("*.jsonl")]
