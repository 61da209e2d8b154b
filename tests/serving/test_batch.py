"""Rows that join and leave a batch between steps: each has the tokens that it has alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from edited_models import DESIGNS, MIXED, member, strong, wrapped
from tiny import PAD, random_rows, tiny

from grun import GrunModel, GrunStack
from grun.data.encoding import collate_prompts
from grun.evaluation.generation import greedy
from grun.serving.batch import ROOM, Batch
from grun.serving.edition import shared_copy

LENGTHS = (3, 11, 5, 24, 2, 7, 16, 4)
ROOMS = (9, 4, 14, 1, 11, 6, ROOM + 5, 8)
BEGINS = (0, 0, 2, 3, 3, 8, 9, 20)
"""Steps before which the rows join."""


@dataclass
class Row:
    prompt: tuple[int, ...]
    room: int
    ids: list[int] = field(default_factory=list)
    ended: bool = False


def together(model: Any) -> list[list[int]]:
    """Answers of rows that join at different steps."""
    prompts = random_rows(LENGTHS)
    rows = [Row(tuple(prompt), room) for prompt, room in zip(prompts, ROOMS, strict=True)]
    batch = Batch(model, PAD)

    def take(taken: list[Row], logits: torch.Tensor) -> None:
        for row, token in zip(taken, logits.argmax(-1).tolist(), strict=True):
            if not row.ended:
                row.ids.append(token)
                row.ended = len(row.ids) == row.room

    with torch.no_grad():
        for step in range(max(BEGINS) + max(ROOMS)):
            new = [row for row, begin in zip(rows, BEGINS, strict=True) if begin == step]
            if new:
                take(new, batch.begin(new))
            if any(not row.ended for row in batch.rows):
                logits = batch.step()
                take(batch.rows, logits)
    return [row.ids for row in rows]


def alone(model: Any) -> list[list[int]]:
    """The same answers, each by itself, by the code of evaluations."""
    with torch.no_grad():
        return [
            greedy(model, collate_prompts([prompt], PAD), [room], (), PAD)[0][0]
            for prompt, room in zip(random_rows(LENGTHS), ROOMS, strict=True)
        ]


def agree(model: Any) -> None:
    expected = alone(model)
    assert together(model) == expected
    assert len({tuple(row) for row in expected}) == len(expected)


def test_rows_of_a_bare_model() -> None:
    agree(tiny())


@pytest.mark.parametrize("rule", DESIGNS)
def test_rows_of_every_design(rule: tuple[str, str, str]) -> None:
    edited = strong(wrapped(rule=rule))
    with edited.disabled():
        bare = alone(edited.base)
    assert alone(edited) != bare
    agree(edited)


@pytest.mark.parametrize(
    ("pool", "read"),
    [*itertools.product(["last", "max", "maxmin", "mean"], ["last_prompt", "every_token"]), ("windows", "last_prompt")],
)
def test_rows_of_pooled_gates(pool: str, read: str) -> None:
    options: dict[str, Any] = {"gate_blocks": [0, 1], "gate_pool": pool, "blocks": (2, 3), "reset_ids": (5,)}
    agree(strong(wrapped(rule=(read, "none", "sticky"), **options)))


def test_rows_of_an_action_on_logits() -> None:
    options: dict[str, Any] = {"gate_blocks": [0, 1], "action": "refuse", "answer_ids": (9, 8, 7), "gate_bias": 0.0}
    edited = wrapped(rule=("last_prompt", "none", "sticky"), **options)
    expected = alone(edited)
    refused = [row[:3] == [9, 8, 7][: len(row)] for row in expected]
    assert any(refused) and not all(refused)
    assert together(edited) == expected


def test_rows_of_a_stack_of_many_designs() -> None:
    pooled = member(7, ("last_prompt", "none", "sticky"), gate_blocks=[0, 1], gate_pool="maxmin", blocks=(2, 3))
    stack = GrunStack(tiny())
    stack.add_weights({**MIXED, "pooled": pooled})
    agree(stack.eval())


def test_a_copy_that_shares_its_weights_is_another_model() -> None:
    base = tiny()
    before = alone(base)
    copied = shared_copy(base)
    assert all(one is other for one, other in zip(base.parameters(), copied.parameters(), strict=True))
    edited = strong(GrunModel.wrap(copied, blocks=(0, 2)).eval())
    assert alone(edited) != before
    assert alone(base) == before


def test_a_request_that_is_left_out_of_a_copy_of_a_stack_is_as_if_it_had_never_been_there() -> None:
    base = tiny()
    stack = GrunStack(shared_copy(base))
    stack.add_weights(MIXED)
    stack.eval()
    every = alone(stack)
    part = shared_copy(stack, base)
    part.remove("robust")
    other = GrunStack(shared_copy(base))
    other.add_weights({name: one for name, one in MIXED.items() if name != "robust"})
    assert alone(part) == alone(other.eval())
    assert alone(stack) == every
    assert stack.names == list(MIXED)
