"""Numbers of a whole evaluation, such as the model utility."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from grun.evaluation.metrics.averages import harmonic_mean
from grun.evaluation.metrics.memorization import ATTACKS, membership_auc
from grun.evaluation.metrics.registry import AS_RETAIN_ONLY, HIGH, METRICS, NO_QUIRKS, metrics_of, present, whole_metric
from grun.evaluation.table import Table

PROBABILITIES = {
    "retain": "probability",
    "real_authors": "probability_normalized",
    "world_facts": "probability_normalized",
}
"""Sets whose numbers enter the model utility, with the probability that does."""


def model_utility(numbers: Sequence[float | None]) -> float | None:
    """Harmonic mean of the nine numbers; exactly 0 if one is 0, None if one is missing.

    Source: Maini et al. 2024, arXiv 2401.06121, section 2.2.
    """
    known = [number for number in numbers if number is not None]
    return harmonic_mean(known) if len(known) == 3 * len(PROBABILITIES) == len(numbers) else None


def overall_metrics(table: Table, quirks: Collection[str] = NO_QUIRKS) -> dict[str, float]:
    """Numbers over several sets by name; what cannot be computed is absent."""
    return present({name: metric.compute(table, quirks) for name, metric in metrics_of("overall").items()})


def _utility(table: Table, truth_ratio: str, quirks: Collection[str]) -> float | None:
    return model_utility(
        [
            METRICS.get(metric).compute(table, name, quirks)
            for name, probability in PROBABILITIES.items()
            for metric in (probability, "rouge_l", truth_ratio)
        ]
    )


@whole_metric("model_utility", "model utility", "overall", good=HIGH)
def utility(table: Table, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """TOFU's harmonic mean of probability, ROUGE-L and truth ratio on retain, real authors and world facts; 0 where
    one of them is 0.
    """
    return _utility(table, "truth_ratio", quirks)


@whole_metric("model_utility_arithmetic", "model utility, arithmetic", "overall", good=HIGH)
def utility_arithmetic(table: Table, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """model_utility with truth_ratio_arithmetic."""
    return _utility(table, "truth_ratio_arithmetic", quirks)


def _register(attack: str, label: str) -> None:
    def area(table: Table, quirks: Collection[str] = NO_QUIRKS) -> float | None:
        return membership_auc(table, attack)

    area.__doc__ = (
        f"Membership inference by {label}, forget against unknown rows, area under the ROC curve: 0.5 is chance, 1 "
        "where forget looks like training data."
    )
    whole_metric(f"mia_{attack}", f"MIA {label} AUC", "overall", good=AS_RETAIN_ONLY)(area)


for _attack, _label in zip(ATTACKS, ("loss", "zlib", "Min-K%", "Min-K%++"), strict=True):
    _register(_attack, _label)
