"""The hooks: any decoder, foreign hooks, hidden states, errors, stock calls; compared with hooks written in tiny.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import DEPTH, FAMILIES, OddForCausalLM, blocks_of, formula, padded, plain_hooks, random_rows, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from grun import GrunModel, GrunStack
from grun.errors import ModelError
from pyvene_custom import GatedOutput, IntervenableModel, Sites, find_blocks
from pyvene_custom.model import Pass

BLOCKS = [1, 3]
PROMPTS = [5, 9, 3]
"""Prompt tokens of the rows below: prompt, then four answer tokens; longer than the sliding window of 8."""

# Models normalize in float32 inside, whatever their dtype: two orders of the same sums differ by float32 rounding.
CLOSE: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9}


def wrapped(family: str, **options: Any) -> GrunModel:
    torch.manual_seed(1)
    return GrunModel.wrap(tiny(family), **{"blocks": BLOCKS, "rank": 3, **options}).eval()


def rows_and_lengths() -> tuple[list[list[int]], Tensor]:
    return random_rows([length + 4 for length in PROMPTS]), torch.tensor(PROMPTS)


def real(logits: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits of each row at its attended tokens."""
    return [row[mask != 0] for row, mask in zip(logits, batch["attention_mask"], strict=True)]


def hooks_on(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_wrapped_model_equals_plain_hooks_and_returns_the_gates(family: str) -> None:
    model = wrapped(family)
    rows, lengths = rows_and_lengths()
    batch = padded(rows, "right")
    output = model(**batch, prompt_lengths=lengths)
    twin = tiny(family)
    columns = [[length - 1] for length in PROMPTS]
    with plain_hooks(twin, family, model.state_dict(), columns) as logits:
        expected = twin(**batch).logits
    assert (expected - twin(**batch).logits).abs().max() > 0.01  # the edit does something
    for got, wanted in zip(real(output.logits, batch), real(expected, batch), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)
    assert list(output.gate_logits) == BLOCKS
    for block in BLOCKS:
        wanted = torch.stack([row[0] for row in logits[block]]).unsqueeze(1)
        torch.testing.assert_close(output.gate_logits[block], wanted, **CLOSE)
        torch.testing.assert_close(output.gates[block], torch.sigmoid(output.gate_logits[block]))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit_and_unwrap_restores_everything(family: str) -> None:
    base, batch = tiny(family), padded(random_rows([6, 8]), "left")
    untouched = base(**batch).logits
    base(**batch, output_hidden_states=True)  # transformers puts its own permanent hooks at the first such call
    answer = base.generate(**batch, max_new_tokens=4, do_sample=False)
    base.train()
    dropped = next(module for module in base.modules() if module is not base)
    dropped.eval()
    frozen = next(base.parameters())
    frozen.requires_grad_(False)
    flags = [module.training for module in base.modules()]
    trainable = [parameter.requires_grad for parameter in base.parameters()]
    before, attributes = hooks_on(base), set(base.__dict__)

    model = GrunModel.wrap(base, blocks=BLOCKS).eval()
    assert hooks_on(base) > before
    assert not torch.equal(base(**batch).logits, untouched)
    with model.disabled() as inside:
        assert inside is base
        assert torch.equal(base(**batch).logits, untouched)
        assert torch.equal(base.generate(**batch, max_new_tokens=4, do_sample=False), answer)
        with model.disabled():
            pass
        assert torch.equal(base(**batch).logits, untouched)
        assert model(**batch, prompt_lengths=torch.tensor([1, 1])).gates == {}
    assert not torch.equal(base(**batch).logits, untouched)

    assert model.unwrap() is base
    assert model.unwrap() is base  # a second time does nothing
    assert hooks_on(base) == before
    assert set(base.__dict__) == attributes
    assert base.generate.__func__ is type(base).generate
    assert [module.training for module in base.modules()] == flags
    assert [parameter.requires_grad for parameter in base.parameters()] == trainable
    assert torch.equal(base.eval()(**batch).logits, untouched)
    GrunModel.wrap(base, blocks=[0])  # and can be wrapped again


def test_unwrap_within_disabled_stays_unwrapped() -> None:
    base = tiny()
    model = GrunModel.wrap(base, blocks=[1])
    with model.disabled():
        model.unwrap()
    assert hooks_on(base) == 0


def test_unwrap_gives_back_a_generate_that_the_instance_had() -> None:
    base = tiny()
    own = base.generate
    base.__dict__["generate"] = own
    GrunModel.wrap(base, blocks=[1]).unwrap()
    assert base.__dict__["generate"] is own


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hidden_states_are_the_edited_ones_on_every_call(family: str) -> None:
    model = wrapped(family)
    rows, lengths = rows_and_lengths()
    batch = padded(rows, "left")
    columns = [[batch["input_ids"].shape[1] - 5] for _ in rows]
    twin = tiny(family)
    seen: dict[int, Tensor] = {}
    with plain_hooks(twin, family, model.state_dict(), columns):
        for index, block in enumerate(blocks_of(twin, family)):
            block.register_forward_hook(  # after the editing hook, so it sees the edited output
                lambda _, __, out, index=index: seen.update({index: out[0] if isinstance(out, tuple) else out})
            )
        twin(**batch)
    for call in range(3):
        if call == 2:
            with model.disabled():  # hooks go and come back: still ahead of transformers' own
                plain = model.base(**batch, output_hidden_states=True).hidden_states
                assert len(plain) == DEPTH + 1
        states = model(**batch, prompt_lengths=lengths, output_hidden_states=True).base_output.hidden_states
        assert len(states) == DEPTH + 1
        for block in range(DEPTH - 1):  # the last entry comes after the model's final norm
            for got, wanted in zip(real(states[block + 1], batch), real(seen[block], batch), strict=True):
                torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "odd"])
