"""The numbers of a scored table; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from grun.evaluation.metrics import METRICS, OPEN, overall_metrics, reference_metrics, set_metrics, unread
from grun.evaluation.table import Table

METRICS_FORMAT = 3
"""Raised when a metric reads the table otherwise; `report` measures older tables again. 2: words of all scripts."""

NOT_TO_OPEN = ("heldout", "retain")
"""Sets of taught rows at which an open gate is a false positive."""


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


def gate_table(table: Table) -> dict[str, Any]:
    """Gate numbers by the mean over blocks and, under "blocks", by each block; empty for a model without gates.

    Keys: `auc_SET` (forget against that set), `false_positive_rate` (share of held-out and retain prompts above 0.5),
    `mean`, `open` (each by set). What cannot be computed is absent.
    """
    if not table.gates:
        return {}
    blocks = {str(block): _numbers(table.at_block(block)) for block in table.blocks()}
    return {**_numbers(table), "blocks": blocks}


def _numbers(table: Table) -> dict[str, Any]:
    sets = list(dict.fromkeys(record.set for record in table.gates))
    numbers: dict[str, Any] = {}
    for name in sets:
        area = METRICS.get("gate_auc").compute(table, name)
        if area is not None:
            numbers[f"auc_{name}"] = area
    rows = [record for name in NOT_TO_OPEN for record in table.gates_of(name)]
    if rows:
        numbers["false_positive_rate"] = sum(record.mean > OPEN for record in rows) / len(rows)
    for key in ("mean", "open"):
        numbers[key] = {name: METRICS.get(f"gate_{key}").compute(table, name) for name in sets}
    return numbers
