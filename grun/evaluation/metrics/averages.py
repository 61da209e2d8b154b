"""Averages of plain numbers: arithmetic, harmonic, and of numbers known by their logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
