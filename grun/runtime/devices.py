"""Devices of a model that accelerate may have spread over several, and what their kernels do to its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grun.errors import ConfigError, ModelError
from grun.runtime import processes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def pick_device(name: str) -> torch.device:
    """Device for `auto`, `cpu`, `cuda` or `mps`; ConfigError if it is not there. Each process has a GPU of its own."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.count() > 1 and torch.cuda.is_available():
        return torch.device("cuda", processes.local_rank())
    known = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not known.get(name, False):
        available = ", ".join(device for device, there in known.items() if there)
        raise ConfigError(f"model.device={name} is not available here; available: auto, {available}")
    return torch.device(name)


def launches(device: torch.device) -> bool:
    """Whether each operator costs a launch on `device`, so that few large ones are better than little padding."""
    return device.type != "cpu"


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


def lies_elsewhere(module: nn.Module) -> bool:
    """Whether the weights of a module lie in files, or on another device, until it is run (accelerate's hooks)."""
    weight = next(module.parameters(), None)
    return weight is not None and weight.is_meta and hasattr(module, "_hf_hook")


@contextlib.contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Within the block the weights of `module` are where it computes; what was there already stays."""
    if not lies_elsewhere(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name, of those that lie elsewhere their values, one at a time."""
    stored: dict[str, Any] = {}
    for path, module in model.named_modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            stored |= {f"{path}.{name}": (weights, name) for name, _ in module.named_parameters()}
    for name, parameter in model.named_parameters():
        weights, key = stored.get(name, (None, name))
        yield name, weights[key] if parameter.is_meta and weights is not None else parameter


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
