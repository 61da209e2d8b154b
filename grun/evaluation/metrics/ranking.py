"""The area under the ROC curve, for gates and for membership inference."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """P(positive > negative) + P(equal) / 2 over all pairs (Mann-Whitney U / pairs); None if a side is empty."""
    if not positives or not negatives:
        return None
    ordered = sorted(negatives)
    doubled = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in positives)
    return doubled / (2 * len(positives) * len(negatives))
