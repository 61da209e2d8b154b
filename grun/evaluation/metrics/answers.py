"""Metrics of the greedy answers: do they say what the reference says, and are they language at all."""

from __future__ import annotations

from collections.abc import Collection

from grun.evaluation.metrics.averages import mean
from grun.evaluation.metrics.registry import NO_QUIRKS, metric
from grun.evaluation.table import Table

LONGEST_RUN = 3
"""An answer that repeats one word more often than this in a row is degenerate."""


@metric(
    "rouge_l",
    "generations",
    "ROUGE-L recall of the greedy answer against the reference, words stemmed, mean over rows; 0 to 1, "
    "low is good on forget, high elsewhere",
)
def rouge_l(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of the reference's words that the answer has in the same order (longest common subsequence).

    Source: Lin 2004, as computed by `rouge_score` with its Porter stemmer.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rows = table.generations_of(name)
    return mean([float(scorer.score(row.reference, row.text)["rougeL"].recall) for row in rows])


@metric(
    "fact_recall",
    "generations",
    "share of greedy answers that contain the row's key fact; 0 to 1, low is good on forget, high elsewhere",
)
def fact_recall(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of answers with the key fact, letter case and white space apart; None unless every row has a fact."""
    rows = table.generations_of(name)
    if any(not row.fact for row in rows):
        return None
    return mean([float(says(row.text, row.fact or "")) for row in rows])


def says(text: str, fact: str) -> bool:
    """Whether `fact` stands in `text`, letter case and white space apart."""
    return _plain(fact) in _plain(text)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


@metric(
    "degenerate",
    "generations",
    f"share of greedy answers that are empty or repeat a word more than {LONGEST_RUN} times running; "
    "0 to 1, low is good everywhere",
)
def degenerate(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of answers that are no language; words are what white space separates."""
    return mean([float(is_degenerate(row.text)) for row in table.generations_of(name)])


def is_degenerate(text: str) -> bool:
    """True if there is no word in `text`, or one word stands there more than three times running."""
    words = text.split()
    run, previous = 0, None
    for word in words:
        run = run + 1 if word == previous else 1
        previous = word
        if run > LONGEST_RUN:
            return True
    return not words
