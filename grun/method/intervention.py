"""Gate times edit at one block, as a pyvene intervention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from grun.method.adapter import AdapterConfig
from grun.method.edits import EDITS
from grun.method.gate import make_gate, set_bias
from grun.method.gating import GaussianNoise, drawn, openings
from grun.method.pooled_gate import PooledGate
from grun.method.stack.stacked import StackedIntervention
from pyvene_custom import GatedOutput, Intervention, Sites


class GatedIntervention(Intervention):
    """h + sigmoid(g(h)) * edit(h), or h + edit(h) without a gate.

    All arithmetic is in the type of the parameters (float32, float64 on a float64 base, never less) with autocast off,
    because a gate probability in bfloat16 rounds to exactly 1 above a logit of 6.2 and its gradient dies. The gate is
    reported as a logit for the same reason.

    Source: GRUN, arXiv 2502.17823.
    """

    def __init__(
        self,
        edit: nn.Module,
        gate: nn.Module | None,
        *,
        dropout: float = 0.0,
        dropout_on_hidden: bool = False,
        accumulate: str = "none",
    ) -> None:
        """Combine `edit`, hidden state [..., hidden size] -> change of it, and `gate`, the same -> logit [..., 1].

        Without a gate the edit acts in full. For the options see `AdapterConfig`.
        """
        super().__init__(keep_last_dim=True)
        self.edit = edit
        self.gate = gate
        self.dropout = dropout
        self.dropout_on_hidden = dropout_on_hidden
        self.accumulate = accumulate
        self.threshold: float | None = None
        self.row_seeds: Sequence[int] | None = None
        """For each row of a pass the number that its dropout is drawn from; None: torch's generator."""
        self.earlier: StackedIntervention | None = None
        """Edits of other requests at this block, in force with this one."""

    def forward(
        self,
        base: Tensor,
        source: Tensor | None = None,
        subspaces: Any = None,
        *,
        read: Tensor | None = None,
        sites: Sites | None = None,
        carry: Tensor | None = None,
        opening: Tensor | None = None,
    ) -> GatedOutput:
        """Edit the states `base` [batch, positions written, hidden size].

        Args:
            base: hidden states where the edit is written.
            source: unused (pyvene's interface).
            subspaces: unused (pyvene's interface).
            read: hidden states the gate reads, [batch, positions read, hidden size]; None: `base`.
            sites: where this pass is read and written.
            carry: logit in force at the last token of the passes before, [batch, 1]; with `earlier`, of its requests
                too, [batch, 1, 1 + requests].
            opening: logit in force of a gate for all edits, [batch, positions read or 1]; None: this edit has its own.

        One position read goes with any number written; else they are the same positions.
        """
        dtype = self.widen(base)
        own, others = carry, None
        if self.earlier is not None and carry is not None:
            own, others = (carry[..., 0], carry[..., 1:]) if self.gate is not None else (None, carry)
        with torch.autocast(base.device.type, enabled=False):
            hidden = base.to(dtype)
            seen = hidden if read is None or read is base else read.to(dtype)
            change = self.edit(hidden)
            result = GatedOutput(output=None)
            if self.gate is not None:
                result.gate = self.gate(seen).squeeze(-1)  # [batch, positions read]
                result.opening = opening = openings(result.gate, sites, own, self.accumulate)
            if opening is not None:
                change = torch.sigmoid(opening).unsqueeze(-1) * change
            edited = self._dropped(hidden + change) if self.dropout_on_hidden else hidden + self._dropped(change)
            is_open = None
            if opening is not None and self.threshold is not None and not self.training:
                is_open = (torch.sigmoid(opening) >= self.threshold).unsqueeze(-1)
            shut: Tensor | None = None  # what stands where this request's gate is shut; None: the state as it is
            if self.earlier is not None:
                before = self.earlier(hidden, read=seen, sites=sites, carry=others)
                result.carry = before.opening
                if result.opening is not None:
                    result.carry = torch.cat((result.opening[..., None], before.opening), -1)
                if before.output is not None:
                    shut = before.output.to(base.dtype)
                    edited = edited + (before.output - hidden)
        if is_open is None:
            result.output = edited.to(base.dtype)
        elif bool(is_open.any()):
            result.output = torch.where(is_open, edited.to(base.dtype), base if shut is None else shut)
        else:
            result.output = shut
        return result

    def rests(self, opening: Tensor, known: dict[Any, bool]) -> bool:
        """Whether a gate for all edits leaves nothing to do here, bit for bit: no row opens it.

        `known` are answers of this pass by threshold, to which this one is added.
        """
        if self.gate is not None or self.earlier is not None or self.threshold is None or self.training:
            return False
        if self.threshold not in known:
            known[self.threshold] = not bool((torch.sigmoid(opening) >= self.threshold).any())
        return known[self.threshold]

    def draw_from(self, seeds: Sequence[int] | None) -> None:
        """Let dropout, and noise in the gate, be a function of one number for each row; None: of torch's generator."""
        self.row_seeds = seeds
        if self.gate is not None:
            draw_noise_from(self.gate, seeds)

    def _dropped(self, values: Tensor) -> Tensor:
        """Dropout of `values` [batch, positions, hidden size]; with row seeds the same wherever a row stands."""
        if not self.training or not self.dropout:
            return values
        if self.row_seeds is None:
            return nn.functional.dropout(values, self.dropout)
        kept = drawn(torch.rand, self.row_seeds, *values.shape[1:]).to(values.device) >= self.dropout
        return values * kept / (1 - self.dropout)


def draw_noise_from(gate: nn.Module, seeds: Sequence[int] | None) -> None:
    """Let noise in a gate be a function of one number for each row; None: of torch's generator."""
    for module in gate.modules():
        if isinstance(module, GaussianNoise):
            module.row_seeds = None if seeds is None else [seed + 1 for seed in seeds]  # not dropout's draws


def new_gate(config: AdapterConfig) -> nn.Module | None:
    """Newly initialized gate: of one block, or the one for all edits."""
    gate = make_gate(config.gate, config.gate_size, config.gate_pool)
    if gate is not None and config.gate_bias is not None:
        set_bias(gate, config.gate_bias)
    return gate


def pooled_gate(config: AdapterConfig) -> PooledGate | None:
    """Newly initialized gate for all edits; None where each edit has its own."""
    if config.gate_blocks is None:
        return None
    gate = new_gate(config)
    assert gate is not None  # `AdapterConfig.check`
    return PooledGate(gate, config.gate_blocks, config.gate_pool)


def gated_intervention(config: AdapterConfig) -> GatedIntervention:
    """Newly initialized edit of one block, and gate, but for one that all edits share."""
    activation = None if config.activation is None else ACT2FN[config.activation]
    gate = new_gate(config) if config.gate_blocks is None else None
    edit = EDITS.get(config.edit)(config.hidden_size, config.rank, activation)
    return GatedIntervention(
        edit,
        gate,
        dropout=config.dropout,
        dropout_on_hidden=config.dropout_on_hidden,
        accumulate=config.gate_accumulate,
    )
