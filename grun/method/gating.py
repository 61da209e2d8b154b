"""What gates are made of (the base class, linear layers, noise), and how far they are open at each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from grun.method.stack.gates import LayerByLayer, OneByOne, WindowByWindow, in_windows

if TYPE_CHECKING:
    from pyvene_custom import Sites

FILLED = 16
"""torch fills normal numbers in groups of so many, so rows of whole groups are the same in a longer draw."""


class Gate(nn.Module):
    """A gate: hidden state [..., hidden size] -> logit [..., 1]. A base class for those that can be stacked faster."""

    def stack(self) -> OneByOne | LayerByLayer | WindowByWindow:
        """What computes the gates of several requests that are made as this one; none are in it yet.

        One after another, as for every gate of another class. See `grun.method.stack.gates.OneByOne` for its methods.
        """
        return OneByOne(self)


class LinearGate(nn.Sequential, Gate):
    """Linear layers with ReLU between, perhaps on the normalized state, to which noise may be added in training."""

    def __init__(self, hidden_size: int, *widths: int, noise: float = 0.0, normalized: bool = False) -> None:
        """`widths` of the inner layers; `noise`, its standard deviation, comes with the normalization."""
        layers: list[nn.Module] = []
        if noise or normalized:
            layers = [nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)]
        if noise:
            layers.append(GaussianNoise(noise))
        inputs = hidden_size
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        super().__init__(*layers, nn.Linear(inputs, 1))

    def stack(self) -> OneByOne | LayerByLayer:
        """Layer by layer: between its linear layers, and before them, nothing has weights."""
        return LayerByLayer(list(self))


class WindowsGate(Gate):
    """A gate on each window of the user's turn or, where that only asks for an answer ("Go on."), of those before it.

    Logit: max(max_w g(w), min(max_v g(v), f(turn))) over windows w of the turn and v of the user's turns before it, f
    of both ends of each feature over the whole turn: that of a turn which says nothing itself. What else a turn holds
    cannot shut it, but for what that changes in the states of the window itself.
    """

    def __init__(self, gate: nn.Module, size: int) -> None:
        """`gate`: g, which reads `size` features, as f does."""
        super().__init__()
        self.follow_up = LinearGate(size)
        self.window = gate  # last, so that its last layer is the gate's: a bias moves the logits of all windows

    def forward(self, features: Tensor) -> Tensor:
        """Features [batch, positions, windows, 1 + size] of `windows_at` -> logit [batch, positions, 1]."""
        return in_windows(features, self.window, self.follow_up)

    def stack(self) -> OneByOne | LayerByLayer | WindowByWindow:
        """g and f of all requests as those stack."""
        if not isinstance(self.window, Gate):
            return OneByOne(self)
        return WindowByWindow(self.window.stack(), self.follow_up.stack())


class GaussianNoise(nn.Module):
    """Add normal noise in training, nothing otherwise; it holds no weights.

    Source: training with noise as regularization, Bishop 1995, Neural Computation 7.
    """

    def __init__(self, deviation: float) -> None:
        """`deviation`: standard deviation of the noise, in units of the input."""
        super().__init__()
        self.deviation = deviation
        self.row_seeds: Sequence[int] | None = None
        """For each row of a pass the number that its noise is drawn from; None: torch's generator."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [batch, positions, size], or of any shape without row seeds; the same shape."""
        if not self.training:
            return inputs
        if self.row_seeds is None:
            return inputs + self.deviation * torch.randn_like(inputs)
        _, positions, size = inputs.shape
        whole = -(-size // FILLED) * FILLED
        return inputs + self.deviation * drawn(torch.randn, self.row_seeds, positions, whole)[..., :size].to(inputs)


def drawn(draw: Callable[..., Tensor], seeds: Sequence[int], *shape: int) -> Tensor:
    """Numbers of each seed, by `torch.rand` or `torch.randn`, wherever its row stands: float32 [seeds, *shape]."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([draw(*shape, generator=generator, dtype=torch.float32) for generator in made])


def openings(logits: Tensor, sites: Sites | None, carry: Tensor | None, accumulate: str) -> Tensor:
    """Logit in force at each position read, or at the one before them where none is: [batch, positions or 1, ...].

    Args:
        logits: of gates at the positions read, [batch, positions read], or [batch, positions read, gates].
        sites: where this pass is read; None: `logits` are in force as they stand.
        carry: logit in force at the last token of the passes before, as `logits` with one position; None: shut.
        accumulate: none, or running_max: a gate is as open as at any token read since the last reset.
    """
    if sites is None or (accumulate == "none" and logits.shape[1] and bool(sites.read_mask.all())):
        return logits
    shut = logits.new_full((len(logits), 1, *logits.shape[2:]), -torch.inf)
    before = shut if carry is None else carry.to(logits)
    if logits.shape[1] == 0:
        return before
    read = _like(sites.read_mask, logits)
    if accumulate == "none":
        return torch.where(read, logits, before if sites.read is not sites.write else shut)
    counted = logits.masked_fill(~read, -torch.inf)
    if sites.reset is None or not bool(sites.reset.any()):
        return torch.maximum(counted.cummax(dim=1).values, before)
    turn = _like(sites.reset.long().cumsum(dim=1), logits)  # [batch, positions, ...]
    opening = torch.maximum(counted.masked_fill(turn > 0, -torch.inf).cummax(dim=1).values, before)
    for number in range(1, int(turn.max()) + 1):
        of_turn = counted.masked_fill(turn != number, -torch.inf).cummax(dim=1).values
        opening = torch.where(turn == number, of_turn, opening)
    return opening


def _like(values: Tensor, logits: Tensor) -> Tensor:
    """Values [batch, positions] with as many dimensions as `logits`."""
    return values.unsqueeze(2) if logits.dim() == 3 else values
