"""What an attacker changes who has the weights: the adapter, a new LoRA or all of them; and how it is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

Part = Literal["adapter", "lora", "all"]
"""What trains: the model's own adapter (GRUN, ReFT, LoRA), a new LoRA beside it, or every weight."""
LR_TIMES_WIDTH = 0.025
"""Learning rate of whole models times their hidden size: AdamW's best rate falls as the width grows (Yang et al. 2022,
arXiv 2203.03466). 6e-6 at 4096; at twice that, 50 steps spoil a quarter of what the demo's model knew."""
ADAPTER_LR = 4e-3
"""Learning rate of GRUN's adapters, in the range they are trained with at any width."""
RANK = 8
"""Of the new LoRA."""
LORA_TIMES = 10
"""Learning rate of a LoRA, as a multiple of that of whole models."""


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


@contextlib.contextmanager
def put_back(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block `weights` may change in place; after it they are as before, bit for bit, without gradients.

    What they were is kept in the main memory.
    """
    import torch

    kept = [(weight, weight.detach().to("cpu", copy=True)) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)
                weight.grad = None


def untrainable(model: Any, part: Part) -> str | None:
    """Why a part of a model cannot train, as "needs ..."; None: it can."""
    import torch

    from grun.evaluation.scoring import base_of
    from grun.method.actions import EDIT
    from grun.method.host import is_quantized
    from grun.method.model import GrunModel
    from grun.method.stack.stack import GrunStack

    if isinstance(model, GrunStack):
        return "needs weights that train, and those of a store of requests do not; name one request's adapter"
    if part == "adapter" and isinstance(model, GrunModel):
        action = model.config.action
        return None if action == EDIT else f"needs an edit that trains, and the action {action} has none"
    if part == "adapter" and not adapter_weights(model):
        return "needs an adapter that trains"
    if part != "adapter" and is_quantized(base_of(model)):
        return "needs weights that train, and those of a quantized base do not"
    if base_of(model).dtype == torch.float16:  # steps of AdamW are lost in it, or infinite
        return "needs weights that train, which float16 is too narrow for (model.dtype=bfloat16)"
    return None


def adapter_weights(model: Any) -> list[nn.Parameter]:
    """Those of GRUN's or ReFT's edits, or of PEFT's adapter layers; none of a model without an adapter."""
    from grun.method.model import GrunModel

    if isinstance(model, GrunModel):
        return list(model.parameters())
    own = {id(weight) for weight in own_weights(model)}
    return [weight for weight in model.parameters() if weight.is_floating_point() and id(weight) not in own]


@contextlib.contextmanager
def training(model: Any, part: Part, seed: int) -> Iterator[tuple[list[nn.Parameter], float]]:
    """The weights of a part, and its learning rate; after the block the model is as before, bit for bit.

    `seed` is of a new LoRA.
    """
    from grun.evaluation.scoring import base_of
    from grun.method.host import hidden_size_of
    from grun.method.model import GrunModel

    base, edits = base_of(model), isinstance(model, GrunModel)
    lr = LR_TIMES_WIDTH / hidden_size_of(base)
    if part == "lora":
        with frozen(model), low_rank(base, seed) as weights:
            yield weights, lr * LORA_TIMES
        return
    weights = adapter_weights(model) if part == "adapter" or edits else []
    if part == "adapter":
        lr = ADAPTER_LR if edits else lr * LORA_TIMES
    else:
        weights = [*own_weights(base), *weights]
    with frozen(model), put_back(weights):
        yield weights, lr


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Within the block no weight of a model, or of its base, asks for a gradient until it is told to."""
    from grun.evaluation.scoring import base_of

    flags = [(weight, weight.requires_grad) for one in (base_of(model), model) for weight in one.parameters()]
    try:
        for weight, _ in flags:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, trainable in flags:
            weight.requires_grad_(trainable)


@contextlib.contextmanager
def low_rank(base: Any, seed: int) -> Iterator[list[nn.Parameter]]:
    """Within the block every linear layer of the blocks has B A added to its weight, of rank `RANK`; all B and A.

    B begins at zero, A is normal with the variance 1 / its columns; both are float32 at least. The layer's own weight
    stays.

    Source: Hu et al. 2021, arXiv 2106.09685; here alpha is the rank, so the scale is 1.
    """
    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    class Added(nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            dtype, (rows, columns) = torch.promote_types(weight.dtype, torch.float32), weight.shape
            drawn = torch.randn(RANK, columns, generator=generator) / columns**0.5
            self.a = nn.Parameter(drawn.to(weight.device, dtype))
            self.b = nn.Parameter(torch.zeros(rows, RANK, device=weight.device, dtype=dtype))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + (self.b @ self.a).to(weight.dtype)

    generator = torch.Generator().manual_seed(seed)
    layers = linear_layers(base)
    orders = [list(layer._parameters) for layer in layers]
    added = []
    try:
        for layer in layers:
            added.append(Added(layer.weight))
            parametrize.register_parametrization(layer, "weight", added[-1])
        yield [weight for one in added for weight in (one.a, one.b)]
    finally:
        for layer, names in zip(layers, orders, strict=True):
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            for name in names:  # the order in which they stand
                layer._parameters[name] = layer._parameters.pop(name)


def linear_layers(base: Any) -> list[Any]:
    """Linear layers of the decoder blocks, without those of an adapter; transformers' Conv1D (GPT-2) among them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from grun.evaluation.reading import blocks_of

    own = {id(weight) for weight in own_weights(base)}
    modules: Iterator[nn.Module] = blocks_of(base).modules()
    return [module for module in modules if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in own]
