"""Gates and edits of requests of one kind, computed together; read without pyvene, so that other engines share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from grun.errors import AdapterError
from grun.method.actions import EDIT
from grun.method.adapter import AdapterConfig
from grun.method.edit import orthonormal_columns
from grun.method.edits import LOREFT
from grun.method.gate import KEYWORDS, make_gate
from grun.method.gating import Gate
from grun.method.precision import float32_by_default
from grun.method.rules import POOLS
from grun.method.stack.gates import LayerByLayer, OneByOne, WindowByWindow, starting


class Kind(NamedTuple):
    """What requests share whose gates and edits are computed together."""

    gate_read: str
    gate_accumulate: str
    edit_write: str
    reset_ids: tuple[int, ...]
    gate_blocks: tuple[int, ...]
    """Empty where each edit has a gate of its own."""
    gate: str
    rank: int
    activation: str
    gate_pool: str
    gate_threshold: float
    """0 where no edit is skipped."""

    @classmethod
    def of(cls, config: AdapterConfig) -> Kind:
        """Kind of an adapter; AdapterError for one whose gate reads token ids."""
        if config.gate == KEYWORDS:
            raise AdapterError(f"the gate {KEYWORDS} reads token ids; stacks and vLLM take gates that read states")
        values = {name: getattr(config, name) for name in cls._fields}
        lists = {name: tuple(values[name] or ()) for name in ("reset_ids", "gate_blocks")}
        unset = {"activation": config.activation or "", "gate_threshold": config.gate_threshold or 0.0}
        return cls(**{**values, **lists, **unset})

    @property
    def position(self) -> tuple[Any, ...]:
        """The part that decides where gates read and edits write."""
        return (*self[:4], bool(self.gate_blocks))

    def stacked_gates(self, size: int) -> OneByOne | LayerByLayer | WindowByWindow:
        """What computes gates that read `size` numbers; of no request yet. torch's random numbers stay as they are."""
        with torch.random.fork_rng(devices=[]), float32_by_default():
            gate = make_gate(self.gate, size, self.gate_pool)
        if gate is None:
            raise AdapterError(f"gate {self.gate!r}: a stack takes gated edits alone")
        gate.eval().requires_grad_(False)
        return gate.stack() if isinstance(gate, Gate) else OneByOne(gate)


FEW = 64
"""Edits so few, tokens times requests, are computed all: finding those that act would take longer."""


class Acting(NamedTuple):
    """Where the edits of a group act."""

    tokens: Tensor | None
    """Numbers of the tokens that some edit is written at; None: all."""
    requests: Tensor | None
    """Numbers of the requests whose edit is written somewhere; None: all."""
    weights: Tensor
    """Of those tokens and requests, [tokens, requests]."""

    @classmethod
    def of(cls, weights: Tensor) -> Self | None:
        """Of weights [tokens, requests]; None where all are 0."""
        if weights.numel() <= FEW:
            return cls(None, None, weights) if bool(weights.any()) else None
        acting = weights != 0
        tokens, requests = (acting.any(dim=dim).nonzero()[:, 0] for dim in (1, 0))
        if not len(requests):
            return None
        some_tokens, some_requests = len(tokens) < len(weights), len(requests) < weights.shape[1]
        weights = weights[tokens] if some_tokens else weights
        weights = weights[:, requests] if some_requests else weights
        return cls(tokens if some_tokens else None, requests if some_requests else None, weights)


class Group(nn.Module):
    """Gates and edits of the requests of one kind at one block; weights that nothing trains."""

    def __init__(self, kind: Kind, hidden_size: int) -> None:
        super().__init__()
        self.kind = kind
        self.names: list[str] = []
        self._hidden_size = hidden_size
        self._activation = ACT2FN[kind.activation] if kind.activation else None
        self.gates = None if kind.gate_blocks else kind.stacked_gates(hidden_size)
        """None where the requests have one gate for all edits."""
        self.places: list[int] | None = None
        """Where their gates stand among those of `StackedGates`; None: in the same order."""

    def append(self, names: Sequence[str], weights: Sequence[Mapping[str, Tensor]], like: Tensor) -> None:
        """Add requests after those there are, to compute in the type and on the device of `like`.

        The `weights` of each are named as in the state of a `GatedIntervention`.
        """
        made: dict[str, list[Tensor]] = {"basis": [], "source": [], "shift": []}
        for one in weights:
            made["basis"].append(orthonormal_columns(one["edit.rotation"].to(like)).mT)  # [rank, hidden size]
            made["source"].append(one["edit.source.weight"].to(like))
            made["shift"].append(one["edit.source.bias"].to(like))
        for name, tensors in made.items():
            new = torch.stack(tensors)
            self.register_buffer(name, torch.cat((self.get_buffer(name), new)) if self.names else new, persistent=False)
        if self.gates is not None:
            self.gates.append([starting(one, "gate.") for one in weights], like)
        self.names += names

    def remove(self, name: str) -> None:
        """Take a request out."""
        kept = [place for place, other in enumerate(self.names) if other != name]
        for buffer, values in list(self.named_buffers(recurse=False)):
            self.register_buffer(buffer, values[kept].clone(), persistent=False)
        if self.gates is not None:
            self.gates.keep(kept)
        self.names.remove(name)

    def add_change(self, change: Tensor, states: Tensor, acting: Acting) -> None:
        """Add to `change`, in place, the weighted sum of the edits of `states`, both [tokens, hidden size].

        Only requests with a weight anywhere are computed, and only for tokens with one.
        """
        buffers: dict[str, Any] = self._buffers
        basis, source, shift = (
            buffers[name] if acting.requests is None else buffers[name][acting.requests]
            for name in ("basis", "source", "shift")
        )
        here = states if acting.tokens is None else states[acting.tokens]
        target = linear(here, source.flatten(0, 1), shift.flatten())
        if self._activation is not None:
            target = self._activation(target)
        flat = basis.flatten(0, 1)  # [requests * rank, hidden size]
        moved = (target - linear(here, flat)).unflatten(1, basis.shape[:2])
        found = (moved * acting.weights.unsqueeze(2)).flatten(1) @ flat
        if acting.tokens is None:
            change += found
        else:
            change[acting.tokens] += found


