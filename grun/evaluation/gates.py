"""The gate table: does the gate open on what is to be forgotten, and on nothing else."""

from __future__ import annotations

from typing import Any

from grun.evaluation.metrics import METRICS, OPEN
from grun.evaluation.table import Table

NOT_TO_OPEN = ("heldout", "retain")
"""Sets of taught rows at which an open gate is a false positive."""


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
