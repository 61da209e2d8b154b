"""What metrics see of a text in any script: its words, or its characters where a script has no spaces.

A text in ASCII is seen as `rouge_score` sees it, stems included, so published numbers hold. Beyond ASCII that package
sees nothing: it takes letters from a to z and digits alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import regex

from grun.data.words import UNSPACED, normalized, split_words

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

_REPEATED = regex.compile(rf"(\S{{0,11}}?[[{UNSPACED}]&&\p{{L}}]\S{{0,11}}?|[^\s\d]{{3,12}}?)\1{{3,}}", regex.V1)


def words(text: str) -> list[str]:
    """What `split_words` gives; English words of more than 3 letters stemmed (Porter)."""
    return [stem for word in split_words(text) for stem in (_stems(word) if word.isascii() else [word])]


def repeats(text: str) -> bool:
    """Whether a part of a word stands there more than 3 times running.

    A part is 3 to 12 characters with a letter and no digit among them, or up to 23 with one of a script without spaces.
    """
    parts = _REPEATED.finditer(normalized(text))
    return any(any(letter.isalpha() for letter in part[1]) for part in parts)


@functools.lru_cache(maxsize=2**16)
def _stems(word: str) -> list[str]:
    return _published().tokenize(word)


@functools.cache
def _published() -> DefaultTokenizer:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


def rouge_recall(reference: str, text: str) -> float | None:
    """Share of the reference's words that stand in `text` in the same order (longest common subsequence).

    None where the reference has no word, so that nothing can be said of any answer.
    Source: Lin 2004, as computed by `rouge_score` with its Porter stemmer.
    """
    if not words(reference):
        return None
    return float(_scorer(words).score(reference, text)["rougeL"].recall)


def rouge_f1(reference: str, text: str) -> float | None:
    """Harmonic mean of that recall and of its share of the text's words (ROUGE-L F1), words not stemmed.

    None where the reference has no word. Source: Lin 2004, as in MUSE (Shi et al. 2024, arXiv 2407.06460).
    """
    if not split_words(reference):
        return None
    return float(_scorer(split_words).score(reference, text)["rougeL"].fmeasure)


def rouge_union(reference: str, text: str) -> float | None:
    """Share of the reference's distinct words that sentences of `text` have in order (summary-level ROUGE-L recall).

    The words of a longest common subsequence of each sentence of the reference with each of `text`, together. Sentences
    end at full stops, words at white space; letter case and marks count. None where the reference has no sentence.
    Source: the package rouge 1.0.1, which RWKU (Jin et al. 2024, arXiv 2406.10890) scores with.
    """
    wanted, given = _sentences(reference), _sentences(text.strip())
    found = {word for sentence in wanted for other in given for word in _common(sentence, other)}
    words = {word for sentence in wanted for word in sentence}
    return len(found) / len(words) if words else None


def _sentences(text: str) -> list[list[str]]:
    return [part.split() or [""] for part in text.split(".") if part]


def _common(first: Sequence[str], second: Sequence[str]) -> Iterator[str]:
    """Words of a longest common subsequence, from the end; of several the one that goes furthest back in `second`."""
    lengths = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, j in itertools.product(range(len(first)), range(len(second))):
        longer = max(lengths[i][j + 1], lengths[i + 1][j])
        lengths[i + 1][j + 1] = lengths[i][j] + 1 if first[i] == second[j] else longer
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            yield first[i]
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1


@functools.cache
def _scorer(split: Callable[[str], list[str]]) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return split(text)

    return RougeScorer(["rougeL"], tokenizer=Words())
