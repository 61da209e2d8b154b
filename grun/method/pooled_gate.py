"""One gate for all edits, which reads pooled states of blocks at or below the lowest edited one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grun.errors import ModelError
from grun.method.gate_state import GateState
from grun.method.gating import openings
from grun.method.pooled_sites import PLACES, PooledSites
from pyvene_custom import Intervention
from pyvene_custom.model import Pass

KEY = "pooled"
"""What its logits go by among those that a cache keeps."""


class PooledGate(Intervention):
    """A gate on the features of several blocks, one after another; see `grun.method.pooling` for what they are.

    It is computed once a pass, in the type of its parameters, with autocast off. Where it lies above an edit of
    another request that is in force (`method.beside`), it reads what that one wrote.
    """

    def __init__(self, gate: nn.Module, blocks: Sequence[int], pool: str) -> None:
        """`gate`: features [..., size] -> logit [..., 1]; `blocks` ascend."""
        super().__init__(keep_last_dim=True)
        self.gate = gate
        self.blocks = tuple(blocks)
        self.pool = pool

    @property
    def block(self) -> int:
        """The highest block that is read, by which the gate goes among those of blocks."""
        return self.blocks[-1]

    @property
    def last_layer(self) -> nn.Linear | None:
        """The layer that gives the logit; None where the gate has none."""
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return layers[-1] if layers else None

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features [batch, positions read, ...], as its pool gives them: [batch, positions read]."""
        dtype = self.widen(features)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.gate(features.to(dtype)).squeeze(-1)
        return logits

    def read(self, block: int, hidden: Tensor, running: Pass) -> None:
        """See `pyvene_custom.model.Reader`."""
        sites = running.sites
        assert isinstance(sites, PooledSites)
        if not running.again:
            sites.take(block, hidden, self.pool)
        if block != self.block:
            return
        logits, opening = self._opened(sites, hidden)
        running.gates[block], running.openings[block] = logits, opening
        if not running.again:
            running.kept[KEY] = opening.detach()
            if sites.places is not None:
                running.kept[PLACES] = sites.places.to(torch.float32)  # as what else is kept
            # Without its graph, which leads to nothing that sites may hold; for blocks that run again.
            sites.given[KEY] = logits.detach(), opening.detach().requires_grad_(opening.requires_grad)

    def opening(self, running: Pass, device: torch.device) -> Tensor:
        """See `pyvene_custom.model.Reader`."""
        found = running.openings.get(self.block)
        if found is None:  # a block runs again without the one that was read
            sites = running.sites
            assert isinstance(sites, PooledSites)
            found = sites.given[KEY][1]
            if torch.is_grad_enabled() and not found.requires_grad:  # no gradient was wanted the first time
                found = self._opened(sites, found)[1]
        return found.to(device)

    def along(self, memory: GateState, row: int) -> Tensor:
        """Logits that the gate would give at each token of a row, were it asked there: [columns]."""
        return torch.cat([self(features)[0] for features in memory.along(row, self.blocks, self.pool)])

    def _opened(self, sites: PooledSites, like: Tensor) -> tuple[Tensor, Tensor]:
        """Logits where the gate is asked, and those in force, where the sites are; `like` has as many rows."""
        home, carry = sites.read.device, sites.carry.get(KEY)
        if not sites.read.shape[1] and carry is not None:  # decided before this pass
            return carry[:, :0], carry
        if not sites.read.shape[1]:
            logits = torch.zeros(len(like), 0, dtype=self.widen(like), device=home)
        elif not sites.features:
            raise ModelError(
                "a pooled gate whose inputs have gradients cannot be read again in the backward pass; leave gradient "
                "checkpointing out"
            )
        else:
            logits = self(sites.joined(self.blocks, self.pool)).to(home)
        return logits, openings(logits, sites, carry, "none")
