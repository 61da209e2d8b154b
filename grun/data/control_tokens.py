"""Tokenizing text that a template and a user wrote together, with control tokens only where the template wrote them.

Control tokens are the tokenizer's special tokens, and the added tokens that stand in the template (<think>). Text of a
user or of a data set that spells one is tokenized as ordinary text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Part(NamedTuple):
    """A piece of the rendered text."""

    text: str
    written: bool
    """Whether the template wrote it, so that control tokens in it are meant."""


class ControlTokens(NamedTuple):
    """A tokenizer's control tokens."""

    pattern: re.Pattern[str] | None
    """Finds them in a text, longest first; None: there are none."""
    ids: dict[str, int]
    special: frozenset[str]
    """Those that `split_special_tokens` leaves as text."""
    eats_left: frozenset[str]
    """Those that swallow blanks before them."""
    eats_right: frozenset[str]
    start: list[int]
    """What the tokenizer puts before every text: nothing, a start token, or several tokens."""


def find_control_tokens(tokenizer: PreTrainedTokenizerBase, written: str) -> ControlTokens:
    """The tokenizer's control tokens, where `written` is the text of the template."""
    return _find(tokenizer, (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id), written)


@functools.lru_cache(maxsize=8)
def _find(tokenizer: PreTrainedTokenizerBase, state: tuple[object, ...], written: str) -> ControlTokens:
    """`state` is in the cache's key only, since a tokenizer can be changed."""
    added = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items() if token.content}
    special = {content for content, (_, token) in added.items() if token.special}
    ids = {
        content: index
        for content, (index, _) in added.items()
        if content in special or (content in written and not content.isspace())
    }
    for content, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        if content and content not in ids:
            special.add(content)
            ids[content] = index
    longest_first = sorted(ids, key=lambda content: (-len(content), content))
    return ControlTokens(
        pattern=re.compile("|".join(map(re.escape, longest_first))) if longest_first else None,
        ids=ids,
        special=frozenset(special),
        eats_left=frozenset(content for content, (_, token) in added.items() if token.lstrip),
        eats_right=frozenset(content for content, (_, token) in added.items() if token.rstrip),
        start=_start(tokenizer),
    )


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that stand before a text's own; not all of them need have a name such as `bos_token`."""
    whole, own = list(tokenizer("a")["input_ids"]), _ids(tokenizer, "a", split=False)
    for place in range(len(whole) - len(own) + 1):
        if own and whole[place : place + len(own)] == own:
            return whole[:place]
    return whole[:1] if whole[:1] == [tokenizer.bos_token_id] else []


def tokenize(parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, control: ControlTokens) -> list[int]:
    """Ids of the joined parts, with control tokens only where the template wrote them."""
    if not _spelled_by_user(parts, control):
        return _ids(tokenizer, "".join(part.text for part in parts), split=False)
    ids: list[int] = []
    pending, previous = "", ""  # ordinary text not yet tokenized, and the control token before it
    for text, token in _cut_at_control_tokens(parts, control):
        pending += text
        if token is None:
            continue
        ids += _plain_ids(_eaten(pending, previous, token, control), tokenizer, control)
        ids.append(control.ids[token])
        pending, previous = "", token
    return ids + _plain_ids(_eaten(pending, previous, "", control), tokenizer, control)


def _spelled_by_user(parts: Sequence[Part], control: ControlTokens) -> bool:
    """Whether the joined text spells a control token anywhere but inside a part that the template wrote."""
    if control.pattern is None:
        return False
    spans, position = [], 0
    for part in parts:
        if part.written:
            spans.append((position, position + len(part.text)))
        position += len(part.text)
    matches = control.pattern.finditer("".join(part.text for part in parts))
    return any(not any(start <= match.start() and match.end() <= end for start, end in spans) for match in matches)


def _cut_at_control_tokens(parts: Sequence[Part], control: ControlTokens) -> Iterable[tuple[str, str | None]]:
    """Ordinary text, and the template's control token that follows it, if any."""
    for part in parts:
        position = 0
        for match in control.pattern.finditer(part.text) if part.written and control.pattern else ():
            yield part.text[position : match.start()], match[0]
            position = match.end()
        yield part.text[position:], None


def _eaten(text: str, previous: str, following: str, control: ControlTokens) -> str:
    """The text without the blanks that the control tokens around it swallow."""
    text = text.lstrip() if previous in control.eats_right else text
    return text.rstrip() if following in control.eats_left else text


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase, control: ControlTokens) -> list[int]:
    """Ids of ordinary text, whatever it spells.

    `split_special_tokens` lets special tokens be text, but not other added tokens (<think>): those are torn apart.
    """
    for match in control.pattern.finditer(text) if control.pattern else ():
        if match[0] not in control.special and len(match[0]) > 1:
            cut = match.start() + 1
            return _plain_ids(text[:cut], tokenizer, control) + _plain_ids(text[cut:], tokenizer, control)
    return _ids(tokenizer, text, split=True)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, split: bool) -> list[int]:
    """Ids of a text without start and end token; `split`: special tokens in it are ordinary text.

    The choice is made at each call, since fast tokenizers keep the last one that was made.
    """
    if not text:
        return []
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=split, verbose=False)
    return list(encoded["input_ids"])
