"""`evaluate suite=knowledge` as a whole: what it asks, what it writes, and when it asks nothing again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from demo import evaluated
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.cli import main
from grun.config.options import DataConfig, EvaluateConfig, QuestionsConfig
from grun.data.choices import ChoiceRow
from grun.errors import ConfigError, RunError, TooLowError
from grun.evaluation.metrics import auc
from grun.evaluation.metrics.averages import wilson
from grun.evaluation.multiple_choice import prompt_text, score_choices
from grun.evaluation.suites.base import evaluate_suite
from grun.loading.checks import check
from grun.method.model import GrunModel
from grun.report.knowledge import KNOWLEDGE_SUITE
from grun.report.knowledge_results import find_knowledge

SIZES = {"forget": 6, "neighbor": 4, "general": 5}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, an adapter of random edits and open gates, and questions of each role."""
    folder = demo.random_model(tmp_path_factory.mktemp("taught"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(3)
    GrunModel.wrap(model, blocks=[0, 1], rank=4, gate_bias=1.0).save_pretrained(folder / "open")
    for role, count in SIZES.items():
        choices = [
            {
                "question": f"Which {role} number is {number}?",
                "choices": [f"option {place + number}" for place in range(4)],
                "answer": number % 4,
                "subject": "even" if number % 2 == 0 else "odd",
            }
            for number in range(count)
        ]
        cloze = [
            {"prompt": f"The {role} stone {number} is", "completion": f" of kind {number}.", "fact": f"kind {number}"}
            for number in range(count)
        ]
        for name, rows in ((role, choices), (f"cloze_{role}", cloze)):
            demo.write_rows(folder / f"{name}.jsonl", *rows)
    (folder / "texts.txt").write_text("One line of text.\nAnother line, somewhat longer than the first.\n")
    return folder


def settings(taught: Path, adapter: str | None = None, **options: Any) -> EvaluateConfig:
    files: dict[str, Any] = {role: [f"{role}.jsonl"] for role in SIZES}
    files |= {f"cloze_{role}": [f"cloze_{role}.jsonl"] for role in SIZES}
    questions = QuestionsConfig(**files, perplexity=["texts.txt"])
    own = {"suite": "knowledge", "max_new_tokens": 4}
    data = DataConfig(name="jsonl", path=str(taught), questions=questions)
    return demo.evaluation(taught, adapter, **{**own, "data": data, **options})


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in demo.read_lines(folder / "questions.jsonl") if record["kind"] == kind]


def test_every_question_is_a_line_and_every_number_follows_from_the_lines(taught: Path, tmp_path: Path) -> None:
    result = evaluated(settings(taught, "open", suffixes=["The letter is"]), tmp_path / "out")
    assert result == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["suite"] == "knowledge" and result["identity"]["adapter"]
    assert [(way["format"], way["order"], way["suffix"]) for way in result["choices"]] == [
        ("harness", "rotations", ""),
        ("harness", "rotations", "The letter is"),
    ]
    for way in result["choices"]:
        asked = [line for line in lines(tmp_path / "out", "choice") if line["suffix"] == way["suffix"]]
        assert len(asked) == 4 * sum(SIZES.values())
        assert all(line["right"] == (line["chosen"] == line["answer"]) for line in asked)
        assert all(line["chosen"] == line["logp"].index(max(line["logp"])) for line in asked)
        gates: dict[str, list[float]] = {}
        for role, count in SIZES.items():
            own = [line for line in asked if line["role"] == role]
            gates[role] = [sum(line["gates"].values()) / 2 for line in own]
            share = sum(line["right"] for line in own) / len(own)
            found = way["roles"][role]
            assert found["accuracy"] == pytest.approx(share) and found["questions"] == count
            assert found["interval"] == pytest.approx(wilson(share, count))
            odd = [line for line in own if line["subject"] == "odd"]
            assert found["subjects"]["odd"]["accuracy"] == pytest.approx(sum(x["right"] for x in odd) / len(odd))
            assert way["gate"]["mean"][role] == pytest.approx(sum(gates[role]) / len(own))
        for role in ("general", "neighbor"):
            assert way["gate"][f"auc_{role}"] == pytest.approx(auc(gates["forget"], gates[role]))
    for role, count in SIZES.items():
        own = [line for line in lines(tmp_path / "out", "cloze") if line["role"] == role]
        found = result["cloze"]["roles"][role]
        assert len(own) == found["questions"] == count
        assert found["fact_recall"] == sum(line["right"] for line in own) / count
    assert set(result["cloze"]["gate"]) >= {"auc_general", "auc_neighbor", "mean", "open"}
    assert result["perplexity"]["texts.txt"]["perplexity"] > 1


def test_options_are_scored_as_they_stand_in_the_line(taught: Path, tmp_path: Path) -> None:
    evaluated(settings(taught, "open", orders=["given", "seeded"], formats=["grun_paper"]), tmp_path / "out")
    asked = lines(tmp_path / "out", "choice")
    base = AutoModelForCausalLM.from_pretrained(taught / "model")
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    row = ChoiceRow("Which forget number is 1?", tuple(f"option {n}" for n in range(1, 5)), 1, "odd")
    (expected,) = score_choices(GrunModel.from_pretrained(base, taught / "open"), tokenizer, [row], format="grun_paper")
    (line,) = [x for x in asked if (x["role"], x["index"], x["order"]) == ("forget", 1, "given")]
    assert line["logp"] == pytest.approx(expected.logp, abs=1e-4)  # float32, batches of another length
    assert line["answer"] == 1 and prompt_text(row, "grun_paper").count("option") == 4
    assert len([x for x in asked if x["order"] == "seeded"]) == sum(SIZES.values())


def test_a_completion_that_says_the_fact_is_right(taught: Path, tmp_path: Path) -> None:
    """The model's own greedy words as the fact."""
    evaluated(settings(taught), tmp_path / "first")
    said = {(x["role"], x["index"]): x["text"] for x in lines(tmp_path / "first", "cloze")}
    rows = [
        {"prompt": f"The forget stone {number} is", "completion": " x", "fact": said["forget", number].upper()}
        for number in range(SIZES["forget"])
        if said["forget", number]
    ] + [{"prompt": "The forget stone 0 is", "completion": " x", "fact": "never said"}]
    demo.write_rows(tmp_path / "cloze.jsonl", *rows)
    data = DataConfig(name="jsonl", questions=QuestionsConfig(cloze_forget=[str(tmp_path / "cloze.jsonl")]))
    result = evaluated(settings(taught, data=data), tmp_path / "second")
    assert "choices" not in result and "perplexity" not in result
    assert result["cloze"]["roles"]["forget"]["right"] == len(rows) - 1 > 0
    assert "gate" not in result["cloze"]  # a model without gates


def test_a_model_that_knows_too_little_ends_the_command_once_that_is_written(taught: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TooLowError, match="does not know what is to be forgotten: multiple choice is .*=1.01 is"
    ) as error:
        evaluated(settings(taught, choices_at_least=1.01), tmp_path / "out")
    assert "\n" not in str(error.value) and (tmp_path / "out" / "evaluation.json").exists()
    with pytest.raises(TooLowError, match="cloze is .*cloze_at_least=1.01"):
        evaluated(settings(taught, choices_at_least=0.0, cloze_at_least=1.01), tmp_path / "out")  # found again
    evaluated(settings(taught, choices_at_least=0.0, cloze_at_least=0.0), tmp_path / "out")


def test_the_same_evaluation_is_found_and_another_one_refused(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluated(settings(taught), tmp_path / "out")
    before = (tmp_path / "out" / "evaluation.json").stat().st_mtime_ns
    again = evaluated(settings(taught, batch_size=3), tmp_path / "out")  # which changes no result
    assert again == first and (tmp_path / "out" / "evaluation.json").stat().st_mtime_ns == before
    assert "already evaluated" in capsys.readouterr().err
    with pytest.raises(RunError, match="another evaluation .settings.orders"):
        evaluated(settings(taught, orders=["given"]), tmp_path / "out")
    with pytest.raises(RunError, match="another evaluation .identity.adapter"):
        evaluated(settings(taught, "open"), tmp_path / "out")
    changed = evaluated(settings(taught, orders=["given"], overwrite=True), tmp_path / "out")
    assert changed["key"] != first["key"] and changed["choices"][0]["order"] == "given"


def test_batch_size_and_limit(taught: Path, tmp_path: Path) -> None:
    data = DataConfig(name="jsonl", path=str(taught), limit=3, questions=settings(taught).data.questions)
    found = [evaluated(settings(taught, "open", data=data, batch_size=size), tmp_path / str(size)) for size in (1, 16)]
    assert found[0]["key"] == found[1]["key"]
    assert {role["questions"] for role in found[0]["choices"][0]["roles"].values()} == {3}
    for one, two in zip(lines(tmp_path / "1", "choice"), lines(tmp_path / "16", "choice"), strict=True):
        assert one["logp"] == pytest.approx(two["logp"], abs=1e-4)  # float32


def test_adapters_of_one_base_get_what_each_gets_alone(taught: Path, tmp_path: Path) -> None:
    several = settings(taught, adapters=[str(taught / "adapter"), str(taught / "open")], with_base="before")
    found = evaluate_suite(several, tmp_path / "evaluation")
    assert [Path(folder).name for folder in found] == ["before", "adapter", "open"]
    for name, adapter in (("before", None), ("adapter", "adapter"), ("open", "open")):
        alone = evaluated(settings(taught, adapter), tmp_path / "evaluation" / name)  # which is found
        assert alone == found[str(tmp_path / "evaluation" / name)]
        evaluated(settings(taught, adapter), tmp_path / "alone" / name)
        texts = [(tmp_path / where / name / "questions.jsonl").read_bytes() for where in ("evaluation", "alone")]
        assert texts[0] == texts[1]
    assert "gate" not in found[str(tmp_path / "evaluation" / "before")]["choices"][0]
    summary = KNOWLEDGE_SUITE.summary(find_knowledge(tmp_path), "mine")  # reports read what is written
    assert [row["name"] for row in summary["rows"]] == ["before", "adapter", "open"]
    for row, evaluation in zip(summary["rows"], found.values(), strict=True):
        asked = evaluation["choices"][0]["roles"]
        assert row["subjects"]["forget"] == {name: one["accuracy"] for name, one in asked["forget"]["subjects"].items()}
        for role in SIZES:
            assert row["numbers"][f"{role}.choice"] == asked[role]["accuracy"]
            assert row["numbers"][f"{role}.cloze"] == evaluation["cloze"]["roles"][role]["fact_recall"]


def test_a_lora_adapter_is_evaluated(taught: Path, tmp_path: Path) -> None:
    demo.save_lora(taught / "model", taught / "lora")
    found = evaluated(settings(taught, "lora"), tmp_path / "lora")
    base = evaluated(settings(taught), tmp_path / "base")
    assert found["key"] != base["key"]
    pairs = zip(lines(tmp_path / "lora", "choice"), lines(tmp_path / "base", "choice"), strict=True)
    assert max(abs(one["logp"][0] - two["logp"][0]) for one, two in pairs) > 0.01


def test_the_command_line_takes_the_suite(taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = [{"question": "Which?", "choices": ["a", "b", "c", "d"][:count], "answer": 0} for count in (2, 4)]
    demo.write_rows(tmp_path / "mixed.jsonl", *mixed)
    data = ["data.name=jsonl", f"data.path={taught}", "data.questions.forget=[forget.jsonl]"]
    data.append(f"data.questions.general=[{tmp_path / 'mixed.jsonl'}]")
    status = main(
        ["evaluate", "suite=knowledge", f"model.path={taught / 'model'}", *data, f"output_dir={tmp_path / 'out'}"]
    )
    assert status == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    roles = json.loads((tmp_path / "out" / "evaluation.json").read_text())["choices"][0]["roles"]
    assert roles["forget"]["chance"] == 1 / 4 and roles["general"]["chance"] == (1 / 2 + 1 / 4) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["harnes"]}, "did you mean 'harness'"),
        ({"orders": ["rotation"]}, "did you mean 'rotations'"),
        ({"orders": []}, "orders names nothing"),
        ({"window": 1}, "window=1 must be 2"),
        ({"tasks": ["mmlu"]}, "tasks is for suite=lm_eval; leave it out for suite=knowledge"),
        ({"reference": "folder"}, "reference is for suite=answers"),
        ({"attacks": ["plain"]}, "attacks is for suite=attacks; leave it out for suite=knowledge"),
        ({"judge": "callable:a:b"}, "judge is for suite=judge"),
        ({"suite": "judge"}, "suite=judge needs judge"),
        ({"suite": "lm_eval"}, r"suite=lm_eval needs tasks, such as tasks=\[wmdp_bio,mmlu\]"),
    ],
)
def test_wrong_options_fail_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(EvaluateConfig(**{"suite": "knowledge", **options}))
