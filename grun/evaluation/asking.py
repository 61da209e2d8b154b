"""A model that answers many questions, whose answers are kept on disk so that a process that was cut off goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grun.data.templates import Template, encode_prompt
from grun.evaluation.generation import Answer, Draw, generate_answers
from grun.evaluation.journal import Journal
from grun.runtime.progress import progress

LIST_TOKENS = 160
"""Longest answer where a list is asked for, tokens."""
FEW = 8
"""Questions that are asked without a bar."""


class Asking:
    """Asks in the order of its calls: the calls of a process that goes on must be those of the one before."""

    def __init__(self, model: Any, tokenizer: Any, template: Template, config: Any, folder: Path) -> None:
        """`config` gives batch_size, max_new_tokens, seed and temperature; `folder` is where answers are kept."""
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._config, self._folder = config, folder
        self._calls = 0

    def __call__(self, questions: Sequence[str], draw: int | None = None, *, lists: bool = False) -> list[str]:
        """Answers to questions: greedy ones, or those of the draw of that number; `lists` may be longer.

        Raises:
            DataError: a question leaves no room for an answer in the model's context.
        """
        config = self._config
        prompts = [encode_prompt(self._template, self._tokenizer, question) for question in questions]
        number, self._calls = self._calls, self._calls + 1
        with (
            Journal(self._folder, f"asked{number:03d}", Answer.from_json) as journal,
            progress("asking", len(prompts), shown=len(prompts) > FEW) as advance,
        ):
            answers = generate_answers(
                *(self._model, self._tokenizer, prompts, config.batch_size),
                LIST_TOKENS if lists else config.max_new_tokens,
                int(self._tokenizer.pad_token_id),
                advance,
                journal=journal,
                draw=None if draw is None else Draw(config.seed, draw, config.temperature),
            )
        return [answer.text for answer in answers]
