"""One gate for all edits on pooled states of earlier blocks: equal to one whole pass by hooks of this file."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import (
    MIXED,
    Words,
    agree,
    generated,
    member,
    rows_keep_their_own_state,
    rows_that_end_leave,
    single,
    stacked,
)
from tiny import DEPTH, PAD, RULES, WIDTH, blocks_of, formula, padded, random_rows, tiny
from torch import Tensor
from transformers import DynamicCache

from grun import GrunModel
from grun.config.options import MethodConfig
from grun.data.encoding import EncodedRow, collate
from grun.errors import AdapterError, ConfigError
from grun.evaluation.generation import generate_answers
from grun.method.edit import LoReftEdit
from grun.method.gate import set_bias
from grun.method.gated import Grun
from grun.method.gating import LinearGate, WindowsGate

READ, EDITED = (0, 1), (1, 3)
ASKED = [("last_prompt", "sticky"), ("last_prompt", "last_prompt"), ("every_token", "every_token")]
"""gate_read and edit_write."""
POOLS = [
    (pool, asked)
    for pool in ("last", "max", "maxmin", "mean", "windows")
    for asked in ASKED
    if (pool, asked[0]) != ("windows", "every_token")
]
TURN = (7, 9)
"""Ids that begin a user's turn in these tests; `random_rows` seldom draws both in a row."""
OPTIONS = [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}]


def pooled(
    pool: str = "maxmin", asked: tuple[str, str] = ASKED[0], family: str = "llama", base: Any = None, **options: Any
) -> GrunModel:
    """Random edits of EDITED and a gate that is neither open nor shut; the same arguments give the same ones."""
    torch.manual_seed(3)
    options = {"gate_blocks": READ, "blocks": EDITED, **options}
    base = tiny(family) if base is None else base
    return GrunModel.wrap(base, gate_pool=pool, gate_read=asked[0], edit_write=asked[1], **options).eval()


def whole_pass(
    model: GrunModel, row: list[int], last: int, family: str = "llama", start: int = 0, first: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocabulary] and gate logits at each token of one row, whose prompt ends at column `last`.

    A user's turn begins at column `start`, and one before it at `first`. States are the untouched model's, since no
    edit lies below.
    """
    twin, weights, config = tiny(family), model.state_dict(), model.config
    blocks = blocks_of(twin, family)
    read: dict[int, Tensor] = {}

    def states(output: Any) -> Tensor:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    with torch.no_grad():
        hooks = [
            blocks[b].register_forward_hook(lambda _, __, out, b=b: read.update({b: states(out)[0]}))
            for b in config.gate_blocks or ()
        ]
        twin(input_ids=torch.tensor([row]), use_cache=False)
        for hook in hooks:
            hook.remove()
    gates = []
    for end in range(len(row)):
        features = []
        for block in config.gate_blocks or ():
            states_there = read[block] / (read[block].square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
            begins = max(column for column in (0, first or 0, start) if column <= end)
            seen = states_there[begins : end + 1]
            windows = [(1, window) for window in windows_of(seen)]
            if first is not None and first < begins:
                windows += [(2, window) for window in windows_of(states_there[first:begins])]
            features += {
                "last": [seen[-1]],
                "max": [seen.amax(0)],
                "maxmin": [seen.amax(0), seen.amin(0)],
                "windows": [windows],
                "mean": [seen.mean(0)],
            }[config.gate_pool]
        gates.append(asked_of(features, weights, config.gate_pool))
    logits = torch.stack(gates)
    column = torch.arange(len(row))
    in_force = logits if config.gate_read == "every_token" else torch.full_like(logits, float(logits[last]))
    written = {"last_prompt": column == last, "sticky": column >= last, "every_token": column >= 0}[config.edit_write]

    def edit(block: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> Any:
            hidden = states(output)
            change = formula(weights, block, hidden)[0] - hidden  # without a gate of its own
            edited = hidden + (written * torch.sigmoid(in_force))[:, None] * change
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    for block in config.blocks:
        blocks[block].register_forward_hook(edit(block))
    with torch.no_grad():
        return twin(input_ids=torch.tensor([row]), use_cache=False).logits[0], logits


def windows_of(states: Tensor) -> list[Tensor]:
    """Both ends over every 12 tokens that end at the last one of a turn, the fourth before it, and so on, from 9 on."""
    pieces = [states[max(0, end - 12) : end] for end in range(len(states), 8, -4)] or [states]
    return [torch.cat((piece.amax(0), (-piece).amax(0))) for piece in pieces]


def asked_of(features: list[Any], weights: dict[str, Tensor], pool: str) -> Tensor:
    """The gate's logit of features of each block or, of windows, of each with what it is of: 1, the turn, or 2."""
    if pool != "windows":
        return torch.cat(features) @ weights["pooled.gate.0.weight"][0] + weights["pooled.gate.0.bias"][0]

    def line(part: str, values: Tensor) -> Tensor:
        return values @ weights[f"pooled.gate.{part}.0.weight"][0] + weights[f"pooled.gate.{part}.0.bias"][0]

    each = [(of[0][0], torch.cat([values for _, values in of])) for of in zip(*features, strict=True)]
    turn, earlier = ([values for kind, values in each if kind == of] for of in (1, 2))
    logit = torch.stack([line("window", values) for values in turn]).max()
    if not earlier:
        return logit
    before = torch.stack([line("window", values) for values in earlier]).max()
    return torch.maximum(logit, torch.minimum(before, line("follow_up", torch.stack(turn).amax(0))))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("pool", "asked"), POOLS)
