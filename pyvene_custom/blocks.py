"""Find the decoder blocks of a model by shape instead of by a table of model types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the dotted path and the stack of decoder blocks of `model`.

    The stack is the module list whose length is the number of layers that the config states; among several such lists
    (or where the config states none) the one that holds most parameters. It lies in the text decoder, where `model` has
    parts for images or sound too.

    Raises:
        ValueError: the model has no list of blocks, or an encoder reads its prompts.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} reads prompts with an encoder; edits need a decoder-only language model"
        )
    found: list[tuple[str, nn.ModuleList]] = []
    for part in _text_parts(model):
        inside = {id(module) for module in part.modules()}
        stacks = [
            (path, module)
            for path, module in model.named_modules()
            if id(module) in inside
            and isinstance(module, nn.ModuleList)
            and next(module.parameters(), None) is not None
        ]
        depth = getattr(text_config(part) or text_config(model), "num_hidden_layers", None)
        if of_stated_depth := [(path, stack) for path, stack in stacks if len(stack) == depth]:
            return _largest(of_stated_depth)
        found = found or stacks
    if found:
        return _largest(found)
    raise ValueError(f"{type(model).__name__} has no torch.nn.ModuleList of decoder blocks to edit")


def text_config(model: nn.Module) -> Any:
    """Config of the part of `model` that continues text; None where it has none."""
    for part in _text_parts(model):
        config: Any = getattr(part, "config", None)
        if config is not None:
            return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return None


def _largest(stacks: list[tuple[str, nn.ModuleList]]) -> tuple[str, nn.ModuleList]:
    return max(stacks, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def _text_parts(model: nn.Module) -> Iterator[nn.Module]:
    """What transformers holds for the text decoder, where that is a part of `model`; then the whole model."""
    get_decoder: Any = getattr(model, "get_decoder", lambda: None)
    decoder = get_decoder()
    if isinstance(decoder, nn.Module) and any(module is decoder for module in model.modules()):
        yield decoder
    if decoder is not model:
        yield model
