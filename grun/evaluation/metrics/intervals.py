"""How sure a share is."""

from __future__ import annotations

import math

NORMAL = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


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