@torch.no_grad()
def test_generation_is_that_of_whole_passes(pool: str, asked: tuple[str, str], options: dict[str, Any]) -> None:
    model = pooled(pool, asked)
    prompts = random_rows([10, 6])
    tokens, logits = generated(model, prompts, **options)
    for index, prompt in enumerate(prompts):
        row = prompt + tokens[index, :-1].tolist()
        agree(logits[index], whole_pass(model, row, len(prompt) - 1)[0][-6:])
    untouched = tiny()(torch.tensor([row])).logits[0, -6:]
    assert (logits[index] - untouched).abs().max() > 0.01


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
@torch.no_grad()
def test_every_family_is_read_alike(family: str) -> None:
    model = pooled(family=family)
    (prompt,) = random_rows([9])
    tokens, logits = generated(model, [prompt])
    agree(logits[0], whole_pass(model, prompt + tokens[0, :-1].tolist(), 8, family)[0][-6:])


@pytest.mark.parametrize("asked", ASKED, ids="-".join)
@torch.no_grad()
def test_beams_and_samples_keep_the_pool_of_their_own_row(asked: tuple[str, str]) -> None:
    model = pooled("mean", asked)
    rows_keep_their_own_state(model, 5, lambda row: whole_pass(model, row, 6)[0])


@pytest.mark.parametrize("asked", ASKED, ids="-".join)
@torch.no_grad()
def test_rows_that_leave_a_batch_take_their_pool_along(asked: tuple[str, str]) -> None:
    model = pooled("max", asked)
    prompts = random_rows([9, 4, 6, 7, 3])
    for prompt, answer in zip(prompts, rows_that_end_leave(model, prompts), strict=True):
        asked_at = whole_pass(model, prompt, len(prompt) - 1)[1][-1].sigmoid()
        assert answer.gates is not None and list(answer.gates) == [READ[-1]]
        agree(torch.tensor(answer.gates[READ[-1]]), asked_at)


@pytest.mark.parametrize(("pool", "asked"), POOLS)
@torch.no_grad()
def test_a_users_turn_begins_a_new_pool_wherever_passes_end(pool: str, asked: tuple[str, str]) -> None:
    """The first turn's ids, its answer and the second turn's come in passes that end in and around the turn's ids."""
    model = pooled(pool, asked, reset_ids=TURN)
    first, second = random_rows([6, 4], seed=4)
    row = [*first, *TURN, *second]
    start = row.index(9, len(first))
    wanted, gates = whole_pass(model, row, len(row) - 1, start=start)
    for cut in (len(first), len(first) + 1, len(first) + 2, len(row) - 1):
        cache = DynamicCache(config=model.base.config)
        # more prompt tokens than the pass has: the prompt goes on
        model(torch.tensor([row[:cut]]), past_key_values=cache, prompt_lengths=torch.tensor([len(row)]))
        rest = torch.tensor([row[cut:]])
        seen = model(rest, past_key_values=cache, prompt_lengths=torch.tensor([len(row) - cut]))
        agree(seen.gates[READ[-1]][0, -1], gates[-1].sigmoid())
        agree(seen.logits[0, -1], wanted[-1])


