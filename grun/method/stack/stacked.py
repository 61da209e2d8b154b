"""The edits of several requests at one block, computed together from the same state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from grun.errors import AdapterError
from grun.method.adapter import AdapterConfig
from grun.method.edit import orthonormal_columns
from grun.method.gate import GATES
from grun.method.gating import Gate, openings
from grun.method.position import PositionRule, position_rule
from grun.method.precision import float32_by_default
from grun.method.stack.combination import edit_weights
from grun.method.stack.gates import LayerByLayer, OneByOne
from pyvene_custom import GatedOutput, Intervention, Sites
from pyvene_custom.sites import read_and_written, scatter


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
        """Kind of an adapter."""
        values = {name: getattr(config, name) for name in cls._fields}
        lists = {name: tuple(values[name] or ()) for name in ("reset_ids", "gate_blocks")}
        unset = {"activation": config.activation or "", "gate_threshold": config.gate_threshold or 0.0}
        return cls(**{**values, **lists, **unset})

    @property
    def position(self) -> tuple[Any, ...]:
        """The part that decides where gates read and edits write."""
        return (*self[:4], bool(self.gate_blocks))

    def rule(self) -> PositionRule:
        """Where gates read and edits write."""
        *where, pooled = self.position
        return position_rule(*where, pooled=pooled)

    def new_gate(self, size: int) -> nn.Module:
        """A gate with weights that mean nothing yet, in evaluation mode; torch's random numbers stay as they are."""
        with torch.random.fork_rng(devices=[]), float32_by_default():
            gate = GATES.get(self.gate)(size)
        if gate is None:
            raise AdapterError(f"gate {self.gate!r}: a stack takes gated edits alone")
        return gate.eval().requires_grad_(False)

    def stacked_gates(self, size: int) -> OneByOne | LayerByLayer:
        """What computes gates that read `size` numbers; of no request yet."""
        gate = self.new_gate(size)
        return gate.stack() if isinstance(gate, Gate) else OneByOne(gate)


Openings = Mapping[Kind, tuple[Tensor, Tensor]]
"""Of gates for all edits, by kind: logits where they are asked, and those in force, [batch, positions, requests]."""


