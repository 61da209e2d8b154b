"""Metrics of the greedy answers: do they give what the reference gives, and are they language at all."""

from __future__ import annotations

import re
from collections.abc import Collection

from grun.data.rows import ALTERNATIVES
from grun.data.sets import find_set
from grun.data.words import normalized, plain
from grun.evaluation.metrics.averages import mean
from grun.evaluation.metrics.registry import LOW, NO_QUIRKS, metric
from grun.evaluation.metrics.words import repeats, rouge_f1, rouge_recall, rouge_union, words
from grun.evaluation.table import Table

LONGEST_RUN = 3
"""An answer that repeats one word more often than this in a row is degenerate."""


@metric("rouge_l", "ROUGE-L", reads="generations")
def rouge_l(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of the reference's words that the greedy answer has in the same order (ROUGE-L recall, words
    stemmed), mean over rows.

    Without rows whose reference has no word; None where none is left.
    """
    found = [rouge_recall(row.reference, row.text) for row in table.generations_of(name)]
    return mean([value for value in found if value is not None])


@metric("rouge_l_f1", "ROUGE-L F1", reads="generations")
def rouge_l_f1(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """ROUGE-L F1 of the greedy answer, words not stemmed, mean over rows; of sets that are compared so alone.

    MUSE's VerbMem and KnowMem (Shi et al. 2024, arXiv 2407.06460); None of a set that does not list it.
    """
    if "rouge_l_f1" not in find_set(name).metrics:
        return None
    found = [rouge_f1(row.reference, row.text) for row in table.generations_of(name)]
    return mean([value for value in found if value is not None])


@metric("rouge_l_union", "ROUGE-L, union", reads="generations")
def rouge_l_union(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of the reference's distinct words that sentences of the greedy answer have in the same order, words as they
    are spelled, mean over rows; of sets that are compared so alone.

    RWKU's ROUGE-L recall (Jin et al. 2024, arXiv 2406.10890); None of a set that does not list it.
    """
    one = find_set(name)
    if "rouge_l_union" not in one.metrics + one.in_files:
        return None
    found = [rouge_union(row.reference, row.text) for row in table.generations_of(name)]
    return mean([value for value in found if value is not None])


@metric("fact_recall", "fact recall", reads="generations")
def fact_recall(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of greedy answers that contain the row's key fact.

    Rows of blank facts are left out; None unless every row has a fact.
    """
    rows = table.generations_of(name)
    if any(not row.fact for row in rows):
        return None
    return mean([float(says(row.text, row.fact or "")) for row in rows if plain(row.fact or "")])


def says(text: str, fact: str, *, whole_words: bool = False) -> bool:
    """Whether `fact`, or one of its alternatives, stands in `text`, both as `plain` gives them.

    Letter case, white space and vowel signs do not count. With `whole_words` (short facts such as Na or 11, which stand
    in many words and numbers) no letter or digit may stand beside it, and white space and vowel signs count.
    """
    if whole_words:
        parts = "|".join(map(re.escape, fact.split(ALTERNATIVES)))
        return re.search(rf"(?<!\w)(?:{parts})(?!\w)", text, re.IGNORECASE) is not None
    return any(plain(part) in plain(text) for part in fact.split(ALTERNATIVES))


def unread(table: Table, name: str) -> dict[str, int]:
    """How many rows of a set a metric of the answers cannot read and leaves out, by metric; without those of none.

    ROUGE-L reads no reference without a letter or digit (punctuation, emoji), fact recall no blank fact.
    """
    rows = table.generations_of(name)
    counts = {"rouge_l": sum(not words(row.reference) for row in rows)}
    if all(row.fact for row in rows):
        counts["fact_recall"] = sum(not plain(row.fact or "") for row in rows)
    return {metric: count for metric, count in counts.items() if count}


@metric("degenerate", "degenerate", reads="generations", good=LOW)
def degenerate(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of greedy answers that are empty or repeat a word, or a part of one, more than 3 times running."""
    return mean([float(is_degenerate(row.text)) for row in table.generations_of(name)])


def is_degenerate(text: str) -> bool:
    """True if there is no word in `text`, or one word stands there more than three times running.

    Words are what white space separates, bytes that are no character aside; of parts of words see `repeats`.
    """
    separated = normalized(text).replace("\N{REPLACEMENT CHARACTER}", " ").split()
    run, previous = 0, None
    for word in separated:
        run = run + 1 if word == previous else 1
        previous = word
        if run > LONGEST_RUN:
            return True
    return not separated or repeats(text)
