"""Tokens that all prompts of a batch begin with run once; answers and gates are those of whole prompts."""

from __future__ import annotations

import pytest
import torch
from edited_models import PUBLISHED, strong, wrapped
from tiny import PAD, RULES, random_rows, tiny

from grun.data.encoding import collate_prompts
from grun.evaluation import generation
from grun.evaluation.scoring import base_of

TURN = (7, 9)
"""Ids that begin a user's turn, where gates begin again."""
START = (*random_rows([8], seed=4)[0], *TURN, 11)
ENDS = [random_rows([length], seed=length)[0] for length in (1, 5, 3, 8)]


POOLED = ("last_prompt", "none", "sticky")


@pytest.mark.parametrize(
    ("rule", "pool"),
    [
        (None, ""),
        (PUBLISHED, ""),
        *((rule, "") for rule in RULES),
        (POOLED, "maxmin"),
        (POOLED, "windows"),
        (POOLED, "mean"),
    ],
    ids=str,
)
@torch.no_grad()
def test_answers_and_gates_are_those_of_whole_prompts(
    rule: tuple[str, str, str] | None, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"gate_blocks": [0], "gate_pool": pool} if pool else {}
    model = (tiny() if rule is None else strong(wrapped(rule=rule, reset_ids=TURN, **gate))).eval()
    batch = collate_prompts([(*START, *end) for end in ENDS], PAD)
    shapes: list[tuple[int, ...]] = []
    embedding = base_of(model).get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    answers, gates = generation.greedy(model, batch, [6] * len(ENDS), [], PAD)
    assert shapes[:2] == [(1, 11), (4, 8)]
    monkeypatch.setattr(generation, "SHARED", 100)
    shapes.clear()
    wanted, wanted_gates = generation.greedy(model, batch, [6] * len(ENDS), [], PAD)
    assert shapes[0] == (4, 19)
    assert answers == wanted
    assert (gates or {}).keys() == (wanted_gates or {}).keys()
    for block, gate in (gates or {}).items():
        torch.testing.assert_close(gate, (wanted_gates or {})[block], atol=1e-9, rtol=0)  # tiny models are float64


@torch.no_grad()
def test_prompts_that_are_masked_within_run_whole() -> None:
    model = tiny().eval()
    batch = collate_prompts([(*START, *end) for end in ENDS], PAD)
    batch.attention_mask[:, -2] = 0
    assert generation._shared_start(batch.input_ids, batch.attention_mask) == 0
    answers, _ = generation.greedy(model, batch, [3] * len(ENDS), [], PAD)
    assert all(len(answer) == 3 for answer in answers)


def test_of_each_prompt_a_token_is_left() -> None:
    batch = collate_prompts([START, (*START, 5)], PAD)
    assert generation._shared_start(batch.input_ids, batch.attention_mask) == len(START) - 1
