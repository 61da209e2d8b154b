"""Which tensors of a model's blocks are trained: by the end of their names, or by the published tools' numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from grun.errors import ConfigError, ModelError
from pyvene_custom import find_blocks

log = logging.getLogger(__name__)


class Trained(nn.Module):
    """Holds the parameters that are trained and nothing else, so that optimizer and checkpoints see no others."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], followers: Iterable[nn.Module]) -> None:
        """`parameters` by dotted name; `followers` are the modules that go into training mode with this one."""
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)  # torch allows no dots
        self._followers = tuple(followers)  # in a tuple, so that they are no parts of this module

    def train(self, mode: bool = True) -> Self:
        """Training mode (dropout) of the followers."""
        for module in self._followers:
            module.train(mode)
        return super().train(mode)


def named_tensors(base: PreTrainedModel, blocks: Sequence[int], names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters of `blocks` (0-based) whose name inside the block ends with one of `names`, by full name.

    `mlp.down_proj` is the weight and the bias, if there is one, of that layer; `mlp.down_proj.weight` the weight alone.

    Raises:
        ConfigError: a block is beyond the depth, or a name chooses nothing.
    """
    chosen: dict[str, nn.Parameter] = {}
    for block, path, tensors in _of_blocks(base, blocks):
        for name in names:
            matching = [inside for inside in tensors if _ends_with(inside, name)]
            if not matching:
                raise ConfigError(f"block {block} has no tensor called {name!r}; it has {_listed(tensors)}")
            chosen |= {f"{path}.{inside}": tensors[inside] for inside in matching}
    return chosen


def numbered_tensors(base: PreTrainedModel, blocks: Sequence[int], numbers: Sequence[int]) -> dict[str, nn.Parameter]:
    """Parameters of `blocks` by their place in `block.parameters()`, as the published tools choose them.

    What a number means differs from one architecture to the next, so the names are logged.

    Raises:
        ConfigError: a block is beyond the depth, or has no tensor of such a number.
    """
    chosen: dict[str, nn.Parameter] = {}
    meanings: dict[int, list[str]] = {}
    for block, path, tensors in _of_blocks(base, blocks):
        names = list(tensors)
        for number in numbers:
            if not 0 <= number < len(names):
                raise ConfigError(
                    f"param id {number} chooses nothing: block {block} has {len(names)} tensors, {_listed(names)}; "
                    "choose by name, such as mlp.down_proj"
                )
            chosen[f"{path}.{names[number]}"] = tensors[names[number]]
            meanings.setdefault(number, []).append(names[number])
    for number, found in meanings.items():
        log.info("param id %d is %s in blocks %s", number, ", ".join(dict.fromkeys(found)), list(blocks))
    return chosen


def check_block(base: PreTrainedModel, block: int, option: str) -> None:
    """ConfigError if `base` has no block of that number; `option` is what named it."""
    depth = len(_stack(base)[1])
    if not 0 <= block < depth:
        raise ConfigError(f"{option}: there is no block {block}; this model has {depth}, 0 to {depth - 1}")


def check_tensors(base: PreTrainedModel, tensors: Mapping[str, object], block: int) -> None:
    """ConfigError if no change of `tensors` can show in the output of `block`; a warning about those that cannot."""
    check_block(base, block, "block of the loss")
    path, stack = _stack(base)
    later = tuple(f"{path}.{number}." for number in range(block + 1, len(stack)))
    above = [name for name in tensors if name.startswith(later)]
    if len(above) == len(tensors):
        raise ConfigError(
            f"nothing to train: the loss reads block {block}, and {', '.join(above) or 'no tensor'} is chosen; choose "
            "tensors of that block or of earlier ones"
        )
    for name in above:
        log.warning("%s lies above block %d, which the loss reads: it will not change", name, block)


def in_float32(tensors: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Copies in at least float32, to be trained in place of `tensors` and written back with `write_back`."""
    return {
        name: nn.Parameter(tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True))
        for name, tensor in tensors.items()
    }


def write_back(base: PreTrainedModel, tensors: Mapping[str, nn.Parameter]) -> None:
    """Copy trained tensors into the parameters of `base` of the same names, in their type."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            base.get_parameter(name).copy_(tensor)


def _of_blocks(base: PreTrainedModel, blocks: Sequence[int]) -> list[tuple[int, str, dict[str, nn.Parameter]]]:
    """Number and path of each block, and its parameters by name inside it in the order of `block.parameters()`."""
    path, stack = _stack(base)
    for block in blocks:
        check_block(base, block, "layer ids")
    return [(block, f"{path}.{block}", dict(stack[block].named_parameters())) for block in blocks]


def _stack(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    try:
        return find_blocks(base)
    except ValueError as error:
        raise ModelError(f"{error}; its tensors cannot be chosen by block") from error


def _ends_with(inside: str, name: str) -> bool:
    layer = inside.rpartition(".")[0]
    return f".{inside}".endswith(f".{name}") or f".{layer}".endswith(f".{name}")


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(f"{number} {name}" for number, name in enumerate(names))
