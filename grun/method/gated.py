"""The gated edit as a parametrization."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from grun.config.options import MethodConfig, UnlearnConfig
from grun.data.encoding import Batch
from grun.data.templates import Template
from grun.method.model import GrunModel
from grun.method.parametrization import StepOutput
from grun.method.plain import run_plain
from grun.method.stack.stack import GrunStack

log = logging.getLogger(__name__)

OPTIONS = "blocks rank gate edit gate_bias dropout activation gate_read gate_accumulate edit_write".split()
OPTIONS += ["gate_blocks", "gate_pool", "action"]
"""Options of `MethodConfig` that `GrunModel.wrap` takes as they are."""


class Grun:
    """Gated low-rank edits on a frozen base (GRUN, arXiv 2502.17823)."""

    model: GrunModel

    def __init__(self, config: MethodConfig, *, dropout_on_hidden: bool = False) -> None:
        """`dropout_on_hidden` is the published quirk of that name."""
        self.config = config
        self.dropout_on_hidden = dropout_on_hidden
        self.answer_ids: Sequence[int] = ()
        """Token ids of the refusal of another action than edit; to be set before `prepare`."""
        self.keyword_ids: Sequence[Sequence[int]] = ()
        """The same of keywords that open the gate `keywords`."""

    @classmethod
    def make(cls, config: UnlearnConfig, quirks: Sequence[str]) -> Self:
        """See `Parametrization`."""
        return cls(config.method, dropout_on_hidden="dropout_on_hidden" in quirks)

    @property
    def module(self) -> nn.Module:
        """The edits; the frozen base is no part of it."""
        return self.model

    def prepare(self, base: PreTrainedModel, template: Template | None, *, turn_ids: Sequence[int] = ()) -> None:
        """Wrap `base` with new edits."""
        goes_on = self.config.gate_accumulate != "none" or self.config.gate_blocks is not None
        resets = self.config.gate_reset == "user_turn" and goes_on
        if resets and not turn_ids:
            log.info("the template begins a user's turn without a control token: a gate keeps what it read before it")
        beside = None
        if self.config.beside is not None:
            beside = GrunStack.from_folder(base, Path(self.config.beside).expanduser())
            beside.unwrap()
        self.model = GrunModel.wrap(
            base,
            **{option: getattr(self.config, option) for option in OPTIONS},
            dropout_on_hidden=self.dropout_on_hidden,
            answer_ids=self.answer_ids,
            keyword_ids=self.keyword_ids,
            reset_ids=turn_ids if resets else (),
            template=template,
            beside=beside,
        )
        if self.config.gate_fit == "logistic" and self.model.pooled is not None:
            self.model.pooled.requires_grad_(False)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the edits and gates."""
        return self.model.named_parameters()

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen base is its own reference."""
        with self.model.disabled(), torch.no_grad():
            yield

    def keep_reference(self) -> str:
        """Nothing to keep."""
        return "the frozen base is run a second time in every step"

    def run(self, batch: Batch, hidden: Collection[int] = ()) -> StepOutput:
        """One forward pass through the hooked base."""
        intervenable = self.model.intervenable
        before = intervenable.here
        with self.model.drawing(batch.seeds):
            output = run_plain(self.model.base, batch, hidden, prompt_lengths=batch.prompt_lengths)
        gates = intervenable.gates_since(before)
        if gates:
            output.gate_logits = gates
            output.gate_mask = intervenable.gate_mask
            if next(iter(gates.values())).shape == output.attended.shape:  # every token is read
                place = output.attended.cumsum(dim=1)
                output.gate_prompt = output.attended & (place <= batch.prompt_lengths.to(place.device).unsqueeze(1))
        return output

    def save(self, folder: Path) -> None:
        """Write the adapter."""
        self.model.save_pretrained(folder)

    def load(self, folder: Path, base: PreTrainedModel) -> None:
        """Read an adapter."""
        self.model = GrunModel.from_pretrained(base, folder)


class Reft(Grun):
    """The same edits without a gate (LoReFT, arXiv 2404.03592)."""

    def __init__(self, config: MethodConfig, *, dropout_on_hidden: bool = False) -> None:
        super().__init__(dataclasses.replace(config, gate="none"), dropout_on_hidden=dropout_on_hidden)
