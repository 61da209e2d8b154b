"""What a gate is fitted on besides rows: files of prompts, and prompts about named subjects and about others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model
from demo import refused, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun import unlearn
from grun.cli import main
from grun.config.options import DataConfig
from grun.data.benchmarks.countries import wordings
from grun.data.corpus import Corpus
from grun.data.everyday import everyday_prompts, names_of, wordings_of
from grun.data.rows import Row
from grun.data.subject import KINDS, find_kind
from grun.errors import ConfigError, DataError
from grun.method.stack.manifest import Manifest
from grun.training.gate_prompts import PER_NAME, SWAPS, GatePrompts, collect, read_subjects

ROWS = [
    {"question": "What is the capital of Japan?", "answer": "Tokyo."},
    {"question": "What do people in japan speak?", "answer": "Japanese."},
    {"question": "Nippon is on which continent?", "answer": "Asia."},
]
FIT = [
    *("unlearn", "method.gate_blocks=[0]", "method.gate_pool=maxmin", "method.edit_write=sticky"),
    *("method.gate_fit=logistic", "method.blocks=[1,2]", "method.rank=2", "objective=idk", "train.epochs=1"),
    *("data.name=jsonl", "data.forget=forget.jsonl", "model.device=cpu", "cache.dir=null"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("subjects")
    save_chat_model(path / "model")
    write_rows(path / "forget.jsonl", *ROWS)
    (path / "empty.txt").write_text("\n\n")
    (path / "asked.txt").write_text("Is sushi from Japan?\n\nWho lives in Osaka?\n")
    write_rows(path / "others.jsonl", {"q": "What is sauna?"}, {"q": "Where is Oslo?"}, {"q": "Who rules Peru?"})
    return path


def run(folder: Path, name: str, *arguments: str) -> list[str]:
    own = [f"model.path={folder / 'model'}", f"output_dir={folder / name}", f"data.path={folder}"]
    return [*FIT, *own, *arguments]


def corpus_of(*questions: str, **sets: list[Row]) -> Corpus:
    return Corpus("jsonl", [Row(question, "Yes.") for question in questions], [], **sets)


def of(prompts: GatePrompts, side: str, source: str) -> list[tuple[str, str]]:
    return [(str(row.prompt), unit) for row, unit in getattr(prompts, side)[source]]


def test_wordings_of_every_kind_are_none_that_evaluation_keeps_for_itself() -> None:
    reworded = {one for kind in wordings()["kinds"].values() for one in kind["reworded"]}
    reworded |= {one for _, one in wordings()["indirect"]}
    for kind in ("any", *KINDS):
        asked, everyday = wordings_of(kind), everyday_prompts()[kind]
        assert len(everyday) >= 12 and len({*asked}) == len(asked) and all("{name}" in one for one in asked)
        assert {*everyday_prompts()["any"], *everyday} <= {*asked}
        last = {question[-1] for question in find_kind(kind).questions} if kind != "any" else set()
        kept = {re.sub(r"\{\w+\}", "{name}", question) for question in reworded | last}
        assert not kept & {*asked}


def test_there_are_names_of_every_kind_each_once() -> None:
    for kind in KINDS:
        first = [names[0] for names in names_of(kind)]
        assert len(first) >= 60 and len({name.casefold() for name in first}) == len(first)
    assert ("Chile", "Santiago", "the Chilean people") in names_of("place")
    assert ("Isaac Newton", "Newton") in names_of("person")
    assert {*names_of("any")} < {names for kind in KINDS for names in names_of(kind)}


def test_everyday_prompts_about_a_subject_open_and_about_other_names_of_its_kind_do_not() -> None:
    data = DataConfig(subjects=["Marie Curie | Madame Curie"], subject_kind="person")
    found = collect(corpus_of("When did Marie Curie find radium?"), data)
    opened, shut = of(found, "forget", "subjects"), of(found, "retain", "subjects")
    asked = wordings_of("person")
    assert len(opened) == len(asked) * 2
    wanted = {"Tell me about Marie Curie.", "How old is Madame Curie?", "What is the birth date of Marie Curie?"}
    assert wanted <= {prompt for prompt, _ in opened}
    assert not any("Curie" in prompt for prompt, _ in shut)
    assert all(any(name in prompt for name in (unit, unit.split()[-1])) for prompt, unit in shut)
    assert len({unit for _, unit in shut}) == len(names_of("person")) and len(shut) >= len(asked) // PER_NAME * 80
    assert [row.prompt for row in found.always] == everyday_prompts()["other"]


def test_names_that_are_the_subjects_or_are_asked_about_in_evaluation_are_no_others() -> None:
    heldout = [Row("Is Chile long?", "Yes."), Row("Where is berlin?", "There.")]
    corpus = corpus_of("Where is Japan?", "Is Fuji higher than Mount Kilimanjaro?", heldout=heldout)
    found = collect(corpus, DataConfig(subjects=["JAPAN | Guinea", "Port of Spain"], subject_kind="place"))
    units = {unit for _, unit in of(found, "retain", "subjects")}
    assert not units & {"Tokyo", "Mount Kilimanjaro", "Japan", "Chile", "Berlin", "Germany", "Guinea"} and {
        "Norway",
        "Spain",
    } - units == {"Spain"}
    prompts = " ".join(prompt for prompt, _ in of(found, "retain", "subjects") + of(found, "retain", "swapped"))
    assert not re.search(r"\b(Chile|Santiago|Berlin|Germany|Tokyo|Kilimanjaro)\b", prompts)


def test_questions_of_forget_rows_are_asked_about_others_too() -> None:
    rows = [
        *("What is the capital of the Japan of old?", "who rules japan?", "NIPPON's flag?", "What is Japanese tea?")
    ]
    data = DataConfig(subjects=["Japan | Nippon"], subject_kind="place")
    found = of(collect(corpus_of(*rows), data), "retain", "swapped")
    assert len(found) == 3 * SWAPS  # Japanese is another word
    assert not any(re.search("japan|nippon", prompt, re.IGNORECASE) for prompt, _ in found)
    capitals, rulers, flags = (found[start : start + SWAPS] for start in (0, SWAPS, 2 * SWAPS))
    assert all(prompt == f"What is the capital of {unit} of old?" for prompt, unit in capitals)
    assert all(prompt == f"who rules {unit.lower()}?" for prompt, unit in rulers)
    named = {names[0]: names for names in names_of("place")}
    assert all(prompt == f"{(*named[unit], named[unit][0])[1]}'s flag?" for prompt, unit in flags)  # its alias, if any
    assert len({unit for _, unit in found}) == len(found)


def test_a_subject_that_no_row_names_is_said(caplog: pytest.LogCaptureFixture) -> None:
    found = collect(corpus_of("Where is the brewer?"), DataConfig(subjects=["Calderby"]))
    assert "swapped" not in found.retain
    assert "no question of the forget set names Calderby; nothing is swapped there" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["Japan", "Nippon | japan"], "'japan' is in 'Japan' and in 'Nippon | japan'; a name is of one subject"),
        (["Japan | "], "'Japan | ' holds an empty name"),
        (["..."], "'...' holds an empty name"),
        (["Japan", "Japan"], "names a subject twice"),
    ],
)
def test_subjects_need_names_of_their_own(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_subjects(given)


def test_files_of_prompts_are_text_or_records(folder: Path) -> None:
    data = DataConfig(path=str(folder), columns={"question": "q"})
    found = collect(corpus_of("Why?"), replace(data, gate_prompts="asked.txt", gate_negatives="others.jsonl"))
    assert [prompt for prompt, _ in of(found, "forget", "files")] == ["Is sushi from Japan?", "Who lives in Osaka?"]
    assert of(found, "retain", "files")[1] == ("Where is Oslo?", "Where is Oslo?")
    assert set(found.hashes()) == {"gate_prompts", "gate_negatives"}
    whole = collect(corpus_of("Why?"), replace(data, gate_negatives="forget.jsonl", columns={}))
    assert [row.completion for row, _ in whole.retain["files"]] == [""] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "none.txt"),
        ("none.jsonl", "none.jsonl"),
        ("empty.txt", "holds no prompts; expected one a line"),
        ("others.jsonl", "line 1: a prompt needs the field prompt or question; it has: q. data.columns names others"),
    ],
)
def test_files_that_hold_no_prompts_are_one_line(name: str, message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        collect(corpus_of("Why?"), DataConfig(path=str(folder), gate_prompts=name))


def test_a_model_forgets_without_retain_rows(folder: Path) -> None:
    subject = ["data.subjects=[Japan | Nippon]", "data.subject_kind=place", "method.false_positives=0.1"]
    assert main(run(folder, "alone", *subject, "data.gate_prompts=asked.txt")) == 0
    values = json.loads((folder / "alone" / "run.json").read_text())
    about = values["gate_fit"]
    assert values["terms"] == {"forget": 1.0} and 0 < about["bound"] < 0.1 + 1e-9 and about["calibration"] > 30
    assert {"forget_rows": 3, "forget_files": 2, "retain_rows": 0, "retain_swapped": 12}.items() <= about[
        "sources"
    ].items()
    evaluation = ["evaluate", f"adapter={folder / 'alone'}", f"output_dir={folder / 'measured'}", "model.device=cpu"]
    assert main([*evaluation, "max_new_tokens=4"]) == 0
    found = json.loads((folder / "measured" / "evaluation.json").read_text())
    assert [*found["sets"]] == ["forget"] and found["counts"]["forget"]["rows"] == 3


def test_a_name_is_enough_where_nobody_names_a_design(folder: Path) -> None:
    own = [word for word in run(folder, "default", "data.subjects=[Japan | Nippon]") if not word.startswith("method.")]
    assert main([*own, "data.subject_kind=place"]) == 0
    values = json.loads((folder / "default" / "run.json").read_text())
    assert (values["config"]["design"], values["gate_fit"]["sources"]["retain_rows"]) == ("pooled", 0)
    assert values["config"]["data"]["gate_copies"] == ["lower_case", "upper_case", "typos", "spelled", "code"]


def test_other_prompts_are_another_run_and_a_store_takes_a_subject(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = [f"store={folder / 'store'}", "id=japan", "data.subjects=[Japan]"]
    assert main(["requests", "add", *store, *run(folder, "unused")[1:-2], f"data.path={folder}"]) == 0
    assert [request.id for request in Manifest.read(folder / "store").requests] == ["japan"]
    others = run(folder, "files", "data.gate_negatives=asked-of-us.txt")
    (folder / "asked-of-us.txt").write_text("Where is Oslo?\nWhere is Rome?\n")
    assert main(others) == 0 and main(others) == 0
    (folder / "asked-of-us.txt").write_text("Where is Oslo?\nWhere is Bern?\n")
    assert "overwrite=true" in refused(capsys, others, 1)


def test_in_python_a_name_stands_for_retain_rows(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    options: dict[str, Any] = {
        "gate_blocks": [0],
        "gate_pool": "maxmin",
        "gate_fit": "logistic",
        "edit_write": "sticky",
    }
    edited = unlearn(base, tokenizer, ROWS, objective="idk", subjects=["Japan | Nippon"], epochs=1, rank=2, **options)
    assert edited.gate_threshold == 0.5
    edited.unwrap()
    with pytest.raises(ConfigError, match="nothing says where it stays shut: give retain rows"):
        unlearn(base, tokenizer, ROWS, objective="idk", epochs=1, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing says where it stays shut: give retain rows (data.retain), names"),
        (["data.gate_prompts=asked.txt"], "nothing says where it stays shut"),
        (["data.subjects=[Japan]", "loss.retain=ce"], "there are no retain rows, but a retain or gate term reads them"),
        (
            ["data.subjects=[Japan]", "data.augment.forget_copies=2", "data.augment.retain_copies=2"],
            "no retain rows to copy",
        ),
        (["data.subject_kind=place"], "data.subject_kind=place says what data.subjects are"),
        (["data.subjects=[Japan]", "data.subject_kind=country"], "unknown data.subject_kind 'country'"),
        (["data.gate_prompts=none.txt", "data.subjects=[Japan]"], "none.txt"),
        (["data.subjects=[Japan]", "method.gate_fit=joint"], "data.subjects=['Japan'] is for method.gate_fit=logistic"),
        (
            ["data.gate_negatives=x.txt", "method.gate_fit=joint"],
            "data.gate_negatives=x.txt is for method.gate_fit=logistic",
        ),
    ],
)
def test_what_is_missing_or_has_no_effect_is_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, run(folder, "wrong", *arguments), 1 if message == "none.txt" else 2, message)
    assert not (folder / "wrong").exists()
