"""A tiny chat model as a GGUF file, and the folder of the same model as a hub would hold it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from chat_model import TOKENIZER, save_chat_model
from gguf.quants import quantize
from transformers import AutoModelForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""transformers' names of a Llama's weights, and llama.cpp's."""


TOKENS = 1000
"""Of the real tokenizer's vocabulary, which GGUF readers take seconds to read whole."""


def save_twin(folder: Path) -> Path:
    """A tiny Llama with the beginning of a real tokenizer, as a hub would hold it."""
    return save_chat_model(folder, blocks=2, tokens=TOKENS)


def write_gguf(path: Path, twin: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """A Llama with its tokenizer as llama.cpp's converter writes it."""
    model = AutoModelForCausalLM.from_pretrained(twin)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((twin / "tokenizer.json").read_text(encoding="utf-8"))
    control = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    types = [
        gguf.TokenType.CONTROL if number in control else gguf.TokenType.NORMAL for number in range(len(vocabulary))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    for add, number in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2)):
        add(number)
    writer.add_chat_template((TOKENIZER / "chat_template.jinja").read_text(encoding="utf-8"))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.named_parameters():
        *_, block, rest = name.removesuffix(".weight").split(".", 3) if ".layers." in name else ("", "", name)
        ours = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}.get(rest) or NAMES[rest]
        values = tensor.detach().float().numpy()
        if ours in heads:  # llama.cpp rotates neighbors
            values = values.reshape(heads[ours], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        packed = values.ndim == 2 and values.shape[1] % 32 == 0 and kind != gguf.GGMLQuantizationType.F32
        full = f"blk.{block}.{ours}.weight" if block else f"{ours}.weight"
        values = np.ascontiguousarray(values)
        writer.add_tensor(full, quantize(values, kind) if packed else values, raw_dtype=kind if packed else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
