"""The small Llama that `model.path=tiny` asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grun.config.options import TinyConfig
from grun.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LARGEST = 1_000_000_000
"""Parameters up to which a model is built on the spot."""


def build_tiny(config: TinyConfig, texts: list[str], seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Llama with random weights, a function of `seed`, and a byte-level BPE tokenizer trained on `texts`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from grun.data.tokenizer import train_tokenizer

    if config.hidden_size % config.heads:
        raise ConfigError(
            f"model.tiny.hidden_size={config.hidden_size} must be a multiple of model.tiny.heads={config.heads}"
        )
    if config.hidden_size // config.heads % 2:
        raise ConfigError(
            f"model.tiny.hidden_size={config.hidden_size} must give each of model.tiny.heads={config.heads} an even "
            "width: positions turn pairs of values"
        )
    width, inner = config.hidden_size, config.intermediate_size
    size = width * config.vocabulary + config.blocks * (4 * width**2 + 3 * width * inner)
    if size > LARGEST:
        raise ConfigError(f"model.tiny would have {size:,} parameters, more than {LARGEST:,}; make it smaller")
    tokenizer = train_tokenizer(texts, config.vocabulary)
    tokenizer.model_max_length = config.context
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.blocks,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=config.context,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return model, tokenizer
