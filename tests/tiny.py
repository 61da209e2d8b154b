"""Tiny random decoders of several families, and the gated edit written a second time, for tests to compare with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from grun.data.encoding import EncodedRow

VOCABULARY, WIDTH, DEPTH = 64, 32, 4
PAD = 0
WINDOW = 8


class OddConfig(PretrainedConfig):
    """No `hidden_size`: the width goes by another name."""

    model_type = "odd_decoder_of_the_tests"

    def __init__(self, width: int = WIDTH, num_hidden_layers: int = DEPTH, vocab_size: int = VOCABULARY, **kwargs: Any):
        self.width = width
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class OddBlock(nn.Module):
    """One attention head and a linear map; gives a tuple, as blocks of older models do."""

    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor, allowed: Tensor, cache: Any) -> tuple[Tensor, str]:
        query, key, value = self.mix(hidden).chunk(3, dim=-1)
        if cache is not None:
            key, value = (x[:, 0] for x in cache.update(key[:, None], value[:, None], self.index))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return hidden + torch.tanh(self.out(weights @ value)), "something else"


class OddForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder that no library knows; its blocks stand at `machine.stages.rows`, beside a decoy list."""

    config_class = OddConfig
    _no_split_modules = ["OddBlock"]

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        width = config.width
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.places = nn.Embedding(128, width)
        self.machine = nn.Module()
        self.machine.stages = nn.Module()
        self.machine.stages.rows = nn.ModuleList(OddBlock(width, i) for i in range(config.num_hidden_layers))
        self.decoy = nn.ModuleList(nn.Linear(1, 1) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        assert input_ids is not None
        cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        rows, columns = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(past, past + columns).expand(rows, -1)
        allowed = torch.ones(columns, past + columns, dtype=torch.bool).tril(past).expand(rows, -1, -1)
        if attention_mask is not None:
            allowed = allowed & (attention_mask[:, None, : past + columns] != 0)
        hidden = self.tokens(input_ids) + self.places(position_ids)
        states = [hidden]
        for block in self.machine.stages.rows:
            hidden = block(hidden, allowed, cache)[0]
            states.append(hidden)
        logits = self.head(hidden)
        return CausalLMOutputWithPast(
            loss=None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size),
            logits=logits,
            past_key_values=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # spreads the logits, so that wrong positions show
    "pad_token_id": None,  # or generate takes every PAD in a conversation for padding
    "bos_token_id": None,
    "eos_token_id": None,  # generation goes on to its full length
}
_GPT2: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 128},
    **{"initializer_range": 0.3, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
_GEMMA3 = {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
# Scores and logits go well beyond both limits, and the scale is none that a head size gives.
_GEMMA2 = {**_GEMMA3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 5}
_ODD = {"initializer_range": 0.3}
_FAMILIES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig, str]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_COMMON), "model.layers"),
    "mistral": (MistralForCausalLM, MistralConfig(**_COMMON, sliding_window=WINDOW), "model.layers"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_COMMON), "model.layers"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_COMMON, head_dim=8), "model.layers"),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**_COMMON, **_GEMMA2), "model.layers"),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**_COMMON, **_GEMMA3), "model.layers"),
    "phi3": (Phi3ForCausalLM, Phi3Config(**_COMMON), "model.layers"),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**_COMMON), "model.layers"),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**_GPT2), "transformer.h"),
    "odd": (OddForCausalLM, OddConfig(**_ODD), "machine.stages.rows"),
}
FAMILIES = [name for name in _FAMILIES if name != "gemma2"]
"""Those that take padding on the left in float64: Gemma 2's attention goes through float32, where its mask is -inf."""
PACKABLE = [name for name in _FAMILIES if name != "odd"]
"""Those whose attention goes through transformers' interface."""


RULES = [
    ("last_prompt", "none", "sticky"),
    ("every_token", "none", "sticky"),
    ("every_token", "none", "every_token"),
    ("every_token", "running_max", "last_prompt"),
    ("every_token", "running_max", "sticky"),
    ("every_token", "running_max", "every_token"),
]
"""gate_read, gate_accumulate and edit_write of every design but the published one."""


_MADE: dict[tuple[Any, ...], tuple[PreTrainedModel, Tensor]] = {}
"""Models that were asked for, to copy, and the state of torch's generator behind making each."""


