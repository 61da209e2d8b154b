"""A model to evaluate, so that several which share a base can be scored together and asked one after another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from grun.evaluation.scoring import evaluating
from grun.method.host import EditedModel
from grun.method.intervention import GatedIntervention
from grun.method.model import GrunModel
from grun.method.stack.stacked import StackedIntervention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Subject:
    """A base model as it is, or with a GRUN adapter that lies on it or is put on it when it is needed."""

    base: PreTrainedModel
    edits: Mapping[int, GatedIntervention | StackedIntervention] | None
    """Edits at the last prompt token by block, none for a base as it is; None: they act elsewhere too."""

    def __init__(self, model: Any) -> None:
        """`model` as it stands: a transformers model, one with edits, or a GrunModel that was unwrapped."""
        self._model = model
        self._on_base = not isinstance(model, EditedModel) or model.active
        if isinstance(model, EditedModel):
            self.base = model.base
            self.edits = model.edit_at() if model.rule.changes == "last_prompt" else None
        else:
            self.base, self.edits = model, {}

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block base and edits are in evaluation mode (no dropout, the gate threshold acts)."""
        with evaluating(self.base), evaluating(self._model):
            yield

    @contextlib.contextmanager
    def put_on(self) -> Iterator[Any]:
        """The whole model within the block; an adapter that was not on its base is taken off again."""
        if self._on_base:
            yield self._model
            return
        model = GrunModel(self.base, self._model.config, self._model.template)
        try:
            model.load_state_dict(self._model.state_dict())
            model.gate_threshold = self._model.gate_threshold
            yield model.eval()
        finally:
            model.unwrap()
