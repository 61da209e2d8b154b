"""Membership inference: do the answers of the forget set still look like training data.

Four attacks score each answer, low where it looks like training data. The area under the ROC curve compares rows of
the forget set (members) with rows that were never taught (non-members): 1 where every forget row looks more like
training data than every other row, 0.5 where nothing tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from grun.evaluation.metrics.averages import mean
from grun.evaluation.metrics.memorization import without_end
from grun.evaluation.metrics.ranking import auc
from grun.evaluation.table import ScoreRecord, Table

MEMBERS = "forget"
NON_MEMBERS = "unknown"
LOWEST = 0.4
"""Share of an answer's tokens that Min-K and Min-K++ look at."""
LEAST_VARIANCE = 1e-6
"""Floor of the variance in Min-K++, nats squared."""


def loss(logp: Sequence[float]) -> float | None:
    """Mean negative log-probability per token, end token included, nats (Yeom et al. 2018, arXiv 1709.01604)."""
    average = mean(logp)
    return None if average is None else -average


def zlib(logp: Sequence[float], compressed_bytes: int) -> float | None:
    """loss over the length of the compressed text (Carlini et al. 2021, arXiv 2012.07805, section 5.2)."""
    average = loss(logp)
    return None if average is None or compressed_bytes <= 0 else average / compressed_bytes


def min_k(logp: Sequence[float]) -> float | None:
    """Minus the mean of the lowest 40 % of log-probabilities, end token left out (Shi et al. 2024, arXiv 2310.16789).

    The number of tokens is rounded down, but at least one.
    """
    lowest = mean(sorted(logp)[: max(1, int(len(logp) * LOWEST))])
    return None if lowest is None else -lowest


def min_k_plus_plus(
    logp: Sequence[float], vocabulary_mean: Sequence[float], vocabulary_variance: Sequence[float]
) -> float | None:
    """min_k of (log p - mean) / deviation of log p over the vocabulary (Zhang et al. 2024, arXiv 2404.02936)."""
    return min_k(
        [
            (value - average) / math.sqrt(max(variance, LEAST_VARIANCE))
            for value, average, variance in zip(logp, vocabulary_mean, vocabulary_variance, strict=True)
        ]
    )


def _min_k(record: ScoreRecord) -> float | None:
    return min_k(without_end(record, record.logp))


def _min_k_plus_plus(record: ScoreRecord) -> float | None:
    per_token = (record.logp, record.vocabulary_mean, record.vocabulary_variance)
    return min_k_plus_plus(*(without_end(record, values) for values in per_token))


ATTACKS: dict[str, Callable[[ScoreRecord], float | None]] = {
    "loss": lambda record: loss(record.logp),
    "zlib": lambda record: zlib(record.logp, record.compressed_bytes),
    "min_k": _min_k,
    "min_k_plus_plus": _min_k_plus_plus,
}


def membership_scores(table: Table, name: str, attack: str) -> dict[int, float]:
    """Score of each answer of a set by row, low for members; rows that have no token to score are left out.

    Args:
        table: the scored table.
        name: the set.
        attack: a key of ATTACKS.
    """
    found = {record.index: ATTACKS[attack](record) for record in table.scores_of(name)}
    return {index: score for index, score in found.items() if score is not None}


def membership_auc(table: Table, attack: str) -> float | None:
    """AUC of an attack, forget rows being members and unknown rows not; None if the table lacks one of the sets."""
    members = membership_scores(table, MEMBERS, attack)
    others = membership_scores(table, NON_MEMBERS, attack)
    return auc(list(others.values()), list(members.values()))
