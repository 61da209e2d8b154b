"""Other answers to forget questions, drawn from the model itself before it is changed: what `altpo` prefers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grun.data.rows import Row
from grun.data.templates import Template, encode, encode_prompt
from grun.evaluation.generation import Draw, generate_answers
from grun.runtime.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ASKED = (
    "Question: {question}\nAnswer: {answer}\nInvent another answer to this question, one that sounds as plausible and "
    "states other facts than this one. Write the invented answer alone."
)
"""How the model is asked for an alternate; published prompts differ by model, and mean this."""
BATCH = 32
"""Prompts that are answered at once."""


def draw_alternates(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Row],
    *,
    count: int,
    seed: int,
) -> list[list[str]]:
    """`count` other answers to each row, at temperature 1, drawn anew in each run: nothing of them is kept.

    None has more tokens than the longest answer of `rows`. A draw that is empty, or the answer itself, gives way to
    another one of the same row; where there is no other, the row's own answer stands, from which nothing is learned.
    """
    prompts = [
        encode_prompt(template, tokenizer, ASKED.format(question=row.prompt, answer=row.completion), row.earlier)
        for row in rows
    ]
    longest = max(len(encode(template, tokenizer, row.prompt, row.completion).answer_ids) for row in rows)
    asked = [prompt for prompt in prompts for _ in range(count)]
    draws = [Draw(seed, number, 1.0) for _ in rows for number in range(count)]
    with progress("drawing alternate answers", len(asked)) as advance:
        found = generate_answers(
            base, tokenizer, asked, BATCH, longest, int(tokenizer.pad_token_id), advance, draw=draws
        )
    texts = [one.text for one in found]
    drawn = [texts[start : start + count] for start in range(0, len(texts), count)]
    chosen = [_other(row.completion, texts) for row, texts in zip(rows, drawn, strict=True)]
    if same := sum({*texts} == {row.completion} for row, texts in zip(rows, chosen, strict=True)):
        log.warning("%d of %d forget rows have no alternate answer: the model gave none but their own", same, len(rows))
    return chosen


def _other(answer: str, drawn: Sequence[str]) -> list[str]:
    """As many texts as were drawn, all of them other than the answer where any is."""
    fine = [text for text in drawn if text and text.casefold() != answer.strip().casefold()] or [answer]
    return [fine[number % len(fine)] for number in range(len(drawn))]