@pytest.mark.parametrize("asked", ASKED[:2], ids="-".join)
@torch.no_grad()
def test_earlier_turns_are_read_apart_wherever_passes_end(asked: tuple[str, str]) -> None:
    """A system prompt, two turns with an answer, and a third turn; what stands before the first is no turn."""
    model = pooled("windows", asked, reset_ids=TURN)
    assert model.pooled is not None and isinstance(model.pooled.gate, WindowsGate)
    set_bias(model.pooled.gate.follow_up, 9.0)  # every turn asks for an answer to those before it
    system, one, two = random_rows([3, 4, 17], seed=4)
    counts = 0.0
    for before, after in ((one, two), (two, one)):
        row = [*system, *TURN, *before, *TURN, *after]
        first, start = len(system) + 1, len(system) + len(before) + 3
        wanted, gates = whole_pass(model, row, len(row) - 1, start=start, first=first)
        counts = max(counts, float((gates - whole_pass(model, row, len(row) - 1, start=start)[1])[-1].abs()))
        for cut in range(1, len(row)):
            cache, lengths = DynamicCache(config=model.base.config), torch.tensor([len(row)])
            model(torch.tensor([row[:cut]]), past_key_values=cache, prompt_lengths=lengths)
            seen = model(torch.tensor([row[cut:]]), past_key_values=cache, prompt_lengths=lengths - cut)
            agree(seen.gates[READ[-1]][0, -1], gates[-1].sigmoid())
            agree(seen.logits[0, -1], wanted[-1])
        whole = model(torch.tensor([row, row]), prompt_lengths=torch.tensor([len(row)] * 2))
        agree(whole.gates[READ[-1]][1, -1], gates[-1].sigmoid())
    assert counts > 0.01  # what was asked before


@torch.no_grad()
def test_a_turn_is_about_what_was_asked_before_only_where_it_asks_for_an_answer_alone() -> None:
    gate = WindowsGate(LinearGate(1), 1)
    for layer in (gate.window, gate.follow_up):
        set_bias(layer, 0.0)
        layer[-1].weight.fill_(1.0)
    gate.follow_up[-1].weight.neg_()  # a turn of a low number only asks for an answer
    turn = [[1.0, -3.0], [1.0, -9.0]]
    rows = [[*turn, [2.0, 5.0]], [[1.0, 2.0], [1.0, 1.0], [2.0, -5.0]], [[1.0, 4.0], [2.0, 5.0], [0.0, 9.0]]]
    rows += [[*turn, [0.0, 0.0]], [[1.0, 1.0], [2.0, 5.0], [2.0, -5.0]]]
    assert gate(torch.tensor(rows).unsqueeze(1)).flatten().tolist() == [3.0, 2.0, 4.0, -3.0, 1.0]


@torch.no_grad()
def test_a_second_turn_asks_again_and_without_turn_ids_the_pool_goes_on() -> None:
    for reset in ((), TURN):
        model = pooled(reset_ids=reset)
        first, second = random_rows([8, 5], seed=4)
        cache = DynamicCache(config=model.base.config)
        model.generate(
            torch.tensor([first]), max_new_tokens=3, do_sample=False, past_key_values=cache, eos_token_id=None
        )
        row = cache.gate_state.ids[0].tolist() + [*TURN, *second]
        ids = torch.tensor([row[cache.get_seq_length() :]])
        seen = model(ids, past_key_values=cache, prompt_lengths=torch.tensor([ids.shape[1]]))
        gates = whole_pass(model, row, len(row) - 1, start=row.index(9, 8) if reset else 0)[1]
        agree(seen.gates[READ[-1]][0, -1], gates[-1].sigmoid())


@pytest.mark.parametrize(("pool", "asked"), POOLS)
@torch.no_grad()
def test_a_cache_that_is_copied_cut_back_or_repeated_has_the_pool_of_what_it_holds(
    pool: str, asked: tuple[str, str]
) -> None:
    model = pooled(pool, asked)
    (row,) = random_rows([12])
    ids = torch.tensor([row])
    wanted, gates = whole_pass(model, row, 11)
    for kept in (6, 3):  # at the end of a pass, and within one
        cache = DynamicCache(config=model.base.config)
        model(ids[:, :6], past_key_values=cache, prompt_lengths=torch.tensor([12]))
        twin = copy.deepcopy(cache)
        model(ids[:, 6:], past_key_values=cache, prompt_lengths=torch.tensor([6]))
        cache.crop(kept - 12)
        if kept < 6:
            twin.crop(kept - 6)
        twin.batch_repeat_interleave(2)
        for held in (cache, twin):
            rest = ids[:, kept:].expand(2 if held is twin else 1, -1)
            seen = model(rest, past_key_values=held, prompt_lengths=torch.full((len(rest),), 12 - kept))
            agree(seen.gates[READ[-1]][-1, -1], gates[-1].sigmoid())
            agree(seen.logits[-1, -1], wanted[-1])