class GateGroup(nn.Module):
    """Gates of the requests of one kind; weights that nothing trains."""

    def __init__(self, kind: Kind, hidden_size: int) -> None:
        super().__init__()
        self.kind = kind
        self.names: list[str] = []
        self.gates = kind.stacked_gates(len(kind.gate_blocks) * POOLS[kind.gate_pool] * hidden_size)

    def append(self, names: Sequence[str], weights: Sequence[Mapping[str, Tensor]], like: Tensor) -> None:
        """As `Group.append`; `weights` of each are named as in the state of a `PooledGate`."""
        self.gates.append([starting(one, "gate.") for one in weights], like)
        self.names += names

    def remove(self, name: str) -> None:
        """Take a request out."""
        self.gates.keep([place for place, other in enumerate(self.names) if other != name])
        self.names.remove(name)

    def places(self, names: Sequence[str]) -> list[int] | None:
        """Where the gates of `names` stand; None: all of them, in this order."""
        if list(names) == self.names:
            return None
        place = {name: number for number, name in enumerate(self.names)}
        return [place[name] for name in names]


def enough(groups: Sequence[Group], in_force: Tensor, threshold: float | None) -> Tensor | None:
    """Which gates are open wide enough to count; None: there is no threshold, and all do.

    Args:
        groups: whose requests the last columns are, one after another.
        in_force: gates' logits, [..., requests].
        threshold: least probability for all of them; each group may have its own, and the larger one counts.
    """
    least = [max(threshold or 0.0, group.kind.gate_threshold) for group in groups]
    if threshold is None and not any(least):
        return None
    counts = torch.tensor([len(group.names) for group in groups])
    lowest = torch.tensor(least, dtype=in_force.dtype).repeat_interleave(counts).to(in_force.device)
    return torch.sigmoid(in_force) >= lowest


@dataclass
class Grouped:
    """Tensors of requests by what is computed together, each named as `Group` and `GateGroup` take them."""

    edits: dict[tuple[int, Kind], dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    """By block and kind, of each request's edit, and of its gate where each edit has one."""
    gates: dict[Kind, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    """By kind, of each request's gate for all edits."""


def grouped(
    requests: Mapping[str, tuple[AdapterConfig, Mapping[str, Tensor]]], others: Mapping[str, AdapterConfig]
) -> Grouped:
    """Requests by kind, of each its config and the state of a `GrunModel`; `others` are in force with them.

    AdapterError for one that cannot be computed with others.
    """
    found = Grouped()
    resets = {tuple(one.reset_ids): of for of, one in others.items() if one.gate_blocks is not None}
    for name, (config, weights) in requests.items():
        if config.action != EDIT:
            raise AdapterError(f"request {name!r}: its action is {config.action}; a stack takes edits alone")
        if config.gate_blocks is not None:
            of_gate = starting(weights, "pooled.")
            found.gates.setdefault(Kind.of(config), {})[name] = of_gate
            resets.setdefault(tuple(config.reset_ids), name)
        for block in config.blocks:
            own = starting(weights, f"edits.{block}.")
            if config.edit != LOREFT:
                raise AdapterError(f"request {name!r}: its edit is {config.edit}; a stack takes {LOREFT} alone")
            if config.gate == "none" or not own:
                raise AdapterError(f"request {name!r}: no gate at block {block}; a stack takes gated edits alone")
            found.edits.setdefault((block, Kind.of(config)), {})[name] = own
    if len(resets) > 1:
        first, other = list(resets.values())[:2]
        raise AdapterError(
            f"request {other!r}: its gate's pool begins anew at other ids than that of {first!r} (template, "
            "gate_reset); a stack takes pooled gates of one kind of turns"
        )
    return found
