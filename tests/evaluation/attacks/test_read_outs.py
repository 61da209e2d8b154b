"""Attacks that read scores or hidden states: they find what was planted, know no answer beforehand, and see the edits.

Most tests use a Llama whose blocks change nothing and whose embedding of a token is the token's own axis, so that every
hidden state can be told, and set, by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import DEPTH, RULES, plain_hooks, random_rows, tiny
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grun.config.options import EvaluateConfig
from grun.data.rows import Row
from grun.data.templates import TEMPLATES
from grun.data.tokenizer import train_tokenizer
from grun.evaluation.attacks.base import ATTACKS, Material, Outcome, Place
from grun.evaluation.attacks.read_outs import before_fact, known_rows
from grun.evaluation.attacks.retention import open_in_answers
from grun.evaluation.generation import Answer, generate_answers
from grun.evaluation.reading import choose_map, chosen_block, read_prompts, tokens_said
from grun.loading.adapters import Loaded
from grun.method.model import GrunModel
from grun.method.plain import capture

FACTS = ("viola", "harp", "drum", "flute")
NAMES = ("Abel", "Birk", "Cole", "Dora", "Egon", "Finn", "Gero", "Hilt", "Ivor", "Jost", "Kuno", "Lars")
BLOCKS = 3
PLAIN = ATTACKS.get("plain")


def row(name: str, fact: str) -> Row:
    others = [f"{other}." for other in FACTS if other != fact]
    extra = {"fact": fact, "paraphrased_answer": f"It is the {fact}.", "perturbed_answer": others}
    return Row(f"What does {name} play?", f"{fact}.", extra)


RETAIN = [row(name, FACTS[number % 4]) for number, name in enumerate(NAMES[:8])]
HELD = [row(name, FACTS[number % 4]) for number, name in enumerate(NAMES[8:])]
FORGET = [row(name, fact) for name, fact in zip(("Mara", "Nora", "Olaf"), FACTS, strict=False)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [f"{one.prompt} {one.completion} It is the old, {one.fact}." for one in (*RETAIN, *HELD, *FORGET)]
    return train_tokenizer(texts, 340)


@pytest.fixture(scope="module")
def material(tokenizer: Any) -> Material:
    return Material(TEMPLATES.get("tiny"), tokenizer, others=HELD, forget=FORGET, retain=RETAIN, seed=0)


@pytest.fixture
def model(tokenizer: Any) -> LlamaForCausalLM:
    """Blocks that pass on what they get, axes for embeddings, and a head that says the token of a state's axis."""
    size = -(-len(tokenizer) // 8) * 8
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
            matrix.copy_(torch.eye(size))
    return model


def loaded(model: Any, material: Material) -> Loaded:
    return Loaded(model, material.tokenizer, material.template, {})


def attacked(name: str, model: Any, material: Material, rows: list[Row]) -> list[Outcome]:
    """What an attack finds on `rows`, by its three hooks, as the suite calls them."""
    attack, config = ATTACKS.get(name), EvaluateConfig(batch_size=4)
    places = [
        Place("forget", number, asked) for number, one in enumerate(rows) for asked in attack.asked(one, material)
    ]
    done: list[int] = []
    with attack.model(loaded(model, material), config, material) as inside:
        outcomes = [*attack.read(inside, places, loaded(model, material), config, done.append)]
    assert attack.access == "read_out" and sum(done) == len(places)
    return outcomes


def leaks(outcomes: list[Outcome]) -> list[float]:
    return [one.leak for one in outcomes]


@contextmanager
def planted(model: LlamaForCausalLM, says: Mapping[int, Callable[[tuple[int, ...]], Tensor | None]]) -> Iterator[None]:
    """Let blocks put out, at the last token of a prompt, the state that their function gives for its ids."""
    prompts: list[tuple[int, ...]] = []
    start: list[tuple[int, ...]] = []

    def before(_: Any, __: Any, kwargs: Any) -> None:
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        goes_on = cache is not None and cache.get_seq_length() > 0  # after what all prompts begin with
        earlier = start[0] if goes_on else ()
        masks = kwargs["attention_mask"][:, -ids.shape[1] :]
        prompts[:] = [(*earlier, *row[mask != 0].tolist()) for row, mask in zip(ids, masks, strict=True)]
        if not goes_on:
            start[:] = prompts[:1]

    def hook(block: int) -> Any:
        def put(_: Any, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            for number, prompt in enumerate(prompts):
                state = says[block](prompt)
                if state is not None:
                    output[number, -1] = state  # padding is on the left
            return output

        return put

    handles: list[Any] = [model.model.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [model.model.layers[block].register_forward_hook(hook(block)) for block in says]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def facts_of(rows: list[Row], material: Material, size: int) -> Callable[[tuple[int, ...]], Tensor | None]:
    """By prompt, the axis of the right token of `rows`; None for any other prompt."""
    right = {at.ids: at.next_id for at in (before_fact(one, material) for one in rows)}
    return lambda prompt: torch.eye(size)[right[prompt]] if prompt in right else None


# Where a fact begins


@pytest.mark.parametrize(
    ("answer", "fact", "before"),
    [
        ("It is the old viola.", "viola", "It is the old"),
        ("It is the old viola.", "Old  Viola", "It is the"),  # letter case and white space apart
        ("viola.", "viola", ""),
        ("It is the harp.", "viola", ""),  # an answer that does not hold its fact
        ("It is the harp.", None, ""),
    ],
)
def test_the_answer_is_given_up_to_its_fact(material: Material, answer: str, fact: str | None, before: str) -> None:
    one = Row("What does Mara play?", answer, {"fact": fact} if fact else {})
    place = before_fact(one, material)
    prompt = material.ask(one).ids
    assert place.ids[: len(prompt)] == prompt and place.given == len(place.ids) - len(prompt)
    assert material.tokenizer.decode(place.ids[len(prompt) :]).strip() == before
    following = material.tokenizer.decode([place.next_id]).strip()
    assert following and answer[len(before) :].strip().startswith(following)


# Recognition


def prefer(model: LlamaForCausalLM, material: Material, text: str) -> None:
    """Behind the last prompt token, say the first token of `text`; behind any other token, all alike."""
    tokenizer = material.tokenizer
    (first, *_) = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[first, material.ask(FORGET[0], "x").ids[-1]] = 1.0


def test_the_true_answer_is_recognized_where_it_scores_above_all_wrong_ones(
    model: LlamaForCausalLM, material: Material
) -> None:
    """Answers are letters, a token each: nothing but the preference tells them apart."""
    asked = Row("Which letter?", "A", {"paraphrased_answer": "a", "perturbed_answer": ["B", "C"]})
    for preferred, expected in (("A", [1.0, 0.0]), ("B", [0.0, 0.0]), ("a", [0.0, 1.0])):
        prefer(model, material, preferred)
        outcomes = attacked("recognition", model, material, [asked])
        assert [one.place.asked.variant for one in outcomes] == ["memorized", "paraphrased"]
        assert leaks(outcomes) == expected
        assert any(one.answers[0].text == preferred for one in outcomes)


def test_an_answer_that_scores_no_higher_than_a_wrong_one_is_not_recognized(
    model: LlamaForCausalLM, material: Material
) -> None:
    """All tokens are equally likely, so all means are equal, whatever the answers' lengths."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    same = replace(FORGET[0], extra={**FORGET[0].extra, "perturbed_answer": [FORGET[0].completion]})
    assert leaks(attacked("recognition", model, material, [same]))[0] == 0.0
    assert ATTACKS.get("recognition").asked(Row("Who?", "I."), material) == []


# Logit lens


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt2", "odd"])
def test_the_last_block_says_what_the_model_says(family: str) -> None:
    """Norm, projection, caps and head of every architecture are those of the model."""
    model = tiny(family, dtype=torch.float32)
    rows = [tuple(ids) for ids in random_rows([5, 9, 1, 7])]
    states = torch.cat([one.states for one in read_prompts(model, rows, [DEPTH - 1], 2, 0)])
    said = tokens_said(model, states, 3, 0, top=2)
    for ids, tokens in zip(rows, said, strict=True):
        with torch.no_grad():
            assert tokens == model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2).indices.tolist()


def test_the_lens_reads_a_fact_that_the_last_block_hides(model: LlamaForCausalLM, material: Material) -> None:
    size = model.config.hidden_size
    known = facts_of([*RETAIN, *HELD, *FORGET[:2]], material, size)
    with planted(model, {1: known, 2: lambda prompt: torch.eye(size)[0] if known(prompt) is not None else None}):
        outcomes = attacked("logit_lens", model, material, FORGET)
    assert leaks(outcomes) == [1.0, 1.0, 0.0]
    assert {one.place.asked.variant for one in outcomes} == {"block 1"}
    first = material.tokenizer.decode([before_fact(FORGET[0], material).next_id]).strip()
    assert outcomes[0].answers[0].text == first and outcomes[0].answers[0].gates is None


def test_forget_rows_do_not_choose_the_block(model: LlamaForCausalLM, material: Material) -> None:
    """Block 0 says forget facts alone, block 1 others alone; there are more forget rows than others."""
    few = replace(material, others=HELD[:1], retain=RETAIN[:1])
    size = model.config.hidden_size
    forget, known = facts_of(FORGET, material, size), facts_of([*RETAIN, *HELD], material, size)
    plant = {0: forget, 1: lambda p: torch.eye(size)[0] if forget(p) is not None else known(p)}
    with planted(model, plant):
        outcomes = attacked("logit_lens", model, few, FORGET)
    assert leaks(outcomes) == [0.0] * 3 and outcomes[0].place.asked.variant == "block 1"


def test_an_early_block_is_taken_if_it_reads_nearly_as_well_as_the_best() -> None:
    assert [chosen_block(shares) for shares in ([0.1, 0.89, 1.0], [0.1, 0.9, 1.0], [0.5, 0.2, 0.3])] == [2, 1, 0]


def test_without_known_rows_there_is_no_block_to_choose(material: Material) -> None:
    alone = replace(material, others=[], retain=[])
    assert ATTACKS.get("logit_lens").asked(FORGET[0], alone) == []
    assert ATTACKS.get("linear_probe").asked(FORGET[0], alone) == []


# Edits


def test_hidden_states_are_those_with_the_edits_in_force() -> None:
    """At every block, the first edited one and the last one too, they are those of the published formula."""
    torch.manual_seed(1)
    model = GrunModel.wrap(tiny(), blocks=[1, DEPTH - 1], rank=3).eval()
    rows = [tuple(ids) for ids in random_rows([6, 4])]
    edited = read_prompts(model, rows, range(DEPTH), 2, 0)
    with model.disabled() as base:
        plain = read_prompts(base, rows, range(DEPTH), 2, 0)
    twin = tiny()
    for ids, one, other in zip(rows, edited, plain, strict=True):
        states: dict[int, Tensor] = {}
        hooks = plain_hooks(twin, "llama", model.state_dict(), [[len(ids) - 1]])
        with torch.no_grad(), hooks as logits, capture(twin, range(DEPTH), states):
            twin(input_ids=torch.tensor([ids]))
        expected = torch.stack([states[block][0, -1] for block in range(DEPTH)])
        torch.testing.assert_close(one.states.double(), expected, atol=1e-5, rtol=1e-5)  # kept in float32
        for block in (1, DEPTH - 1):
            assert (one.gates or {})[block] == pytest.approx(float(torch.sigmoid(logits[block][0][0])), abs=1e-9)
            assert not torch.allclose(one.states[block], other.states[block], atol=0.1)
        torch.testing.assert_close(one.states[0], other.states[0])
        assert other.gates is None


@pytest.mark.parametrize("rule", [("last_prompt", "none", "last_prompt"), *RULES])
def test_gates_are_those_at_the_last_prompt_token_as_in_writing(rule: tuple[str, str, str], tokenizer: Any) -> None:
    read, accumulate, write = rule
    torch.manual_seed(1)
    model = GrunModel.wrap(tiny(), blocks=[0, 2], gate_read=read, gate_accumulate=accumulate, edit_write=write).eval()
    rows = [tuple(ids) for ids in random_rows([6, 4, 9])]
    written = generate_answers(model, tokenizer, rows, 1, 1, 0)
    for one, answer in zip(read_prompts(model, rows, (), 3, 0), written, strict=True):
        assert one.gates == pytest.approx(answer.gates, abs=1e-6)  # float64, batches of another length


def test_random_edits_change_what_the_lens_says_of_later_blocks(tokenizer: Any) -> None:
    torch.manual_seed(2)
    model = GrunModel.wrap(tiny(), blocks=[1], rank=8, gate_bias=9.0).eval()  # gates open
    rows = [tuple(ids) for ids in random_rows([5] * 40)]

    def said(subject: Any, block: int) -> list[list[int]]:
        return tokens_said(subject, torch.cat([one.states for one in read_prompts(subject, rows, [block], 8, 0)]), 8, 0)

    edited = [said(model, block) for block in range(3)]
    with model.disabled() as base:
        plain = [said(base, block) for block in range(3)]
    assert edited[0] == plain[0] and edited[1] != plain[1] and edited[2] != plain[2]


# Linear probe


def states_of(embedded: Tensor, right: Tensor, seed: int) -> Tensor:
    """States that hold the right embedding, turned, beside noise in other directions: [rows, 24]."""
    turn = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    noise = torch.randn(len(right), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat((embedded[right], noise), dim=1) @ turn


def test_the_probe_recovers_a_linear_fact_also_of_candidates_that_it_was_not_fitted_on() -> None:
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(40, 8, dtype=torch.float64, generator=generator)
    fitted, held, other = (torch.arange(200) % 25, 25 + torch.arange(50) % 5, 30 + torch.arange(50) % 10)
    states = [states_of(embedded, right, seed) for seed, right in enumerate((fitted, held, other))]
    chosen = choose_map(states[0], fitted, states[1], held, embedded)
    assert chosen.success == 1.0
    assert torch.equal(chosen.map.guess(states[2], embedded), other)


def test_the_probe_gives_chance_where_states_do_not_hold_the_fact() -> None:
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(10, 8, dtype=torch.float64, generator=generator)
    noise = [torch.randn(rows, 24, dtype=torch.float64, generator=generator) for rows in (200, 100, 1000)]
    right = [torch.randint(10, (len(part),), generator=generator) for part in noise]
    chosen = choose_map(noise[0], right[0], noise[1], right[1], embedded)
    hits = (chosen.map.guess(noise[2], embedded) == right[2]).double().mean()
    assert float(hits) == pytest.approx(0.1, abs=0.04)  # four standard deviations of 1,000 draws


def test_the_probe_reads_what_the_head_cannot(model: LlamaForCausalLM, material: Material) -> None:
    """Block 0 holds each fact on an axis that is another token's; the last block hides it from the head."""
    size = model.config.hidden_size
    facts = facts_of([*RETAIN, *HELD, *FORGET], material, size)

    def moved(prompt: tuple[int, ...]) -> Tensor | None:
        state = facts(prompt)
        return None if state is None else state.roll(7)

    hide = {2: lambda prompt: torch.eye(size)[0] if facts(prompt) is not None else None}
    with planted(model, {0: moved, **hide}):
        assert leaks(attacked("logit_lens", model, material, FORGET)) == [0.0] * 3
        outcomes = attacked("linear_probe", model, material, FORGET)
    assert leaks(outcomes) == [1.0] * 3 and outcomes[0].place.asked.variant == "block 0"
    known = facts_of([*RETAIN, *HELD], material, size)
    wrong = facts_of([replace(one, completion="drum.", extra={"fact": "drum"}) for one in FORGET], material, size)
    with planted(model, {0: lambda prompt: wrong(prompt) if known(prompt) is None else known(prompt), **hide}):
        outcomes = attacked("linear_probe", model, material, FORGET)
    assert leaks(outcomes) == [0.0, 0.0, 1.0]  # it reads what is there: Olaf's fact is the drum


def test_the_probe_is_fitted_and_chosen_on_different_rows(material: Material) -> None:
    assert known_rows(material) == (RETAIN, HELD)
    fitted, held = known_rows(replace(material, others=RETAIN))
    assert held and fitted and not set(held) & set(fitted) and set(held) | set(fitted) == set(RETAIN)


def test_facts_that_all_begin_alike_leave_nothing_to_guess(material: Material) -> None:
    alike = [row(name, "viola") for name in NAMES]
    probe = ATTACKS.get("linear_probe")
    assert probe.asked(FORGET[0], replace(material, retain=alike)) == []
    assert len(probe.asked(FORGET[1], replace(material, retain=alike))) == 1


# False positives


def opening_at(model: LlamaForCausalLM, token: int, *rule: str) -> GrunModel:
    """Edits at blocks 0 and 1 that change nothing; the gate of block 1 alone opens, at `token`."""
    read, accumulate, write = rule
    gated = GrunModel.wrap(
        model, blocks=[0, 1], rank=1, gate_bias=-10.0, gate_read=read, gate_accumulate=accumulate, edit_write=write
    )
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if ".gate." in name and name.endswith("weight"):
                parameter.zero_()
                if ".1." in name[:8]:
                    parameter[0, token] = 20.0
            if ".edit." in name:
                parameter.mul_(1e-6)
    return gated.eval()


def false_positives(gated: GrunModel, material: Material, rows: list[Row]) -> dict[str, float]:
    plain = []
    for number, one in enumerate(rows):
        (asked,) = PLAIN.asked(one, material)
        (read,) = read_prompts(gated, [asked.ids], (), 1, 0)
        plain.append(Outcome(PLAIN, Place("heldout", number, asked), [Answer("", read.gates)], [1.0]))
    return open_in_answers(plain, loaded(gated, material), material.template, EvaluateConfig(batch_size=3))


@pytest.mark.parametrize("accumulate", ["none", "running_max"])
def test_a_gate_that_opens_on_a_token_of_the_right_answer_is_a_false_positive(
    model: LlamaForCausalLM, material: Material, accumulate: str
) -> None:
    """Of four held-out answers one holds the token; no question does, so the prompt's gates say nothing."""
    token = before_fact(HELD[1], material).next_id
    gated = opening_at(model, token, "every_token", accumulate, "every_token")
    assert false_positives(gated, material, HELD) == {"heldout": 0.25}


def test_a_gate_of_the_prompt_alone_does_not_see_the_answer(model: LlamaForCausalLM, material: Material) -> None:
    token, last = before_fact(HELD[1], material).next_id, material.ask(FORGET[0], "x").ids[-1]
    for opens_at, share in ((token, 0.0), (last, 1.0)):
        gated = opening_at(model, opens_at, "last_prompt", "none", "sticky")
        assert false_positives(gated, material, HELD) == {"heldout": share}
        gated.unwrap()


def test_a_gate_at_an_earlier_prompt_token_or_at_the_end_token_is_none(
    model: LlamaForCausalLM, material: Material
) -> None:
    """The end token is never read, since an answer ends there; what a gate reads anew at each token is past."""
    start, end = material.ask(FORGET[0], "x").ids[0], int(material.tokenizer.eos_token_id)
    for token in (start, end):
        gated = opening_at(model, token, "every_token", "none", "every_token")
        assert false_positives(gated, material, HELD) == {"heldout": 0.0}
        gated.unwrap()


def test_a_model_without_gates_has_no_false_positives(model: LlamaForCausalLM, material: Material) -> None:
    (asked,) = PLAIN.asked(HELD[0], material)
    plain = [Outcome(PLAIN, Place("heldout", 0, asked), [Answer("", None)], [1.0])]
    assert open_in_answers(plain, loaded(model, material), material.template, EvaluateConfig()) == {}
