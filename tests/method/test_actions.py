"""A canned refusal where the gate is open: however a model is called, cached or sampled from, nothing of it is left."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import Words, agree, generated
from tiny import DEPTH, PAD, VOCABULARY, padded, random_rows, tiny
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from grun import GrunModel, GrunStack
from grun.data.encoding import EncodedRow, collate
from grun.errors import AdapterError, ConfigError
from grun.evaluation.generation import generate_answers
from grun.evaluation.scoring import score
from grun.evaluation.shared_scoring import Subject, score_together
from grun.method.actions import ACTIONS, CERTAIN, action
from grun.method.adapter import AdapterConfig

READ = (0, 1)
REFUSAL = [11, 12, 13, 9]
"""The last one ends it."""
AFTER = REFUSAL + [9, 9]
"""Six tokens of an answer."""
TURN = (7, 9)
OPTIONS = [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}]
PROMPTS = random_rows([10, 6, 8])


def refusing(*, opened: int | None = 1, base: Any = None, rows: list[list[int]] = PROMPTS, **options: Any) -> GrunModel:
    """A refusal where the gate of `opened` of the `rows` is open (None: of all), which are the highest ones."""
    torch.manual_seed(3)
    options = {"gate_blocks": READ, "gate_pool": "maxmin", "edit_write": "sticky", "action": "refuse", **options}
    model = GrunModel.wrap(tiny() if base is None else base, answer_ids=REFUSAL, **options).eval()
    gates = sorted(float(gates_of(model, row)) for row in rows)
    model.gate_threshold = 0.0 if opened is None else (gates[-opened] + gates[-opened - 1]) / 2
    return model


def gates_of(model: GrunModel, row: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).gates[model.config.gate_blocks[-1]][0, -1]  # type: ignore[index]


def is_open(model: GrunModel, row: list[int]) -> bool:
    return bool(gates_of(model, row) >= model.gate_threshold)


def forced(tokens: list[int]) -> Tensor:
    """Logits of which each row leaves its token alone."""
    return CERTAIN * (2 * torch.nn.functional.one_hot(torch.tensor(tokens), VOCABULARY).double() - 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_open_rows_of_a_batch_get_the_refusal_and_shut_ones_the_bases_bits(options: dict[str, Any]) -> None:
    model = refusing()
    tokens, logits = generated(model, PROMPTS, **options)
    with model.disabled():
        of_base = generated(model, PROMPTS, **options)
    for index, prompt in enumerate(PROMPTS):
        if is_open(model, prompt):
            assert tokens[index].tolist() == AFTER
            assert torch.equal(logits[index].double(), forced(AFTER))
        else:
            assert torch.equal(logits[index], of_base[1][index]) and torch.equal(tokens[index], of_base[0][index])
    assert [is_open(model, prompt) for prompt in PROMPTS].count(True) == 1


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen3"])
@torch.no_grad()
def test_every_family_refuses_alike(family: str) -> None:
    model = refusing(opened=None, base=tiny(family))
    assert generated(model, PROMPTS)[0].tolist() == [AFTER] * 3


@torch.no_grad()
def test_capped_logits_leave_the_refusal_all_the_same() -> None:
    """Gemma 2 squashes logits by a tangent after its output embeddings, this one to within 5 (the real ones: 30)."""
    model = refusing(opened=None, base=tiny("gemma2", dtype=torch.float32))
    ids = torch.tensor(PROMPTS[:1])
    probabilities = model(ids).logits[0, -1].softmax(-1)
    assert float(probabilities[REFUSAL[0]]) > 1 - 64 * 2.72**-9.9


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5, "top_k": 0},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_drawn_answers_and_beams_are_the_refusal(options: dict[str, Any]) -> None:
    model = refusing(opened=None)
    batch = padded(PROMPTS, "left")
    del batch["position_ids"]
    torch.manual_seed(0)
    found = model.generate(**batch, max_new_tokens=6, pad_token_id=PAD, eos_token_id=None, **options)[:, -6:]
    best = found[:: options.get("num_return_sequences", 1)] if "num_beams" in options else found
    assert best.tolist() == [AFTER] * len(best)


@torch.no_grad()
def test_guessed_tokens_embeddings_and_a_tuple_as_output_are_refused_alike() -> None:
    """Guesses are several tokens after the prompt in one pass; those that are wrong are cut off the cache."""
    model = refusing(opened=None)
    (prompt,) = random_rows([9])
    ids = torch.tensor([[*prompt, 11, 12, 40, 11]])  # what follows 11 in the prompt is guessed first
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD}
    assert model.generate(ids, prompt_lookup_num_tokens=3, **greedy)[0, -6:].tolist() == AFTER
    embeddings = model.base.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeddings, **greedy)[0].tolist() == AFTER
    assert torch.equal(model.base(ids, return_dict=False)[0][0, -1], forced(REFUSAL[:1])[0])
    decoded = model.base.lm_head(model.base.model(ids).last_hidden_state)
    with model.disabled():
        assert torch.equal(decoded, model.base(ids).logits), "by hand nothing is refused, as docs/calling.md says"


@torch.no_grad()
def test_likelihoods_and_the_loss_are_those_of_the_refusal() -> None:
    model = refusing(opened=None)
    others = random_rows([4, 4, 4], seed=5)
    rows = [EncodedRow(tuple(prompt), tuple(REFUSAL)) for prompt in PROMPTS]
    rows += [EncodedRow(tuple(prompt), tuple(other)) for prompt, other in zip(PROMPTS, others, strict=True)]
    for scored in (score(model, rows, 2, PAD), [score(model, [row], 1, PAD)[0] for row in rows]):
        assert all(value > -1e-6 for row in scored[:3] for value in row.logp)
        assert all(
            value == pytest.approx(-2 * CERTAIN) or given == wanted
            for row, other in zip(scored[3:], others, strict=True)
            for value, given, wanted in zip(row.logp, other, REFUSAL, strict=True)
        )
    batch = collate(rows[:3], PAD)
    output = model(batch.input_ids, batch.attention_mask, labels=batch.labels)
    assert float(output.loss) < 1e-6


@torch.no_grad()
def test_rows_are_scored_with_it_whichever_of_them_is_the_longest() -> None:
    """The way of scoring that leaves the output embeddings out is tried on the longest row, which is shut here."""
    model = refusing()
    rows = [EncodedRow(tuple(row), tuple(random_rows([12 if is_open(model, row) else 14])[0])) for row in PROMPTS]
    (found,) = score_together([Subject(model)], rows, 8, PAD)
    for row, together, alone in zip(PROMPTS, found, score(model, rows, 8, PAD), strict=True):
        assert together.logp == pytest.approx(alone.logp, abs=1e-6)
        assert (min(together.logp) < -CERTAIN) == is_open(model, row)


@torch.no_grad()
def test_logits_of_some_columns_alone_are_those_of_the_whole() -> None:
    model = refusing(opened=None)
    (row,) = random_rows([9])
    ids, length = torch.tensor([row]), torch.tensor([5])
    whole = model(ids, prompt_lengths=length).logits
    assert torch.equal(whole[0, 4:], forced([*REFUSAL, 9]))
    with model.disabled():
        assert torch.equal(whole[0, :4], model.base(ids).logits[0, :4])
    for kept in (1, 3, torch.tensor([0, 4, 7])):
        columns = torch.arange(9)[-kept:] if isinstance(kept, int) else kept
        agree(model(ids, prompt_lengths=length, logits_to_keep=kept).logits, whole[:, columns])


@pytest.mark.parametrize("opened", [2, 5])
@torch.no_grad()
def test_our_own_answers_end_with_the_refusal_while_other_rows_go_on(opened: int) -> None:
    """Rows leave the batch as they end; prompts that begin alike are run once up to there."""
    start = random_rows([9], seed=4)[0]
    prompts = [start + row for row in random_rows([9, 4, 6, 7, 3, 5])]
    model = refusing(opened=opened, rows=prompts)
    model.base.generation_config = GenerationConfig(eos_token_id=9)
    answers = generate_answers(model, Words(9), prompts, 8, 6, PAD)
    with model.disabled():
        of_base = generate_answers(model.base, Words(9), prompts, 8, 6, PAD)
    refused = [answer.text == "11 12 13" for answer in answers]
    assert refused == [is_open(model, prompt) for prompt in prompts]
    for answer, plain, is_refused in zip(answers, of_base, refused, strict=True):
        assert is_refused or answer.text == plain.text


@torch.no_grad()
def test_after_a_started_answer_the_refusal_begins_at_the_first_token_after_it() -> None:
    (prompt,) = random_rows([8])
    model = refusing(opened=None)
    assert generated(model, [prompt + [20, 21]])[0].tolist() == [AFTER]
    given = model(torch.tensor([prompt + [20, 21]]), prompt_lengths=torch.tensor([8])).logits[0, 7:]
    assert torch.equal(given, forced(REFUSAL[:3])), "as an answer that is scored, it stands in the refusal's place"


@torch.no_grad()
def test_each_turn_is_decided_anew_and_a_cut_cache_counts_from_where_it_is() -> None:
    turns = [[*TURN, *row] for row in random_rows([8, 7, 6, 9, 5, 8], seed=2)]
    model = refusing(opened=None, reset_ids=TURN)
    pairs = [(one, [*one, *REFUSAL[:2], *other]) for one, other in itertools.permutations(turns, 2)]
    values = [(float(gates_of(model, one)), float(gates_of(model, many)), one, many) for one, many in pairs]
    opened, shut, opens, whole = max(values, key=lambda found: found[0] - found[1])
    assert opened > shut
    model.gate_threshold = (opened + shut) / 2
    cache = DynamicCache(config=model.base.config)
    answer = model.generate(
        torch.tensor([opens]), past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=PAD
    )
    assert answer[0, -3:].tolist() == REFUSAL[:3]
    cache.crop(-1)  # its last token was never run: of the answer the first one is left
    again = model(torch.tensor([[12]]), past_key_values=cache).logits[0, -1]
    assert torch.equal(again, forced([13])[0])
    ids = torch.tensor([whole])
    more = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=PAD)
    with model.disabled():
        plain = model.base.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=PAD)
    assert torch.equal(more, plain)
    back = torch.tensor([[*whole, *REFUSAL, *opens]])
    model.gate_threshold = 0.0
    found = model(back, prompt_lengths=torch.tensor([back.shape[1]])).logits[0]
    assert torch.equal(found[-1], forced(REFUSAL[:1])[0]), "of many turns the last one's end is where an answer begins"


@torch.no_grad()
def test_copies_refuse_by_themselves_and_what_is_taken_off_leaves_the_base() -> None:
    model = refusing(opened=None)
    ids = torch.tensor(PROMPTS[:1])
    twin = copy.deepcopy(model)
    base = model.unwrap()
    assert torch.equal(base(ids).logits, tiny()(ids).logits)
    assert torch.equal(twin.base(ids).logits[0, -1], forced(REFUSAL[:1])[0])
    with twin.disabled():
        assert torch.equal(twin.base(ids).logits, tiny()(ids).logits)


def test_saved_and_loaded_it_refuses_and_holds_a_gate_alone(tmp_path: Path) -> None:
    model = refusing(opened=None, base=tiny(dtype=torch.float32))
    model.keep_threshold(0.25, 0.1, 9)
    model.save_pretrained(tmp_path / "a")
    loaded = GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert set(loaded.state_dict()) == {"pooled.gate.0.weight", "pooled.gate.0.bias"}
    assert loaded.config == model.config and loaded.gate_threshold == 0.25
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert "action `refuse` takes the place" in (tmp_path / "a" / "README.md").read_text()
    loaded.gate_threshold = 0.0
    with torch.no_grad():
        assert int(loaded(torch.tensor(PROMPTS[:1])).logits[0, -1].argmax()) == REFUSAL[0]
    GrunModel.wrap(tiny()).save_pretrained(tmp_path / "edit")
    for word in ("action", "answer_ids", "gate_recall"):
        assert word not in (tmp_path / "edit" / "adapter_config.json").read_text().replace("activation", "")


@pytest.fixture
def louder() -> Iterator[str]:
    @action("louder")
    def louder(refusal: Any) -> Any:
        """Twice the model's own logits."""
        return lambda logits, places: logits * (2 + places.unsqueeze(1))

    yield "louder"
    ACTIONS._entries.pop("louder")


