"""The picture of evaluated answers: what is left and what is kept, by model or by cell of the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grun.report.before_after import MOST
from grun.report.columns import columns_by_key
from grun.report.matrix import Row, make_matrix
from grun.report.result import DISTINGUISHABLE, Result, after, has_utility, main_metric
from grun.report.rows_figure import Panel, rows_figure
from grun.report.tables import Column, Number, with_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG10 = "reference.forget_quality_log10"


def left_and_kept(results: Sequence[Result]) -> Figure | None:
    """A row for each cell of the matrix (means, bars of one standard deviation), or for each model where there is none.

    None where nothing was unlearned, or so little that `before_after.sets_figure` shows the same set by set.
    """
    matrix, metric = make_matrix(results), main_metric(results)[0]
    of_tofu = has_utility(results) and metric == "rouge_l"
    if not after(results) or (matrix is None and len(after(results)) <= MOST and not of_tofu):
        return None
    rows = [Row(one.title, one.stage, one.objective, one.parametrization, (one,)) for one in results]
    rows = rows if matrix is None else list(matrix.rows)
    known = columns_by_key()
    keys = [f"{name}.{metric}" for name in ("forget", "forget_paraphrase", "retain", "heldout")]
    keys += ["overall.model_utility", LOG10] if of_tofu else []
    columns = with_numbers((known[key] for key in keys if key in known), results)
    if len(columns) < 2:
        return None
    return rows_figure(rows, [_panel(column, rows) for column in columns])


def _panel(column: Column, rows: Sequence[Row]) -> Panel:
    numbers = [_number(row, column) for row in rows]
    if column.key != LOG10:
        return Panel(column.header, column.good, numbers)
    numbers = [Number(0.0) if row.stage == "retain_only" else one for row, one in zip(rows, numbers, strict=True)]
    lowest = min([-3.0, *(one.value for one in numbers if one is not None)])
    return Panel(column.header, column.good, numbers, (1.1 * lowest, -0.1 * lowest), math.log10(DISTINGUISHABLE))


def _number(row: Row, column: Column) -> Number | None:
    """Mean over seeds with one standard deviation to each side."""
    spread = row.spread(column)
    if spread.mean is None:
        return None
    deviation = spread.deviation
    return Number(spread.mean, None if deviation is None else (spread.mean - deviation, spread.mean + deviation))