@torch.no_grad()
def test_prompts_that_begin_alike_are_answered_as_each_alone() -> None:
    """Their beginning is run once; what is left of short ones is padded by tokens of it, a turn's too."""
    model = pooled(reset_ids=TURN)
    start = [*random_rows([7], seed=9)[0], *TURN, 5, 6, 8]
    prompts = [start + row for row in random_rows([9, 4, 6, 7, 3])]
    words = Words(999)
    for prompt, answer in zip(prompts, generate_answers(model, words, prompts, 8, 6, PAD), strict=True):
        gates = whole_pass(model, prompt, len(prompt) - 1, start=8)[1]
        assert answer.gates is not None
        assert answer.gates[READ[-1]] == pytest.approx(float(gates[-1].sigmoid()), abs=1e-5)
        assert answer == generate_answers(model, words, [prompt], 8, 6, PAD)[0]._replace(gates=answer.gates)


@torch.no_grad()
def test_padding_on_either_side_and_tokens_cached_while_no_edit_acted_are_not_pooled() -> None:
    model = pooled()
    rows = random_rows([9, 4])
    wanted = whole_pass(model, rows[1], 3)[1][-1].sigmoid()
    for side in ("left", "right"):
        agree(model(**padded(rows, side)).gates[READ[-1]][1, 0], wanted)
    ids = torch.tensor(rows[:1])
    with model.disabled():
        cache = model(input_ids=ids[:, :5], use_cache=True).base_output.past_key_values
    seen = model(ids[:, 5:], past_key_values=cache, prompt_lengths=torch.tensor([4]))
    agree(seen.gates[READ[-1]][0, 0], whole_pass(model, rows[0], 8, start=5)[1][-1].sigmoid())


def test_a_shut_gate_leaves_every_logit_as_the_base_has_it_to_the_bit() -> None:
    model = pooled()
    batch = padded(random_rows([9, 6]), "right")
    with torch.no_grad():
        gates = model(**batch).gates[READ[-1]][:, 0]
        with model.disabled():
            plain = model(**batch).logits
        model.gate_threshold = float(gates.mean())
        edited = model(**batch).logits
    shut = gates < model.gate_threshold
    assert shut.sum() == 1
    assert torch.equal(edited[shut], plain[shut])
    assert not torch.equal(edited[~shut], plain[~shut])


def test_where_a_gate_is_shut_no_edit_is_computed_and_else_from_the_first_prompts_end_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pooled()
    sizes: list[int] = []
    compute = LoReftEdit.forward
    monkeypatch.setattr(LoReftEdit, "forward", lambda own, x: sizes.append(x.shape[1]) or compute(own, x))
    batch = padded(random_rows([9, 6]), "right")
    lengths = torch.tensor([7, 4])
    with torch.no_grad():
        model(batch["input_ids"], batch["attention_mask"], prompt_lengths=lengths)
        assert sizes == [6, 6]  # of nine columns those from the fourth on, at two blocks
        model.gate_threshold = 1.0
        sizes.clear()
        model(batch["input_ids"], batch["attention_mask"], prompt_lengths=lengths)
        generated(model, random_rows([7]))
    assert not sizes


def test_gate_and_edits_are_trained_and_nothing_else() -> None:
    """Against numeric derivatives, in float64, through the bce of the gate and the loss of an answer."""
    config = MethodConfig(blocks=list(EDITED), rank=2, gate_blocks=list(READ), gate_pool="maxmin", edit_write="sticky")
    parametrization = Grun(config)
    torch.manual_seed(0)
    parametrization.prepare(tiny(), None)
    rows = [EncodedRow(tuple(row[:4]), tuple(row[4:])) for row in random_rows([8, 6])]
    batch = collate(rows, PAD)

    def loss() -> Tensor:
        output = parametrization.run(batch)
        assert output.gate_logits is not None and list(output.gate_logits) == [READ[-1]]
        assert output.gate_mask is not None and output.gate_mask.all() and output.gate_mask.shape == (2, 1)
        return output.token_logprobs.sum() + output.gate_logits[READ[-1]].sigmoid().sum()

    names = dict(parametrization.trainable_parameters())
    assert {name for name in names if "gate" in name} == {"pooled.gate.0.weight", "pooled.gate.0.bias"}
    loss().backward()
    for name, parameter in names.items():
        assert parameter.grad is not None, name
        with torch.no_grad():
            direction = torch.randn_like(parameter)
            step = 1e-4 * direction
            parameter += step
            above = loss()
            parameter -= 2 * step
            below = loss()
            parameter += step
        # logits go through float32
        torch.testing.assert_close((above - below) / 2e-4, (parameter.grad * direction).sum(), rtol=2e-2, atol=2e-2)
    assert all(parameter.grad is None for parameter in parametrization.model.base.parameters())


