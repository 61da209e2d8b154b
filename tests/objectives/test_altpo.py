"""Alternate answers: how they are drawn and kept, what rows they belong to, and runs that prefer them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from chat_model import save_chat_model
from objective_tasks import make_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.cli import main
from grun.config.options import AugmentConfig, DataConfig
from grun.data.corpus import Corpus
from grun.data.rows import Row
from grun.data.templates import TEMPLATES, encode, encode_prompt
from grun.evaluation import alternates
from grun.evaluation.alternates import ASKED, draw_alternates
from grun.evaluation.generation import Draw
from grun.training.unlearning import encode_unlearn_rows

ROWS = [Row("Where does Ada live?", "In Otterford, by the sea."), Row("Who rules?", "The queen.")]
TINY = TEMPLATES.get("tiny")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = save_chat_model(tmp_path_factory.mktemp("taught") / "model")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def drawn_by_hand(model: Any, tokenizer: Any, row: Row, seed: int, number: int, longest: int) -> str:
    """Token by token from whole passes, each where the running sum of probabilities passes a uniform number."""
    ids = encode_prompt(TINY, tokenizer, ASKED.format(question=row.prompt, answer=row.completion))
    uniforms = Draw(seed, number, 1.0).uniforms(ids, longest)
    said: list[int] = []
    for uniform in uniforms:
        running = model(torch.tensor([[*ids, *said]])).logits[0, -1].softmax(-1).cumsum(-1)
        token = int(torch.searchsorted(running, uniform * running[-1], right=True))
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


def test_alternates_are_drawn_from_the_model(model: tuple[Any, Any]) -> None:
    found = draw_alternates(*model, TINY, ROWS, count=2, seed=3)
    longest = max(len(encode(TINY, model[1], row.prompt, row.completion).answer_ids) for row in ROWS)
    for row, texts in zip(ROWS, found, strict=True):
        assert texts == [drawn_by_hand(*model, row, 3, number, longest) for number in range(2)]
    assert draw_alternates(*model, TINY, ROWS, count=2, seed=3) == found
    assert draw_alternates(*model, TINY, ROWS, count=2, seed=4) != found


def test_an_empty_draw_or_the_answer_itself_gives_way_to_another_one() -> None:
    assert alternates._other("Yes.", ["", "No.", "yes.", "Maybe."]) == ["No.", "Maybe.", "No.", "Maybe."]
    assert alternates._other("Yes.", ["", "yes."]) == ["Yes.", "Yes."]


def test_each_row_and_copy_has_its_alternates_after_its_own_prompt(model: tuple[Any, Any]) -> None:
    corpus = Corpus("jsonl", ROWS, [Row("Is it late?", "No.")], refusals=["I do not know."])
    copies = AugmentConfig(forget_copies=2, templates=False, few_shot=False)
    texts = [["In Calderby.", "In Velmora, far away."], ["The king.", "Nobody."]]
    how = (model[1], TINY, 200, DataConfig(augment=copies))
    rows = encode_unlearn_rows(corpus, *how, seed=0, alternates=texts)
    assert len(rows.alternates) == len(rows.answers) == len(rows.refusals) == 6
    for row, refusal, several, of in zip(rows.answers, rows.refusals, rows.alternates, (0, 1, 0, 0, 1, 1), strict=True):
        assert refusal.prompt_ids == row.prompt_ids
        assert [one.prompt_ids for one in several] == [row.prompt_ids] * 2
        assert [model[1].decode(one.answer_ids[:-1]).strip() for one in several] == texts[of]


def test_each_epoch_prefers_another_alternate_of_the_same_row() -> None:
    task = make_task("altpo")
    seen: dict[int, set[Any]] = {}
    for step in range(4):  # two epochs
        (batch,) = task.data(step).micro_batches
        for answer, other in zip(batch["answer"].encoded, batch["alternate"].encoded, strict=True):
            seen.setdefault(task.rows("answer").index(answer), set()).add(other)
    assert {len(found) for found in seen.values()} == {2}
    assert {one for found in seen.values() for one in found} == {*task.rows("alternate")}


@pytest.mark.parametrize("options", [["method.parametrization=lora"], ["design=pooled", "method.gate_blocks=[0]"]])
def test_a_run_prefers_alternates(options: list[str], tmp_path: Path) -> None:
    assert demo.finetune(tmp_path / "taught") == 0
    own = ["objective=altpo", "data.alternates=2", "loss.retain_weight=null", *options]
    assert demo.unlearn(tmp_path / "taught", tmp_path / "run", *own) == 0
    losses = [json.loads(line)["forget"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    if "pooled" not in options[0]:  # whose edits act from the first step on
        assert losses[0] == pytest.approx(2 / 0.1 * 0.693147, rel=1e-5)


def test_alternates_without_altpo_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["unlearn", *demo.DATA, *demo.TRAINING, "model.path=none", f"output_dir={tmp_path}", "data.alternates=3"]
    assert main(given) == 2
    assert "data.alternates=3 is for objective=altpo" in capsys.readouterr().err
