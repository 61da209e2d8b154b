"""A look at a few fixed rows of each set while unlearning goes on: monitor.jsonl in the run's folder."""

from __future__ import annotations

import logging
from typing import Any

from grun.config.options import DataConfig, EvaluateConfig
from grun.data.corpus import Corpus
from grun.data.rows import evenly_spaced
from grun.data.templates import Template
from grun.evaluation.items import answer_questions, encode_items, score_items
from grun.evaluation.measure import measure
from grun.evaluation.scoring import base_of
from grun.evaluation.shared_scoring import Subject
from grun.loading.models import context_length

log = logging.getLogger(__name__)

NOT_LOOKED_AT = ("validation", "heldout", "unknown")
"""Sets kept for the final evaluation, so that no setting is chosen by them."""
NEW_TOKENS = 32
"""Longest answer of a look, tokens."""
SHOWN = ("rouge_l", "fact_recall", "probability", "gate_mean")
"""Metrics of a look."""


class Monitor:
    """Asks a model the same rows again and again; nothing of the training is touched, its random state least."""

    def __init__(
        self, model: Any, tokenizer: Any, template: Template, corpus: Corpus, *, rows: int, max_length: int | None
    ) -> None:
        """`rows` of each set, evenly spaced."""
        self._model = model
        self._tokenizer = tokenizer
        self._config = EvaluateConfig(
            data=DataConfig(max_length=max_length), continuations=["answer"], max_new_tokens=NEW_TOKENS
        )
        self._sets = {
            name: evenly_spaced(found, rows) for name, found in corpus.sets().items() if name not in NOT_LOOKED_AT
        }
        self._items = encode_items(self._sets, tokenizer, template, context_length(base_of(model)), self._config)

    def look(self) -> dict[str, dict[str, dict[str, float]]]:
        """{"sets": metrics by set}, as they are now."""
        (table,) = score_items([Subject(self._model)], self._tokenizer, self._items, self._config)
        answer_questions(table, self._model, self._tokenizer, self._sets, self._items, self._config)
        measured = measure(table)
        for name, gate in measured.get("gate", {}).get("mean", {}).items():
            measured["sets"][name]["gate_mean"] = gate
        shown = {
            name: {metric: round(metrics[metric], 6) for metric in SHOWN if metric in metrics}
            for name, metrics in measured["sets"].items()
        }
        forget = ", ".join(f"{metric} {value:.3f}" for metric, value in shown.get("forget", {}).items())
        log.info("forget set now: %s", forget)
        return {"sets": shown}
