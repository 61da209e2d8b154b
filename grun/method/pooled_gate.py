"""One gate for all edits, which reads pooled states of blocks at or below the lowest edited one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grun.errors import ModelError
from grun.method.gating import openings
from grun.method.pooling import PooledSites
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

    def read(self, block: int, hidden: Tensor, running: Pass) -> None:
        """See `pyvene_custom.model.Reader`."""
        sites = running.sites
        assert isinstance(sites, PooledSites)
        sites.take(block, hidden, self.pool)
        if block != self.block:
            return
        home = sites.read.device
        logits = self(sites.joined(self.blocks, self.pool)) if sites.read.shape[1] else self._nothing(hidden)
        opening = openings(logits.to(home), sites, sites.carry.get(KEY), "none")
        running.gates[block], running.openings[block] = logits.to(home), opening
        running.kept[KEY] = opening.detach()

    def opening(self, running: Pass, device: torch.device) -> Tensor:
        """See `pyvene_custom.model.Reader`."""
        if not running.again:
            return running.openings[self.block].to(device)
        sites = running.sites
        assert isinstance(sites, PooledSites)
        if sites.read.shape[1] and not sites.features:
            raise ModelError(
                "a pooled gate whose inputs have gradients cannot be read again in the backward pass; leave gradient "
                "checkpointing out"
            )
        logits = self(sites.joined(self.blocks, self.pool)).to(sites.read.device)
        return openings(logits, sites, sites.carry.get(KEY), "none").to(device)

    def _nothing(self, hidden: Tensor) -> Tensor:
        """Logits of no position."""
        return torch.zeros(len(hidden), 0, dtype=self.widen(hidden), device=hidden.device)
