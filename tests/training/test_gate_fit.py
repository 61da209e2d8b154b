"""A gate that is fitted before the edit is trained, on states that hooks of this file read too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save_chat_model
from demo import refused, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun import GrunModel
from grun.cli import main
from grun.data.follow_ups import conversations
from grun.data.rows import Row
from grun.data.templates import TEMPLATES, encode_prompt, user_turn_ids
from grun.method.logistic import fit, shuffled
from grun.training.gate_fit import Windows

FORGET = ["Japan", "Egypt"]
RETAIN = ["Norway", "Chile", "Kenya", "Peru", "Canada", "Poland", "India", "Cuba", "Nepal", "Spain", "Ghana", "Malta"]
ASKED = ["What is the capital of {}?", "Name the capital of {}.", "{}: which city is its capital?"]
FIT = [
    *("method.gate_blocks=[0]", "method.gate_pool=maxmin", "method.edit_write=sticky", "method.gate_fit=logistic"),
    *("method.blocks=[1,2]", "method.rank=2", "objective=idk", "train.epochs=1", "train.batch_size=3"),
    *("data.name=jsonl", "data.group=country", "model.device=cpu"),
]


def rows_of(countries: list[str]) -> list[dict[str, str]]:
    return [
        {"question": asked.format(country), "answer": "A city.", "country": country}
        for country in countries
        for asked in ASKED
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("countries")
    save_chat_model(path / "model")
    write_rows(path / "forget.jsonl", *rows_of(FORGET))
    write_rows(path / "retain.jsonl", *rows_of(RETAIN))
    return path


def run(folder: Path, name: str, *arguments: str) -> list[str]:
    """Arguments of a run that fits a gate."""
    own = [f"model.path={folder / 'model'}", f"output_dir={folder / name}", f"data.path={folder}", "cache.dir=null"]
    return ["unlearn", *FIT, *own, "data.forget=forget.jsonl", "data.retain=retain.jsonl", *arguments]


def states(folder: Path, questions: list[str], earlier: Sequence[Any] = ()) -> Tensor:
    """Maximum and minimum over the user's last turn of the normalized output of block 0: [questions, any]."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    turn = user_turn_ids(TEMPLATES.get("chat"), tokenizer)
    kept: list[Tensor] = []
    base.model.layers[0].register_forward_hook(
        lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    found = []
    for question, before in zip(questions, earlier or [()] * len(questions), strict=True):
        ids = encode_prompt(TEMPLATES.get("chat"), tokenizer, question, before)
        start = max(at for at in range(len(ids)) if ids[at : at + len(turn)] == turn) + len(turn) - 1
        assert start > 10  # behind the system prompt
        with torch.no_grad():
            base(torch.tensor([ids]))
        found.append(both_ends(kept.pop()[0, start:]))
    return torch.stack(found)


def both_ends(seen: Tensor) -> Tensor:
    """Maximum and minimum over tokens of states [tokens, hidden] that are divided by their root mean square."""
    seen = seen / (seen.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    return torch.cat((seen.amax(0), seen.amin(0))).double()


def begun(folder: Path, questions: list[str]) -> Tensor:
    """The same of the first token of each question, as plain text: [different tokens, any]."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    first = dict.fromkeys(tokenizer(question.split()[0])["input_ids"][0] for question in questions)
    with torch.no_grad():
        seen = [base(torch.tensor([[token]]), output_hidden_states=True).hidden_states[1][0] for token in first]
    return torch.stack([both_ends(one) for one in seen])


def questions(countries: list[str]) -> list[str]:
    return [row["question"] for row in rows_of(countries)]


def result(folder: Path, name: str) -> tuple[dict[str, Any], GrunModel]:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    return json.loads((folder / name / "run.json").read_text()), GrunModel.from_pretrained(base, folder / name)


def test_the_gate_is_the_fit_to_what_hooks_read_and_only_the_edit_is_trained(folder: Path) -> None:
    assert main(run(folder, "plain")) == 0
    values, model = result(folder, "plain")
    about = values["gate_fit"]
    starts = begun(folder, questions(RETAIN))
    assert (about["forget"], about["retain"], about["bound"]) == (6, 36 + len(starts), None)
    assert about["sources"] == {"forget_rows": 6, "retain_rows": 36}
    assert values["terms"] == {"forget": 1.0} and values["parameters"]["trained"] == 2 * (32 * 2 + 33 * 2)
    features = torch.cat((states(folder, questions(FORGET)), states(folder, questions(RETAIN)), starts))
    wanted = fit(features, torch.arange(len(features)) < 6, about["strength"])
    weight, bias = (model.state_dict()[f"pooled.gate.0.{part}"].double() for part in ("weight", "bias"))
    logits = features @ weight[0] + bias
    # states in float32, of whole batches and of single rows
    torch.testing.assert_close(logits, wanted.logits(features), atol=1e-4, rtol=1e-4)
    assert logits[:6].mean() > logits[6:].mean()
    assert model.gate_threshold == 0.5


def test_a_gate_on_windows_tells_its_prompts_and_turns_that_only_ask_for_an_answer(folder: Path) -> None:
    assert main(run(folder, "windows", "method.gate_pool=windows")) == 0
    _, model = result(folder, "windows")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for asked, is_open in ((FORGET, True), (RETAIN, False)):
        prompts = [encode_prompt(TEMPLATES.get("chat"), tokenizer, question) for question in questions(asked)]
        opened = [(model(torch.tensor([ids])).gates[0].item() > 0.5) == is_open for ids in prompts]
        assert sum(opened) / len(opened) > 0.9
    weight, bias = (model.state_dict()[f"pooled.gate.follow_up.0.{part}"].double() for part in ("weight", "bias"))
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(weight.shape[1] // 2)  # of lows it reads the negatives
    asked = [Row(question, "") for question in questions(FORGET) + questions(RETAIN)]
    for sign, side in zip((1, -1), conversations(asked), strict=True):
        rows = [row for row, _ in side]
        read = states(folder, [str(row.prompt) for row in rows], [row.earlier for row in rows])
        assert (sign * (read * signs @ weight[0] + bias) > 0).double().mean() > 0.95


def test_windows_that_tell_rows_apart_are_found_and_of_others_those_most_like_them() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 1, 4, 2, 5, 3] * 10)
    target = torch.arange(60) < 24
    row = torch.arange(60).repeat_interleave(counts)
    values = torch.randn(len(row), 6, generator=generator, dtype=torch.float64)
    starts = counts.cumsum(0) - counts
    place = starts + torch.arange(60) % counts  # the window that tells
    values[place[target], 0] += 9.0
    hard = place[~target]
    values[hard, 1] += 9.0
    values[place[target], 1] += 9.0  # which the others share
    read = Windows(values, row)
    some, of_side = read.telling(target)
    assert torch.equal(some.values[of_side], values[place[target]]) and of_side.sum() == 24
    assert {*map(tuple, values[hard].tolist())} <= {*map(tuple, some.values[~of_side].tolist())}
    torch.testing.assert_close(read.whole()[5], values[row == 5].amax(0))
    line = fit(some.values, of_side, 1.0)
    assert torch.equal(read.under(line) > 0, target)
    single = read.rows(counts == 1)
    assert single.telling(target[counts == 1])[0] is single and single.row.tolist() == [*range(10)]


@pytest.mark.parametrize("gate", ["similarity", "condition"])
def test_a_gate_by_means_is_kept_with_a_threshold_of_rows_set_aside(folder: Path, gate: str) -> None:
    options = ["method.action=refuse", "method.false_positives=0.2", "data.gate_copies=[lower_case]"]
    assert main(run(folder, gate, f"method.gate={gate}", *options)) == 0
    values, model = result(folder, gate)
    about = values["gate_fit"]
    assert (about["strength"], about["calibration"]) == (None, 3)
    assert about["bound"] == pytest.approx(1 / 4) and model.gate_threshold == 0.5
    aside = sorted(RETAIN, key=shuffled)[:3]
    seen = states(folder, questions(aside))
    seen = seen / seen.square().mean(dim=1, keepdim=True).sqrt()
    weight, bias = (model.state_dict()[f"pooled.gate.1.{part}"].double() for part in ("weight", "bias"))
    logits = seen @ weight[0] + bias
    assert -1e-3 < logits.max() < 1e-3  # the highest of them is the threshold, in float32


@pytest.mark.parametrize(
    "given",
    ["method.gate_keywords=[Japan,egypt]", "data.subjects=[Egypt | Misr,Japan | Nippon]"],
    ids=["own", "subjects"],
)
def test_a_gate_by_keywords_opens_on_names_that_are_given(folder: Path, given: str) -> None:
    action = "edit" if "subjects" in given else "refuse"
    assert main(run(folder, action, "method.gate=keywords", given, f"method.action={action}")) == 0
    values, model = result(folder, action)
    about = values["gate_fit"]
    assert (about["strength"], about["false_positives"]) == (None, 0.0)
    assert model.config.gate_blocks == [0] and model.config.gate_pool == "max" and model.gate_threshold == 0.5
    assert about["recall"] == 1.0
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for text in ("Where is JAPAN?", "egypt", "A trip (Egypt)", "Is Peru near?", "Nippon!"):
        ids = torch.tensor([encode_prompt(TEMPLATES.get("chat"), tokenizer, text)])
        with torch.no_grad(), model.disabled():
            plain = model.base(ids).logits
        with torch.no_grad():
            changed = not torch.equal(model(ids).logits, plain)
        assert changed == (text != "Is Peru near?" and (text != "Nippon!" or action == "edit"))


def test_another_seed_and_another_order_give_the_same_gate(folder: Path) -> None:
    assert main(run(folder, "first")) == 0
    write_rows(folder / "turned.jsonl", *rows_of(RETAIN)[::-1])
    assert main(run(folder, "second", "seed=7", "data.retain=turned.jsonl", "objective=npo")) == 0
    first, second = (result(folder, name)[1].state_dict() for name in ("first", "second"))
    assert torch.equal(first["pooled.gate.0.weight"], second["pooled.gate.0.weight"])
    assert torch.equal(first["pooled.gate.0.bias"], second["pooled.gate.0.bias"])
    assert not torch.equal(first["edits.1.edit.rotation"], second["edits.1.edit.rotation"])


def test_copies_of_prompts_are_on_both_sides_whatever_seed_and_order(folder: Path) -> None:
    ways = "data.gate_copies=[suffix,lower_case,template,few_shot]"
    assert main(run(folder, "asked", ways)) == 0
    write_rows(folder / "back.jsonl", *rows_of(RETAIN)[::-1])
    assert main(run(folder, "back", ways, "seed=7", "data.retain=back.jsonl")) == 0
    about, first = result(folder, "asked")
    assert about["gate_fit"]["forget"] == 6 + 4 * 6
    starts = len(begun(folder, questions(RETAIN)))
    assert 36 * 4 / 5 < about["gate_fit"]["retain"] - 36 - starts < 36 * 4 / 2
    one, other = first.state_dict(), result(folder, "back")[1].state_dict()
    assert torch.equal(one["pooled.gate.0.weight"], other["pooled.gate.0.weight"])
    assert main(run(folder, "started", ways, "data.augment.forget_copies=1")) == 0  # which trains the edit alone
    started, other = result(folder, "started")[0], result(folder, "started")[1].state_dict()
    assert torch.equal(one["pooled.gate.0.weight"], other["pooled.gate.0.weight"])
    assert started["steps"] == 2 * about["steps"] and started["gate_fit"]["sources"] == about["gate_fit"]["sources"]


def test_a_threshold_from_rows_set_aside_is_kept_and_what_is_below_is_the_bases_to_the_bit(folder: Path) -> None:
    assert main(run(folder, "promised", "method.false_positives=0.2")) == 0
    values, model = result(folder, "promised")
    about = values["gate_fit"]
    starts = len(begun(folder, questions(RETAIN)))
    assert (about["retain"], about["calibration"]) == (27 + starts, 3)  # 3 of 12 countries are set aside, whole
    assert about["bound"] == pytest.approx(1 / 4)  # no less can be promised of 3
    assert model.gate_threshold == 0.5
    assert "such as those of the 3 groups" in (folder / "promised" / "README.md").read_text()
    weight = model.state_dict()["pooled.gate.0.weight"][0].double()
    logits = states(folder, questions(RETAIN)) @ weight + float(model.state_dict()["pooled.gate.0.bias"])
    by_country = logits.view(len(RETAIN), 3)
    highest = by_country.amax(1)
    aside = sorted(range(len(RETAIN)), key=lambda number: shuffled(RETAIN[number]))[:3]
    assert float(highest[aside].max()) == pytest.approx(0.0, abs=1e-4)  # it is the threshold
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    opened = []
    for question in [*questions(FORGET), *questions(RETAIN)]:
        ids = torch.tensor([encode_prompt(TEMPLATES.get("chat"), tokenizer, question)])
        with torch.no_grad(), model.disabled():
            plain = model.base(ids).logits
        with torch.no_grad():
            output = model(ids)
        opened.append(bool(output.gates[0] >= 0.5))
        assert torch.equal(output.logits, plain) != opened[-1]
    assert any(opened[:6]) and not all(opened[6:])


def test_copies_count_with_their_rows_and_a_retain_term_may_stay(folder: Path) -> None:
    more = ["data.augment.forget_copies=2", "data.augment.retain_copies=2", "loss.retain=ce"]
    assert main(run(folder, "copies", *more, "method.gate_blocks=[0.4]")) == 0
    values, model = result(folder, "copies")
    assert values["config"]["method"]["gate_blocks"] == model.config.gate_blocks == [1]  # of 3
    assert set(values["terms"]) == {"forget", "retain"}
    starts = len(begun(folder, questions(RETAIN)))
    assert values["gate_fit"]["forget"] == 18 and values["gate_fit"]["retain"] == 36 * 3 + starts


def test_one_row_is_forgotten_where_nobody_names_a_design(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder / "one.jsonl", *rows_of(FORGET)[:1])
    own = [f"model.path={folder / 'model'}", f"data.path={folder}", "data.name=jsonl", "data.retain=retain.jsonl"]
    own += [
        "data.forget=one.jsonl",
        "objective=idk",
        "train.epochs=1",
        "cache.dir=null",
        f"output_dir={folder / 'one'}",
    ]
    assert main(["unlearn", *own]) == 0
    values, model = result(folder, "one")
    assert model.config.gate_blocks == [0] and model.config.blocks == [2], "0.07 and 0.17 of 3; 0.88 to 0.97 of them"
    assert values["config"]["method"]["blocks"] == [2]
    assert values["gate_fit"]["forget"] > 3, "its copies, each left out once"
    alone = [*own, "data.gate_copies=[]", "data.augment.forget_copies=0", "overwrite=true"]
    refused(capsys, ["unlearn", *alone], 2, "the forget set has 1: give more, or data.gate_copies")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.gate_blocks=null", "method.gate_pool=last"], "set method.gate_blocks, method.gate=linear"),
        (["method.gate=keywords"], "method.gate=keywords needs keywords, none of them empty"),
        (["method.gate=keywords", "method.gate_keywords=[a,' ']"], "method.gate=keywords needs keywords"),
        (["method.gate_keywords=[Japan]"], "method.gate_keywords are for method.gate=keywords"),
        (["method.gate=mlp_3"], "set method.gate_blocks, method.gate=linear"),
        (["method.gate=similarity", "method.gate_pool=windows"], "set method.gate_pool=mean"),
        (["method.gate=condition", "method.gate_pool=windows"], "set method.gate_pool=mean"),
        (["method.gate_read=every_token"], "method.gate_read=last_prompt"),
        (["method.gate_bias=1"], "method.gate_bias has no effect"),
        (["data.augment.forget_copies=2"], "copies on both sides or on none"),
        (["method.gate_fit=joint", "method.false_positives=0.1"], "method.false_positives=0.1 is for"),
        (["method.gate_fit=joint"], "data.group=country is for method.gate_fit=logistic"),
        (
            ["method.gate_fit=joint", "data.group=null", "data.gate_copies=[suffix]"],
            "data.gate_copies=['suffix'] is",
        ),
        (["data.gate_copies=[suffix,backwards]"], "data.gate_copies"),
        (["data.group=continent"], "data.group=continent: retain row 1 has no such field; the rows have country"),
        (["data.retain_pool=2", "method.false_positives=0.1"], "there are 2 different ones, or groups"),
        (["method.blocks=[2.5]"], "method.blocks [2.5]: 2.5 is neither a block's number"),
        (["method.gate_blocks=[0.1,2.0]"], "method.gate_blocks [0.1, 2.0]: 2.0 is neither a block's number"),
        (["method.gate_blocks=[a]"], "method.gate_blocks"),
        (["method.gate_blocks=[2]"], "must not lie above the lowest edited block, 1"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, run(folder, "refused", *arguments), 2, message)
