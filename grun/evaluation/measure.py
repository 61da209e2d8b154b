"""The numbers of a scored table; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from grun.evaluation.gates import gate_table
from grun.evaluation.metrics import overall_metrics, reference_metrics, set_metrics, unread
from grun.evaluation.table import Table

METRICS_FORMAT = 2
"""Raised when a metric reads the table otherwise; `report` measures older tables again. 2: words of all scripts."""


def measure(table: Table, quirks: Collection[str] = (), reference: tuple[str, Table] | None = None) -> dict[str, Any]:
    """All metrics of a table: counts, sets, overall; gate for a model with gates; reference where there is one.

    Of sets with rows that a metric of the answers cannot read, the counts hold `unread`: their number by metric.
    """
    measured: dict[str, Any] = {
        "metrics_format": METRICS_FORMAT,
        "counts": {
            name: {
                "rows": len(table.scores_of(name)),
                "answer_tokens": sum(row.answer_tokens for row in table.scores_of(name)),
                **({"unread": not_read} if (not_read := unread(table, name)) else {}),
            }
            for name in table.sets()
        },
        "sets": set_metrics(table, quirks),
        "overall": overall_metrics(table, quirks),
    }
    if gate := gate_table(table):
        measured["gate"] = gate
    if reference is not None:
        key, of_reference = reference
        measured |= {"reference": reference_metrics(table, of_reference, quirks), "reference_key": key}
    return measured
