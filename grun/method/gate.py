"""Gates: from the hidden state of a token to the logit that it belongs to a prompt about the data to forget."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from grun.errors import ConfigError
from grun.registry import Registry

if TYPE_CHECKING:
    from torch import nn

GateBuilder = Callable[[int], "nn.Module | None"]
"""Takes the hidden size and returns a module [..., hidden size] -> [..., 1], or None for no gate."""

GATES: Registry[GateBuilder] = Registry("gate")


NOISE = 0.5
"""Standard deviation of what is added in training to the normalized state that a noisy gate reads."""


def _mlp(*widths: int, noisy: bool = False) -> GateBuilder:
    def build(hidden_size: int) -> nn.Module:
        from torch import nn

        from grun.method.noise import GaussianNoise

        layers: list[nn.Module] = []
        if noisy:
            layers = [nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False), GaussianNoise(NOISE)]
        inputs = hidden_size
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, 1))

    return build


GATES.add("linear", _mlp(), "one linear layer")
GATES.add("mlp_3", _mlp(256, 64), "three linear layers (256, 64, 1) with ReLU between")
GATES.add("noisy_mlp_3", _mlp(256, 64, noisy=True), "mlp_3 on the normalized state, with noise added in training")
GATES.add("mlp_5", _mlp(1024, 512, 256, 64), "five linear layers (1024, 512, 256, 64, 1) with ReLU between")
GATES.add("none", lambda _: None, "no gate: the edit always acts in full (plain ReFT)")


def set_bias(gate: nn.Module, value: float) -> None:
    """Set the bias of the gate's last layer, that is the logit it starts from; ConfigError for a gate without one."""
    import torch
    from torch import nn

    biases = [module.bias for module in gate.modules() if isinstance(module, nn.Linear)]
    if not biases or biases[-1] is None:
        raise ConfigError("gate_bias sets the bias of a gate's last linear layer, and this gate has none; leave it out")
    with torch.no_grad():
        biases[-1].fill_(value)
