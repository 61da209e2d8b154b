"""Arithmetic of plain numbers: averages, how sure a share is, the area under a ROC curve."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

NORMAL = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def harmonic_mean(values: Sequence[float]) -> float | None:
    """n / sum(1 / value), of numbers >= 0; exactly 0 where one of them is 0, None of nothing."""
    if not values:
        return None
    if any(value == 0 for value in values):
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def log_sum_exp(logs: Sequence[float]) -> float:
    """log(sum(exp(logs))) without overflow or underflow; -inf of nothing."""
    largest = max(logs, default=-math.inf)
    if math.isinf(largest):
        return largest
    return largest + math.log(math.fsum(math.exp(log - largest) for log in logs))


def exp(log: float) -> float:
    """math.exp, but inf where that overflows."""
    try:
        return math.exp(log)
    except OverflowError:
        return math.inf


def wilson(share: float, count: int) -> list[float] | None:
    """95 % interval [low, high] of a probability, `share` of `count` independent tries having come out; None of no try.

    (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n), p the share, n the count.

    Source: Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    if count == 0:
        return None
    square = NORMAL**2 / count
    middle = share + square / 2
    half = math.sqrt(square * share * (1 - share) + square**2 / 4)
    return [max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))]


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """P(positive > negative) + P(equal) / 2 over all pairs (Mann-Whitney U / pairs); None if a side is empty."""
    if not positives or not negatives:
        return None
    ordered = sorted(negatives)
    doubled = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in positives)
    return doubled / (2 * len(positives) * len(negatives))
