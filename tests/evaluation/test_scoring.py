"""Scoring, generation and the table, on tiny random models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import PAD, VOCABULARY, Numbers, ragged_rows, tiny

from grun.data.encoding import EncodedRow
from grun.errors import DataError, ModelError, RunError
from grun.evaluation.generation import generate_answers
from grun.evaluation.scoring import score, score_tokens
from grun.evaluation.table import GateRecord, GenerationRecord, ScoreRecord, Table
from grun.method.model import GrunModel

EOS = 1

# -- scoring ----------------------------------------------------------------------------------------------------------


def test_scores_equal_a_full_forward_of_each_row_alone() -> None:
    model, rows = tiny(), ragged_rows(9, 0)
    for row, scored in zip(rows, score(model, rows, 4, PAD), strict=True):
        with torch.no_grad():
            logp = model(torch.tensor([row.prompt_ids + row.answer_ids])).logits[0].log_softmax(-1)
        for number, token in enumerate(row.answer_ids):
            at = logp[len(row.prompt_ids) + number - 1]
            p = at.exp()
            mean = (p * at).sum().item()
            # 1e-5: float32 sums in another order over 64 words
            assert scored.logp[number] == pytest.approx(at[token].item(), abs=1e-5)
            assert scored.hit[number] == (at.argmax().item() == token)
            assert scored.vocabulary_mean[number] == pytest.approx(mean, abs=1e-5)
            assert scored.vocabulary_variance[number] == pytest.approx((p * (at - mean) ** 2).sum().item(), abs=1e-4)
        assert scored.gates is None
        assert len(scored.logp) == len(row.answer_ids)


def test_each_distinct_row_is_scored_once() -> None:
    model, rows = tiny().train(), ragged_rows(3, 0)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    done: list[int] = []
    scored = score(model, [*rows, *rows, rows[0]], 2, PAD, done.append)
    assert sum(seen) == 3
    assert sum(done) == 7
    assert scored[0] == scored[3] == scored[6]
    assert model.training  # the mode that it was in


def test_half_precision_logits_are_scored_in_float32_and_float64_stays() -> None:
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 8
    targets = torch.arange(5)
    for narrow, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        got = score_tokens(logits.to(narrow), targets)
        want = logits.to(narrow).to(wide).log_softmax(-1)
        assert got.logp.dtype == wide
        assert torch.equal(got.logp, want[torch.arange(5), targets])


def test_a_word_of_probability_zero_does_not_spoil_mean_and_variance() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    got = score_tokens(logits, torch.tensor([0]))
    assert got.vocabulary_mean.item() == pytest.approx(math.log(0.5))
    assert got.vocabulary_variance.item() == pytest.approx(0.0, abs=1e-12)


def test_without_a_prompt_the_first_token_is_left_out() -> None:
    row = EncodedRow((), (5, 6, EOS))
    scored = score(tiny(), [row], 1, PAD)[0]
    same = score(tiny(), [EncodedRow((5,), (6, EOS))], 1, PAD)[0]
    assert scored.logp == pytest.approx(same.logp)


def test_a_model_of_nan_is_refused() -> None:
    model = tiny()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        score(model, ragged_rows(1, 0), 1, PAD)


def test_gates_of_a_gated_model_are_those_of_the_row_alone() -> None:
    torch.manual_seed(1)
    model = GrunModel.wrap(tiny(), blocks=[0, 1], rank=2)
    rows = ragged_rows(6, 0)
    for row, scored in zip(rows, score(model, rows, 3, PAD), strict=True):
        ids, lengths = torch.tensor([row.prompt_ids + row.answer_ids]), torch.tensor([len(row.prompt_ids)])
        with torch.no_grad():
            out = model(input_ids=ids, prompt_lengths=lengths)
        assert scored.gates is not None
        assert list(scored.gates) == [0, 1]
        for block in (0, 1):
            # 1e-9: the model runs in float64
            assert scored.gates[block] == pytest.approx(out.gates[block].item(), abs=1e-9)
        logp = out.logits[0].log_softmax(-1)
        first = logp[len(row.prompt_ids) - 1, row.answer_ids[0]].item()
        assert scored.logp[0] == pytest.approx(first, abs=1e-9)


# -- generation -------------------------------------------------------------------------------------------------------


def test_an_answer_ends_where_the_context_is_full_whatever_else_is_in_the_batch() -> None:
    model = tiny(seed=3, max_position_embeddings=12)
    prompts = [(5,) * 10, (6, 7), (8, 9)]
    found = generate_answers(model, Numbers(), prompts, 3, 8, PAD)
    for prompt, answer in zip(prompts, found, strict=True):  # step by step, without a cache and without padding
        ids = list(prompt)
        while len(ids) < min(12, len(prompt) + 8) and ids[-1] != EOS:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.text == " ".join(str(token) for token in ids[len(prompt) :] if token != EOS)
    assert len(found[0].text.split()) <= 2
    for prompt, problem in (((5,) * 12, "no room"), ((), "empty prompt")):
        with pytest.raises(DataError, match=problem):
            generate_answers(model, Numbers(), [prompt], 1, 8, PAD)


# -- table ------------------------------------------------------------------------------------------------------------


def test_the_table_on_disk_keeps_float32_exactly(tmp_path: Path) -> None:
    exact = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()
    strange = 'line\u2028separators \x85 and "quotes" \n and 東京'
    one = ScoreRecord("forget", 0, "answer", 0, 3, 50, True, 9, exact, [True] * 50, exact, exact)
    answer = GenerationRecord("forget", 0, "q", "the cat sat", None, strange)
    table = Table([one], [answer], [GateRecord("forget", 0, {4: 0.25, 5: 0.875})])
    table.write(tmp_path)
    back = Table.read(tmp_path)
    assert torch.equal(torch.tensor(back.scores[0].logp), torch.tensor(exact))
    assert back.generations == table.generations
    assert back.gates == table.gates
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"set": "forget"\n')
    for where in ("scores.jsonl, line 2", "scores.jsonl"):
        with pytest.raises(RunError, match=where) as error:
            Table.read(tmp_path)
        assert "\n" not in str(error.value)
        (tmp_path / "scores.jsonl").unlink(missing_ok=True)
