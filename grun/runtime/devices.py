"""Devices of a model that accelerate may have spread over several, and what their kernels do to its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grun.errors import ModelError

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


def keep_unpacked(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers compute from the weights as they were loaded, on every CPU and at any width.

    Where a CPU has AVX-512 BF16, such a layer would repack its weights at its first pass without gradients: for widths
    that are multiples of 32 alone, and with kernels that give no gradient to what lies before the layer and no weights
    that can be saved.

    Raises:
        ModelError: some weights are repacked already.
    """
    for name, layer in model.named_modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ModelError(
                f"the 4-bit weights of {name} were repacked for this CPU when the model was run, and no gradient goes "
                "through them any more; load the model anew and hand it over before its first pass"
            )
        layer.support_avx512bf16_for_cpu = False
