"""Fine-tuning of all weights, as a parametrization."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from baselines.tensors import Trained
from grun.config.options import MethodConfig, UnlearnConfig
from grun.data import templates
from grun.data.encoding import Batch
from grun.data.templates import Template
from grun.errors import ConfigError, ModelError
from grun.method.parametrization import StepOutput
from grun.method.plain import run_plain
from grun.method.precision import Masters
from grun.runtime import sharding


class Full:
    """All weights of the model, but the LM head where `method.full.freeze_head` says so.

    They are held in float32, and so is the copy of the untouched ones that `keep_reference` makes; both are computed
    with alike, so that at the start the model is its reference exactly.
    """

    model: PreTrainedModel
    module: nn.Module

    def __init__(self, config: MethodConfig, *, precision: str = "auto") -> None:
        """`config.full` applies; `precision` is that of forward passes, see `grun.method.precision`."""
        self._options = config.full
        self._precision = precision
        self._template: Template | None = None
        self._untouched: dict[str, Tensor] | None = None

    @classmethod
    def make(cls, config: UnlearnConfig, quirks: Sequence[str]) -> Self:
        """See `grun.method.parametrization.Parametrization`; no quirk concerns it."""
        return cls(config.method, precision=config.train.precision)

    def prepare(self, base: PreTrainedModel, template: Template | None, *, turn_ids: Sequence[int] = ()) -> None:
        """Make the weights trainable, in place.

        A frozen head that shares its weight with the embedding keeps that from training too. ConfigError if the model
        is quantized, or names no head to freeze.
        """
        self.model = base
        self._template = template
        self._masters = Masters(base, self._precision)
        base.requires_grad_(True)
        if self._options.freeze_head:
            head = base.get_output_embeddings()
            if head is None:
                raise ConfigError(f"{type(base).__name__} names no LM head; set method.full.freeze_head=false")
            head.requires_grad_(False)
        if sharding.asked_for():  # weights are cut block by block, so the blocks have to be there
            self.module = base
        else:
            self.module = Trained(dict(self.trainable_parameters()), [base])
        self.module.train(base.training)
        self._untouched = None
        self._versions = self._counts_of_changes()

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters that are not frozen."""
        named = self.model.named_parameters()
        return ((name, parameter) for name, parameter in named if parameter.requires_grad)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Run with the untouched weights in place of the trained ones, without dropout; only pointers are exchanged.

        ModelError if the weights have changed and `keep_reference` was not called before.
        """
        if self._untouched is None and self._counts_of_changes() != self._versions:
            raise ModelError("the untouched weights are gone: keep_reference() must be called before training")
        untouched = self._untouched or {}
        training = self.model.training
        trained = {name: parameter.data for name, parameter in self.trainable_parameters()}
        try:
            for name, weights in untouched.items():
                self.model.get_parameter(name).data = weights
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)
            for name in untouched:
                self.model.get_parameter(name).data = trained[name]

    def keep_reference(self) -> str:
        """Copy the weights that are trained."""
        self._untouched = {name: parameter.detach().clone() for name, parameter in self.trainable_parameters()}
        size = sum(weights.nbytes for weights in self._untouched.values())
        return f"a second copy of the trained weights is kept ({size / 1e9:.2f} GB) and run in every step"

    def run(self, batch: Batch, hidden: Collection[int] = ()) -> StepOutput:
        """One forward pass."""
        with self._masters.forward():
            return run_plain(self.model, batch, hidden)

    def save(self, folder: Path) -> None:
        """Write the model as transformers does, in the type it came in, with the template."""
        with self._masters.as_stored():
            self.model.save_pretrained(folder)
        if self._template is not None:
            templates.store(self._template, folder)

    def load(self, folder: Path, base: PreTrainedModel) -> None:
        """Copy saved weights into `base`; they become what is untouched."""
        saved = type(base).from_pretrained(folder)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                parameter.copy_(saved.get_parameter(name))
        self.prepare(base, templates.load(folder))

    def _counts_of_changes(self) -> list[int]:
        """How often each trained weight was changed in place, as torch counts it for its own checks."""
        return [parameter._version for _, parameter in self.trainable_parameters()]
