"""Edits by name: from the hidden state of a token to the change of it.

A new edit is a function, or a class, of the hidden size, the rank and an activation under the decorator `edit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from grun.errors import ConfigError
from grun.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

EditBuilder = Callable[[int, int, "Callable[[Tensor], Tensor] | None"], "nn.Module"]
"""Takes hidden size, rank and `method.activation` (None: identity); the module maps [..., hidden size] to the same."""

EDITS: Registry[EditBuilder] = Registry("edit")

LOREFT = "loreft"
"""The published edit, and the only one that a stack of requests computes."""
STEER = "steer"
"""The edit that leads from answers to refusals."""
CORRUPT = "corrupt"
"""The edit that is noise, on the prompt."""
UNTRAINED = (STEER, CORRUPT)
"""Edits that are set and never trained."""


edit = EDITS.register
"""Decorator of a builder: takes the edit's name, which the first paragraph of the docstring describes."""


@edit(LOREFT)
def loreft(hidden_size: int, rank: int, activation: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """R (f(Wh + b) - R^T h), low-rank, R with orthonormal columns (LoReFT)."""
    from grun.method.edit import LoReftEdit  # not above: names of edits are read without torch

    return LoReftEdit(hidden_size, rank, activation)


@edit(STEER)
def steer(hidden_size: int, rank: int, activation: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """One vector, added as it is: from states of answers to those of refusals; nothing is trained, and rank is unused.

    Source: the behavior vector of conditional activation steering (CAST), arXiv 2409.05907.
    """
    return _vector(STEER, hidden_size, activation)


@edit(CORRUPT)
def corrupt(hidden_size: int, rank: int, activation: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """One vector of noise, added to every token of the user's turn; nothing is trained, and rank is unused.

    Source: embedding-corrupted prompts (ECO), arXiv 2406.07933; here states after the gate's last block are corrupted.
    """
    return _vector(CORRUPT, hidden_size, activation)


def _vector(name: str, hidden_size: int, activation: Callable[[Tensor], Tensor] | None) -> nn.Module:
    from grun.method.edit import SteeringVector

    if activation is not None:
        raise ConfigError(f"edit={name} adds a vector, on which activation has no effect; leave activation out")
    return SteeringVector(hidden_size)