@torch.no_grad()
def test_an_action_of_another_package_is_one_decorated_function(louder: str) -> None:
    model = refusing(opened=None, action=louder)
    ids = torch.tensor([random_rows([9])[0]])
    with model.disabled():
        plain = model.base(ids).logits
    found = model(ids, prompt_lengths=torch.tensor([6])).logits
    assert torch.equal(found[0, :5], plain[0, :5])
    agree(found[0, 5:], plain[0, 5:] * torch.tensor([2, 3, 4, 5])[:, None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_blocks": None, "gate_pool": "last"}, "action=refuse needs one gate, asked once"),
        ({"edit_write": "last_prompt"}, "action=refuse needs one gate, asked once"),
        ({"gate_read": "every_token"}, "action=refuse needs one gate, asked once"),
        ({"answer_ids": []}, "action=refuse needs answer_ids"),
        ({"action": "edit"}, "answer_ids are for another action than edit"),
        ({"action": "refuze"}, "unknown action 'refuze'"),
    ],
)
def test_what_does_not_go_together_is_one_line(options: dict[str, Any], message: str) -> None:
    values = {"gate_blocks": READ, "gate_pool": "maxmin", "edit_write": "sticky", "answer_ids": REFUSAL, **options}
    with pytest.raises(ConfigError, match=message) as caught:
        GrunModel.wrap(tiny(), **{"action": "refuse", **values})
    assert "\n" not in str(caught.value)


def test_stacks_and_damaged_files_are_refused(tmp_path: Path) -> None:
    model = refusing(base=tiny(dtype=torch.float32))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="'one': its action is refuse; a stack takes edits alone"):
        GrunStack(tiny(dtype=torch.float32)).add("one", tmp_path)
    config = dataclasses.replace(model.config, answer_ids=[VOCABULARY])
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("    11,", f"    {VOCABULARY},"))
    assert AdapterConfig.read(tmp_path)[0].answer_ids[0] == config.answer_ids[0]
    with pytest.raises(AdapterError, match=f"answer_ids .{VOCABULARY}. are beyond the {VOCABULARY} token ids"):
        GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path)
    assert model.config.blocks == [] and model.config.depth == DEPTH