@torch.no_grad()
def test_foreign_hooks_survive_our_calls_and_stock_calls(family: str) -> None:
    model = wrapped(family)
    base, batch = model.base, padded(random_rows([6, 6]), "left")
    calls = {"forward": 0, "pre": 0}
    block = blocks_of(base, family)[1]
    block.register_forward_hook(lambda *_: calls.update(forward=calls["forward"] + 1))
    base.register_forward_pre_hook(lambda *_: calls.update(pre=calls["pre"] + 1))
    model(**batch)
    base(**batch)
    stock = model.intervenable
    stock.forward(base=batch, unit_locations={"base": 5})
    stock.generate(base=batch, unit_locations={"base": 5}, intervene_on_prompt=True, max_new_tokens=1)
    model(**batch, output_hidden_states=True)
    with model.disabled():
        base(**batch)
    model.unwrap()
    base(**batch)
    assert calls == {"forward": 7, "pre": 7}


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["block_hook", "block_pre_hook", "model_pre_hook", "model_hook", "edit"])
@pytest.mark.parametrize("call", ["model", "generate", "stock_forward", "stock_generate"])
@torch.no_grad()
def test_an_exception_leaves_nothing_behind(stage: str, call: str) -> None:
    model = wrapped("llama")
    base, batch = model.base, padded(random_rows([6, 6]), "left")
    longer = padded(random_rows([9, 9]), "left")
    with model.disabled():
        untouched = base(**batch).logits
    edited, longer_edited = base(**batch).logits, base(**longer).logits
    decoder_alone = base.model(**batch).last_hidden_state
    before = hooks_on(base)

    def fail(*_: Any) -> None:
        raise Stop

    block = blocks_of(base, "llama")[2]
    handle = {
        "block_hook": lambda: block.register_forward_hook(fail),
        "block_pre_hook": lambda: block.register_forward_pre_hook(fail),
        "model_pre_hook": lambda: base.register_forward_pre_hook(fail),
        "model_hook": lambda: base.register_forward_hook(fail),
        "edit": lambda: model.edits["3"].edit.register_forward_hook(fail),
    }[stage]()
    calls = {
        "model": lambda: model(**batch),
        "generate": lambda: base.generate(**batch, max_new_tokens=2),
        "stock_forward": lambda: model.intervenable.forward(base=batch, unit_locations={"base": 5}),
        "stock_generate": lambda: model.intervenable.generate(
            base=batch, unit_locations={"base": 5}, intervene_on_prompt=True, max_new_tokens=2
        ),
    }
    with pytest.raises(Stop):
        calls[call]()
    handle.remove()
    assert hooks_on(base) == before
    assert torch.equal(base.model(**batch).last_hidden_state, decoder_alone)  # no sites of the failed pass are left
    assert torch.equal(base(**longer).logits, longer_edited)  # nor the prompt of the failed call
    assert torch.equal(base(**batch).logits, edited)
    with model.disabled():
        assert torch.equal(base(**batch).logits, untouched)


