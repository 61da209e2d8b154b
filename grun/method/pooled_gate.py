"""One gate for all edits, which reads pooled states of blocks at or below the lowest edited one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from grun.errors import ModelError
from grun.method.gating import openings
from grun.method.pooling import PooledSites, pooled_at
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

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features [batch, positions read, size]: [batch, positions read]."""
        dtype = self.widen(features)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.gate(features.to(dtype)).squeeze(-1)
        return logits

    def joined(self, features: Mapping[int, Tensor]) -> Tensor:
        """Features by block, each [batch, positions read, feature size], as those of the gate."""
        home = features[self.block].device
        return torch.cat([features[block].to(home) for block in self.blocks], dim=-1)

    def read(self, block: int, hidden: Tensor, running: Pass) -> None:
        """See `pyvene_custom.model.Reader`."""
        sites = running.sites
        assert isinstance(sites, PooledSites)
        sites.states[block] = hidden
        if sites.read.shape[1]:
            before = None if sites.memory is None else sites.memory.summary(block, self.pool)
            asked = None if sites.everywhere else sites.read.to(hidden.device)
            turns = sites.turns.to(hidden.device)
            sites.features[block], summary = pooled_at(hidden, turns, before, asked, self.pool)
            if asked is None:
                sites.summaries[block] = summary
        if block != self.block:
            return
        home = sites.read.device
        asked_for = sites.read.shape[1] > 0
        logits = self(self.joined(sites.features)).to(home) if asked_for else self._nothing(hidden, home)
        opening = openings(logits, sites, sites.carry.get(KEY), "none")
        running.gates[block], running.openings[block] = logits, opening
        running.kept[KEY] = opening.detach()

    def opening(self, running: Pass) -> Tensor:
        """See `pyvene_custom.model.Reader`."""
        if not running.again:
            return running.openings[self.block]
        sites = running.sites
        assert isinstance(sites, PooledSites)
        if sites.read.shape[1] and not sites.features:
            raise ModelError(
                "a pooled gate whose inputs have gradients cannot be read again in the backward pass; leave gradient "
                "checkpointing out"
            )
        logits = self(self.joined(sites.features)).to(sites.read.device)
        return openings(logits, sites, sites.carry.get(KEY), "none")

    def _nothing(self, hidden: Tensor, home: torch.device) -> Tensor:
        """Logits of no position."""
        return torch.zeros(len(hidden), 0, dtype=self.widen(hidden), device=home)
