"""`from grun import unlearn, evaluate, attack`: models and rows in memory, as docs and README show them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import grun
from grun import GrunModel, attack, evaluate, unlearn
from grun.cli import main
from grun.config.options import DataConfig, TinyConfig
from grun.data.encoding import collate, encode_rows
from grun.data.rows import Row
from grun.data.templates import resolve
from grun.errors import ConfigError, DataError
from grun.loading.tiny import build_tiny
from grun.runtime.files import read_json

NAMES = ("Mara", "Tom", "Ines", "Olof", "Vera", "Noah", "Lena", "Karl")
TOWNS = ("Bergen", "Lisbon", "Quito", "Accra", "Tunis", "Hanoi", "Riga", "Cairo")
ROWS = [
    {"question": f"Where does {name} live?", "answer": f"In {town}.", "fact": town}
    for name, town in zip(NAMES, TOWNS, strict=True)
]
FORGET, RETAIN = ROWS[:3], ROWS[3:]
TRAINING: dict[str, Any] = {
    "design": "published",
    "blocks": [2, 3],
    "lr": 0.03,
    "epochs": 60,
    "batch_size": 3,
    "seed": 1,
}


@pytest.fixture(scope="module")
def known() -> tuple[Any, Any]:
    """A tiny model that answers every question right, and its tokenizer."""
    texts = [f"{row['question']} {row['answer']}" for row in ROWS]
    model, tokenizer = build_tiny(TinyConfig(hidden_size=64, blocks=4, intermediate_size=128, vocabulary=400), texts, 0)
    rows = [Row(row["question"], row["answer"]) for row in ROWS]
    template = resolve("auto", None, tokenizer, None, DataConfig.date)
    batch = collate(encode_rows(rows, tokenizer, template, 128, strict=False), tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


@pytest.fixture
def model(known: tuple[Any, Any]) -> Any:
    return copy.deepcopy(known[0])


@pytest.fixture
def tokenizer(known: tuple[Any, Any]) -> Any:
    return known[1]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The current folder and the folder of temporary files, both of which stay empty."""
    found = [tmp_path / "here", tmp_path / "temporary"]
    for folder in found:
        folder.mkdir()
    monkeypatch.chdir(found[0])
    monkeypatch.setattr(tempfile, "tempdir", str(found[1]))
    yield found
    assert [path for folder in found for path in folder.iterdir()] == []


def recall(result: dict[str, Any]) -> dict[str, float]:
    return {name: metrics["fact_recall"] for name, metrics in result["sets"].items()}


def test_a_model_forgets_rows_and_keeps_others(model: Any, tokenizer: Any) -> None:
    sets = {"forget": FORGET, "retain": RETAIN}
    assert recall(evaluate(model, tokenizer, sets)) == {"forget": 1, "retain": 1}
    before = {name: value.clone() for name, value in model.state_dict().items()}

    edited = unlearn(model, tokenizer, FORGET, RETAIN, **TRAINING)

    assert isinstance(edited, GrunModel) and edited.base is model and not edited.training
    assert edited.config.blocks == [2, 3]
    result = evaluate(edited, tokenizer, sets)
    found = recall(result)
    assert found["forget"] == 0 and found["retain"] > 0.5
    probability = {name: metrics["probability"] for name, metrics in result["sets"].items()}
    assert probability["forget"] < 0.1 * probability["retain"]
    assert result["gate"]["mean"]["forget"] > result["gate"]["mean"]["retain"]
    assert len(result["table"].scores_of("forget")) == len(FORGET)
    assert result["sets"] == evaluate(model, tokenizer, sets)["sets"]  # the base carries the edits
    edited.unwrap()
    assert recall(evaluate(model, tokenizer, sets)) == {"forget": 1, "retain": 1}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_attacks_find_what_is_there_and_not_what_is_gone(model: Any, tokenizer: Any) -> None:
    chosen: dict[str, Any] = {"attacks": ["plain", "prefill_1", "samples"], "attack_samples": 2}
    found = attack(model, tokenizer, FORGET, RETAIN, **chosen)
    assert list(found["attacks"]) == chosen["attacks"] and found["attacks"]["plain"]["leak"] == 1
    assert len(found["answers"]) == 3 * len(FORGET) and found["answers"][0]["text"] == "In Bergen."

    edited = unlearn(model, tokenizer, FORGET, RETAIN, **TRAINING)
    assert attack(edited, tokenizer, FORGET, RETAIN, rows=2, **chosen)["attacks"]["plain"] == {
        **found["attacks"]["plain"],
        **attack(edited, tokenizer, FORGET[:2], RETAIN, **chosen)["attacks"]["plain"],
    }
    assert attack(edited, tokenizer, FORGET, RETAIN, **chosen)["attacks"]["plain"]["leak"] == 0


