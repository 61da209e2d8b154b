"""Fine-tuning of all weights, as a parametrization."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from grun.config import MethodConfig
from grun.data import templates
from grun.data.encoding import Batch
from grun.data.templates import Template
from grun.method.plain import run_plain
from grun.parametrization import StepOutput
from grun.precision import Masters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full:
    """All weights of the model; the untouched weights are kept beside them as the reference.

    Both are held in float32 and computed with alike, so that at the start the model is its reference exactly.
    """

    model: PreTrainedModel

    def __init__(self, config: MethodConfig, *, precision: str = "auto") -> None:
        """No option of `method` but its name applies; `precision` is that of forward passes, see `grun.precision`."""
        self._precision = precision
        self._template: Template | None = None
        self._untouched: dict[str, Tensor] = {}

    @property
    def module(self) -> nn.Module:
        """The whole model."""
        return self.model

    def prepare(self, base: PreTrainedModel, template: Template | None) -> None:
        """Make all weights trainable and keep a copy of them."""
        self.model = base
        self._template = template
        self._masters = Masters(base, self._precision)
        base.requires_grad_(True)
        self._untouched = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters."""
        return self.model.named_parameters()

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Run with the untouched weights in place of the trained ones, without dropout; only pointers are exchanged."""
        training = self.model.training
        trained = {name: parameter.data for name, parameter in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.data = self._untouched[name]
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)
            for name, parameter in self.model.named_parameters():
                parameter.data = trained[name]

    def run(self, batch: Batch, hidden: Collection[int] = ()) -> StepOutput:
        """One forward pass."""
        with self._masters.forward():
            return run_plain(self.model, batch, hidden)

    def save(self, folder: Path) -> None:
        """Write the model as transformers does, in the type it came in, with the template beside it."""
        with self._masters.as_stored():
            self.model.save_pretrained(folder)
        if self._template is not None:
            templates.store(self._template, folder)

    def load(self, folder: Path, base: PreTrainedModel) -> None:
        """Copy saved weights into `base`."""
        from safetensors.torch import load_model

        self.prepare(base, templates.load(folder))
        load_model(base, folder / "model.safetensors")
