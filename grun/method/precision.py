"""Numbers that all weights of a model are trained in: float32 masters, forward passes in bfloat16 where asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from grun.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Within the block new tensors are float32, whatever torch's default type was set to."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Masters:
    """The weights of a model, held in float32 while they are trained and written in the type they came in.

    A bfloat16 number has 8 bits: at a learning rate of 1e-5 most of AdamW's updates are too small to change one, and
    are lost. In float32 none is. Making this object changes the parameters of `model` in place; float32 and float64
    ones stay as they are.
    """

    def __init__(self, model: PreTrainedModel, precision: str = "auto") -> None:
        """Widen the parameters of `model`.

        `precision` is the type of forward passes: bfloat16 (by autocast), float32, or auto, which is bfloat16 where the
        model is stored in bfloat16.
        """
        self._model = model
        if getattr(model, "quantization_method", None) is not None:
            raise ConfigError("the weights of a quantized model cannot be trained; unset model.quantization")
        self._stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self.autocast = precision == "bfloat16" or (precision == "auto" and model.dtype == torch.bfloat16)
        """Whether forward passes are in bfloat16."""
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def forward(self) -> AbstractContextManager[object]:
        """A context to run the model in; what is computed from its output belongs outside."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self._model.device.type, torch.bfloat16)

    @contextlib.contextmanager
    def as_stored(self) -> Iterator[PreTrainedModel]:
        """Within the block the model has the types it came in, so that it can be saved as such."""
        masters = {name: parameter.data for name, parameter in self._model.named_parameters()}
        try:
            for name, parameter in self._model.named_parameters():
                parameter.data = parameter.data.to(self._stored[name])
            yield self._model
        finally:
            for name, parameter in self._model.named_parameters():
                parameter.data = masters[name]
