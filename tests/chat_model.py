"""A tiny random Llama with the tokenizer and chat template of a real chat model, as a folder to load from."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = Path(__file__).parent / "data" / "smollm2"
"""Files of SmolLM2-135M-Instruct, see the README there."""


def save_chat_model(folder: Path, blocks: int = 3, seed: int = 0) -> Path:
    """Write the model to `folder`, as a hub would hold it: nothing of GRUN's beside it."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