@pytest.mark.parametrize("form", ["dataset", "messages", "instructions", "rows", "prompts"])
def test_rows_in_every_form_train_the_same_edits(form: str, model: Any, tokenizer: Any) -> None:
    forms: dict[str, Any] = {
        "dataset": Dataset.from_list,
        "messages": lambda rows: [
            {
                "messages": [
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"]},
                ]
            }
            for row in rows
        ],
        "instructions": lambda rows: [{"instruction": row["question"], "output": row["answer"]} for row in rows],
        "rows": lambda rows: [Row(row["question"], row["answer"]) for row in rows],
        "prompts": lambda rows: [{"prompt": row["question"], "completion": row["answer"]} for row in rows],
    }
    training = {**TRAINING, "epochs": 1}
    expected = unlearn(copy.deepcopy(model), tokenizer, FORGET, RETAIN, **training).state_dict()
    found = unlearn(model, tokenizer, forms[form](FORGET), forms[form](RETAIN), **training).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_plain_texts_are_rows_without_a_question(model: Any, tokenizer: Any) -> None:
    texts = [f"{row['question']} {row['answer']}" for row in ROWS]
    training = {**TRAINING, "epochs": 1, "objective": "gd"}
    del training["design"]  # the default gives way
    one = unlearn(copy.deepcopy(model), tokenizer, texts[:3], texts[3:], **training).state_dict()
    other = unlearn(
        model, tokenizer, [{"text": text} for text in texts[:3]], Dataset.from_dict({"text": texts[3:]}), **training
    ).state_dict()
    assert all(torch.equal(other[name], value) for name, value in one.items())
    assert evaluate(model, tokenizer, texts)["counts"]["rows"]["rows"] == len(texts)


@pytest.mark.parametrize("parametrization", ["lora", "full"])
def test_other_parametrizations_give_the_model_itself(parametrization: str, model: Any, tokenizer: Any) -> None:
    model = model.to(torch.bfloat16)
    sets = {"forget": FORGET, "retain": RETAIN}
    before = evaluate(model, tokenizer, sets)["sets"]["forget"]["probability"]
    changed = unlearn(
        model, tokenizer, FORGET, RETAIN, parametrization=parametrization, objective="gd", lr=3e-3, epochs=40
    )
    assert changed is model and model.dtype == torch.bfloat16 and not model.training
    assert evaluate(changed, tokenizer, sets)["sets"]["forget"]["probability"] < before / 2