@dataclass
class StackSites(Sites):
    """Sites of requests that differ in where they read and write: all columns, and by rule those of each."""

    by_position: Mapping[tuple[Any, ...], Sites | None] | None = None
    """By `Kind.position`; None where that rule neither reads nor writes in this pass."""

    def to(self, device: torch.device) -> Sites:
        """Same columns on `device`."""
        if self.read.device == device:
            return self
        parts = {key: sites and sites.to(device) for key, sites in (self.by_position or {}).items()}
        return StackSites(**vars(super().to(device)), by_position=parts)


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
            self.gates.append(gates_of(weights), like)
        self.names += names

    def remove(self, name: str) -> None:
        """Take a request out."""
        kept = [place for place, other in enumerate(self.names) if other != name]
        for buffer, values in list(self.named_buffers(recurse=False)):
            self.register_buffer(buffer, values[kept].clone(), persistent=False)
        if self.gates is not None:
            self.gates.keep(kept)
        self.names.remove(name)

    def change(self, states: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the edits of states [tokens, hidden size] by weights [tokens, requests]: as the states.

        Only requests with a weight anywhere are computed, and only for tokens with one.
        """
        acting = weights != 0
        tokens, requests = acting.any(dim=1), acting.any(dim=0)
        change = torch.zeros_like(states)
        if not bool(requests.any()):
            return change
        all_here = bool(requests.all())
        basis, source, shift = (
            self.get_buffer(name) if all_here else self.get_buffer(name)[requests]
            for name in ("basis", "source", "shift")
        )
        here = states[tokens]
        target = linear(here, source.flatten(0, 1), shift.flatten())
        if self._activation is not None:
            target = self._activation(target)
        flat = basis.flatten(0, 1)  # [requests * rank, hidden size]
        moved = (target - linear(here, flat)).unflatten(1, basis.shape[:2])
        by = weights[tokens] if all_here else weights[tokens][:, requests]
        change[tokens] = (moved * by.unsqueeze(2)).flatten(1) @ flat
        return change


def gates_of(weights: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The gates' own tensors of several requests."""
    return [{name.removeprefix("gate."): one[name] for name in one if name.startswith("gate.")} for one in weights]


class StackedIntervention(Intervention):
    """h + sum over requests of w_i R_i (W_i h + b_i - R_i^T h), every term of the same h.

    The weights w_i come from the requests' gates by a rule of `grun.method.stack.combination`. A gate below the
    threshold counts as shut. Nothing here is trained.
    """

    def __init__(self, hidden_size: int, like: Tensor, rule: str, threshold: float | None) -> None:
        """Of no request yet, to compute in the type and on the device of `like`.

        `rule` is a name in `grun.method.stack.combination.RULES`; a gate below `threshold` counts as shut.
        """
        super().__init__(keep_last_dim=True)
        self.groups = nn.ModuleList()
        self.rule = rule
        self.threshold = threshold
        self._hidden_size = hidden_size
        self.register_buffer("_like", like, persistent=False)

    @property
    def names(self) -> list[str]:
        """Requests, in the order in which their gates are given back."""
        return [name for group in self._groups for name in group.names]

    @property
    def _groups(self) -> list[Group]:
        return [group for group in self.groups if isinstance(group, Group)]

    def append(self, kind: Kind, names: Sequence[str], weights: Sequence[Mapping[str, Tensor]]) -> None:
        """Add requests of one kind; see `Group.append`."""
        groups = {group.kind: group for group in self._groups}
        if kind not in groups:
            groups[kind] = Group(kind, self._hidden_size)
        groups[kind].append(names, weights, self.get_buffer("_like"))
        # Sorted, so that the sum over groups does not depend on which request came first.
        self.groups = nn.ModuleList([groups[key] for key in sorted(groups)])

    def find_gates(self, gates: Mapping[Kind, Any]) -> None:
        """Note where the requests' gates for all edits stand in the groups of `StackedGates`."""
        for group in self._groups:
            if group.kind in gates:
                group.places = gates[group.kind].places(group.names)

    def remove(self, name: str) -> None:
        """Take a request out, if it is here."""
        for group in self._groups:
            if name in group.names:
                group.remove(name)
        self.groups = nn.ModuleList([group for group in self._groups if group.names])

    def forward(
        self,
        base: Tensor,
        source: Tensor | None = None,
        subspaces: Any = None,
        *,
        read: Tensor | None = None,
        sites: Sites | None = None,
        carry: Tensor | None = None,
        opening: Openings | None = None,
    ) -> GatedOutput:
        """Edit the states `base`; arguments as of `GatedIntervention.forward`, but for what `StackedGates` give.

        What is given back as gate is of each position the widest gate's logit; `opening` has those in force of all,
        [batch, positions read, requests], as `carry` has with one position.
        """
        dtype = self.widen(base)
        with torch.autocast(base.device.type, enabled=False):
            hidden = base.to(dtype)
            seen = hidden if read is None or read is base else read.to(dtype)
            groups = self._groups
            counts = [len(group.names) for group in groups]
            carried = [None] * len(groups) if carry is None else carry.split(counts, dim=-1)
            found = [
                _read(group, hidden, seen, sites, part, opening) for group, part in zip(groups, carried, strict=True)
            ]
            read_by, opened, written = zip(*found, strict=True)
            widest, in_force = torch.cat(read_by, dim=2).amax(dim=2), torch.cat(opened, dim=2)
            least = [max(self.threshold or 0.0, group.kind.gate_threshold) for group in groups]
            skips = self.threshold is not None or any(least)
            is_open = None
            if skips:
                lowest = torch.tensor(least, dtype=dtype).repeat_interleave(torch.tensor(counts)).to(in_force.device)
                is_open = torch.sigmoid(in_force) >= lowest
                if not bool(is_open.any()):
                    return GatedOutput(output=None, gate=widest, opening=in_force)
            masks = [part.expand(*hidden.shape[:2], count) for part, count in zip(written, counts, strict=True)]
            mask = torch.cat(masks, dim=2)
            if is_open is not None:
                mask = mask & is_open
                if not bool(mask.any()):
                    return GatedOutput(output=None, gate=widest, opening=in_force)
            at_written = in_force.expand(-1, hidden.shape[1], -1) if in_force.shape[1] == 1 else in_force
            weights = edit_weights(at_written, mask, self.rule).flatten(0, 1)
            flat = hidden.flatten(0, 1)
            change = torch.zeros_like(flat)
            for group, part in zip(groups, weights.split(counts, dim=1), strict=True):
                change = change + group.change(flat, part)
            edited = (flat + change).view_as(hidden)
        output = edited.to(base.dtype)
        if skips:  # tokens of which no gate is open stay as they are, bit for bit
            output = torch.where(mask.any(dim=2, keepdim=True), output, base)
        return GatedOutput(output=output, gate=widest, opening=in_force)


class InForce(Intervention):
    """Edits of other requests at a block where the one that is trained has none; their gates are no concern of it."""

    def __init__(self, earlier: StackedIntervention) -> None:
        super().__init__(keep_last_dim=True)
        self.earlier = earlier

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Any = None, **where: Any) -> GatedOutput:
        """Edit the states `base`; arguments as of `StackedIntervention.forward`."""
        found = self.earlier(base, **where)
        return GatedOutput(output=found.output, gate=None, carry=found.opening)


def _read(
    group: Group,
    hidden: Tensor,
    seen: Tensor,
    sites: Sites | None,
    carry: Tensor | None,
    given: Openings | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits read and logits in force, [batch, positions read or 1, requests], and where edits are written.

    Where requests differ in where they read and write, all three stand at all columns.
    """
    accumulate = group.kind.gate_accumulate

    def opened(where: Sites | None, at: Tensor) -> tuple[Tensor, Tensor]:
        """Logits where gates are read, and those in force."""
        if group.gates is not None:
            found: Tensor = group.gates(at)
            return found, openings(found, where, carry, accumulate)
        assert given is not None
        read, in_force = given[group.kind]
        if group.places is None:
            return read, in_force
        return read[..., group.places], in_force[..., group.places]

    if not isinstance(sites, StackSites):
        logits, opening = opened(sites, seen)
        return logits, opening, logits.new_ones(1, 1, 1, dtype=torch.bool)
    own = (sites.by_position or {})[group.kind.position]
    shut = hidden.new_full((*hidden.shape[:2], len(group.names)), -torch.inf)
    if own is None:
        return shut, shut, shut.new_zeros(1, 1, 1, dtype=torch.bool)
    read, _ = read_and_written(hidden, own)
    logits, opening = opened(own, read)
    if own.everywhere:
        return logits, opening, own.write_mask.unsqueeze(2)
    places = own.write.new_zeros(hidden.shape[:2], dtype=torch.bool)
    written = scatter(places.unsqueeze(2), own.write, own.write_mask, own.write_mask.unsqueeze(2))
    spread = shut if not logits.shape[1] else scatter(shut, own.read, own.read_mask, logits)
    return spread, opening.expand(-1, hidden.shape[1], -1), written
