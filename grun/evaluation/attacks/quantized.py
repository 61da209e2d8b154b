"""The weights are rounded to 8 or 4 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from grun.evaluation.attacks.base import Access, Material
from grun.evaluation.attacks.plain import Plain
from grun.evaluation.attacks.weights import is_quantized, own_weights, put_back
from grun.evaluation.generation import base_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from grun.config.options import EvaluateConfig
    from grun.loading.models import Loaded

BLOCK = 64
"""Weights that share a scale in nf4."""


class Quantized(Plain):
    """Round the linear layers of the base's blocks to fewer bits, where they lie, and ask the plain question.

    Rounding may undo the small changes of weights that unlearning made. An adapter stays as it is (a LoRA unmerged),
    and so do embeddings, head and norms. Weights alone are rounded; products are taken in the model's own type.

    Source: Zhang et al. 2024, arXiv 2410.16454; int8 by the largest absolute value of each output row, Dettmers et al.
    2022, arXiv 2208.07339; nf4 in blocks of 64, Dettmers et al. 2023, arXiv 2305.14314.
    """

    access: Access = "weights"

    def __init__(self, kind: str, rounded: Callable[[Tensor], Tensor]) -> None:
        """`rounded` gives a weight [outputs, inputs] as it is after rounding to `kind` and back."""
        self.name = f"quantized_{kind}"
        self._rounded = rounded

    def unfit(self, loaded: Loaded) -> str | None:
        """bitsandbytes rounds, and rounded weights are not rounded again."""
        import importlib.util

        if is_quantized(loaded.model):
            return "needs a base that is not quantized already"
        if importlib.util.find_spec("bitsandbytes") is None:
            return "needs bitsandbytes, which is not installed: pip install 'grun-unlearning[quantization]'"
        return None

    @contextlib.contextmanager
    def model(self, loaded: Loaded, config: EvaluateConfig, material: Material) -> Iterator[Any]:
        """The model with rounded weights; after the block they are as before."""
        import torch
        from transformers.pytorch_utils import Conv1D

        layers = linear_layers(base_of(loaded.model))
        with put_back([layer.weight for layer in layers]):
            with torch.no_grad():
                for layer in layers:
                    weight = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight  # [outputs, inputs]
                    weight.copy_(self._rounded(weight.contiguous()))
            yield loaded.model


def linear_layers(base: Any) -> list[Any]:
    """Linear layers of the decoder blocks, without those of an adapter; transformers' Conv1D (GPT-2) among them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from pyvene_custom import find_blocks

    own = {id(weight) for weight in own_weights(base)}
    modules: Iterator[nn.Module] = find_blocks(base)[1].modules()
    return [module for module in modules if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in own]


def _int8(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    whole, scale, _ = int8_vectorwise_quant(weight.half())  # the type it takes on every device
    return int8_vectorwise_dequant(whole, scale)


def _nf4(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.float(), blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(packed, state)


INT8 = Quantized("int8", _int8)
NF4 = Quantized("nf4", _nf4)
