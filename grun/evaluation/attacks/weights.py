"""Attacks with the weights: a few steps of fine-tuning, the adapter taken off, fewer bits; all is put back after."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from grun.data.rows import Row, evenly_spaced
from grun.evaluation.attacks.base import ATTACKS, Access, Asked, Attack, Material, attack
from grun.evaluation.attacks.parts import Part, linear_layers, peft_layers, put_back, training, untrainable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from grun.config.options import EvaluateConfig
    from grun.loading.adapters import Loaded

log = logging.getLogger(__name__)

SHARE = 8
"""One forget row of so many is learned again, at least one; the others are asked."""
RETAIN_ROWS = 64
"""Retain rows that are learned at most."""
BATCH_ROWS = 16
"""Rows of a step at most."""
BLOCK = 64
"""Weights that share a scale in nf4."""


class Relearn(Attack):
    """Fine-tune on a few forget rows, or on retain rows alone, and ask the plain question of the other forget rows.

    Of a GRUN or ReFT adapter its own parameters (gates and edits) train. Of every other model all weights do: with a
    LoRA the base's, which is the same as merging it first and training what comes out. The answers' tokens count, and
    weights train in the type they have: in bfloat16 many a step is rounded away, which model.dtype=float32 avoids.

    Source: Hu et al. 2024, arXiv 2406.13356, and Lynch et al. 2024, arXiv 2402.16835 (few forget rows bring back
    others); Deeb and Roger 2024, arXiv 2410.08827 (rows unrelated to what is asked).
    """

    access: Access = "weights"
    floor = True

    def __init__(self, source: Literal["forget", "retain"], steps: int) -> None:
        """`steps` of AdamW on rows of `source`."""
        self.source = source
        self.steps = steps
        self.name = f"relearn_{source}_{steps}"
        self.turn = (f"relearn_{source}", steps)
        self.needs = "two forget rows or more" if source == "forget" else "retain rows with questions"

    def unfit(self, loaded: Loaded) -> str | None:
        """A model whose part that is trained does not train."""
        return untrainable(loaded.model, part_of(loaded.model))

    def rows(self, material: Material) -> list[Row]:
        """Rows that are learned."""
        if self.source == "forget":
            return evenly_spaced(material.forget, max(1, len(material.forget) // SHARE))
        return evenly_spaced(material.retain, RETAIN_ROWS)

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The plain question; nothing for a row that is learned, or where there is none to learn."""
        learned = self.rows(material)
        return [material.ask(row)] if learned and row not in learned else []

    @contextlib.contextmanager
    def models(
        self, attacks: Sequence[Relearn], loaded: Loaded, config: EvaluateConfig, material: Material
    ) -> Iterator[Iterator[Any]]:
        """The model after the steps of each of `attacks`, fewest first: one goes on where the last one stopped.

        After the block its weights are as before.
        """
        from grun.evaluation.scoring import evaluating

        inside = training(loaded.model, part_of(loaded.model), config.seed)
        with evaluating(loaded.model), inside as (weights, lr):
            steps = self.learning(weights, lr, self.rows(material), loaded, config, material)
            yield (_after(steps, attack, loaded.model) for attack in attacks)

    def learning(
        self,
        weights: Sequence[nn.Parameter],
        lr: float,
        rows: Sequence[Row],
        loaded: Loaded,
        config: EvaluateConfig,
        material: Material,
    ) -> Iterator[int]:
        """Train `weights` on `rows`, without end; the steps taken after each."""
        import torch

        from grun.data.encoding import encode_rows
        from grun.evaluation.relearning import fine_tune
        from grun.evaluation.scoring import base_of
        from grun.loading.models import context_length

        if any(weight.dtype == torch.bfloat16 for weight in weights):
            log.warning("%s trains in bfloat16, which rounds small steps away; model.dtype=float32 does not", self.name)
        limit = context_length(base_of(loaded.model))
        return fine_tune(
            loaded.model,
            weights,
            encode_rows(rows, loaded.tokenizer, material.template, limit, strict=False),
            lr=lr,
            batch_size=BATCH_ROWS,
            micro_batch_size=config.batch_size,
            pad_id=loaded.pad_id,
            seed=f"{config.seed} {self.source}",
        )


def part_of(model: Any) -> Part:
    """What relearning trains: of GRUN and ReFT the edits, of every other model all weights but a LoRA's."""
    from grun.method.model import GrunModel

    return "adapter" if isinstance(model, GrunModel) else "all"


def _after(steps: Iterator[int], attack: Relearn, model: Any) -> Any:
    """The model, trained on until it has taken the attack's steps."""
    from grun.runtime.progress import progress

    with progress(f"{attack.name}, learning", attack.steps) as advance:
        for done in steps:
            advance(1)
            if done == attack.steps:
                break
    return model


LEARNED: dict[Literal["forget", "retain"], str] = {
    "forget": "an eighth of the forget rows",
    "retain": "retain rows alone",
}
"""What a relearning attack trains on."""
for _source, _rows in LEARNED.items():
    for _steps in (10, 50):
        _name = f"relearn_{_source}_{_steps}"
        ATTACKS.add(_name, Relearn(_source, _steps), f"fine-tuned on {_rows}, {_steps} steps")


@attack("adapter_removed")
class AdapterRemoved(Attack):
    """The adapter is taken off (GRUN, ReFT, LoRA).

    Nothing was removed from the weights: whoever has the base has the data. So this gives back all that the model knew
    before, by design, and is here to show it.
    """

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


class Quantized(Attack):
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

        from grun.evaluation.scoring import base_of
        from grun.method.host import is_quantized

        if is_quantized(base_of(loaded.model)):
            return "needs a base that is not quantized already"
        if importlib.util.find_spec("bitsandbytes") is None:
            return "needs bitsandbytes, which is not installed: pip install 'grun-unlearning[quantization]'"
        return None

    @contextlib.contextmanager
    def model(self, loaded: Loaded, config: EvaluateConfig, material: Material) -> Iterator[Any]:
        """The model with rounded weights; after the block they are as before."""
        import torch
        from transformers.pytorch_utils import Conv1D

        from grun.evaluation.scoring import base_of

        layers = linear_layers(base_of(loaded.model))
        with put_back([layer.weight for layer in layers]):
            with torch.no_grad():
                for layer in layers:
                    weight = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight  # [outputs, inputs]
                    weight.copy_(self._rounded(weight.contiguous()))
            yield loaded.model


def _int8(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    whole, scale, _ = int8_vectorwise_quant(weight.half())  # the type it takes on every device
    return int8_vectorwise_dequant(whole, scale)


def _nf4(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.float(), blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(packed, state)


for _kind, _rounded in (("int8", _int8), ("nf4", _nf4)):
    _description = f"weights of the blocks rounded to {_kind} (bitsandbytes)"
    ATTACKS.add(f"quantized_{_kind}", Quantized(_kind, _rounded), _description)
