"""Base models and tokenizers: from a hub id, a folder, or made on the spot."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from grun.config import ModelConfig, TinyConfig
from grun.data import templates
from grun.data.templates import Template
from grun.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TINY = "tiny"
"""Value of `model.path` that asks for the small Llama."""


def load_base(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Template | None]:
    """Model in evaluation mode on its device, tokenizer with a pad token, and the template stored beside the weights.

    Raises:
        ConfigError: no model is named, or an option is unknown.
        ModelError: the model or its tokenizer cannot be loaded or used.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if config.path is None or config.path == TINY:
        raise ConfigError(
            "model.path names no taught model; give a hub id, or a folder such as the one `python -m grun finetune` "
            "prints"
        )
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    path = Path(config.path).expanduser()
    if looks_local and not path.is_dir():
        raise ModelError(f"model.path={config.path}: no such folder")
    source = str(path) if path.is_dir() else config.path
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            **({"attn_implementation": config.attention} if config.attention else {}),
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {config.path!r} cannot be loaded: {text}") from error
    ensure_pad_token(tokenizer)
    return place(model, config.device).eval(), tokenizer, templates.load(path) if path.is_dir() else None


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the end-of-text token pad where there is no pad token; padding is always masked, so any token will do."""
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has neither a pad nor an end-of-text token; set one and save it again")
    tokenizer.pad_token = tokenizer.eos_token
    log.info("the tokenizer has no pad token; %s is used, masked", tokenizer.eos_token)


def pick_device(name: str) -> torch.device:
    """Device for `auto`, `cpu`, `cuda` or `mps`; ConfigError if it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not known.get(name, False):
        available = ", ".join(device for device, there in known.items() if there)
        raise ConfigError(f"model.device={name} is not available here; available: auto, {available}")
    return torch.device(name)


def place(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """`model` on the device that the option names."""
    torch_module: torch.nn.Module = model
    torch_module.to(pick_device(device))
    return model


def build_tiny(config: TinyConfig, texts: list[str], seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Llama with random weights, a function of `seed`, and a byte-level BPE tokenizer trained on `texts`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from grun.data.tokenizer import train_tokenizer

    if config.hidden_size % config.heads:
        raise ConfigError(
            f"model.tiny.hidden_size={config.hidden_size} must be a multiple of model.tiny.heads={config.heads}"
        )
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


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence the model takes, tokens."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**30)
