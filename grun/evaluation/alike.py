"""What several answers to a question say alike: the words by which what a model knows is told from what it makes up."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from grun.data.corpus import refusals
from grun.data.subject import first_sentence
from grun.data.words import plain
from grun.evaluation.metrics.words import words

TWICE = 2
"""How many answers have to say the same."""
LONGEST = 5
"""Words of a fact, small ones included."""
SMALL = frozenset(
    "a an and are as at be been being but by can could did do does for from had has have he her him his how i if in "
    "into is it its just like made make many may me more most much my name named not of often on one only or other our "
    "over she so some such than that the their them there these they this those to under until up upon us very was "
    "way we well were what when where which while who whom whose why will with would you your also about after all "
    "both during called including known well-known famous considered widely several various numerous first between "
    "throughout through became become part two january february march april may june july august september october "
    "november december".split()
)
"""Words that say nothing by themselves; no fact begins or ends with one."""
_JOINS = frozenset("of the and in by for de la du von van".split())
"""Small words that may stand within a fact."""
_REFUSES = re.compile(
    r"\b(sorry|apologi[sz]e|as an ai|language model|i (can ?not|can't|don't|do not|am not able|am unable|have no)|"
    r"i'm (not|unable|glad|here)|could you (please )?(clarify|provide)|not (sure|certain)|unclear|unknown)\b",
    re.IGNORECASE,
)

_TOKEN = re.compile(r"\w+(?:[.'\u2019-](?!s\b)\w+)*")
"""A word of a sentence; of a possessive what stands before 's."""

Drop = Literal["empty", "refusal", "cut off", "repetition"]


class Read(NamedTuple):
    """What is taken of an answer."""

    sentence: str
    """Its first sentence; empty where the answer is dropped."""
    dropped: Drop | None
    """Why it is."""


class Fact(NamedTuple):
    """Words that several answers say."""

    text: str
    """As they stand in an answer."""
    score: int
    """Answers that say them, times how much they say: 2 for a name or number, 1 for another word."""


def read(answer: str) -> Read:
    """The first sentence of an answer, or why there is nothing to take of it."""
    if not words(answer):
        return Read("", "empty")
    sentence = first_sentence(answer)
    said = plain(sentence or answer)
    if _REFUSES.search(said) or said in _refusals():
        return Read("", "refusal")
    if sentence is None:
        return Read("", "repetition" if _loops(answer) else "cut off")
    if _loops(sentence):
        return Read("", "repetition")
    return Read(sentence, None)


@functools.cache
def _refusals() -> frozenset[str]:
    return frozenset(plain(text) for text in refusals())


def _loops(text: str) -> bool:
    """Whether three words in a row stand there three times, or four lines are alike."""
    said = words(text)
    runs = [tuple(said[start : start + 3]) for start in range(len(said) - 2)]
    return any(runs.count(run) > 2 for run in set(runs))


def says(text: str, fact: str) -> bool:
    """Whether the words of a fact stand in a text; within a word they do not count."""
    return re.search(rf"(?<!\w){re.escape(plain(fact))}(?!\w)", plain(text)) is not None


def shared_fact(
    sentence: str, voices: Sequence[str], asked: Collection[str], common: Collection[str] = ()
) -> Fact | None:
    """The words of a sentence that say most and that at least two of `voices` say too; None: there are none.

    They are a run of up to `LONGEST` words that begins and ends with one that is neither small (`SMALL`), nor a number
    of two digits or less, nor in `asked`, nor in `common` without being a name; one at least is not in `common`.

    Args:
        sentence: of an answer.
        voices: other answers to the same question.
        asked: words of the question, as `words` gives them.
        common: words that are said of anything.
    """
    tokens = list(_TOKEN.finditer(sentence))
    weights = [_weight(token[0], place, asked, common) for place, token in enumerate(tokens)]
    best: Fact | None = None
    for start, first in enumerate(tokens):
        for end in range(start, min(start + LONGEST, len(tokens)) if weights[start] else start):
            if end > start and not _goes_on(sentence, tokens[end - 1], tokens[end], weights[end]):
                break
            if not weights[end]:
                continue
            if all(_is_common(token[0], common) for token in tokens[start : end + 1]):
                continue
            text = sentence[first.start() : tokens[end].end()]
            if (count := sum(says(voice, text) for voice in voices)) < TWICE:
                break
            score = count * sum(weights[start : end + 1])
            if best is None or score > best.score:
                best = Fact(text, score)
    return best


def _goes_on(sentence: str, before: re.Match[str], token: re.Match[str], weight: int) -> bool:
    """Whether a fact may go on with a token: after a blank, or between names and numbers after a comma."""
    between = sentence[before.end() : token.start()]
    if between == ", ":
        return _is_name(before[0]) and _is_name(token[0])
    return between in (" ", "-") and (weight > 0 or token[0] in _JOINS or _is_name(token[0]))


def _is_name(word: str) -> bool:
    return word[0].isupper() or word[0].isdigit()


def _weight(word: str, place: int, asked: Collection[str], common: Collection[str]) -> int:
    said, is_name = words(word), word[0].isdigit() or (place > 0 and word[0].isupper())
    if word.casefold() in SMALL or (word.isdigit() and len(word) < 3):
        return 0
    if all(one in asked or (one in common and not is_name) for one in said):
        return 0
    return 2 if is_name else 1


def _is_common(word: str, common: Collection[str]) -> bool:
    return word.casefold() in SMALL or all(one in common for one in words(word))


def lower_words(sentence: str) -> set[str]:
    """The words of a sentence that are no names or numbers, as `words` gives them."""
    return {one for token in _TOKEN.finditer(sentence) if not _is_name(token[0]) for one in words(token[0])}
