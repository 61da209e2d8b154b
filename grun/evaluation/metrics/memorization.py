"""How much of the reference answer the model reproduces token by token, the true tokens before each being given.

The end token, which holds nothing of the row, is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

from grun.evaluation.metrics.averages import mean
from grun.evaluation.metrics.registry import EXTRACTION_FLOOR, NO_QUIRKS, metric
from grun.evaluation.table import ScoreRecord, Table

T = TypeVar("T")


def without_end(record: ScoreRecord, values: list[T]) -> list[T]:
    """One value per scored token of `record`, less that of the end token if the record has one."""
    return values[:-1] if record.ended else values


def matching_end(hit: Sequence[bool], floor: bool = False) -> float | None:
    """Share of an answer's tokens in its longest suffix of hits, 1 - k / L; None for an answer without tokens.

    Args:
        hit: for each of the L tokens whether it is the most probable one.
        floor: at least 1 / L, also where the last token is no hit, as open-unlearning computes it.
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
