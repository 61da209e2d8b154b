"""GrunModel as a whole: generation against decoding by hand, options, thresholds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edited_models import prompts_of, strong
from tiny import DEPTH, FAMILIES, PAD, blocks_of, greedy_by_hand, padded, plain_hooks, random_rows, tiny
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

import grun
from grun import GrunModel
from grun.errors import ConfigError
from grun.method.model import resolve_blocks

BLOCKS = [1, 2]
STEPS = 8
LENGTHS = [5, 11, 7]
"""Prompt tokens of the rows; the second is longer than the sliding window of 8."""


def wrapped(family: str = "llama", **options: Any) -> GrunModel:
    torch.manual_seed(1)
    return strong(GrunModel.wrap(tiny(family), **{"blocks": BLOCKS, "rank": 4, **options}).eval())


def new_tokens(sequences: Tensor, batch: dict[str, Tensor]) -> list[list[int]]:
    return sequences[:, batch["input_ids"].shape[1] :].tolist()


class Writes:
    """Counts the passes in which an edit acts."""

    def __init__(self, model: GrunModel) -> None:
        self.counts = dict.fromkeys(model.config.blocks, 0)
        for block in self.counts:
            model.edits[str(block)].register_forward_hook(lambda *_, block=block: self.add(block))

    def add(self, block: int) -> None:
        self.counts[block] += 1


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generate_equals_decoding_by_hand_and_base_generate(family: str) -> None:
    model = wrapped(family)
    writes = Writes(model)
    rows = random_rows(LENGTHS)
    batch = prompts_of(rows)
    by_hand = greedy_by_hand(tiny(family), family, model.state_dict(), rows, STEPS)
    answer = model.base.generate(**batch, max_new_tokens=STEPS, do_sample=False)
    assert new_tokens(answer, batch) == by_hand
    assert writes.counts == {1: 1, 2: 1}  # the prefill once, decode steps never
    assert torch.equal(model.generate(**batch, max_new_tokens=STEPS, do_sample=False), answer)
    with model.disabled():
        assert new_tokens(model.generate(**batch, max_new_tokens=STEPS, do_sample=False), batch) != by_hand
    for index, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), max_new_tokens=STEPS, do_sample=False)  # by place, without a mask
        assert alone[0, len(row) :].tolist() == by_hand[index]


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 1},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@torch.no_grad()
def test_other_ways_to_run_greedy_decoding_give_the_same_tokens(family: str, options: dict[str, Any]) -> None:
    model = wrapped(family)
    rows = random_rows(LENGTHS)
    by_hand = greedy_by_hand(tiny(family), family, model.state_dict(), rows, STEPS)
    if "prompt_lookup_num_tokens" in options:  # transformers drafts for one row at a time
        for row, answer in zip(rows, by_hand, strict=True):
            batch = prompts_of([row])
            assert new_tokens(model.generate(**batch, max_new_tokens=STEPS, **options), batch) == [answer]
        return
    batch = prompts_of(rows)
    assert new_tokens(model.generate(**batch, max_new_tokens=STEPS, do_sample=False, **options), batch) == by_hand


@torch.no_grad()
def test_assisted_decoding_gives_the_same_tokens_whoever_assists() -> None:
    model, rows = wrapped(), random_rows(LENGTHS)
    by_hand = greedy_by_hand(tiny(), "llama", model.state_dict(), rows, STEPS)
    stranger = tiny("llama", seed=5)
    assistants = [stranger, tiny(), GrunModel.wrap(tiny(), blocks=[0]).base]
    for assistant in assistants:
        for row, answer in zip(rows, by_hand, strict=True):
            batch = prompts_of([row])
            got = model.generate(**batch, assistant_model=assistant, max_new_tokens=STEPS, do_sample=False)
            assert new_tokens(got, batch) == [answer]


@torch.no_grad()
def test_a_prompt_given_as_embeddings_is_edited() -> None:
    model, rows = wrapped(), random_rows([6, 6])
    batch = prompts_of(rows)
    embedded = model.base.get_input_embeddings()(batch["input_ids"])
    answer = model.generate(
        inputs_embeds=embedded, attention_mask=batch["attention_mask"], max_new_tokens=STEPS, do_sample=False
    )
    assert answer.tolist() == greedy_by_hand(tiny(), "llama", model.state_dict(), rows, STEPS)


@torch.no_grad()
def test_right_padded_prompts_are_edited_at_their_last_real_token() -> None:
    model, rows = wrapped(), random_rows(LENGTHS)
    batch = prompts_of(rows, "right")
    twin = tiny()
    with plain_hooks(twin, "llama", model.state_dict(), [[length - 1] for length in LENGTHS]) as logits:
        twin(**padded(rows, "right"))
    for samples in (1, 2):
        model.generate(**batch, max_new_tokens=1, do_sample=True, num_return_sequences=samples)
        for block, gates in model.last_gates.items():
            wanted = torch.sigmoid(torch.stack([row[0] for row in logits[block]])).repeat_interleave(samples)
            torch.testing.assert_close(gates[:, 0], wanted, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_beams_and_several_samples_get_the_position_of_their_prompt() -> None:
    model, rows = wrapped(), random_rows(LENGTHS)
    batch = prompts_of(rows)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    writes = Writes(model)
    together = model.generate(**batch, **beams)
    assert writes.counts == {1: 1, 2: 1}
    assert model.last_gates[1].shape == (9, 1)
    assert together.shape[0] == 6
    for index, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), **beams)
        assert new_tokens(together[2 * index : 2 * index + 2], batch) == alone[:, len(row) :].tolist()

    torch.manual_seed(0)
    samples = model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=4)
    assert samples.shape[0] == 6 and model.last_gates[1].shape == (6, 1)
    torch.testing.assert_close(model.last_gates[1][::2], model.last_gates[1][1::2])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "odd"])
@pytest.mark.parametrize("second_turn", ["whole", "whole without mask", "new tokens alone"])
@torch.no_grad()
def test_a_chat_with_a_kept_cache_is_edited_at_the_end_of_both_prompts(family: str, second_turn: str) -> None:
    model = wrapped(family)
    writes = Writes(model)
    first, more = random_rows([7, 5])
    cache = DynamicCache() if family == "odd" else DynamicCache(config=model.base.config)
    ids = torch.tensor([first])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    assert said[0, 7:].tolist() == greedy_by_hand(tiny(family), family, model.state_dict(), [first], 4)[0]
    assert cache.get_seq_length() == 10  # the last token was never fed back
    turn = torch.cat([said, torch.tensor([more])], dim=1)
    mask = {} if second_turn == "whole without mask" else {"attention_mask": torch.ones_like(turn)}
    given = turn[:, 10:] if second_turn == "new tokens alone" else turn
    asked = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    answer = model.generate(given, **mask, past_key_values=cache, **asked)
    assert writes.counts == {1: 2, 2: 2}

    both = [6, turn.shape[1] - 1]
    by_hand = greedy_by_hand(tiny(family), family, model.state_dict(), turn.tolist(), STEPS, [both])[0]
    assert answer.sequences[0, given.shape[1] :].tolist() == by_hand
    logits = {}
    for edited in (both, both[:1], both[1:]):
        twin = tiny(family)
        with plain_hooks(twin, family, model.state_dict(), [edited]):
            logits[tuple(edited)] = twin(torch.tensor([turn[0].tolist() + by_hand[:-1]])).logits[0, -STEPS:]
    wanted = logits.pop(tuple(both))
    # Norms go through float32 and cached passes sum in another order; transformers returns logits in float32.
    torch.testing.assert_close(torch.cat(answer.logits).double(), wanted, atol=5e-5, rtol=1e-5)
    for one_alone in logits.values():
        assert (one_alone - wanted).abs().max() > 0.01  # the two edits both show


@torch.no_grad()
def test_a_chat_of_unequal_rows_with_a_kept_cache() -> None:
    model = wrapped()
    first, more = random_rows([7, 4]), random_rows([3, 3], seed=1)
    batch = prompts_of(first)
    cache = DynamicCache()
    said = model.generate(**batch, past_key_values=cache, max_new_tokens=4, do_sample=False)
    turn = torch.cat([said, torch.tensor(more)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 7).long()], dim=1)
    answer = model.generate(turn, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
    for index, row in enumerate(first):
        whole = turn[index][mask[index] != 0].tolist()
        edited = [[len(row) - 1, len(whole) - 1]]
        by_hand = greedy_by_hand(tiny(), "llama", model.state_dict(), [whole], 4, edited)
        assert answer[index, turn.shape[1] :].tolist() == by_hand[0]


@torch.no_grad()
def test_generation_takes_a_config_and_stops_at_the_end_token_row_by_row() -> None:
    model, rows = wrapped(), random_rows(LENGTHS)
    batch = prompts_of(rows)
    by_hand = greedy_by_hand(tiny(), "llama", model.state_dict(), rows, STEPS)
    end = by_hand[0][2]
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=end, pad_token_id=PAD)
    for got, full in zip(new_tokens(model.generate(**batch, generation_config=config), batch), by_hand, strict=True):
        stop = full.index(end) + 1 if end in full else STEPS
        assert got[:stop] == full[:stop] and set(got[stop:]) <= {PAD}


# -- threshold ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_below_the_threshold_a_row_is_the_base_bit_for_bit() -> None:
    model = wrapped(blocks=[1])
    rows = random_rows([9, 9])
    batch = padded(rows, "left")
    with model.disabled():
        untouched = model(**batch, output_hidden_states=True)
        plain = model.generate(**prompts_of(rows), max_new_tokens=STEPS, do_sample=False)
    # A gate that opens on the first row alone: steep in the direction in which the rows differ.
    gate, (one, two) = model.edits["1"].gate[0], untouched.base_output.hidden_states[2][:, -1]
    direction = (one - two) / (one - two).norm() ** 2
    gate.weight.copy_(20 * direction.unsqueeze(0))
    gate.bias.copy_(-20 * direction @ (one + two) / 2)
    model.gate_threshold = 0.5
    assert model.gate_threshold == 0.5
    output = model(**batch)
    assert output.gates[1].flatten().tolist() == pytest.approx([1, 0], abs=1e-3)
    assert torch.equal(output.logits[1], untouched.logits[1])
    assert (output.logits[0] - untouched.logits[0]).abs().max() > 0.01
    open_row = output.logits[0]

    answer = model.generate(**prompts_of(rows), max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(answer[1], plain[1])
    assert not torch.equal(answer[0], plain[0])
    model.gate_threshold = 1.0  # both closed now
    output = model(**batch)
    assert torch.equal(output.logits, untouched.logits) and list(output.gates) == [1]
    assert torch.equal(model.generate(**prompts_of(rows), max_new_tokens=STEPS, do_sample=False), plain)
    model.train()  # training sees the smooth gate
    assert not torch.equal(model(**batch).logits[1], untouched.logits[1])
    model.eval()
    model.gate_threshold = None
    output = model(**batch)
    assert torch.equal(output.logits[0], open_row)
    assert not torch.equal(output.logits[1], untouched.logits[1])


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_0_to_1_is_refused(value: float) -> None:
    model = wrapped()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        model.gate_threshold = value
    assert model.gate_threshold is None


# -- options -----------------------------------------------------------------------------------------------------------


def test_negative_blocks_count_from_the_last() -> None:
    model = GrunModel.wrap(tiny(), blocks=[-1, 0, -3])
    assert model.config.blocks == [0, 1, DEPTH - 1]
    assert list(model.edits) == ["0", "1", "3"]
    assert resolve_blocks([-4, 3], 4) == [0, 3]


@pytest.mark.parametrize(
    ("blocks", "depth", "found"),
    [([0.07, 0.17], 30, [2, 5]), ([0.07, 0.17], 32, [2, 5]), ([0.17, 0.07], 4, [0]), ([-1, 0.29], 100, [29, 99])],
    ids=str,
)
def test_shares_of_the_depth_are_the_blocks_that_they_fall_on(
    blocks: list[int | float], depth: int, found: list[int]
) -> None:
    assert resolve_blocks(blocks, depth) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [0, 4]}, r"0\.\.3"),
        ({"blocks": [-5]}, r"-4\.\.-1"),
        ({"blocks": []}, "at least one"),
        ({"blocks": [1, 1]}, "block 1 is named twice"),
        ({"blocks": [-1, 3]}, "block 3 is named twice"),
        ({"rank": 0}, "rank 0 must lie between 1 and the hidden size 32"),
        ({"rank": 33}, "rank 33"),
        ({"dropout": -0.1}, r"dropout -0.1"),
        ({"dropout": 1.0}, r"dropout 1.0"),
        ({"gate": "mlp_4"}, "unknown gate 'mlp_4'.*mlp_3"),
        ({"activation": "rellu"}, "unknown activation 'rellu'.*relu"),
        ({"edit_write": "answer"}, "edit_write=answer"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_in_one_line_before_the_base_is_touched(
    options: dict[str, Any], message: str
) -> None:
    base = tiny()
    with pytest.raises(ConfigError, match=message) as caught:
        GrunModel.wrap(base, **{"blocks": [1], **options})
    assert "\n" not in str(caught.value)
    assert "generate" not in base.__dict__ and all(parameter.requires_grad for parameter in base.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_full_rank_is_allowed() -> None:
    model = GrunModel.wrap(tiny(), blocks=[1], rank=32)
    assert model(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_wrapping_twice_is_refused() -> None:
    model = wrapped()
    with pytest.raises(ConfigError, match="already"):
        GrunModel.wrap(model.base, blocks=[0])
    assert len(model(torch.tensor([[3, 4]])).gates) == 2  # the first one goes on


def test_without_a_gate_there_are_no_gates() -> None:
    model = wrapped(gate="none")
    batch = padded(random_rows([6]), "left")
    output = model(**batch)
    assert output.gate_logits == {} and output.gates == {} and model.last_gates == {}
    twin = tiny()
    with plain_hooks(twin, "llama", model.state_dict(), [[5]]):
        torch.testing.assert_close(output.logits, twin(**batch).logits)


@torch.no_grad()
def test_loss_is_the_models_own_and_absent_without_labels() -> None:
    model = wrapped()
    batch = padded(random_rows([8, 8]), "left")
    labels = batch["input_ids"].clone()
    labels[:, :5] = -100
    output = model(**batch, labels=labels)
    wanted = nn.functional.cross_entropy(output.logits[:, 4:-1].flatten(0, 1), labels[:, 5:].flatten())
    torch.testing.assert_close(output.loss.double(), wanted, atol=1e-5, rtol=1e-5)  # transformers' loss is in float32
    assert model(**batch).loss is None


@torch.no_grad()
def test_edits_stand_before_hooks_that_were_there_first() -> None:
    base = tiny()
    seen = []
    blocks_of(base, "llama")[1].register_forward_hook(lambda *args: seen.append(args[2]))
    ids = torch.tensor([[3, 4, 5]])
    base(ids)
    GrunModel.wrap(base, blocks=[1])
    base(ids)
    assert torch.equal(seen[0][:, :2], seen[1][:, :2]) and not torch.equal(seen[0][:, 2], seen[1][:, 2])


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        grun.Nothing  # noqa: B018
