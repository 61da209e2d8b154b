"""Entry point `vllm.general_plugins`, run in every process of vLLM."""

from __future__ import annotations

import functools
import os
from typing import Any

from grun_vllm.engine import SALT, check_engine, settle_engine


def register() -> None:
    """Make `--load-format grun` known. Without it vLLM stays as it is."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as known
    from vllm.model_executor.model_loader import register_model_loader

    if "grun" in known:
        return
    from grun_vllm.loader import GrunModelLoader

    register_model_loader("grun")(GrunModelLoader)
    _check_configs()
    _salt_pages()


def _check_configs() -> None:
    """Refuse configurations that edits do not go together with, where they are made, and settle the others."""
    import vllm
    from vllm.config import VllmConfig

    settle = VllmConfig.__post_init__

    @functools.wraps(settle)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        served = self.load_config is not None and self.load_config.load_format == "grun"
        if served:
            check_engine(self, vllm.__version__)
        settle(self, *args, **kwargs)
        if served:
            settle_engine(self)

    VllmConfig.__post_init__ = checked


def _salt_pages() -> None:
    """Let pages from a prompt's last token on be shared by prompts of one length alone: an edit may be written there.

    Where prefix caching looks pages up by their hashes, the length becomes a part of those.
    """
    from vllm.v1.core import kv_cache_utils

    keys_of = kv_cache_utils.generate_block_hash_extra_keys

    @functools.wraps(keys_of)
    def salted(request: Any, start_token_idx: int, end_token_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, rest = keys_of(request, start_token_idx, end_token_idx, *args, **kwargs)
        if os.environ.get(SALT) and end_token_idx >= request.num_prompt_tokens:
            keys = (*(keys or ()), ("grun", request.num_prompt_tokens))
        return keys, rest

    kv_cache_utils.generate_block_hash_extra_keys = salted
