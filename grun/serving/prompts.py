"""Token ids of what is asked, by the same code as in training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grun.data.chat import System, Turn
from grun.data.templates import TEMPLATES, Template, encode, encode_prompt
from grun.errors import GrunError
from grun.runtime.reading import in_one_line
from grun.serving.bodies import Message
from grun.serving.refusal import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_ids(messages: Sequence[Message], template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a conversation up to where the answer starts, or where a begun answer goes on.

    Refused with status 400 where the messages are none: a system message at most, at the beginning, then user and
    assistant by turns. A name of who speaks is not shown to the model.
    """
    texts = [message.text() for message in messages]
    roles = [message.role for message in messages]
    start = 1 if roles[0] in ("system", "developer") else 0
    expected = ["assistant" if number % 2 else "user" for number in range(len(roles) - start)]
    if roles[start:] != expected or not expected:
        raise Refused(
            400,
            "messages must be a system message at most, at the beginning, then user and assistant by turns",
            "messages",
        )
    earlier: list[System | Turn] = [System(texts[0])] if start else []
    begun = texts.pop() if roles[-1] == "assistant" else None
    said = texts[start:]
    earlier += [Turn(question, answer) for question, answer in zip(said[::2], said[1::2], strict=False)]
    try:
        if begun is None:
            return encode_prompt(template, tokenizer, said[-1], earlier)
        encoded = encode(template, tokenizer, said[-1], begun, earlier)
    except GrunError as error:
        raise Refused(400, in_one_line(error), "messages") from error
    return [*encoded.prompt_ids, *encoded.answer_ids[:-1]]


def text_ids(prompt: str | Sequence[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[int]:
    """Ids of a plain text that goes on, blanks at its end left to the answer; or ids as they are given."""
    if isinstance(prompt, str):
        return encode_prompt(TEMPLATES.get("text"), tokenizer, prompt)
    if max(prompt) >= vocabulary:
        raise Refused(400, f"prompt: token ids go up to {vocabulary - 1}", "prompt")
    return list(prompt)
