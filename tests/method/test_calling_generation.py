"""Ways of generating, PEFT inside and outside, caches that a user filled: always the answers of whole passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import BLOCKS, PUBLISHED, agree, generated, member, prompts_of, stacked, strong, whole_pass, wrapped
from tiny import PAD, RULES, formula, greedy_by_hand, padded, random_rows, tiny
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    StaticCache,
)
from watched import Recorded

from grun import GrunModel
from grun.errors import ModelError

ALL_RULES = [PUBLISHED, *RULES]
STEPS = 6
"""As `generated` takes."""
SHAPE = "-".join


def agree_with_whole_passes(
    model: GrunModel, rule: tuple[str, str, str], rows: list[list[int]], found: tuple[Tensor, Tensor], family: str
) -> None:
    for row, tokens, logits in zip(rows, *found, strict=True):
        wanted, _ = whole_pass(model, rule, row + tokens[:-1].tolist(), len(row) - 1, family)
        agree(logits, wanted[-STEPS:])


CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dynamic": lambda base: DynamicCache(),
    "dynamic and sliding": lambda base: DynamicCache(config=base.config),
    "static": lambda base: StaticCache(base.config, max_cache_len=32),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("rule", ALL_RULES, ids=SHAPE)
@torch.no_grad()
def test_generation_on_a_copy_of_a_cache_that_holds_a_prefix(
    rule: tuple[str, str, str], family: str, cache: str
) -> None:
    """The recipe of docs/calling.md: the pass over the prefix is told that the prompt goes on."""
    model, rows = wrapped(rule=rule, family=family), random_rows([10, 6])
    batch = padded(rows, "left")
    held = CACHES[cache](model.base)
    prefix = {name: values[:, :7] for name, values in batch.items()}
    model.base(**prefix, past_key_values=held, use_cache=True, prompt_lengths=[100, 100])
    for _ in range(2):
        found = generated(model.base, rows, past_key_values=copy.deepcopy(held))
        agree_with_whole_passes(model, rule, rows, found, family)


@torch.no_grad()
def test_guidance_runs_another_prompt_within_generate() -> None:
    model = strong(wrapped())
    prompt, other = random_rows([6, 9])
    ids, negative = torch.tensor([prompt]), torch.tensor([other])
    answer = model.base.generate(
        ids, negative_prompt_ids=negative, guidance_scale=1.7, max_new_tokens=STEPS, do_sample=False
    )
    tokens: list[int] = []
    for _ in range(STEPS):
        scores = [
            whole_pass(model, PUBLISHED, start + tokens, len(start) - 1)[0][-1].float().log_softmax(-1)
            for start in (prompt, other)
        ]
        tokens.append(int((scores[1] + 1.7 * (scores[0] - scores[1])).argmax()))
    assert answer[0, 6:].tolist() == tokens


def own_loop(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
    """A decoding loop as transformers' documentation has it, without a cache."""
    for _ in range(STEPS):
        input_ids = torch.cat((input_ids, model(input_ids).logits[:, -1:].argmax(-1)), dim=1)
    return input_ids


def own_cached_loop(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
    cache, new = DynamicCache(), input_ids
    for _ in range(STEPS):
        new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
        input_ids = torch.cat((input_ids, new), dim=1)
    return input_ids


@pytest.mark.parametrize("loop", [own_loop, own_cached_loop])
@torch.no_grad()
def test_a_loop_given_to_generate_is_edited_at_the_prompt(loop: Callable[..., Tensor]) -> None:
    model, rows = strong(wrapped()), random_rows([7])
    answer = model.base.generate(torch.tensor(rows), custom_generate=loop, max_new_tokens=STEPS)
    assert answer[:, 7:].tolist() == greedy_by_hand(tiny(), "llama", model.state_dict(), rows, STEPS)


@pytest.mark.parametrize("rule", [PUBLISHED, RULES[0], RULES[-1]], ids=SHAPE)
@pytest.mark.parametrize("handed", [False, True], ids=["cache of its own", "cache handed over"])
@torch.no_grad()
def test_a_loop_over_tuples(handed: bool, rule: tuple[str, str, str]) -> None:
    model, rows = wrapped(rule=rule), random_rows([7, 7])
    new, logits = torch.tensor(rows), []
    cache, tokens = DynamicCache() if handed else None, []
    for _ in range(STEPS):
        out = model.base(new, past_key_values=cache, use_cache=True, return_dict=False)
        logits.append(out[0][:, -1])
        new, cache = out[0][:, -1:].argmax(-1), out[1]
        tokens.append(new)
    agree_with_whole_passes(model, rule, rows, (torch.cat(tokens, 1), torch.stack(logits, 1)), "llama")


_RECURRENT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 64, "eos_token_id": None}


