"""The text of an answer while its tokens come one by one: whole characters, and no part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What bytes that begin a character are decoded to while the rest of them is missing."""


class AnswerText:
    """Text of the tokens so far, and how much of it may be handed on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        """`stops`: texts that end the answer and are no part of it."""
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        self._ends: list[int] = []
        """By token, length of the text up to and with it."""
        self._text = ""
        self._given = 0
        self._tokens_given = 0
        self.stopped = False
        """Whether a stop text has come."""

    def add(self, token: int) -> None:
        """One more token; after `stopped` there is none."""
        self._ids.append(token)
        whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        places = [place for stop in self._stops if (place := whole.find(stop, self._given)) >= 0]
        if places:
            self.stopped = True
            whole = whole[: min(places)]
        self._text = whole
        self._ends.append(len(whole))

    def take(self, *, last: bool) -> tuple[str, int]:
        """Text that was not handed on yet, and how many tokens it ends; all of both where no more will come."""
        end = len(self._text)
        if not last:
            end = len(self._text.rstrip(UNFINISHED))
            end -= max((_begun(self._text[self._given : end], stop) for stop in self._stops), default=0)
        text = self._text[self._given : end]
        count = len(self._ids) - self._tokens_given
        if not last:
            count = sum(length <= end for length in self._ends[self._tokens_given :])
        self._given, self._tokens_given = end, self._tokens_given + count
        return text, count


def _begun(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Texts that make up the text of the tokens: a character of several tokens stands at the last of them."""
    found, start = [], 0
    for end in range(1, len(tokens) + 1):
        text = str(tokenizer.decode(list(tokens[start:end]), skip_special_tokens=False))
        if text.endswith(UNFINISHED) and end < len(tokens):
            found.append("")
            continue
        blank = str(tokenizer.convert_ids_to_tokens(tokens[start])).startswith("\N{LOWER ONE EIGHTH BLOCK}")
        found.append(f" {text}" if blank and not text.startswith(" ") else text)
        start = end
    return found


def piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token by itself, the blank before a word included."""
    return pieces(tokenizer, [token])[0]
