"""Where a user's turn begins, in token ids that no user can type."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from grun.data.chat import Turn
from grun.data.control_tokens import find_control_tokens
from grun.data.templates import Template, prompt_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def user_turn_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The shortest run of ids that stands before a second question of a conversation and not before an answer.

    It holds a control token of the tokenizer, so that text which spells it, being tokenized as text, is not taken for
    it. Empty where the template begins a user's turn with plain text.
    """
    parts, _ = prompt_parts(template, tokenizer, "a", [Turn("b", "c")])
    groups = [(written, "".join(part.text for part in group)) for written, group in groupby(parts, lambda p: p.written)]
    written = [text for is_written, text in groups if is_written]
    if len(written) < 3:
        return []
    before_answer, before_question = (
        list(tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]) for text in written[-3:-1]
    )
    control = set(find_control_tokens(tokenizer, f"{template.text}\n{tokenizer.chat_template}").ids.values())
    for count in range(1, len(before_question) + 1):
        ids = before_question[-count:]
        if control & set(ids) and not _stands_in(ids, before_answer):
            return ids
    return []


def _stands_in(ids: list[int], within: list[int]) -> bool:
    return any(within[start : start + len(ids)] == ids for start in range(len(within) - len(ids) + 1))
