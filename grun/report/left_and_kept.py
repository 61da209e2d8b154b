"""The pictures of what is left and what is kept: set by set of a few models, else by model or by cell of the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grun.data.sets import EvaluationSet, in_order
from grun.report.columns import columns_by_key
from grun.report.figures import clean, colors_of, new_figure, plain
from grun.report.matrix import Row, make_matrix
from grun.report.result import DISTINGUISHABLE, Result, after, has_utility, main_metric, sets_of
from grun.report.rows_figure import Panel, rows_figure
from grun.report.tables import Column, Number, with_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 4
"""Unlearned models that are shown set by set."""
WANTED = {"low": "should go", "high": "should stay", "same": "guessed"}
LOG10 = "reference.forget_quality_log10"


def asked_sets(results: Sequence[Result]) -> list[EvaluationSet]:
    """Sets of questions that were evaluated, without those that settings were chosen by."""
    named = [one for one in in_order(sets_of(results)) if not one.for_tuning]
    return [one for one in named if any(result.table.generations_of(one.name) for result in results)]


def sets_figure(results: Sequence[Result]) -> Figure | None:
    """Bars of the main metric: a group a set, a bar a model; None where nothing was unlearned or too much."""
    befores, unlearned = [one for one in results if one.stage == "before"], after(results)
    if not befores or not unlearned or len(unlearned) > MOST:
        return None
    models = [befores[0], *unlearned]
    metric, label = main_metric(results)
    sets = [one for one in asked_sets(models) if any(model.metric(one.name, metric) is not None for model in models)]
    height = 0.8 / len(models)
    figure = new_figure(8.0, 1.2 + 0.24 * len(sets) * len(models))
    axes, colors = figure.add_subplot(), colors_of(results)
    for number, model in enumerate(models):
        values = [model.metric(one.name, metric) or 0.0 for one in sets]
        places = [place + (number - (len(models) - 1) / 2) * height for place in range(len(sets))]
        axes.barh(places, values, height=0.9 * height, color=colors[model.name], label=plain(model.label))
    clean(axes, "x", xlim=(0, 1.02), xlabel=f"{label} (share of right answers)")
    names = [f"{one.label}\n({WANTED[one.good]})" for one in sets]
    axes.set_yticks(range(len(sets)), names)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(models), frameon=False, fontsize=10)
    return figure


def left_and_kept(results: Sequence[Result]) -> Figure | None:
    """A row for each cell of the matrix (means, bars of one standard deviation), or for each model where there is none.

    None where nothing was unlearned, or so little that `sets_figure` shows the same set by set.
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
