"""Gates that read every token, and edits written behind the prompt: equal to one whole pass by hooks of this file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from edited_models import (
    BLOCKS,
    PUBLISHED,
    agree,
    generated,
    rows_keep_their_own_state,
    rows_that_end_leave,
    whole_pass,
    wrapped,
)
from tiny import PAD, RULES, padded, random_rows, tiny
from transformers import DynamicCache

from grun import GrunModel
from grun.config.options import MethodConfig
from grun.data.encoding import EncodedRow, collate
from grun.errors import ModelError
from grun.method.gated import Grun

MAXIMUM = RULES[-1]
OPTIONS = [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}]
TURN = (7, 9)
"""Ids that begin a user's turn in these tests; `random_rows` draws others."""


@pytest.mark.parametrize(
    ("family", "rule"),
    [*(("llama", rule) for rule in RULES), *((family, MAXIMUM) for family in ("gpt2", "gemma3"))],
    ids=str,
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_generation_is_that_of_whole_passes(family: str, options: dict[str, Any], rule: tuple[str, str, str]) -> None:
    model = wrapped(rule=rule, family=family)
    prompts = random_rows([10, 6])
    tokens, logits = generated(model, prompts, **options)
    for index, prompt in enumerate(prompts):
        row = prompt + tokens[index, :-1].tolist()
        wanted, _ = whole_pass(model, rule, row, len(prompt) - 1, family)
        agree(logits[index], wanted[-6:])
    untouched = tiny(family)(torch.tensor([row])).logits[0, -6:]
    assert (wanted[-6:] - untouched).abs().max() > 0.01


@pytest.mark.parametrize("rule", [PUBLISHED, *RULES], ids="-".join)
@torch.no_grad()
def test_samples_and_beams_keep_the_state_of_their_own_row(rule: tuple[str, str, str]) -> None:
    model = wrapped(rule=rule)
    rows_keep_their_own_state(model, 6, lambda row: whole_pass(model, rule, row, 6)[0])


@torch.no_grad()
def test_rows_that_leave_a_batch_take_their_state_along() -> None:
    rows_that_end_leave(wrapped(rule=MAXIMUM), random_rows([9, 4, 6, 7, 3]))


@torch.no_grad()
def test_a_second_turn_begins_anew_at_the_ids_of_a_users_turn_alone() -> None:
    first, second = random_rows([8, 5])
    turns = {"reset": [*TURN, *second], "none": [*TURN[:1], *second]}
    for reset in ((), TURN):
        for kind, following in turns.items():
            model = wrapped(rule=MAXIMUM, reset_ids=reset)
            cache = DynamicCache(config=model.base.config)
            model.generate(
                torch.tensor([first]), max_new_tokens=3, do_sample=False, past_key_values=cache, eos_token_id=None
            )
            row = cache_ids(model, cache) + following
            seen = model(input_ids=torch.tensor([row[cache.get_seq_length() :]]), past_key_values=cache, use_cache=True)
            starts = (row.index(9, len(first)),) if reset and kind == "reset" else ()
            logits, openings = whole_pass(model, MAXIMUM, row, len(row) - 1, starts=starts)
            agree(seen.logits[0, -1], logits[-1])
            for block, values in openings.items():
                agree(seen.gates[block][0, -1], values[-1].sigmoid())


def cache_ids(model: GrunModel, cache: Any) -> list[int]:
    """Tokens that a cache of one row holds."""
    found: list[int] = cache.gate_state.ids[0].tolist()
    assert len(found) == cache.get_seq_length()
    return found


@torch.no_grad()
def test_the_ids_of_a_turn_are_found_across_the_border_of_two_passes() -> None:
    model = wrapped(rule=MAXIMUM, reset_ids=TURN)
    row = [*random_rows([6])[0], *TURN, *random_rows([3], seed=1)[0]]
    cut = row.index(9)
    output = model(input_ids=torch.tensor([row[:cut]]), use_cache=True)
    output = model(input_ids=torch.tensor([row[cut:]]), past_key_values=output.base_output.past_key_values)
    _, openings = whole_pass(model, MAXIMUM, row, len(row) - 1, starts=(cut,))
    for block, values in openings.items():
        agree(output.gates[block][0], values[cut:].sigmoid())


@torch.no_grad()
def test_a_cache_that_is_copied_or_cut_back_has_the_state_of_what_it_holds() -> None:
    model = wrapped(rule=MAXIMUM)
    row = random_rows([10])[0]
    ids = torch.tensor([row])
    cache = model(input_ids=ids[:, :6], use_cache=True).base_output.past_key_values
    twin = copy.deepcopy(cache)
    model(input_ids=ids[:, 6:], past_key_values=cache)
    twin.reorder_cache(torch.tensor([0]))
    again = model(input_ids=ids[:, 6:], past_key_values=twin)
    cache.crop(-4)
    cropped = model(input_ids=ids[:, 6:], past_key_values=cache)
    logits, openings = whole_pass(model, MAXIMUM, row, 9)
    for output in (again, cropped):
        agree(output.logits[0], logits[6:])
        for block, values in openings.items():
            agree(output.gates[block][0], values[6:].sigmoid())


@torch.no_grad()
def test_tokens_cached_while_no_edit_acted_are_unknown_to_the_gates() -> None:
    model = wrapped(rule=MAXIMUM)
    ids = torch.tensor(random_rows([8]))
    with model.disabled():
        cache = model(input_ids=ids[:, :5], use_cache=True).base_output.past_key_values
    output = model(input_ids=ids[:, 5:], past_key_values=cache)
    for block in BLOCKS:
        logits = output.gate_logits[block]
        agree(output.gates[block], logits.cummax(dim=1).values.sigmoid())


@torch.no_grad()
def test_a_cache_whose_rows_changed_behind_the_gates_back_is_refused() -> None:
    model = wrapped(rule=MAXIMUM)
    cache = model(input_ids=torch.tensor(random_rows([5])), use_cache=True).base_output.past_key_values
    for layer in cache.layers:
        layer.batch_repeat_interleave(2)
    with pytest.raises(ModelError, match="1 sequences of this cache, the pass has 2; change the rows of a cache by"):
        model(input_ids=torch.tensor([[3], [4]]), past_key_values=cache)


@torch.no_grad()
def test_padding_opens_no_gate_on_either_side() -> None:
    model = wrapped(rule=MAXIMUM)
    rows = random_rows([9, 4])
    _, openings = whole_pass(model, MAXIMUM, rows[1], 3)
    for side in ("left", "right"):
        output = model(**padded(rows, side))
        own = slice(5, 9) if side == "left" else slice(0, 4)
        for block, values in openings.items():
            agree(output.gates[block][1, own], values.sigmoid())
            assert output.gates[block][1].count_nonzero() == 4


@torch.no_grad()
def test_masked_tokens_begin_no_turn() -> None:
    model = wrapped(rule=MAXIMUM, reset_ids=TURN)
    row = random_rows([5])[0]
    ids = torch.tensor([[*row[:3], *TURN, *row[3:]]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1]])
    output = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    _, openings = whole_pass(model, MAXIMUM, row, 4)
    for block, values in openings.items():
        agree(output.gates[block][0][mask[0] == 1], values.sigmoid())


