"""Metrics: pure functions of the scored table, one number for one set, or None where it cannot be computed.

To add one, write a function `(table, name of the set) -> float | None` and register it here; `evaluation.json`,
`summary.json` and `python -m grun list metrics` then have it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from grun.evaluation.table import Table
from grun.registry import Registry

Compute = Callable[[Table, str], float | None]


@dataclass(frozen=True)
class Metric:
    """How a number is computed, and from which part of the table."""

    compute: Compute
    reads: Literal["scores", "generations", "gates"]


METRICS: Registry[Metric] = Registry("metric")

OPEN = 0.5
"""Gate probability above which a gate counts as open."""
LONGEST_RUN = 3
"""An answer that repeats one token more often than this in a row is degenerate."""


def _metric(name: str, reads: Literal["scores", "generations", "gates"], text: str) -> Callable[[Compute], Compute]:
    def decorate(compute: Compute) -> Compute:
        METRICS.add(name, Metric(compute, reads), text)
        return compute

    return decorate


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


@_metric(
    "rouge_l",
    "generations",
    "ROUGE-L recall of the greedy answer against the reference, words stemmed, mean over rows; 0 to 1, "
    "low is good on forget, high elsewhere",
)
def rouge_l(table: Table, name: str) -> float | None:
    """Share of the reference's words that the answer has in the same order (longest common subsequence).

    Source: Lin 2004, as computed by `rouge_score` with its Porter stemmer.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rows = table.generations_of(name)
    return _mean([float(scorer.score(row.reference, row.text)["rougeL"].recall) for row in rows])


@_metric(
    "fact_recall",
    "generations",
    "share of greedy answers that contain the row's key fact; 0 to 1, low is good on forget, high elsewhere",
)
def fact_recall(table: Table, name: str) -> float | None:
    """Share of answers with the key fact, letter case and white space apart; None unless every row has a fact."""
    rows = table.generations_of(name)
    if any(not row.fact for row in rows):
        return None
    return _mean([float(_plain(row.fact or "") in _plain(row.text)) for row in rows])


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


@_metric(
    "probability",
    "scores",
    "probability per token of the reference answer, exp(mean log p) with the end token, mean over rows; "
    "0 to 1, low is good on forget, high elsewhere",
)
def probability(table: Table, name: str) -> float | None:
    """Geometric mean of the answer tokens' probabilities, averaged over rows."""
    rows = [row for row in table.scores_of(name) if row.kind == "answer" and row.logp]
    return _mean([math.exp(math.fsum(row.logp) / len(row.logp)) for row in rows])


@_metric(
    "degenerate",
    "generations",
    f"share of greedy answers that are empty or repeat a word more than {LONGEST_RUN} times running; "
    "0 to 1, low is good everywhere",
)
def degenerate(table: Table, name: str) -> float | None:
    """Share of answers that are no language; words are what white space separates."""
    return _mean([float(is_degenerate(row.text)) for row in table.generations_of(name)])


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


@_metric(
    "gate_mean",
    "gates",
    "gate probability at the prompt, mean over rows and blocks; 0 to 1, high is good on forget, low elsewhere",
)
def gate_mean(table: Table, name: str) -> float | None:
    """How far the gates open on a set."""
    return _mean([row.mean for row in table.gates_of(name)])


@_metric(
    "gate_open",
    "gates",
    f"share of prompts whose mean gate is above {OPEN}; 0 to 1, high is good on forget, low elsewhere",
)
def gate_open(table: Table, name: str) -> float | None:
    """Share of a set's prompts at which the gate counts as open; off the forget set, its false positives."""
    return _mean([float(row.mean > OPEN) for row in table.gates_of(name)])


@_metric(
    "gate_auc",
    "gates",
    "area under the ROC curve: how often a forget prompt has a higher gate than a prompt of this set; "
    "0 to 1, 1 is good, 0.5 is chance",
)
def gate_auc(table: Table, name: str) -> float | None:
    """Forget prompts against the prompts of another set, by the gate's mean over blocks; None for the forget sets."""
    if name.startswith("forget"):
        return None
    return auc([row.mean for row in table.gates_of("forget")], [row.mean for row in table.gates_of(name)])


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """P(positive > negative) + P(equal) / 2 over all pairs (Mann-Whitney U / pairs); None if a side is empty."""
    if not positives or not negatives:
        return None
    ordered = sorted(negatives)
    doubled = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in positives)
    return doubled / (2 * len(positives) * len(negatives))


def set_metrics(table: Table) -> dict[str, dict[str, float]]:
    """Every metric of scores and answers, by set and name; what cannot be computed is absent."""
    metrics = {name: METRICS.get(name) for name in METRICS.names()}
    found: dict[str, dict[str, float]] = {}
    for set_name in table.sets():
        values = {name: metric.compute(table, set_name) for name, metric in metrics.items() if metric.reads != "gates"}
        found[set_name] = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    return found