def test_an_output_folder_holds_what_the_command_line_reads_and_is_found_again(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = tmp_path / "adapter", tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    first = unlearn(loaded, tokenizer, FORGET, RETAIN, output_dir=folder, **TRAINING)
    first.unwrap()
    assert read_json(folder / "run.json")["config"]["train"]["lr"] == TRAINING["lr"]
    assert "Mara" not in "".join(path.read_text(errors="ignore") for path in folder.iterdir() if path.is_file())
    again = unlearn(loaded, tokenizer, FORGET, RETAIN, output_dir=folder, **TRAINING)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in first.state_dict().items())
    assert main(["generate", f"adapter={folder}", f"model.path={base}", FORGET[0]["question"]]) == 0
    assert "without the adapter: In Bergen." in capsys.readouterr().out
    result = evaluate(again, tokenizer, FORGET, output_dir=tmp_path / "evaluation")
    assert read_json(tmp_path / "evaluation" / "evaluation.json")["sets"] == result["sets"]
    again.unwrap()
    with pytest.raises(grun.errors.RunError, match="another run"):
        unlearn(loaded, tokenizer, FORGET, RETAIN, output_dir=folder, **{**TRAINING, "lr": 0.01})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"epoch": 3}, ["unknown option 'epoch'", "did you mean 'epochs'"]),
        ({"options": {"train.lrr": 1}}, ["unknown option 'train.lrr'", "did you mean 'train.lr'"]),
        ({"gate": "linear"}, ["method.gate or loss.gate", "whole key"]),
        ({"lr": 1e-3, "options": {"train.lr": 1e-3}}, ["train.lr is given twice"]),
        ({"lr": -1.0}, ["train.lr=-1.0 must be greater than 0"]),
        ({"lr": "fast"}, ["train.lr", "fast"]),
        ({"lr": torch.ones(1)}, ["no plain type"]),
        ({"objective": "nppo"}, ["unknown objective 'nppo'", "npo"]),
        ({"blocks": [7]}, ["blocks [7]", "4 blocks"]),
        ({"adapter": "x"}, ["unknown option 'adapter'"]),
        ({"parametrization": "in_context"}, ["in_context changes no model"]),
        ({"options": {"model.path": "x"}}, ["unknown option 'model.path'"]),
    ],
)
def test_a_wrong_option_is_named_and_leaves_the_model_as_it_was(
    given: dict[str, Any], named: list[str], model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError) as raised:
        unlearn(model, tokenizer, FORGET, RETAIN, **given)
    for text in named:
        assert text in str(raised.value)
    assert grun.GrunModel.of(model) is None and "generate" not in vars(model)


def test_gates_are_fitted_first_though_the_objective_reads_no_answer(model: Any, tokenizer: Any) -> None:
    edited = unlearn(model, tokenizer, FORGET, RETAIN, objective="idk", gate_pretraining=300, epochs=1, blocks=[2, 3])
    opened = evaluate(edited, tokenizer, {"forget": FORGET, "retain": RETAIN})["gate"]["mean"]
    assert opened["forget"] > opened["retain"]


def test_the_key_with_the_fewest_sections_is_meant(model: Any, tokenizer: Any) -> None:
    edited = unlearn(model, tokenizer, FORGET, RETAIN, rank=2, dropout=0.5, epochs=1)
    assert edited.config.rank == 2 and edited.config.dropout == 0.5  # not those of method.lora


@pytest.mark.parametrize(
    ("forget", "retain", "named"),
    [
        ([{"question": "Who?"}], RETAIN, "forget row 1: a row needs the fields"),
        (FORGET, [*RETAIN, 5], "retain row 6: expected an object"),
        (FORGET, {"question": "Who?", "answer": "I."}, "retain: expected rows"),
        ([], RETAIN, "the forget set is empty"),
        (FORGET, ROWS, "3 of 3 forget rows also stand in the retain set"),
    ],
)
def test_malformed_rows_are_named(forget: Any, retain: Any, named: str, model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=named):
        unlearn(model, tokenizer, forget, retain)


def test_attacks_need_questions(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="forget rows hold none"):
        attack(model, tokenizer, ["A text."], RETAIN)
    with pytest.raises(ConfigError, match="unknown attack 'plane'"):
        attack(model, tokenizer, FORGET, RETAIN, attacks=["plane"])


def test_gates_are_calibrated_in_memory_by_rows_that_must_stay(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    edited = unlearn(model, tokenizer, FORGET, RETAIN[:2], **{**TRAINING, "epochs": 1})
    others = [{**row, "town": row["fact"]} for row in RETAIN[2:]]
    found = grun.calibrate(edited, tokenizer, others, false_positives=0.25, forget=FORGET, group="town")
    assert found["bound"] == pytest.approx(0.25) and found["calibration"] == 3
    assert found["opened"] == 0 and 0 <= found["recall"] <= 1
    edited.save_pretrained(tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["gate_bound"] == pytest.approx(0.25)
    for wrong, message in ((2.0, "between 0 and 1"), (0.1, "needs 9 rows to keep")):
        with pytest.raises(ConfigError, match=message):
            grun.calibrate(edited, tokenizer, others, false_positives=wrong)
    edited.unwrap()
    with pytest.raises(ConfigError, match="the GrunModel that unlearn gives"):
        grun.calibrate(model, tokenizer, others, false_positives=0.25)
