"""Task vectors as a parametrization: what fine-tuning on the forget set adds to the weights is subtracted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from baselines.full import Full
from grun.config.options import MethodConfig
from grun.data.templates import Template
from grun.errors import ModelError


class TaskVector(Full):
    """W - scale * (W' - W), where W' are weights W that have learned the forget set (negation of a task vector).

    Trained is W', by CE of the answers to forget (`grun.objectives.objective.learning`); W is kept beside it in
    float32 until `take_away`.

    Source: Ilharco et al. 2022, arXiv 2212.04089, section 3.
    """

    def __init__(self, config: MethodConfig, *, precision: str = "auto") -> None:
        """`config.task_vector` and `config.full` apply; for `precision` see `Full`."""
        super().__init__(config, precision=precision)
        self._scale = config.task_vector.scale

    def prepare(self, base: PreTrainedModel, template: Template | None, *, turn_ids: Sequence[int] = ()) -> None:
        """As `Full.prepare`; the weights are copied, too."""
        super().prepare(base, template, turn_ids=turn_ids)
        self.keep_reference()

    @torch.no_grad()
    def take_away(self) -> None:
        """Put the result in the place of the weights that have learned; once, or it is a ModelError."""
        if self._untouched is None:
            raise ModelError("what was learned is taken away already, or prepare() was not called")
        for name, learned in self.trainable_parameters():
            untouched = self._untouched[name]
            learned.copy_(untouched - self._scale * (learned - untouched))
        self._untouched = None
