"""The matrix in words: for each objective, GRUN against the other parametrizations, computed from the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from grun.report.labels import PARAMETRIZATIONS
from grun.report.matrix import Matrix, Row, Spread
from grun.report.result import main_metric, target_of
from grun.report.tables import Column, markdown_points, markdown_text, to_markdown

FORGOTTEN = 0.05
"""How far above the target's main metric a mean on forget may lie and still count as forgotten."""
RULE = (
    f"Forgotten as far as the target: the mean on forget is at most {FORGOTTEN} above the target's. A difference "
    "between two means counts where it is larger than their two standard deviations together, which a few seeds give "
    "roughly."
)
HEADING = "GRUN against the others"
MEASURES = (
    *("forget_paraphrase.", "heldout.", "retain.", "overall.model_utility"),
    *("cost.parameters", "cost.seconds", "cost.saved_bytes"),
)
"""What is compared beside forgetting, by the beginning of its key: what should be gone and stay, and the costs."""
SAME_FOR_ALL_SEEDS = ("cost.parameters", "cost.saved_bytes")
"""What a seed does not change, so that one run is enough."""
EQUAL = 1e-9
"""Means closer than this differ by rounding alone."""

Standing = Literal["ahead", "behind", "equal", "within the spread", "one seed, no spread known"]


def compare(ours: Spread, theirs: Spread, column: Column) -> Standing | None:
    """How GRUN stands to another cell in one number; None where either has none."""
    if ours.mean is None or theirs.mean is None:
        return None
    difference = ours.mean - theirs.mean
    if abs(difference) <= EQUAL:
        return "equal"
    if column.key not in SAME_FOR_ALL_SEEDS:
        if ours.deviation is None or theirs.deviation is None:
            return "one seed, no spread known"
        if abs(difference) <= ours.deviation + theirs.deviation + EQUAL:
            return "within the spread"
    return "ahead" if (difference < 0) == _low_is_good(column) else "behind"


def words(matrix: Matrix) -> list[tuple[str, list[str]]]:
    """For each objective that was run with GRUN and something else: its name and the sentences."""
    cells = [row for row in matrix.cells if row.objective is not None and row.results]
    found = []
    for objective in dict.fromkeys(str(row.objective) for row in cells):
        of_objective = [row for row in cells if row.objective == objective]
        rows = list({row.parametrization: row for row in reversed(of_objective)}.values())[::-1]
        ours = next((row for row in rows if row.parametrization == "grun"), None)
        if ours is None or len(rows) < 2:
            continue
        others = [row for row in rows if row is not ours]
        lines = [_forgetting(matrix, rows), *_summary(matrix, ours, others)]
        if len(rows) < len(of_objective):
            lines.append(f"Of several settings the first is compared: {', '.join(row.label for row in rows)}.")
        found.append((objective.upper(), [line for line in lines if line]))
    return found


def matrix_markdown(matrix: Matrix) -> str:
    """Both tables, how to read them, what is missing, and the comparison in words."""
    parts = ["# Matrix: objective by parametrization\n", f"{markdown_text(matrix.caption)}\n"]
    for title, table in matrix.tables():
        parts += [f"## {title}\n", to_markdown(table)]
    notes, compared = matrix.notes(), words(matrix)
    parts += ["## Notes\n", markdown_points(notes)] if notes else []
    parts += [f"## {HEADING}\n", f"{RULE}\n"] if compared else []
    for objective, sentences in compared:
        parts += [f"**{markdown_text(objective)}**\n", markdown_points(sentences)]
    return "\n".join(parts)


def _name(row: Row) -> str:
    return PARAMETRIZATIONS.get(row.parametrization, row.parametrization)


def _with_number(row: Row, column: Column) -> str:
    return f"{_name(row)} {row.spread(column).text(column.style)}"


def _low_is_good(column: Column) -> bool:
    return column.good.startswith("low")


# -- forgetting -------------------------------------------------------------------------------------------------------


def _goal(matrix: Matrix, row: Row) -> float | None:
    """The target's main metric on forget; None where there is no target."""
    target = target_of(row.results[0], matrix.results)
    return None if target is None else target.metric("forget", main_metric(matrix.results)[0])


def _has_forgotten(matrix: Matrix, row: Row) -> bool | None:
    """Whether the cell's mean on forget is at most `FORGOTTEN` above the target's; None where either is missing."""
    column, goal = matrix.column(f"forget.{main_metric(matrix.results)[0]}"), _goal(matrix, row)
    mean = row.spread(column).mean if column else None
    return None if mean is None or goal is None else mean <= goal + FORGOTTEN + EQUAL


def _forgetting(matrix: Matrix, rows: Sequence[Row]) -> str:
    metric, name = main_metric(matrix.results)
    column, goal = matrix.column(f"forget.{metric}"), _goal(matrix, rows[0])
    if column is None:
        return ""
    if goal is None:
        return f"No target to compare with; {name} on forget: {', '.join(_with_number(row, column) for row in rows)}."
    far = [_with_number(row, column) for row in rows if _has_forgotten(matrix, row)]
    less = [_with_number(row, column) for row in rows if _has_forgotten(matrix, row) is False]
    text = f"Forgets as far as the target ({name} on forget {goal:.2f}): {', '.join(far) or 'none'}"
    return text + (f"; not as far: {', '.join(less)}." if less else ".")


# -- what is left and kept, and what it costs -------------------------------------------------------------------------


def _standings(matrix: Matrix, column: Column, ours: Row, others: Sequence[Row]) -> dict[Standing, list[str]]:
    """The others by how GRUN stands to them, with a remark on those that keep much because they forgot little."""
    groups: dict[Standing, list[str]] = {}
    for row in others:
        standing = compare(ours.spread(column), row.spread(column), column)
        if standing is not None:
            kept = not _low_is_good(column) and _has_forgotten(matrix, row) is False
            groups.setdefault(standing, []).append(_name(row) + " (which did not forget as far)" * kept)
    return groups


def _summary(matrix: Matrix, ours: Row, others: Sequence[Row]) -> list[str]:
    """Each number is in one sentence: GRUN is behind some other, ahead of all others, or neither."""
    behind, ahead, neither = [], [], []
    if _has_forgotten(matrix, ours) is False:
        behind.append("forgetting: not as far as the target")
    for column in (column for start in MEASURES for column in matrix.columns if column.key.startswith(start)):
        name = column.header.partition(" (")[0]  # without the unit
        groups = _standings(matrix, column, ours, others)
        if "behind" in groups:
            behind.append(f"{name}: behind {', '.join(groups['behind'])}")
        elif list(groups) == ["ahead"]:
            ahead.append(name)
        elif groups:
            reasons = (f"{', '.join(names)} {standing}" for standing, names in groups.items() if standing != "ahead")
            neither.append(f"{name}: {', '.join(reasons)}")
    return [
        f"GRUN does not win in {'; '.join(behind)}." if behind else "GRUN is behind in nothing beyond the spread.",
        f"GRUN is ahead of all others in {', '.join(ahead) or 'nothing'}.",
        f"Neither ahead nor behind in {'; '.join(neither)}." if neither else "",
    ]
