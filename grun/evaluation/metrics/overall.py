"""Numbers of a whole evaluation: model utility and membership inference."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from grun.evaluation.metrics.averages import harmonic_mean
from grun.evaluation.metrics.membership import ATTACKS, membership_auc
from grun.evaluation.metrics.registry import METRICS, NO_QUIRKS, present
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
    """Numbers over several sets by name; what cannot be computed is absent.

    `model_utility` takes `truth_ratio`, `model_utility_arithmetic` takes `truth_ratio_arithmetic`; `mia_ATTACK` is an
    area under the ROC curve, 1 where the forget set looks like training data.
    """
    values: dict[str, float | None] = {
        "model_utility": _utility(table, "truth_ratio", quirks),
        "model_utility_arithmetic": _utility(table, "truth_ratio_arithmetic", quirks),
    }
    return present({**values, **{f"mia_{attack}": membership_auc(table, attack) for attack in ATTACKS}})


def _utility(table: Table, truth_ratio: str, quirks: Collection[str]) -> float | None:
    return model_utility(
        [
            METRICS.get(metric).compute(table, name, quirks)
            for name, probability in PROBABILITIES.items()
            for metric in (probability, "rouge_l", truth_ratio)
        ]
    )
