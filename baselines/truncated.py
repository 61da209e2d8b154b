"""A forward pass that ends at one block: no later block and no LM head is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call

from grun.data.encoding import Batch
from pyvene_custom import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Reached(Exception):
    """Carries the block's output out of the model's own forward."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Truncated:
    """The output of one block of any decoder, computed by the model's own forward up to there.

    Nothing stays on the model between calls. Activations and gradients are those of a whole pass.
    """

    def __init__(self, base: PreTrainedModel, block: int) -> None:
        """`block`, 0-based, is one that `base` has."""
        self._base = base
        self._block = find_blocks(base)[1][block]

    def __call__(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden states after the block, [batch, length, hidden size], in the model's type, padding included.

        Args:
            batch: its ids and attention mask are read.
            weights: tensors by full parameter name that stand in for the model's own in this pass.
        """
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        handle = self._block.register_forward_hook(_stop)
        try:
            if weights:
                functional_call(self._base, dict(weights), (), inputs)
            else:
                self._base(**inputs)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise AssertionError("the model's forward ended without running the block")


def _stop(module: nn.Module, arguments: Any, output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)
