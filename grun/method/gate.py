"""Gates: from the hidden state of a token to the logit that it belongs to a prompt about the data to forget.

A new gate is a function, or a class, of the hidden size under the decorator `gate`; any module will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grun.errors import ConfigError
from grun.method.rules import WINDOWS
from grun.registry import Registry

if TYPE_CHECKING:
    from torch import nn

GateBuilder = Callable[[int], "nn.Module | None"]
"""Takes the hidden size and returns a module [..., hidden size] -> [..., 1], or None for no gate."""

GATES: Registry[GateBuilder] = Registry("gate")

BY_MEANS = ("similarity", "condition")
"""Gates whose direction follows from the means of prompts; see `grun.method.means`."""

KEYWORDS = "keywords"
"""The gate that reads token ids, and no states."""

UNTRAINED = (*BY_MEANS, KEYWORDS)
"""Gates that are set and never trained."""

NOISE = 0.5
"""Standard deviation of what is added in training to the normalized state that a noisy gate reads."""


gate = GATES.register
"""Decorator of a builder: takes the gate's name, which the first paragraph of the docstring describes."""


@gate("linear")
def linear(hidden_size: int) -> nn.Module:
    """One linear layer."""
    return _layers(hidden_size)


@gate("mlp_3")
def mlp_3(hidden_size: int) -> nn.Module:
    """Three linear layers (256, 64, 1) with ReLU between."""
    return _layers(hidden_size, 256, 64)


@gate("noisy_mlp_3")
def noisy_mlp_3(hidden_size: int) -> nn.Module:
    """As mlp_3 on the normalized state, with noise added in training."""
    return _layers(hidden_size, 256, 64, noise=NOISE)


@gate("mlp_5")
def mlp_5(hidden_size: int) -> nn.Module:
    """Five linear layers (1024, 512, 256, 64, 1) with ReLU between."""
    return _layers(hidden_size, 1024, 512, 256, 64)


@gate("similarity")
def similarity(hidden_size: int) -> nn.Module:
    """Cosine of a pooled state with the mean of forget prompts, less a threshold; nothing is trained.

    Source: text-embedding gates such as GUARD-IT, arXiv 2605.12765, with the model's own early states as embedding.
    """
    return _layers(hidden_size, normalized=True)


@gate("condition")
def condition(hidden_size: int) -> nn.Module:
    """Cosine of a pooled state with a condition vector, the difference of forget and retain means, less a threshold.

    Source: conditional activation steering (CAST), arXiv 2409.05907.
    """
    return _layers(hidden_size, normalized=True)


@gate(KEYWORDS)
def keywords(size: int) -> nn.Module:
    """Open where the user's turn holds one of a list of keywords, as token sequences; nothing is trained."""
    return _layers(size)


@gate("none")
def none(hidden_size: int) -> None:
    """No gate: the edit always acts in full (plain ReFT)."""


def _layers(hidden_size: int, *widths: int, **options: Any) -> nn.Module:
    from grun.method.gating import LinearGate  # not above: names of gates are read without torch

    return LinearGate(hidden_size, *widths, **options)


def make_gate(name: str, size: int, pool: str) -> nn.Module | None:
    """Newly initialized gate that reads `size` features, pooled as `pool`; None: there is none."""
    own = GATES.get(name)(size)
    if pool != WINDOWS or own is None:
        return own
    from grun.method.gating import WindowsGate

    return WindowsGate(own, size)


def set_bias(gate: nn.Module, value: float) -> None:
    """Set the bias of the gate's last layer, that is the logit it starts from; ConfigError for a gate without one."""
    import torch
    from torch import nn

    biases = [module.bias for module in gate.modules() if isinstance(module, nn.Linear)]
    if not biases or biases[-1] is None:
        raise ConfigError("gate_bias sets the bias of a gate's last linear layer, and this gate has none; leave it out")
    with torch.no_grad():
        biases[-1].fill_(value)
