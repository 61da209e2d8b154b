"""Metrics of the gates at the prompt, by the mean over blocks."""

from __future__ import annotations

from collections.abc import Collection

from grun.evaluation.metrics.averages import mean
from grun.evaluation.metrics.ranking import auc
from grun.evaluation.metrics.registry import NO_QUIRKS, metric
from grun.evaluation.table import Table

OPEN = 0.5
"""Gate probability above which a gate counts as open."""


@metric(
    "gate_mean",
    "gates",
    "gate probability at the prompt, mean over rows and blocks; 0 to 1, high is good on forget, low elsewhere",
)
def gate_mean(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """How far the gates open on a set."""
    return mean([row.mean for row in table.gates_of(name)])


@metric(
    "gate_open",
    "gates",
    f"share of prompts whose mean gate is above {OPEN}; 0 to 1, high is good on forget, low elsewhere",
)
def gate_open(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of a set's prompts at which the gate counts as open; off the forget set, its false positives."""
    return mean([float(row.mean > OPEN) for row in table.gates_of(name)])


@metric(
    "gate_auc",
    "gates",
    "area under the ROC curve: how often a forget prompt has a higher gate than a prompt of this set; "
    "0 to 1, 1 is good, 0.5 is chance",
)
def gate_auc(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Forget prompts against the prompts of another set, by the gate's mean over blocks; None for the forget sets."""
    if name.startswith("forget"):
        return None
    return auc([row.mean for row in table.gates_of("forget")], [row.mean for row in table.gates_of(name)])