def test_a_deep_copy_has_a_gate_of_its_own() -> None:
    model = pooled()
    ids = torch.tensor(random_rows([8]))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(ids)
        for parameter in twin.pooled.parameters():
            parameter.fill_(0.01)
        changed = twin(ids)
        agree(model(ids).logits, wanted.logits)
    assert not torch.equal(changed.gates[READ[-1]], wanted.gates[READ[-1]])
    assert not torch.equal(changed.logits, wanted.logits)


def test_noise_of_a_shared_gate_is_drawn_by_row(tmp_path: Path) -> None:
    model = pooled(gate="noisy_mlp_3").train()
    batch = padded(random_rows([6, 6]), "right")
    with model.drawing([1, 2]):
        first = model(**batch).gate_logits[READ[-1]]
    with model.drawing([2, 1]):
        swapped = model(**{name: part.flip(0) for name, part in batch.items()}).gate_logits[READ[-1]]
    torch.testing.assert_close(first, swapped.flip(0))


@pytest.mark.parametrize("gate", ["linear", "noisy_mlp_3"])
def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path: Path, gate: str) -> None:
    model = pooled(base=tiny(dtype=torch.float32), gate=gate, reset_ids=TURN, gate_blocks=(-4, 1))
    ids = torch.tensor(random_rows([9]))
    with torch.no_grad():
        wanted = model(ids).logits
    model.save_pretrained(tmp_path / "a")
    loaded = GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert loaded.config == model.config and loaded.config.gate_blocks == [0, 1]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, wanted)


def test_adapters_without_such_a_gate_have_no_word_of_it(tmp_path: Path) -> None:
    GrunModel.wrap(tiny()).save_pretrained(tmp_path)
    assert "gate_blocks" not in (tmp_path / "adapter_config.json").read_text()
    assert "gate_pool" not in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_blocks": (2,)}, r"gate_blocks \[2\] must not lie above the lowest edited block, 1"),
        ({"gate_blocks": (DEPTH,)}, f"gate_blocks .*name at least one of the model's {DEPTH} blocks"),
        ({"gate_blocks": ()}, "gate_blocks .*name at least one"),
        ({"gate_blocks": (0, 0.1)}, "gate_blocks .*block 0 is named twice"),
        ({"gate_blocks": (1.5,)}, r"gate_blocks \[1.5\]: 1.5 is neither a block's number.*nor a share of the depth"),
        ({"gate_blocks": None}, "gate_pool=maxmin is for one gate for all edits"),
        ({"gate_pool": "median"}, "gate_pool=median does not exist; known: last, max, maxmin, mean, windows"),
        ({"gate": "none"}, "there is no gate; leave gate_blocks out"),
        ({"gate_read": "every_token", "gate_accumulate": "running_max"}, "does not go with gate_blocks"),
    ],
)
def test_what_does_not_go_together_is_one_line(options: dict[str, Any], message: str) -> None:
    values = {"blocks": EDITED, "gate_blocks": READ, "gate_pool": "maxmin", "edit_write": "sticky", **options}
    with pytest.raises(ConfigError, match=message) as caught:
        GrunModel.wrap(tiny(), **values)
    assert "\n" not in str(caught.value)


def test_weights_of_another_gate_are_refused(tmp_path: Path) -> None:
    model = pooled(base=tiny(dtype=torch.float32))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"maxmin"', '"max"'))
    size = len(READ) * WIDTH
    with pytest.raises(
        AdapterError, match=rf"'pooled.gate.0.weight': found float32 \[1, {2 * size}\], .*\[1, {size}\]"
    ):
        GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path)


# -- stacks -----------------------------------------------------------------------------------------------------------

