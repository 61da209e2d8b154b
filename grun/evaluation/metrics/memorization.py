"""How much of the reference answer the model reproduces, and whether the forget set still looks like training data.

Memorization goes token by token, the true tokens before each being given. Membership inference: four attacks score each
answer, low where it looks like training data. The area under the ROC curve compares rows of the forget set (members)
with rows that were never taught (non-members): 1 where every forget row looks more like training data than every other
row, 0.5 where nothing tells them apart. But for the loss and zlib the end token, which holds nothing of the row, is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TypeVar

from grun.data.sets import find_set
from grun.evaluation.metrics.averages import auc, mean
from grun.evaluation.metrics.registry import EXTRACTION_FLOOR, NO_QUIRKS, metric
from grun.evaluation.table import ScoreRecord, Table

T = TypeVar("T")

MEMBERS = "forget"
NON_MEMBERS = "unknown"
LOWEST = 0.4
"""Share of an answer's tokens that Min-K and Min-K++ look at."""
LEAST_VARIANCE = 1e-6
"""Floor of the variance in Min-K++, nats squared."""


def without_end(record: ScoreRecord, values: list[T]) -> list[T]:
    """One value per scored token of `record`, less that of the end token if the record has one."""
    return values[:-1] if record.ended else values


def matching_end(hit: Sequence[bool], floor: bool = False) -> float | None:
    """Share of an answer's tokens in its longest suffix of hits, 1 - k / L; None for an answer without tokens.

    `hit` is for each of the L tokens whether it is the most probable one. With `floor` it is at least 1 / L, also where
    the last token is no hit, as open-unlearning computes it.
    """
    if not hit:
        return None
    length = next((count for count, is_hit in enumerate(reversed(hit)) if not is_hit), len(hit))
    return max(length, int(floor)) / len(hit)


@metric("extraction_strength", "extraction strength", reads="scores")
def extraction_strength(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of the answer that the model completes exactly once the rest is given, mean over rows.

    Carlini et al. 2021 (arXiv 2012.07805), teacher-forced as in open-unlearning; rows without tokens left out.
    """
    floor = EXTRACTION_FLOOR in quirks
    found = [matching_end(without_end(record, record.hit), floor) for record in table.scores_of(name)]
    return mean([value for value in found if value is not None])


@metric("exact_memorization", "exact memorization", reads="scores")
def exact_memorization(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of the answer's tokens that are the most probable at their place, mean over rows.

    Tirumala et al. 2022 (arXiv 2205.10770); rows without tokens left out.
    """
    hits = [without_end(record, record.hit) for record in table.scores_of(name)]
    found = [mean([float(is_hit) for is_hit in hit]) for hit in hits]
    return mean([value for value in found if value is not None])


def loss(record: ScoreRecord) -> float | None:
    """Mean negative log-probability per token, end token included, nats (Yeom et al. 2018, arXiv 1709.01604)."""
    return -math.fsum(record.logp) / len(record.logp) if record.logp else None


@metric("text_loss", "loss of texts", reads="scores", good="high is good on forget, low elsewhere", range="0 and above")
def text_loss(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Mean negative log-probability per token of a text, end token left out, mean over texts, nats; of sets that list
    it.

    RWKU's membership inference by loss (Jin et al. 2024, arXiv 2406.10890); rows without tokens left out.
    """
    if "text_loss" not in find_set(name).metrics:
        return None
    found = [mean([-logp for logp in without_end(record, record.logp)]) for record in table.scores_of(name)]
    return mean([value for value in found if value is not None])


def zlib(record: ScoreRecord) -> float | None:
    """loss over the length of the compressed text (Carlini et al. 2021, arXiv 2012.07805, section 5.2)."""
    average = loss(record)
    return None if average is None or record.compressed_bytes <= 0 else average / record.compressed_bytes


def min_k(record: ScoreRecord) -> float | None:
    """Minus the mean of the lowest 40 % of log-probabilities, end token left out (Shi et al. 2024, arXiv 2310.16789).

    The number of tokens is rounded down, but at least one.
    """
    return _minus_lowest(without_end(record, record.logp))


def min_k_plus_plus(record: ScoreRecord) -> float | None:
    """min_k of (log p - mean) / deviation of log p over the vocabulary (Zhang et al. 2024, arXiv 2404.02936)."""
    per_token = zip(record.logp, record.vocabulary_mean, record.vocabulary_variance, strict=True)
    scaled = [(value - average) / math.sqrt(max(variance, LEAST_VARIANCE)) for value, average, variance in per_token]
    return _minus_lowest(without_end(record, scaled))


def _minus_lowest(values: Sequence[float]) -> float | None:
    lowest = mean(sorted(values)[: max(1, int(len(values) * LOWEST))])
    return None if lowest is None else -lowest


ATTACKS = {"loss": loss, "zlib": zlib, "min_k": min_k, "min_k_plus_plus": min_k_plus_plus}


def membership_scores(table: Table, name: str, attack: str) -> dict[int, float]:
    """Score of each answer of the set `name` by row, low for members, by one of ATTACKS; without rows of no token."""
    found = {record.index: ATTACKS[attack](record) for record in table.scores_of(name)}
    return {index: score for index, score in found.items() if score is not None}


def membership_auc(table: Table, attack: str) -> float | None:
    """AUC of an attack, forget rows being members and unknown rows not; None if the table lacks one of the sets."""
    members = membership_scores(table, MEMBERS, attack)
    others = membership_scores(table, NON_MEMBERS, attack)
    return auc(list(others.values()), list(members.values()))