@pytest.mark.parametrize("family", ["llama", "odd"])
@torch.no_grad()
def test_stock_calls_edit_at_unit_locations_and_report_gates(family: str) -> None:
    model = wrapped(family)
    batch = padded(random_rows([8, 8]), "left")
    stock = model.intervenable
    columns = [[2, 5], [7, 0]]  # two positions in each row
    twin = tiny(family)
    with plain_hooks(twin, family, model.state_dict(), columns) as logits:
        expected = twin(**batch).logits
    stock.forward(base=batch, unit_locations={"base": 3})  # under stock pyvene, one location for all rows sticks
    original, edited = stock.forward(base=batch, unit_locations={"sources->base": (None, [columns, columns])})
    assert original is None  # the un-edited pass runs only when asked
    torch.testing.assert_close(edited.logits, expected, **CLOSE)
    for block in BLOCKS:
        wanted = torch.stack([torch.stack(row) for row in logits[block]])
        torch.testing.assert_close(stock.gates[block], wanted, **CLOSE)
    assert stock.full_intervention_outputs == []
    original, _ = stock.forward(base=batch, unit_locations={"base": 3}, output_original_output=True)
    assert torch.equal(original.logits, twin(**batch).logits)

    location = {"base": batch["input_ids"].shape[1] - 1}
    for _ in range(2):
        _, answer = stock.generate(
            base=batch, unit_locations=location, intervene_on_prompt=True, max_new_tokens=5, do_sample=False
        )
        assert torch.equal(answer, model.generate(**batch, max_new_tokens=5, do_sample=False))
        assert stock.full_intervention_outputs == []


def test_blocks_are_found_by_shape() -> None:
    for family in FAMILIES:
        model = tiny(family)
        assert find_blocks(model)[1] is blocks_of(model, family)
    model = tiny("odd", num_hidden_layers=2)
    assert isinstance(model, OddForCausalLM)
    assert find_blocks(model)[0] == "machine.stages.rows"
    with pytest.raises(ValueError, match="ModuleList"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\[4\].*0\.\.3"):
        IntervenableModel({4: nn.Identity()}, tiny())


TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN = {"embed_dim": 64, "hidden_size": 32, "num_heads": 4}
SOUND = {"d_model": 64, "encoder_attention_heads": 4, "encoder_ffn_dim": 256}
WITH_TOWERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "Gemma3": lambda depth: {
        "text_config": TEXT,
        "vision_config": {**VISION, "num_hidden_layers": depth},
        "mm_tokens_per_image": 4,
    },
    "Llava": lambda depth: {
        "text_config": transformers.LlamaConfig(**TEXT),
        "vision_config": transformers.CLIPVisionConfig(**VISION, num_hidden_layers=depth),
    },
    "Qwen2VL": lambda depth: {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {**QWEN, "depth": depth},
    },
    "Qwen2Audio": lambda depth: {
        "text_config": transformers.Qwen2Config(**TEXT),
        "audio_config": {**SOUND, "encoder_layers": depth},
    },
    "Idefics3": lambda depth: {
        "text_config": transformers.LlamaConfig(**TEXT),
        "vision_config": {**VISION, "num_hidden_layers": depth},
        "scale_factor": 2,
    },
}


def conditional_generation(kind: str, **config: Any) -> PreTrainedModel:
    made = getattr(transformers, f"{kind}Config")(**config)
    model: PreTrainedModel = getattr(transformers, f"{kind}ForConditionalGeneration")(made)
    return model.eval()