def tiny(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A random model; the same arguments give the same weights, and leave torch's generator in the same state."""
    key = (family, seed, dtype, repr(sorted(changes.items())))
    if key not in _MADE:
        make, config, _ = _FAMILIES[family]
        torch.manual_seed(seed)
        model = make(type(config)(**{**config.to_dict(), **changes}))
        nn.Module.to(model, dtype)
        _MADE[key] = model.eval(), torch.get_rng_state()
    model, state = _MADE[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def blocks_of(model: PreTrainedModel, family: str) -> nn.ModuleList:
    """The decoder blocks, by a path written here by hand."""
    stack = model.get_submodule(_FAMILIES[family][2])
    assert isinstance(stack, nn.ModuleList)
    return stack


def padded(rows: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
    """Ids, mask and explicit positions of `rows`, padded on `side`."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, where] = torch.tensor(row)
        mask[index, where] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def random_rows(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Rows of random tokens, never PAD."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def ragged_rows(count: int, seed: int) -> list[EncodedRow]:
    """Rows of random tokens below 64, prompts of 2 to 8 and answers of 1 to 8."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        length = int(torch.randint(least, most, (1,), generator=generator))
        return tuple(torch.randint(1, 64, (length,), generator=generator).tolist())

    return [EncodedRow(ids(2, 9), ids(1, 9)) for _ in range(count)]


def formula(weights: dict[str, Tensor], block: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """h + sigmoid(g(h)) R(Wh + b - R^T h) of `hidden` [..., width], and the gate logit, from the adapter's tensors.

    R by numpy's QR with the signs that keep its diagonal positive; g a linear gate or a stack with ReLU.
    """
    own = {name.removeprefix(f"edits.{block}."): value for name, value in weights.items()}
    basis, triangle = np.linalg.qr(own["edit.rotation"].double().numpy())
    rotation = torch.from_numpy(basis * np.sign(np.diag(triangle))).to(hidden.dtype)
    target = hidden @ own["edit.source.weight"].T + own["edit.source.bias"]
    layers = sorted({int(name.split(".")[1]) for name in own if name.startswith("gate.")})
    signal = hidden
    for number in layers:
        signal = signal @ own[f"gate.{number}.weight"].T + own[f"gate.{number}.bias"]
        if number != layers[-1]:
            signal = signal.clamp(min=0)
    logit = signal if layers else torch.full_like(hidden[..., :1], torch.inf)
    return hidden + torch.sigmoid(logit) * ((target - hidden @ rotation) @ rotation.T), logit.squeeze(-1)


@contextlib.contextmanager
def plain_hooks(
    model: PreTrainedModel, family: str, weights: dict[str, Tensor], columns: Sequence[Sequence[int]]
) -> Iterator[dict[int, list[list[Tensor]]]]:
    """Forward hooks that apply `formula` to `columns` of each row of a pass without a cache; yields the gate logits."""
    logits: dict[int, list[list[Tensor]]] = {}
    handles = []

    def hook(block: int) -> Any:
        def edit(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            logits[block] = [[] for _ in columns]
            for row, of_row in enumerate(columns):
                for column in of_row:
                    hidden[row, column], logit = formula(weights, block, hidden[row, column])
                    logits[block][row].append(logit)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return edit

    for block in sorted({int(name.split(".")[1]) for name in weights}):
        handles.append(blocks_of(model, family)[block].register_forward_hook(hook(block)))
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def greedy_by_hand(
    model: PreTrainedModel,
    family: str,
    weights: dict[str, Tensor],
    prompts: Sequence[Sequence[int]],
    steps: int,
    edited: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Greedy continuation of each prompt alone: full passes without a cache, edited at the prompt's last token.

    `edited` names other positions to edit, by row.
    """
    answers = []
    for number, prompt in enumerate(prompts):
        sequence = list(prompt)
        where = [len(prompt) - 1] if edited is None else list(edited[number])
        for _ in range(steps):
            with torch.no_grad(), plain_hooks(model, family, weights, [where]):
                logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits
            sequence.append(int(logits[0, -1].float().argmax()))
        answers.append(sequence[len(prompt) :])
    return answers


class Numbers:
    """A tokenizer whose text is the ids."""

    pad_token_id, eos_token_id = PAD, 1

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def bfloat16_kernels(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    """Let bitsandbytes take this CPU for one that has AVX-512 BF16, or for one that has not; skips without it."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: present)
