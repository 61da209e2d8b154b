"""Gates of several requests at one block, which are made alike and computed for the same states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from grun.method.pooling import EARLIER, OWN

SLICE = 2**20
"""Numbers that wide gates' inner layers may hold at once (4 MiB in float32): few enough for a processor's cache."""


def starting(weights: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Tensors whose names start so, by what follows."""
    return {name.removeprefix(start): values for name, values in weights.items() if name.startswith(start)}


class OneByOne(nn.Module):
    """Gates of any kind, computed one after another."""

    def __init__(self, gate: nn.Module) -> None:
        """Of no request yet; `gate` is what each of them is a copy of, with other numbers."""
        super().__init__()
        self._each: list[nn.Module] = []
        """No sub-modules: nothing trains or saves them, or puts them into training mode."""
        self._made = [gate]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for gate in self._each:
            gate._apply(fn)
        applied: Self = super()._apply(fn, recurse)
        return applied

    def append(self, states: Sequence[Mapping[str, Tensor]], like: Tensor) -> None:
        """Add gates with these states, to compute in the type and on the device of `like`."""
        for state in states:
            gate = copy.deepcopy(self._made[0]).to(like)
            gate.load_state_dict(state)
            self._each.append(gate)

    def keep(self, places: Sequence[int]) -> None:
        """Keep the gates that were added at these places."""
        self._each = [self._each[place] for place in places]

    def forward(self, states: Tensor) -> Tensor:
        """Gate logits of states [batch, positions, hidden size]: [batch, positions, gates]."""
        return torch.stack([gate(states).squeeze(-1) for gate in self._each], dim=2)


class WindowByWindow(nn.Module):
    """Gates that are `grun.method.gating.WindowsGate`: what they ask of windows and of the whole turn, each stacked."""

    def __init__(self, window: OneByOne | LayerByLayer | WindowByWindow, follow_up: OneByOne | LayerByLayer) -> None:
        """Of no request yet."""
        super().__init__()
        self._window, self._follow_up = window, follow_up

    def append(self, states: Sequence[Mapping[str, Tensor]], like: Tensor) -> None:
        """As `OneByOne.append`."""
        for part, start in ((self._window, "window."), (self._follow_up, "follow_up.")):
            part.append([starting(one, start) for one in states], like)

    def keep(self, places: Sequence[int]) -> None:
        """As `OneByOne.keep`."""
        self._window.keep(places)
        self._follow_up.keep(places)

    def forward(self, features: Tensor) -> Tensor:
        """Gate logits of features [batch, positions, windows, 1 + size]: [batch, positions, gates]."""
        return in_windows(features, self._window, self._follow_up)


def in_windows(features: Tensor, on_window: nn.Module, on_turn: nn.Module) -> Tensor:
    """Logits of `WindowsGate`: features [batch, positions, windows, 1 + size] -> [batch, positions, gates].

    `on_window` and `on_turn`: g and f, of one gate or of several, [any, windows, size] -> [any, windows, gates].
    """
    kind, states = features.flatten(0, 1).tensor_split([1], dim=2)  # [any, windows, 1 and size]
    logits = on_window(states)
    turn, earlier = (logits.masked_fill(kind != of, -torch.inf).amax(dim=1) for of in (OWN, EARLIER))
    whole = states.masked_fill(kind != OWN, -torch.inf).amax(dim=1, keepdim=True)
    follow_up = on_turn(whole.masked_fill(whole.isneginf(), 0.0))[:, 0]
    return torch.maximum(turn, torch.minimum(earlier, follow_up)).unflatten(0, features.shape[:2])


class LayerByLayer(nn.Module):
    """Gates of linear layers with layers without weights around them: a layer of all gates is one product."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Of no request yet; `layers` are a gate's."""
        super().__init__()
        self._layers = [None if isinstance(layer, nn.Linear) else layer for layer in layers]
        self._linear = [place for place, layer in enumerate(self._layers) if layer is None]
        self._count = 0

    def append(self, states: Sequence[Mapping[str, Tensor]], like: Tensor) -> None:
        """As `OneByOne.append`."""
        for place in self._linear:
            for part in ("weight", "bias"):
                new = torch.stack([state[f"{place}.{part}"].to(like) for state in states])
                self._put(f"{part}_{place}", new if not self._count else torch.cat((self._at(part, place), new)))
        self._count += len(states)

    def keep(self, places: Sequence[int]) -> None:
        """As `OneByOne.keep`."""
        for name, values in list(self.named_buffers()):
            self._put(name, values[places].clone())
        self._count = len(places)

    def forward(self, states: Tensor) -> Tensor:
        """As `OneByOne.forward`."""
        flat = states.flatten(0, 1)
        for layer in self._layers[: self._linear[0]]:  # the same for all gates
            flat = flat if layer is None else layer(flat)
        widest = max(self._at("weight", place).shape[1] for place in self._linear)
        together = max(1, SLICE // (widest * max(1, len(flat))))
        values = [self._some(flat, slice(start, start + together)) for start in range(0, self._count, together)]
        return torch.cat(values, dim=1).unflatten(0, states.shape[:2])

    def _some(self, states: Tensor, part: slice) -> Tensor:
        """Of [tokens, width]: [tokens, gates of `part`]. Their first layers are one matrix product."""
        values = states
        for place, layer in list(enumerate(self._layers))[self._linear[0] :]:
            if layer is not None:
                values = layer(values)
                continue
            weight, bias = self._at("weight", place)[part], self._at("bias", place)[part]  # [n, out, in], [n, out]
            if place == self._linear[0]:
                values = linear(values, weight.flatten(0, 1), bias.flatten())
                values = values.unflatten(1, weight.shape[:2]).transpose(0, 1)  # [n, tokens, out]
            else:
                values = torch.baddbmm(bias.unsqueeze(1), values, weight.mT)
        return values.squeeze(2).T

    def _at(self, part: str, place: int) -> Tensor:
        return self.get_buffer(f"{part}_{place}")

    def _put(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values, persistent=False)
