"""Gates for all edits of several requests: what they read is pooled once, and gates of one kind are one product."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grun.method.gate_state import GateState
from grun.method.gating import openings
from grun.method.pooled_gate import KEY
from grun.method.pooled_sites import PooledSites
from grun.method.stack.group import GateGroup, Kind
from grun.method.stack.stacked import ByKind, Openings, StackSites
from pyvene_custom import Sites
from pyvene_custom.model import Pass


class StackedGates(ByKind[GateGroup]):
    """The reader of a stack (`pyvene_custom.model.Reader`): all gates for all edits."""

    made = GateGroup

    def _put(self, groups: Mapping[Kind, GateGroup]) -> None:
        super()._put(groups)
        self.blocks = sorted({block for kind in groups for block in kind.gate_blocks})
        """Blocks that some gate reads; asked for at each block of a pass."""

    def read(self, block: int, hidden: Tensor, running: Pass) -> None:
        """See `pyvene_custom.model.Reader`."""
        if running.again:  # nothing here is trained
            return
        for kind, group in self.by_kind.items():
            sites = _sites_of(kind, running.sites)
            if block not in kind.gate_blocks or sites is None:
                continue
            sites.take(block, hidden, kind.gate_pool)
            if block == kind.gate_blocks[-1]:
                sites.given[kind] = found = self._opened(group, sites, hidden)
                running.kept[_key(kind)] = found[1].detach()

    def opening(self, running: Pass, device: torch.device) -> Openings:
        """See `pyvene_custom.model.Reader`."""
        found = {}
        for kind in self.by_kind:
            sites = _sites_of(kind, running.sites)
            if sites is not None and kind in sites.given:
                logits, in_force = sites.given[kind]
                found[kind] = logits.to(device), in_force.to(device)
        return Openings(found, running.decided)

    def along(self, memory: GateState, row: int) -> dict[str, Tensor]:
        """By request, logits that its gate would give at each token of a row, were it asked there: [columns]."""
        found: dict[str, Tensor] = {}
        for kind, group in self.by_kind.items():
            along = [self._logits(group, some)[0] for some in memory.along(row, kind.gate_blocks, kind.gate_pool)]
            found |= zip(group.names, torch.cat(along).unbind(1), strict=True)  # [columns, requests]
        return found

    def _opened(self, group: GateGroup, sites: PooledSites, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits where gates are asked, and those in force, where the sites are: [batch, positions, requests]."""
        home, kind = sites.read.device, group.kind
        carry = sites.carry.get(_key(kind))
        if not sites.read.shape[1] and carry is not None:  # decided before this pass
            return carry[:, :0], carry
        if sites.read.shape[1]:
            logits = self._logits(group, sites.joined(kind.gate_blocks, kind.gate_pool)).to(home)
        else:
            logits = torch.zeros(len(hidden), 0, len(group.names), dtype=self.widen(hidden), device=home)
        return logits, openings(logits, sites, carry, "none")

    def _logits(self, group: GateGroup, features: Tensor) -> Tensor:
        """Of features [batch, positions, ...]: [batch, positions, requests]."""
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = group.gates(features.to(self.get_buffer("_like").device, self.widen(features)))
        return logits


def _key(kind: Kind) -> str:
    """What openings of a kind go by among those that a cache keeps."""
    return f"{KEY} {kind!r}"


def _sites_of(kind: Kind, sites: Sites | None) -> PooledSites | None:
    own = sites.by_position.get(kind.position) if isinstance(sites, StackSites) else sites
    return own if isinstance(own, PooledSites) else None