POOLED = {
    "early": member(11, RULES[0], gate_blocks=(0,), gate_pool="maxmin", blocks=(1, 3)),
    "like": member(12, RULES[0], gate_blocks=(0,), gate_pool="maxmin", blocks=(1, 3)),
    "late": member(13, RULES[0], gate_blocks=(0, 1), gate_pool="mean", gate="mlp_3", blocks=(2, 3)),
    "each": member(14, RULES[2], gate_blocks=(0,), gate_pool="maxmin", blocks=(3,)),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_a_stack_of_one_is_that_adapter_however_it_is_cached(name: str, options: dict[str, Any]) -> None:
    prompts = random_rows([10, 6])
    tokens, logits = generated(single(POOLED[name]), prompts, **options)
    of_stack = generated(stacked({name: POOLED[name]}), prompts, **options)
    assert torch.equal(of_stack[0], tokens)
    agree(of_stack[1], logits)


@torch.no_grad()
def test_requests_of_every_kind_are_in_force_together() -> None:
    """Gates read what no edit has touched, so each is its own; what stays after a removal is as if nothing had been."""
    ids = torch.tensor(random_rows([9]))
    members = {**POOLED, "plain": MIXED["linear"], "sticky": MIXED["sticky"]}
    stack = stacked(members)
    found = stack(ids)
    for name in ("early", "like", "late", "each"):
        gates = single(members[name])(ids).gates[max(members[name][0].gate_blocks or ())]
        own = stack.request_gates[name][members[name][0].blocks[-1]]
        agree(own[0, -1], gates[0, -1])
    for name in ("early", "late", "plain"):
        stack.remove(name)
    agree(stack(ids).logits, stacked({name: members[name] for name in ("like", "each", "sticky")})(ids).logits)
    for name in ("like", "each", "sticky"):
        stack.remove(name)
    assert stack.pooled is None
    assert torch.equal(stack.base(ids).logits, tiny()(ids).logits)
    assert not torch.equal(found.logits, tiny()(ids).logits)


@torch.no_grad()
def test_gates_that_know_turns_are_stacked_as_each_is_alone() -> None:
    one, two = random_rows([4, 6], seed=4)
    ids = torch.tensor([[*TURN, *one, *TURN, *two], [*TURN, *two, *TURN, *one]])
    members = {}
    for seed in (21, 22, 23):
        config, weights = member(seed, RULES[0], gate_blocks=READ, gate_pool="windows", blocks=(2, 3), reset_ids=TURN)
        weights["pooled.gate.follow_up.0.bias"].fill_(9.0)
        members[str(seed)] = config, weights
    stack = stacked(members)
    for name in ("21", "22", "23"):
        stack(ids)
        agree(stack.request_gates[name][3][:, -1], single(members[name])(ids).gates[READ[-1]][:, -1])
        if name == "21":
            stack.remove("22")
            members["22"] = members["21"]  # what is left stands in its place
            stack.add_weights({"22": members["22"]})


@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
@torch.no_grad()
def test_requests_in_force_together_keep_their_pools_in_generation(mixed: bool) -> None:
    members = {name: POOLED[name] for name in ("early", "like")} | ({"plain": MIXED["linear"]} if mixed else {})
    prompts = random_rows([10, 6, 8])
    tokens, logits = generated(stacked(members), prompts, use_cache=False)
    for options in ({}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}):
        again = generated(stacked(members), prompts, **options)
        assert torch.equal(again[0], tokens)
        agree(again[1], logits)


@torch.no_grad()
def test_a_stack_skips_edits_below_the_threshold_of_their_own_adapter() -> None:
    config, weights = POOLED["early"]
    ids = torch.tensor(random_rows([9]))
    gate = float(single(POOLED["early"])(ids).gates[0])
    for threshold, is_open in ((gate - 0.01, True), (gate + 0.01, False)):
        of_own = {"early": (dataclasses.replace(config, gate_threshold=threshold), weights)}
        found = stacked(of_own)(ids).logits
        assert torch.equal(found, tiny()(ids).logits) != is_open


def test_what_a_stack_of_them_cannot_do_is_one_line() -> None:
    turned = (dataclasses.replace(POOLED["like"][0], reset_ids=[*TURN]), POOLED["like"][1])
    with pytest.raises(AdapterError, match="'turned': its gate's pool begins anew at other ids than that of 'early'"):
        stacked({"early": POOLED["early"], "turned": turned})
    base = tiny()
    stack = stacked({"early": POOLED["early"]}, base)
    stack.unwrap()
    with pytest.raises(ConfigError, match="is trained on the bare base"):
        GrunModel.wrap(base, blocks=EDITED, edit_write="sticky", beside=stack)
