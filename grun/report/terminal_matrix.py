"""The matrix as it is printed: a row for each cell, narrow enough for a terminal."""

from __future__ import annotations

from typing import Any

from grun.report.matrix import Matrix, Row
from grun.report.measures import Measure

HEADERS = {
    "forget.fact_recall": "forget\nfact\nrecall",
    "forget.rouge_l": "forget\nROUGE-L",
    "forget_paraphrase.fact_recall": "para-\nphrase",
    "forget_paraphrase.rouge_l": "para-\nphrase",
    "retain.fact_recall": "retain",
    "retain.rouge_l": "retain",
    "heldout.fact_recall": "held-\nout",
    "heldout.rouge_l": "held-\nout",
    "overall.model_utility": "model\nutility",
    "reference.forget_quality": "forget\nquality",
    "forget.degenerate": "dege-\nnerate",
    "gate.auc": "gate\nAUC",
    "cost.parameters": "para-\nmeters",
    "cost.seconds": "sec.",
    "cost.saved_bytes": "MB",
}
"""Columns of the printed matrix with headers that fit."""
MEANS_ALONE = ("forget.degenerate", "gate.auc", "cost.parameters", "cost.seconds", "cost.saved_bytes")
"""Columns without their spread, for want of room; the files have it."""
BOTH_ROUGE_AND_FACTS = "forget.rouge_l"
"""Left out where a corpus has facts."""


def matrix_table(matrix: Matrix, title: str) -> Any:
    """The rich table of the matrix, at most 100 columns wide for the usual labels."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    facts = any(measure.key == "forget.fact_recall" for measure in matrix.measures)
    measures = [
        measure
        for measure in matrix.measures
        if measure.key in HEADERS and not (facts and measure.key == BOTH_ROUGE_AND_FACTS)
    ]
    table = RichTable(
        title=Text(title), title_justify="left", title_style="italic", box=box.SIMPLE_HEAD, padding=0, pad_edge=False
    )
    table.add_column("", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for measure in measures:
        table.add_column(HEADERS[measure.key], justify="right", no_wrap=True)
    objective = None
    for row in matrix.rows:
        if row.objective != objective:
            table.add_section()
            objective = row.objective
        count = str(len(row.results)) if row.stage == "after" and row.results else ""
        table.add_row(Text(row.label), count, *(_cell(row, measure) for measure in measures))
    return table


def _cell(row: Row, measure: Measure) -> str:
    spread = row.spread(measure)
    if measure.kind == "p":
        return "-" if spread.median is None else spread.text(measure.kind).partition(" ")[0]
    if measure.kind == "count" and spread.mean is not None:
        return _short(spread.mean)
    text = spread.text(measure.kind)
    return text.partition(" ")[0] if measure.key in MEANS_ALONE else text.replace(" ± ", "±")


def _short(count: float) -> str:
    """Three digits or so: 999, 110.6k, 3.29M, 8.03B."""
    for unit, name, decimals in ((1e9, "B", 2), (1e6, "M", 2), (1e3, "k", 1)):
        if count >= unit:
            return f"{count / unit:.{decimals}f}{name}"
    return f"{count:.0f}"