@torch.no_grad()
def test_a_threshold_leaves_every_token_before_the_gate_opens_as_the_base_has_it() -> None:
    model = wrapped(rule=MAXIMUM)
    batch = padded(random_rows([9, 6]), "right")
    model.gate_threshold = 1.0  # no edit acts, so that the gates are those of the base's states
    gates = torch.stack(list(model(**batch).gates.values()))  # [blocks, batch, length]
    widest = gates.amax(0)[:, 2]  # of both blocks at the third token
    model.gate_threshold = float(widest.amax() + 1e-6)
    with model.disabled():
        plain = model(**batch).logits
    edited = model(**batch)
    shut = gates.amax(0) < model.gate_threshold
    assert shut[:, :3].all()
    assert torch.equal(edited.logits[:, :3], plain[:, :3])


@torch.no_grad()
def test_a_step_output_says_which_gate_positions_count_and_which_lie_in_the_prompt() -> None:
    read, accumulate, write = MAXIMUM
    config = MethodConfig(blocks=list(BLOCKS), rank=4, gate_read=read, gate_accumulate=accumulate, edit_write=write)
    parametrization = Grun(config)
    parametrization.prepare(tiny(), None)
    rows = [EncodedRow(tuple(row[:3]), tuple(row[3:])) for row in random_rows([8, 5])]
    output = parametrization.run(collate(rows, PAD))
    assert output.gate_logits is not None and output.gate_mask is not None and output.gate_prompt is not None
    assert output.gate_logits[0].shape == output.gate_mask.shape == output.gate_prompt.shape == (2, 8)
    assert torch.equal(output.gate_mask, output.attended)
    assert torch.equal(output.gate_prompt, output.attended & ~output.answer)
