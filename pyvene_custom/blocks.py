"""Find the decoder blocks of a model by shape instead of by a table of model types."""

from __future__ import annotations

from typing import Any

from torch import nn


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the dotted path and the stack of decoder blocks of `model`.

    The stack is the module list whose length is the number of layers that the model's config states; among several
    such lists (or where the config states none) the one that holds most parameters.

    Raises:
        ValueError: the model has no list of blocks.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text_config, "num_hidden_layers", None)
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and any(True for _ in module.parameters())
    ]
    of_stated_depth = [(path, stack) for path, stack in stacks if len(stack) == depth]
    candidates = of_stated_depth or stacks
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no torch.nn.ModuleList of decoder blocks to edit")
    return max(candidates, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
