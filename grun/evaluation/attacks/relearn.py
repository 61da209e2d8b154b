"""A few steps of fine-tuning bring the rest back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from grun.data.rows import Row, evenly_spaced
from grun.evaluation.attacks.base import Access, Asked, Attack, Material
from grun.evaluation.attacks.weights import is_quantized, own_weights, put_back
from grun.evaluation.generation import base_of

if TYPE_CHECKING:
    from torch import nn

    from grun.config.options import EvaluateConfig
    from grun.loading.models import Loaded

log = logging.getLogger(__name__)

SHARE = 8
"""One forget row of so many is learned again, at least one; the others are asked."""
RETAIN_ROWS = 64
"""Retain rows that are learned at most."""
BATCH = 16
"""Rows of a step at most."""
LR_TIMES_WIDTH = 0.025
"""Learning rate of whole models times their hidden size: AdamW's best rate falls as the width grows (Yang et al. 2022,
arXiv 2203.03466). 6e-6 at 4096; at twice that, 50 steps spoil a quarter of what the demo's model knew."""
ADAPTER_LR = 4e-3
"""Learning rate of GRUN's adapters, in the range they are trained with at any width."""


class Relearn(Attack):
    """Fine-tune on a few forget rows, or on retain rows alone, and ask the plain question of the other forget rows.

    Of a GRUN or ReFT adapter its own parameters (gates and edits) train. Of every other model all weights do: beside a
    LoRA the base's, which is the same as merging it first and training what comes out. The answers' tokens count, and
    weights train in the type they have: in bfloat16 many a step is rounded away, which model.dtype=float32 avoids.

    Source: Hu et al. 2024, arXiv 2406.13356, and Lynch et al. 2024, arXiv 2402.16835 (few forget rows bring back
    others); Deeb and Roger 2024, arXiv 2410.08827 (rows that say nothing about what is asked).
    """

    access: Access = "weights"

    def __init__(self, source: Literal["forget", "retain"], steps: int) -> None:
        """`steps` of AdamW on rows of `source`."""
        self.source = source
        self.steps = steps
        self.name = f"relearn_{source}_{steps}"
        self.needs = "two forget rows or more" if source == "forget" else "retain rows with questions"

    def unfit(self, loaded: Loaded) -> str | None:
        """Whole numbers do not train, and steps of AdamW are lost or infinite in float16."""
        import torch

        from grun.method.model import GrunModel
        from grun.method.stack.stack import GrunStack

        if isinstance(loaded.model, GrunModel):
            return None
        if isinstance(loaded.model, GrunStack):
            return "needs weights that train, and those of a store of requests do not; name one request's adapter"
        if is_quantized(loaded.model):
            return "needs weights that train, and those of a quantized base do not"
        if base_of(loaded.model).dtype == torch.float16:
            return "needs weights that train, which float16 is too narrow for (model.dtype=bfloat16)"
        return None

    def rows(self, material: Material) -> list[Row]:
        """Rows that are learned."""
        if self.source == "forget":
            return evenly_spaced(material.forget, max(1, len(material.forget) // SHARE))
        return evenly_spaced(material.retain, RETAIN_ROWS)

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The plain question; nothing for a row that is learned, or where there is none to learn."""
        learned = self.rows(material)
        return [Asked(material.prompt(row.prompt or "", row.earlier), row)] if learned and row not in learned else []

    @contextlib.contextmanager
    def model(self, loaded: Loaded, config: EvaluateConfig, material: Material) -> Iterator[Any]:
        """The model after fine-tuning; after the block its weights are as before."""
        import torch

        from grun.data.encoding import encode_rows
        from grun.evaluation.attacks.fine_tuning import fine_tune
        from grun.evaluation.scoring import evaluating
        from grun.loading.models import context_length
        from grun.runtime.progress import progress

        model, tokenizer = loaded.model, loaded.tokenizer
        limit = context_length(base_of(model))
        rows = encode_rows(self.rows(material), tokenizer, material.template, limit, strict=False)
        weights, lr = trained(model)
        if any(weight.dtype == torch.bfloat16 for weight in weights):
            log.warning("%s trains in bfloat16, which rounds small steps away; model.dtype=float32 does not", self.name)
        with put_back(weights), evaluating(model):
            with progress(f"{self.name}, learning", self.steps) as advance:
                fine_tune(
                    model,
                    weights,
                    rows,
                    steps=self.steps,
                    lr=lr,
                    batch_size=BATCH,
                    micro_batch_size=config.batch_size,
                    pad_id=int(tokenizer.pad_token_id or 0),
                    seed=f"{config.seed} {self.source}",
                    advance=advance,
                )
            yield model


def trained(model: Any) -> tuple[Sequence[nn.Parameter], float]:
    """What trains of a loaded model, and its learning rate."""
    from grun.method.host import hidden_size_of
    from grun.method.model import GrunModel

    if isinstance(model, GrunModel):
        return list(model.parameters()), ADAPTER_LR
    return own_weights(model), LR_TIMES_WIDTH / hidden_size_of(model)


RELEARN_FORGET_10 = Relearn("forget", 10)
RELEARN_FORGET_50 = Relearn("forget", 50)
RELEARN_RETAIN_10 = Relearn("retain", 10)
RELEARN_RETAIN_50 = Relearn("retain", 50)
