"""The adapter is taken off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grun.evaluation.attacks.base import Access, Material
from grun.evaluation.attacks.plain import Plain
from grun.evaluation.attacks.weights import peft_layers

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig
    from grun.loading.models import Loaded


class AdapterRemoved(Plain):
    """Ask the base without its adapter (GRUN, ReFT, LoRA).

    Nothing was removed from the weights: whoever has the base has the data. So this gives back all that the model knew
    before, by design, and is here to say so.
    """

    name = "adapter_removed"
    access: Access = "weights"

    def unfit(self, loaded: Loaded) -> str | None:
        """Full models and changed tensors have nothing to take off."""
        from grun.method.host import EditedModel

        if isinstance(loaded.model, EditedModel) or peft_layers(loaded.model):
            return None
        return "needs an adapter that can be taken off"

    @contextlib.contextmanager
    def model(self, loaded: Loaded, config: EvaluateConfig, material: Material) -> Iterator[Any]:
        """The base; the adapter acts again after the block."""
        from grun.method.host import EditedModel

        if isinstance(loaded.model, EditedModel):
            with loaded.model.disabled() as base:
                yield base
            return
        layers = peft_layers(loaded.model)
        trainable = [(parameter, parameter.requires_grad) for parameter in loaded.model.parameters()]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield loaded.model
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, was in trainable:  # PEFT makes adapters trainable that it switches on
                parameter.requires_grad_(was)


ADAPTER_REMOVED = AdapterRemoved()
