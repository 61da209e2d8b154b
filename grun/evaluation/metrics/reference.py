"""Numbers against a reference, a model that was never taught the forget set: forget quality and PrivLeak.

Both tables must come from the same rows; a number from two splits would mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from grun.errors import RunError
from grun.evaluation.metrics.averages import log_sum_exp
from grun.evaluation.metrics.likelihood import log_truth_ratios
from grun.evaluation.metrics.memorization import MEMBERS, NON_MEMBERS, membership_auc
from grun.evaluation.metrics.registry import NO_QUIRKS, epsilon, metrics_of, present, whole_metric
from grun.evaluation.table import Table

LEAST_P = math.ulp(0.0)
"""Smallest positive float, about 5e-324; stands for a p-value that is smaller still."""
ADVICE = "evaluate both on the same split, with the same data.limit and continuations"


class Comparison(NamedTuple):
    """Two samples compared by the two-sample Kolmogorov-Smirnov test."""

    statistic: float
    """Largest distance between the two distribution functions, 0 to 1."""
    p_value: float
    """Probability of such a distance if both samples were drawn alike; 0 where it underflows."""

    @property
    def log10(self) -> float:
        """log10 of the p-value; of the smallest positive float (-323.3) where the p-value underflows to 0."""
        return math.log10(max(self.p_value, LEAST_P))


def compare(log_ratios: Sequence[float], reference: Sequence[float], eps: float = 0.0) -> Comparison:
    """Two-sided KS test of the truth ratios of two models, given by their logarithms.

    The test sees the order of the values alone, so logarithms, ratios and inverse ratios give one result. Only with
    eps, which ties the smallest ratios, is the order that of 1 / (R + eps), as open-unlearning takes it.
    """
    from scipy.stats import ks_2samp

    added = [math.log(eps)] if eps else []
    found = ks_2samp(*([-log_sum_exp([log, *added]) for log in sample] for sample in (log_ratios, reference)))
    return Comparison(float(found.statistic), float(found.pvalue))


def privleak(area: float | None, reference: float | None, eps: float = 0.0) -> float | None:
    """((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref + eps) * 100, percent of the reference's 1 - AUC.

    0 is good; below it the forget set still looks like training data, above it stands out as something else.
    None if an area is missing, or where the denominator is 0 (AUC_ref = 1 without eps).
    Source: Shi et al. 2024 (MUSE), arXiv 2407.06460, in the sign convention of `membership.py`.
    """
    if area is None or reference is None or 1 - reference + eps == 0:
        return None
    return (reference - area) / (1 - reference + eps) * 100


def reference_metrics(table: Table, reference: Table, quirks: Collection[str] = NO_QUIRKS) -> dict[str, float]:
    """Numbers against a reference by name; what cannot be computed is absent.

    RunError if the two tables do not hold the same rows.
    """
    for name in (MEMBERS, NON_MEMBERS):
        _check_rows(name, table, reference)
    metrics = metrics_of("reference")
    return present({name: metric.compute(table, reference, quirks) for name, metric in metrics.items()})


def _forget_quality(table: Table, reference: Table, over: str, quirks: Collection[str]) -> Comparison | None:
    samples = [list(log_truth_ratios(one, MEMBERS, over, quirks).values()) for one in (table, reference)]
    return compare(samples[0], samples[1], epsilon(quirks)) if all(samples) else None


@whole_metric("forget_quality", "forget quality (p)", "reference", good="high is good, above 0.05 as retain only")
def forget_quality(table: Table, reference: Table, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """p-value of a Kolmogorov-Smirnov test between the forget set's truth ratios of the model and of the retain-only
    one.
    """
    found = _forget_quality(table, reference, "geometric", quirks)
    return found and found.p_value


@whole_metric(
    "forget_quality_log10", "forget quality (log10 p)", "reference", good="high is good, near 0", range="-323.3 to 0"
)
def forget_quality_log10(table: Table, reference: Table, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """log10 of forget_quality."""
    found = _forget_quality(table, reference, "geometric", quirks)
    return found and found.log10


@whole_metric(
    "forget_quality_arithmetic",
    "forget quality, arithmetic (p)",
    "reference",
    good="high is good, above 0.05 as retain only",
)
def forget_quality_arithmetic(table: Table, reference: Table, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """forget_quality with truth_ratio_arithmetic."""
    found = _forget_quality(table, reference, "arithmetic", quirks)
    return found and found.p_value


@whole_metric("privleak", "PrivLeak (%)", "reference", good="near 0 is good", range="percent")
def privleak_min_k(table: Table, reference: Table, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Min-K% membership inference against the retain-only model's."""
    areas = [membership_auc(one, "min_k") for one in (table, reference)]
    return privleak(areas[0], areas[1], epsilon(quirks))


def _check_rows(name: str, table: Table, reference: Table) -> None:
    """RunError unless the set has the same rows, questions and kinds of continuation in both tables."""
    both = (table, reference)
    here, there = ({record.index for record in one.scores_of(name)} for one in both)
    if not here or not there:
        return
    if here != there:
        which = f"row {min(here ^ there)} is in one of them alone; " if len(here) == len(there) else ""
        raise RunError(f"{name} has {len(here)} rows here, {len(there)} in the reference: {which}{ADVICE}")
    if all(one.scores_of(name, "perturbed") for one in both):
        for kind, word in (("paraphrase", "paraphrased"), ("perturbed", "wrong")):
            counts = [len(one.scores_of(name, kind)) for one in both]
            if counts[0] != counts[1]:
                raise RunError(f"{name} has {counts[0]} {word} answers here, {counts[1]} in the reference: {ADVICE}")
    ours, theirs = ({row.index: row.question for row in one.generations_of(name)} for one in both)
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            raise RunError(f"row {index} of {name} asks something else here than in the reference: {ADVICE}")