@pytest.mark.parametrize("depth", [2, 5])
@pytest.mark.parametrize("kind", WITH_TOWERS)
def test_the_text_decoder_is_edited_where_a_tower_is_as_deep_or_deeper_and_wider(kind: str, depth: int) -> None:
    base = conditional_generation(kind, **WITH_TOWERS[kind](depth))
    path = f"model.{'text_model' if kind == 'Idefics3' else 'language_model'}.layers"
    assert find_blocks(base) == (path, base.get_submodule(path))
    assert sum(p.numel() for p in base.parameters()) > 2 * sum(p.numel() for p in base.get_submodule(path).parameters())
    of_tower = next(base.parameters())
    of_tower.data = of_tower.data.double()  # says nothing about the text part
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    untouched = base(**batch).logits
    model = GrunModel.wrap(base, blocks=[0, -1], rank=2).eval()
    assert model.config.hidden_size == 32 and model.config.depth == 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    output = model(**batch)
    assert list(output.gates) == [0, 1]
    torch.testing.assert_close(output.logits[:, :2], untouched[:, :2])
    assert (output.logits[:, 2] - untouched[:, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_what_reads_prompts_with_an_encoder_is_refused_in_one_line(kind: str) -> None:
    small = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.device("meta"):
        base = conditional_generation(kind, **small)
    with pytest.raises(ModelError, match="reads prompts with an encoder; edits need a decoder-only language model"):
        GrunModel.wrap(base, blocks=[0])
    with pytest.raises(ModelError, match="reads prompts with an encoder"):
        GrunStack(base)


class Recorder(nn.Module):
    """An intervention that notes what it gets."""

    is_source_constant = True
    keep_last_dim = True

    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[tuple[int, ...], tuple[int, ...], Tensor | None]] = []

    def forward(self, written: Tensor, *_: Any, read: Tensor, sites: Sites, carry: Tensor | None) -> GatedOutput:
        self.got.append((tuple(written.shape), tuple(read.shape), carry))
        return GatedOutput(output=None, gate=read[..., 0], carry=read[..., 0])


@torch.no_grad()
def test_reading_and_writing_are_separate_and_state_is_carried_by_whoever_owns_the_sites() -> None:
    base = tiny()
    untouched = base(torch.tensor([[3, 4, 5, 6]])).logits
    recorder = Recorder()
    carried: dict[str, Tensor] = {}
    model = IntervenableModel({2: recorder}, base)

    def locate(args: Any, kwargs: Any) -> tuple[Sites, dict[str, Any]]:
        read, write = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[3]])
        return Sites(read, torch.ones_like(read).bool(), write, torch.ones_like(write).bool(), carried), kwargs

    def finished(_: Any, running: Pass) -> None:
        carried.update({key: values[:, -1:] for key, values in running.kept.items()})

    model.attach(locate, finished)
    for _ in range(2):
        output = base(torch.tensor([[3, 4, 5, 6]]))
        assert torch.equal(output.logits, untouched)  # output=None leaves the block's output as it is
    model.detach()
    base(torch.tensor([[3, 4, 5, 6]]))
    assert [got[:2] for got in recorder.got] == [((1, 1, 32), (1, 4, 32))] * 2
    first, second = (got[2] for got in recorder.got)
    assert first is None and torch.equal(second, model.gates[2][:, -1:])
    assert model.gate_mask is not None and model.gate_mask.shape == (1, 4)
    assert hooks_on(base) == 0


def test_train_and_eval_reach_the_interventions() -> None:
    model = wrapped("llama", dropout=0.5)
    model.intervenable.train()
    assert all(edit.training for edit in model.edits.values())
    model.intervenable.eval()
    assert not any(module.training for module in model.intervenable.modules())


def test_the_formula_of_these_tests_is_the_published_one() -> None:
    """Guards the reference itself: with R = e_0 and an open gate, entry 0 becomes Wh + b and nothing else moves."""
    width = 4
    weights = {
        "edits.0.edit.rotation": torch.eye(width, 1).double() * 3,
        "edits.0.edit.source.weight": torch.full((1, width), 2.0).double(),
        "edits.0.edit.source.bias": torch.tensor([1.0]).double(),
        "edits.0.gate.0.weight": torch.zeros(1, width).double(),
        "edits.0.gate.0.bias": torch.tensor([40.0]).double(),
    }
    edited, logit = formula(weights, 0, torch.arange(4.0).double())
    torch.testing.assert_close(edited, torch.tensor([13.0, 1.0, 2.0, 3.0]).double())
    assert logit.item() == 40
