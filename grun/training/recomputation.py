"""Gradient checkpointing: a block keeps its input alone and runs again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let decoder blocks forget what they computed inside until the backward pass asks for it.

    Mutates them: the `forward` of each block is wrapped, and stays so. Hooks on a block, such as a gated edit, are
    no part of its `forward`: they run once, and nothing of them is repeated. transformers' own switch
    (`gradient_checkpointing_enable`) is not used, because it does nothing in evaluation mode, in which a frozen base
    is kept. Passes without gradients, and passes that fill a cache, are as before.
    """
    for block in blocks:
        forward: Callable[..., Any] = block.forward
        block.__dict__["forward"] = functools.wraps(forward)(functools.partial(_run, forward))


def _run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
