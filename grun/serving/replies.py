"""Answers as OpenAI's API gives them: whole, or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grun.serving.bodies import ChatBody, CompletionBody
from grun.serving.engine import Piece, Told
from grun.serving.gates import Gates
from grun.serving.text import piece, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reply:
    """What all objects of one reply share."""

    def __init__(
        self, body: ChatBody | CompletionBody, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
    ) -> None:
        """`prompts`: token ids of those that `body` asks."""
        self._body, self._tokenizer, self._chat = body, tokenizer, isinstance(body, ChatBody)
        self.answers = body.n or 1
        """To each prompt; choices are numbered prompt by prompt."""
        self.prompts = [prompt for prompt in prompts for _ in range(self.answers)]
        """Of each choice."""
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._tokens = 0
        """Of all answers so far."""
        self._lengths: dict[int, int] = {}

    def whole(self, pieces: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        """The reply, of all pieces of each choice."""
        choices = []
        for index, parts in pieces.items():
            joined = Piece(
                "".join(part.text for part in parts),
                [told for part in parts for told in part.tokens],
                next((part.prompt for part in parts if part.prompt is not None), None),
                parts[-1].finish,
                next((part.reads for part in parts if part.reads is not None), None),
            )
            choice = self._choice(index, joined)
            if self._chat:
                choice["message"] = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
            choices.append(choice)
        return {**self._head(stream=False), "choices": choices, "usage": self.usage()}

    def chunk(self, index: int, new: Piece, *, first: bool, usage: bool) -> dict[str, Any]:
        """What is new of one choice."""
        choice = self._choice(index, new)
        if self._chat:
            delta = {"role": "assistant"} if first else {}
            choice["delta"] = {**delta, "content": choice.pop("text")}
        return {**self._head(stream=True), "choices": [choice], **({"usage": None} if usage else {})}

    def last_chunk(self) -> dict[str, Any]:
        """How many tokens there were."""
        return {**self._head(stream=True), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of all prompts and answers."""
        asked = sum(map(len, self.prompts)) // self.answers
        return {"prompt_tokens": asked, "completion_tokens": self._tokens, "total_tokens": asked + self._tokens}

    def _head(self, *, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._body.model}

    def _choice(self, index: int, new: Piece) -> dict[str, Any]:
        self._tokens += len(new.tokens)
        choice: dict[str, Any] = {"index": index, "text": new.text, "logprobs": None, "finish_reason": new.finish}
        if self._body.top() is not None:
            choice["logprobs"] = self._chat_logprobs(new) if self._chat else self._text_logprobs(index, new)
        if self._body.grun.gates:
            tokens = [told.choice.token for told in new.tokens]
            found = {"answer": self._gated(tokens, [told.gates for told in new.tokens])}
            if new.prompt is not None:
                found = {"prompt": self._gated(self.prompts[index], new.prompt, new.reads), **found}
            choice["grun"] = found
        return choice

    def _gated(
        self, tokens: Sequence[int], gates: Sequence[Gates], reads: Sequence[Gates] | None = None
    ) -> list[dict[str, Any]]:
        """Texts of tokens with the gates at each, and of gates that were not asked there what they would have said."""
        texts = pieces(self._tokenizer, tokens)
        found = [{"token": text, "gates": _rounded(at)} for text, at in zip(texts, gates, strict=True)]
        for one, at, would in zip(found, gates, reads or (), strict=False):
            if unasked := {name: would[name] for name in would if name not in at}:
                one["reads"] = _rounded(unasked)
        return found

    def _chat_logprobs(self, new: Piece) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = piece(self._tokenizer, token)
            return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}

        return {
            "content": [
                {**entry(token, logprob), "top_logprobs": [entry(*other) for other in top]}
                for (token, logprob, top), _ in new.tokens
            ],
            "refusal": None,
        }

    def _text_logprobs(self, index: int, new: Piece) -> dict[str, Any]:
        texts = [piece(self._tokenizer, told.choice.token) for told in new.tokens]
        offsets = []
        for text in texts:
            offsets.append(self._lengths.get(index, 0))
            self._lengths[index] = offsets[-1] + len(text)

        def top(told: Told) -> dict[str, float]:
            return {piece(self._tokenizer, token): logprob for token, logprob in told.choice.top}

        return {
            "tokens": texts,
            "token_logprobs": [told.choice.logprob for told in new.tokens],
            "top_logprobs": [top(told) for told in new.tokens],
            "text_offset": offsets,
        }


def _rounded(gates: Gates) -> Gates:
    return {name: round(value, 6) for name, value in gates.items()}
