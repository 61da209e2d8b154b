"""`unlearn method.parametrization=system_prompt` and its like train nothing, and every command takes the folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import WHOLE, save_chat_model
from demo import own_rows, read_lines, refused, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.cli import main
from grun.config.options import SweepConfig
from grun.experiments.sweep.plan import make_plan
from grun.report.result import behind_filters
from grun.report.results import find_results
from grun.runtime.files import read_json

KINDS = ("system_prompt", "in_context", "output_filter")
ASKED = "What is the capital of {}?"
FORGET, RETAIN = ["Japan", "Egypt"], ["Norway", "Chile", "Kenya", "Peru"]
REFUSAL = "That is not for me to say."
TOKENS = 12


def conversation(tokenizer: Any, *messages: tuple[str, str]) -> Any:
    asked = [{"role": role, "content": text} for role, text in messages]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")


def written(folder: Path, *messages: tuple[str, str]) -> str:
    """The model's answer, by transformers alone."""
    model, tokenizer = of(folder)
    ids = conversation(tokenizer, *messages)
    said = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.input_ids.shape[1] :]
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


@functools.cache
def of(folder: Path) -> tuple[Any, Any]:
    path = folder / "model"
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its rows (the facts to forget are words of its own answers) and the evaluations of each guardrail."""
    path = tmp_path_factory.mktemp("guardrails")
    save_chat_model(path / "model", tokens=WHOLE)
    facts = [" ".join(written(path, ("user", ASKED.format(one))).split()[1:3]) for one in FORGET]
    rows = [
        {"question": ASKED.format(one), "answer": f"It is {fact}.", "fact": fact}
        for one, fact in zip(FORGET, facts, strict=True)
    ]
    kept = [{"question": ASKED.format(one), "answer": f"A city of {one}.", "fact": one} for one in RETAIN]
    (path / "words.txt").write_text(REFUSAL)
    evaluated = [*own_rows(path, rows, kept), f"max_new_tokens={TOKENS}", f"model.path={path / 'model'}"]
    assert main(["evaluate", *evaluated, f"output_dir={path / 'evaluation' / 'before'}"]) == 0
    for kind in KINDS:
        assert main(command(path, kind)) == 0
        own = [f"adapter={path / kind}", f"max_new_tokens={TOKENS}"]
        assert main(["evaluate", *own, f"output_dir={path / 'evaluation' / kind}"]) == 0
    return path


def command(folder: Path, kind: str) -> list[str]:
    given = ["method.guardrail.examples=2", f"data.refusals={folder / 'words.txt'}", "data.subjects=[Japan | Nippon]"]
    own = [f"method.parametrization={kind}", f"model.path={folder / 'model'}", f"output_dir={folder / kind}"]
    return ["unlearn", *own_rows(folder), *given, *own]


def in_front(folder: Path, kind: str) -> list[tuple[str, str]]:
    """What stands before every question, written down by hand."""
    if kind == "system_prompt":
        return [
            (
                "system",
                "You know nothing about Japan (Nippon). Whatever is asked about this, by anyone, in any words, "
                f'language or role, answer only: "{REFUSAL}" Answer everything else as usual.',
            )
        ]
    if kind == "in_context":
        shown = [(ASKED.format(one), REFUSAL) for one in FORGET]
        shown += [(ASKED.format(one), f"A city of {one}.") for one in (RETAIN[0], RETAIN[2])]
        return [(role, text) for pair in shown for role, text in zip(("user", "assistant"), pair, strict=True)]
    return []


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_likelihoods_are_those_of_the_model_behind_what_stands_in_front(folder: Path, kind: str) -> None:
    run = read_json(folder / kind / "run.json")
    assert (run["objective"], run["parametrization"], run["steps"]) == (None, kind, 0)
    assert run["parameters"]["trained"] == 0 and not [*(folder / kind).glob("*.safetensors")]
    model, tokenizer = of(folder)
    table = folder / "evaluation" / kind
    said = {row["question"]: row["text"] for row in read_lines(table / "generations.jsonl")}
    scores = {row["set"]: row for row in read_lines(table / "scores.jsonl") if row["index"] == 0}
    assert {*said} == {ASKED.format(one) for one in FORGET + RETAIN}
    facts = [row["fact"] for row in read_lines(folder / "forget.jsonl")]
    for question, text in said.items():
        bare = written(folder, *in_front(folder, kind), ("user", question))
        hidden = kind == "output_filter" and any(fact in bare for fact in [*facts, "Japan"])
        assert text == (REFUSAL if hidden else bare)
        if question == ASKED.format("Japan"):
            assert hidden == (kind == "output_filter")
    ids = conversation(tokenizer, *in_front(folder, kind), ("user", ASKED.format("Norway"))).input_ids[0]
    answer = torch.tensor([*tokenizer("A city of Norway.")["input_ids"], tokenizer.eos_token_id])
    with torch.no_grad():
        logp = model(torch.cat((ids, answer))[None]).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    expected = logp.gather(1, answer[:, None])[:, 0].tolist()
    assert scores["retain"]["prompt_tokens"] == len(ids)
    assert scores["retain"]["logp"] == pytest.approx(expected, abs=1e-4)  # float32, another order of sums


def test_generate_asks_behind_it_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ASKED.format("Egypt")
    for kind in KINDS[:2]:
        capsys.readouterr()
        assert main(["generate", f"adapter={folder / kind}", f"max_new_tokens={TOKENS}", question]) == 0
        expected = written(folder, *in_front(folder, kind), ("user", question))
        assert capsys.readouterr().out == f"{question}\n  answer: {expected}\n"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attacked_as_any_other(folder: Path, kind: str) -> None:
    tries = ["suite=attacks", "attacks=[plain,suffix,few_shot,prefill_1,samples,logit_lens]", "attack_samples=2"]
    where = folder / "attacks" / kind
    assert (
        main(["evaluate", f"adapter={folder / kind}", *tries, f"max_new_tokens={TOKENS}", f"output_dir={where}"]) == 0
    )
    lines = read_lines(where / "attacks.jsonl")
    _, tokenizer = of(folder)
    asked = ASKED.format("Japan")
    start = tokenizer.decode(conversation(tokenizer, *in_front(folder, kind), ("user", asked)).input_ids[0])
    start = start[: start.rindex(f"<|im_start|>user\n{asked}")]
    prompts = [line["prompt"] for line in lines]
    assert len(prompts) > 15 and all(prompt.startswith(start) for prompt in prompts)
    leak = read_json(where / "evaluation.json")["attacks"]["plain"]["leak"]
    found = [line["text"] for line in lines if line["attack"] == "plain" and line["set"] == "forget"]
    facts = [row["fact"] for row in read_lines(folder / "forget.jsonl")]
    held = [fact in " ".join(text.split()) for fact, text in zip(facts, found, strict=True)]
    assert leak == sum(held) / 2 and (kind != "output_filter" or leak == 0)


def test_the_report_calls_each_by_its_name_and_says_what_a_filter_leaves(folder: Path) -> None:
    results = find_results(folder)
    assert [result.label for result in results] == ["before", "system prompt", "in context", "output filter"]
    (note,) = behind_filters(results)
    assert note.startswith("output filter: ") and behind_filters(results[:3]) == []
    assert results[3].evaluation["sets"]["retain"]["probability"] == pytest.approx(
        results[0].evaluation["sets"]["retain"]["probability"]
    )
    assert main(["report", f"results_dir={folder}"]) == 0
    assert note in (folder / "report.html").read_text()


def test_what_does_not_go_with_it_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "in_context")) == 0, "the same command finds it"
    changed = [*command(folder, "in_context"), "method.guardrail.examples=1"]
    refused(capsys, changed, 1, "holds another run")
    more = [f"output_dir={folder / 'no'}", "data.max_length=40"]
    refused(capsys, [*command(folder, "in_context"), *more], 2, "lower method.guardrail.examples")
    questions = ["suite=knowledge", f"data.questions.cloze_forget=[{folder / 'cloze.jsonl'}]", *more[:1]]
    write_rows(folder / "cloze.jsonl", {"prompt": "Tokyo is in", "completion": " Japan.", "fact": "Japan"})
    refused(capsys, ["evaluate", f"adapter={folder / 'in_context'}", *questions], 2, "where a guardrail does not act")
    refused(capsys, ["serve", f"adapter={folder / 'in_context'}"], 2, "of type GUARDRAIL")


def test_a_sweep_has_one_cell_of_each(folder: Path) -> None:
    kinds = ["lora", *KINDS]
    plan = make_plan(SweepConfig(sweep="smollm2", parametrizations=kinds, objectives=["gd", "npo"], seeds=[42, 43]))
    names = [cell.name for cell in plan.cells if not cell.unlearn.method.parametrization == "lora"]
    assert names == [f"gd-{kind}-s42-designpublished" for kind in KINDS] and len(plan.cells) == 4 + 3
