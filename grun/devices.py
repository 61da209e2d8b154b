"""Devices of a model that accelerate may have spread over several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, which for weights kept elsewhere until they are needed is not where these are."""
    import torch

    hook: Any = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return next(module.parameters()).device if execution is None else torch.device(execution)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: to the embedding."""
    if getattr(model, "hf_device_map", None) is None:
        found: torch.device = model.device
        return found
    return device_of(model.get_input_embeddings())
