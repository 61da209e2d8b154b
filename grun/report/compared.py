"""GRUN against the other parametrizations: a table for each objective, from the numbers of the matrix alone."""

from __future__ import annotations

from typing import Literal

from grun.report.labels import PARAMETRIZATIONS
from grun.report.matrix import Matrix, Row, Spread
from grun.report.result import main_metric, target_of
from grun.report.tables import Column, Line, Table

FORGOTTEN = 0.05
"""How far above the target's main metric a mean on forget may lie and still count as forgotten."""
RULE = (
    f"Forgets as far as the target: the mean on forget is at most {FORGOTTEN} above the target's. GRUN is ahead or "
    "behind where the difference between two means is larger than their two standard deviations together, which a few "
    "seeds give roughly."
)
MEASURES = (
    *("forget_paraphrase.", "heldout.", "retain.", "overall.model_utility"),
    *("cost.parameters", "cost.seconds", "cost.saved_bytes"),
)
"""What is compared, by the beginning of its key: what should be gone and stay, and the costs."""
SAME_FOR_ALL_SEEDS = ("cost.parameters", "cost.saved_bytes")
"""What a seed does not change, so that one run is enough."""
EQUAL = 1e-9
"""Means closer than this differ by rounding alone."""

Standing = Literal["ahead", "behind", "equal", "within the spread", "one seed", "-"]


def compare(ours: Spread, theirs: Spread, column: Column) -> Standing:
    """How GRUN stands to another cell in one number; - where either has none."""
    if ours.mean is None or theirs.mean is None:
        return "-"
    difference = ours.mean - theirs.mean
    if abs(difference) <= EQUAL:
        return "equal"
    if column.key not in SAME_FOR_ALL_SEEDS:
        if ours.deviation is None or theirs.deviation is None:
            return "one seed"
        if abs(difference) <= ours.deviation + theirs.deviation + EQUAL:
            return "within the spread"
    return "ahead" if (difference < 0) == column.good.startswith("low") else "behind"


def standings(matrix: Matrix) -> list[tuple[str, Table]]:
    """For each objective that was run with GRUN and something else: a line a number, a column a parametrization.

    Of several settings of a parametrization the first is compared.
    """
    cells = [row for row in matrix.cells if row.objective is not None]
    columns = [column for start in MEASURES for column in matrix.columns if column.key.startswith(start)]
    found = []
    for objective in dict.fromkeys(str(row.objective) for row in cells):
        of_objective = [row for row in reversed(cells) if row.objective == objective]
        others = dict(reversed({row.parametrization: row for row in of_objective}.items()))
        ours = others.pop("grun", None)
        if ours is None or not others:
            continue
        forgotten = [_has_forgotten(matrix, row) for row in others.values()]
        lines = [Line(f"forgets as far as the target (GRUN: {_has_forgotten(matrix, ours)})", forgotten)]
        for column in columns:
            name = column.header.partition(" (")[0]  # without the unit
            spreads = [row.spread(column) for row in others.values()]
            lines.append(Line(name, [compare(ours.spread(column), spread, column) for spread in spreads]))
        names = [PARAMETRIZATIONS.get(name, name) for name in others]
        found.append((f"{objective.upper()}: GRUN against the others", Table(names, [], lines)))
    return found


def _has_forgotten(matrix: Matrix, row: Row) -> str:
    """Whether the cell's mean on forget is at most `FORGOTTEN` above the target's; - where either is missing."""
    metric, target = main_metric(matrix.results)[0], target_of(row.results[0], matrix.results)
    column, goal = matrix.column(f"forget.{metric}"), target.metric("forget", metric) if target else None
    mean = row.spread(column).mean if column else None
    return "-" if mean is None or goal is None else "yes" if mean <= goal + FORGOTTEN + EQUAL else "no"
