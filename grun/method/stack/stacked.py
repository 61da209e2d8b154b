"""The edits of several requests at one block, computed together from the same state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from grun.method.gating import openings
from grun.method.stack.combination import edit_weights
from grun.method.stack.group import Acting, GateGroup, Group, Kind, enough
from pyvene_custom import GatedOutput, Intervention, Sites
from pyvene_custom.sites import read_and_written, scatter


@dataclass
class Openings:
    """What gates for all edits say in a pass."""

    by_kind: Mapping[Kind, tuple[Tensor, Tensor]]
    """Logits where they are asked, and those in force, [batch, positions, requests]."""
    decided: dict[Any, Any]
    """`Pass.decided`, for `Decision`s."""


class Decision(NamedTuple):
    """What gates mean at one block: the same at all blocks where all edits are weighted by gates for all of them."""

    widest: Tensor
    """Logit of the widest gate, [batch, positions read]."""
    in_force: Tensor
    """Logits in force, [batch, positions, requests]."""
    tokens: Tensor | None = None
    """Numbers of the tokens that may be edited; others stay as they are, bit for bit; None: all may."""
    acting: Sequence[Acting | None] | None = None
    """By group, which of those its edits act on; None: none."""


@dataclass
class StackSites(Sites):
    """Sites of requests that differ in where they read and write: all columns, and by rule those of each."""

    by_position: Mapping[tuple[Any, ...], Sites | None] = field(default_factory=dict)
    """By `Kind.position`; None where that rule neither reads nor writes in this pass."""

    def to(self, device: torch.device) -> Sites:
        """Same columns on `device`."""
        if self.read.device == device:
            return self
        parts = {key: sites and sites.to(device) for key, sites in self.by_position.items()}
        return StackSites(**vars(super().to(device)), by_position=parts)


G = TypeVar("G", Group, GateGroup)


class ByKind(Intervention, Generic[G]):
    """What several requests have at one place: groups by `Kind`, ordered whichever came first."""

    made: type[G]
    """Class of the groups."""

    def __init__(self, hidden_size: int, like: Tensor) -> None:
        """Of no request yet, to compute in the type and on the device of `like`."""
        super().__init__(keep_last_dim=True)
        self._hidden_size = hidden_size
        self.register_buffer("_like", like, persistent=False)
        self._put({})

    def _put(self, groups: Mapping[Kind, G]) -> None:
        self.by_kind: dict[Kind, G] = {kind: groups[kind] for kind in sorted(groups)}
        self.groups = nn.ModuleList(self.by_kind.values())  # so that they move with this module

    def append(self, kind: Kind, names: Sequence[str], weights: Sequence[Mapping[str, Tensor]]) -> None:
        """Add requests of one kind; see `Group.append` and `GateGroup.append`."""
        group = self.by_kind[kind] if kind in self.by_kind else self.made(kind, self._hidden_size)
        group.append(names, weights, self.get_buffer("_like"))
        self._put({**self.by_kind, kind: group})

    def remove(self, name: str) -> None:
        """Take a request out, if it is here."""
        for group in self.by_kind.values():
            if name in group.names:
                group.remove(name)
        self._put({kind: group for kind, group in self.by_kind.items() if group.names})


class StackedIntervention(ByKind[Group]):
    """h + sum over requests of w_i R_i (W_i h + b_i - R_i^T h), every term of the same h.

    The weights w_i come from the requests' gates by a rule of `grun.method.stack.combination`. A gate below the
    threshold counts as shut. Nothing here is trained.
    """

    made = Group

    def __init__(self, hidden_size: int, like: Tensor, rule: str, threshold: float | None) -> None:
        """As `ByKind`; `rule` is a name in `grun.method.stack.combination.RULES`."""
        super().__init__(hidden_size, like)
        self.rule = rule
        self.threshold = threshold

    @property
    def names(self) -> list[str]:
        """Requests, in the order in which their gates are given back."""
        return [name for group in self.by_kind.values() for name in group.names]

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
            if opening is None or any(group.gates is not None for group in self.by_kind.values()):
                decision = self._decide(hidden, seen, sites, carry, opening)
                found = GatedOutput(output=None, gate=decision.widest, opening=decision.in_force)
            else:  # gates for all edits say how every edit here is weighted, and their reader keeps what is in force
                decision = self._decided_once(hidden, seen, sites, opening)
                found = GatedOutput(None, gate=decision.widest, opening=decision.in_force, carry=decision.widest[:, :0])
            if decision.acting is None:
                return found
            flat, tokens = hidden.flatten(0, 1), decision.tokens
            here = flat if tokens is None else flat[tokens]
            change = torch.zeros_like(here)
            for group, acting in zip(self.by_kind.values(), decision.acting, strict=True):
                if acting is not None:
                    group.add_change(change, here, acting)
        edited = (here + change).to(base.dtype)
        if tokens is None:
            found.output = edited.view_as(base)
        else:
            found.output = base.flatten(0, 1).index_put((tokens,), edited).view_as(base)
        return found

    def widen(self, states: Tensor) -> torch.dtype:
        """As of every intervention; all that is held here is of one type."""
        like = self.get_buffer("_like")
        if states.dtype.itemsize > like.dtype.itemsize:
            self.to(states.dtype)
        return self.get_buffer("_like").dtype

    def _decided_once(self, hidden: Tensor, seen: Tensor, sites: Sites | None, opening: Openings) -> Decision:
        """What gates for all edits mean, found out once a pass for all blocks with the same requests."""
        places = tuple((kind, group.places and tuple(group.places)) for kind, group in self.by_kind.items())
        key = (self.rule, self.threshold, places, hidden.device, hidden.dtype)
        if key not in opening.decided:
            opening.decided[key] = self._decide(hidden, seen, sites, None, opening)
        found: Decision = opening.decided[key]
        return found

    def _decide(
        self, hidden: Tensor, seen: Tensor, sites: Sites | None, carry: Tensor | None, opening: Openings | None
    ) -> Decision:
        groups = list(self.by_kind.values())
        counts = [len(group.names) for group in groups]
        carried = [None] * len(groups) if carry is None else carry.split(counts, dim=-1)
        found = [_read(group, hidden, seen, sites, part, opening) for group, part in zip(groups, carried, strict=True)]
        read_by, opened, written = zip(*found, strict=True)
        widest, in_force = torch.cat(read_by, dim=2).amax(dim=2), torch.cat(opened, dim=2)
        is_open = enough(groups, in_force, self.threshold)
        if is_open is not None and not bool(is_open.any()):
            return Decision(widest, in_force)
        masks = [part.expand(*hidden.shape[:2], count) for part, count in zip(written, counts, strict=True)]
        mask = torch.cat(masks, dim=2)
        if is_open is not None:
            mask = mask & is_open
            if not bool(mask.any()):
                return Decision(widest, in_force)
        at_written = in_force.expand(-1, hidden.shape[1], -1) if in_force.shape[1] == 1 else in_force
        weights = edit_weights(at_written, mask, self.rule).flatten(0, 1)
        tokens = None if is_open is None else mask.any(dim=2).flatten().nonzero()[:, 0]
        if tokens is not None:
            weights = weights[tokens]
        return Decision(widest, in_force, tokens, [Acting.of(part) for part in weights.split(counts, dim=1)])


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
        read, in_force = given.by_kind[group.kind]
        if group.places is None:
            return read, in_force
        return read[..., group.places], in_force[..., group.places]

    if not isinstance(sites, StackSites):
        logits, opening = opened(sites, seen)
        return logits, opening, logits.new_ones(1, 1, 1, dtype=torch.bool)
    own = sites.by_position[group.kind.position]
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