@pytest.mark.parametrize("rule", [PUBLISHED, RULES[0], RULES[-1]], ids=SHAPE)
@torch.no_grad()
def test_a_model_that_gives_its_cache_not_back(rule: tuple[str, str, str]) -> None:
    config = RecurrentGemmaConfig(
        **_RECURRENT, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, lru_width=32
    )
    torch.manual_seed(0)
    model, ids = wrapped(RecurrentGemmaForCausalLM(config).eval(), rule), torch.tensor(random_rows([7]))
    _, cached = generated(model, ids.tolist())
    _, whole = generated(model, ids.tolist(), use_cache=False)
    agree(cached, whole)


@torch.no_grad()
def test_a_state_without_a_length_is_refused_and_not_needed() -> None:
    torch.manual_seed(0)
    base = MambaForCausalLM(MambaConfig(**_RECURRENT, state_size=4, pad_token_id=PAD)).eval()
    bare, ids = copy.deepcopy(base), torch.tensor(random_rows([7]))
    model = strong(wrapped(base))
    for call in (lambda: model.generate(ids), lambda: base(ids, cache_params=base(ids, use_cache=True).cache_params)):
        with pytest.raises(ModelError, match="use_cache=False"):
            call()
    found = base.generate(ids, use_cache=False, max_new_tokens=STEPS, do_sample=False)[0].tolist()
    weights, tokens = model.state_dict(), ids[0].tolist()

    def edit(block: int, _: Any, __: Any, hidden: Tensor) -> Tensor:
        return torch.cat((hidden[:, :6], formula(weights, block, hidden[:, 6:7])[0], hidden[:, 7:]), dim=1)

    for block in BLOCKS:
        bare.backbone.layers[block].register_forward_hook(partial(edit, block))
    for _ in range(STEPS):
        tokens.append(int(bare(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert found == tokens


@torch.no_grad()
def test_padding_that_transformers_finds_itself() -> None:
    model = strong(wrapped())
    rows = random_rows([5, 9])
    for side in ("left", "right"):
        batch = padded(rows, side)
        model.base.generate(batch["input_ids"], pad_token_id=PAD, max_new_tokens=1, do_sample=False)
        found = model.last_gates
        model(**batch)
        for block, gates in model.last_gates.items():
            agree(found[block], gates)


@torch.no_grad()
def test_pipelines_and_trainers_call_the_edited_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

    model, rows = strong(wrapped()), random_rows([6, 6])
    words = Tokenizer(models.WordLevel({str(token): token for token in range(64)}, unk_token="63"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="63")
    asked = pipeline("text-generation", model=model.base, tokenizer=tokenizer, device="cpu")
    texts = [" ".join(map(str, row)) for row in rows]
    found = asked(texts, batch_size=2, max_new_tokens=STEPS, do_sample=False, return_full_text=False)
    wanted = greedy_by_hand(tiny(), "llama", model.state_dict(), rows, STEPS)
    assert [list(map(int, one[0]["generated_text"].split())) for one in found] == wanted

    data = [
        {"input_ids": torch.tensor(row), "labels": torch.tensor(row).index_fill(0, torch.arange(3), -100)}
        for row in rows
    ]
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    predicted = Trainer(model=model.base, args=arguments).predict(data)
    for row, logits in zip(rows, torch.as_tensor(predicted.predictions), strict=True):
        agree(logits, whole_pass(model, PUBLISHED, row, 2)[0])


def operations(model: PreTrainedModel) -> list[list[str]]:
    """Names of the operations of each pass of `generate`."""
    starts: list[int] = []
    prepare = model.prepare_inputs_for_generation

    @wraps(prepare)  # generate looks at its signature
    def next_pass(*arguments: Any, **options: Any) -> Any:
        starts.append(len(recorded.names))
        return prepare(*arguments, **options)

    model.__dict__["prepare_inputs_for_generation"] = next_pass
    with Recorded() as recorded, torch.no_grad():
        model.generate(**prompts_of(random_rows([6, 6], seed=1)), max_new_tokens=4, do_sample=False)
    return [recorded.names[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


@pytest.mark.parametrize(("family", "stack"), [("llama", False), ("gpt2", False), ("llama", True)])
def test_a_decode_step_launches_no_operation_of_published_edits(family: str, stack: bool) -> None:
    edited = stacked({str(seed): member(seed) for seed in range(3)}).base if stack else wrapped(family=family).base
    expected, found = operations(tiny(family)), operations(edited)
    assert len(expected) == len(found) == 4
    assert len(found[0]) > len(expected[0]) > 50
    assert found[1:] == expected[1:]


# -- PEFT --------------------------------------------------------------------------------------------------------------


def lora(base: PreTrainedModel) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model.to(torch.float64).eval()


def merged(base: PreTrainedModel) -> PreTrainedModel:
    return lora(base).merge_and_unload()


@torch.no_grad()
def test_edits_within_and_around_peft() -> None:
    rows = random_rows([5, 9])
    inside = strong(wrapped(lora(tiny())))
    outside = strong(wrapped())
    around = lora(outside.base)
    by_hand = greedy_by_hand(merged(tiny()), "llama", inside.state_dict(), rows, STEPS)
    for model, called in (
        (inside, inside), (inside, inside.base), (inside, inside.base.get_base_model()),
        (outside, outside), (outside, around), (outside, outside.base),
    ):  # fmt: skip
        batch = padded(rows, "left")
        output = called(**batch)
        model(**batch)
        gates = model.last_gates
        called.generate(**prompts_of(rows), max_new_tokens=1, do_sample=False)
        for block in gates:
            agree(model.last_gates[block], gates[block])
        found, _ = generated(called, rows)
        assert found.tolist() == by_hand
        assert len(gates) == 2 and output.logits.shape[:2] == (2, 9)
    before = lora(tiny())(**batch).logits
    assert not torch.equal(inside.base(**batch).logits, before)
    assert torch.equal(inside.unwrap()(**batch).logits, before)
    outside.unwrap()
    assert torch.equal(around(**batch).logits, before)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@torch.no_grad()
def test_virtual_tokens_before_the_prompt_move_no_edit(kind: str) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 12}
    rows = random_rows([5, 9])

    def soft(base: PreTrainedModel) -> Any:
        torch.manual_seed(7)
        config = PromptTuningConfig(**options) if kind == "prompt" else PrefixTuningConfig(**options)
        model = get_peft_model(base, config).to(torch.float64).eval()
        for parameter in model.prompt_encoder.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model

    def check(model: GrunModel, called: Any) -> None:
        batch = prompts_of(rows)
        called(**batch)
        gates = model.last_gates
        assert [gate.shape for gate in gates.values()] == [(2, 1)] * 2
        if kind == "prefix":  # virtual tokens of prompt tuning stand in the row itself, before the first label
            called(**batch, labels=batch["input_ids"])
        assert all(torch.equal(gate, gates[block]) for block, gate in model.last_gates.items())
        called.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
        positions = model.last_gates
        for block, gate in gates.items():
            agree(positions[block][1], gate[1])  # of the row without padding, whose positions are the same

    inside = strong(wrapped(soft(tiny())))
    check(inside, inside.base)
    outside = strong(wrapped())
    check(outside, soft(outside.base))
