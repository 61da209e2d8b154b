"""Metrics of the gates at the prompt, by the mean over blocks."""

from __future__ import annotations

from collections.abc import Collection

from grun.evaluation.metrics.averages import auc, mean
from grun.evaluation.metrics.registry import NO_QUIRKS, OPEN_ON_FORGET, metric
from grun.evaluation.table import Table

OPEN = 0.5
"""Gate probability above which a gate counts as open."""


@metric("gate_mean", "mean gate", reads="gates", good=OPEN_ON_FORGET)
def gate_mean(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Gate probability at the prompt, mean over rows and blocks."""
    return mean([row.mean for row in table.gates_of(name)])


@metric("gate_open", "open gates", reads="gates", good=OPEN_ON_FORGET)
def gate_open(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Share of prompts whose mean gate is above 0.5.

    Off the forget set, these are its false positives.
    """
    return mean([float(row.mean > OPEN) for row in table.gates_of(name)])


@metric("gate_auc", "gate AUC", reads="gates", good="1 is good, 0.5 is chance")
def gate_auc(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Area under the ROC curve: how often a forget prompt has a higher gate than one of another set.

    By the gate's mean over blocks; None for the forget sets. Reports show it against held-out rows, else retain.
    """
    if name.startswith("forget"):
        return None
    return auc([row.mean for row in table.gates_of("forget")], [row.mean for row in table.gates_of(name)])
