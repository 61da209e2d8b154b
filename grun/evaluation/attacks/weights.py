"""The weights of a loaded model: whose they are, and how they are put back after an attack has changed them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from grun.evaluation.generation import base_of

if TYPE_CHECKING:
    from torch import nn


def peft_layers(model: nn.Module) -> list[Any]:
    """Layers in which PEFT put an adapter, and modules that it replaced by trained copies; none in other models."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def own_weights(model: nn.Module) -> list[nn.Parameter]:
    """Floating-point weights without those of PEFT's adapter layers, but with modules that PEFT trained as a whole."""
    from torch import nn

    added: set[int] = set()
    for layer in peft_layers(model):
        for name in getattr(layer, "adapter_layer_names", ()):
            part = getattr(layer, name, None)
            if isinstance(part, nn.Module):
                added.update(id(parameter) for parameter in part.parameters())
    return [weight for weight in model.parameters() if weight.is_floating_point() and id(weight) not in added]


def is_quantized(model: Any) -> bool:
    """Whether the base was loaded in 8 or 4 bits."""
    return getattr(base_of(model), "quantization_method", None) is not None


@contextlib.contextmanager
def put_back(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block `weights` may change in place; after it they are as before, bit for bit, without gradients.

    What they were is kept in the main memory.
    """
    import torch

    kept = [(weight, weight.detach().to("cpu", copy=True), weight.requires_grad) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value, trainable in kept:
                weight.copy_(value)
                weight.requires_grad_(trainable)
                weight.grad = None
