"""The matrix: runs of one objective and parametrization with different seeds as one row, with mean and spread.

Objectives say what is minimized, parametrizations what may change; each cell of that matrix is trained with some seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grun.report.labels import order_of, place_of, run_label
from grun.report.measures import Measure, Spread, measures_of
from grun.report.results import Result, main_metric
from grun.report.tables import name_of
from grun.runtime.runs import identity

MANY_RUNS = 8
"""Up to so many runs each has a row of its own in the printed table, and a label in the scatter plots."""


@dataclass(frozen=True)
class Row:
    """A cell of the matrix: one objective and parametrization, a run for each seed; or a model to compare with."""

    label: str
    stage: str
    objective: str | None
    parametrization: str
    results: tuple[Result, ...]
    """By seed; empty where nothing was evaluated."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of its runs as far as they are known, ascending."""
        return tuple(result.seed for result in self.results if result.seed is not None)

    def spread(self, measure: Measure) -> Spread:
        """One measure over the cell's runs."""
        values = (measure.value(result) for result in self.results)
        return Spread(tuple(value for value in values if value is not None))


@dataclass(frozen=True)
class Matrix:
    """The rows in their order: before, retain only, then the cells by objective and parametrization."""

    rows: tuple[Row, ...]
    results: tuple[Result, ...]

    @cached_property
    def measures(self) -> list[Measure]:
        """What at least one row has a number for: first what is forgotten and kept, then what it costs."""
        return [m for m in measures_of(self.results) if any(row.spread(m).n for row in self.rows)]

    @property
    def cells(self) -> list[Row]:
        """The rows that are cells."""
        return [row for row in self.rows if row.stage == "after"]

    @property
    def caption(self) -> str:
        """How to read the numbers."""
        metric = main_metric(self.results)[1]
        counts = sorted({len(row.results) for row in self.cells if row.results})
        seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}, see the column seeds"
        text = f"Mean ± sample standard deviation over the seeds of a row (n = {seeds}); one seed has no spread. "
        if any(measure.kind == "p" for measure in self.measures):
            text += "Forget quality: median p-value (lowest to highest). "
        if any(row.stage == "retain_only" for row in self.rows):
            text += "The target is retain only, a model never taught the forget set. "
        else:
            text += "There is no target: no retain-only model was evaluated. "
        return text + f"Main metric: {metric}. Peak memory is the GPU's, on a CPU the whole process's."


# -- cells ------------------------------------------------------------------------------------------------------------


def cells_of(results: Sequence[Result]) -> list[Row]:
    """The runs by objective, parametrization, base model and settings; a cell's runs differ in seed alone.

    Runs of unknown seed, or of a seed that their cell has already, are cells of their own, under their names.
    """
    cells: list[tuple[Any, list[Result]]] = []
    for result in sorted((result for result in results if result.stage == "after"), key=order_of):
        key = _settings(result)
        for other, runs in cells:
            if other == key and result.seed is not None and result.seed not in [run.seed for run in runs]:
                runs.append(result)
                break
        else:
            cells.append((key, [result]))
    rows = []
    for _, runs in cells:
        first = runs[0]
        label = first.label if first.objective is None else _label(first)
        if first.objective is not None and sum(_label(others[0]) == label for _, others in cells) > 1:
            label = f"{label} ({first.name})"
        rows.append(Row(label, "after", first.objective, first.parametrization, tuple(runs)))
    return sorted(rows, key=lambda row: row.objective is None)  # what was not unlearned here comes last


def _label(result: Result) -> str:
    return run_label(str(result.objective), result.parametrization, result.quantization, result.design)


def _settings(result: Result) -> Any:
    """What the runs of a cell have in common."""
    config = result.record.get("config")
    decides = identity(config)["config"] if isinstance(config, dict) else {}
    settings = {key: value for key, value in decides.items() if key not in ("seed", "profile")}
    base = result.record.get("base_fingerprint")
    return (result.objective, result.parametrization, result.quantization, base, settings)


def first_seeds(results: Sequence[Result]) -> list[Result]:
    """The results with one run of each cell, that of the lowest seed, labeled by its cell."""
    labels = {row.results[0].name: row.label for row in cells_of(results) if len(row.results) > 1}
    left_out = {result.name for row in cells_of(results) for result in row.results[1:]}
    kept = []
    for result in results:
        if result.name in left_out:
            continue
        if result.name in labels:
            result = copy.copy(result)  # with the table, if it was read already
            result.label = labels[result.name]
        kept.append(result)
    return kept


def one_seed_note(results: Sequence[Result], shown: Sequence[Result]) -> str:
    """What a reader must know where `shown` stands for `results`; empty where nothing is left out."""
    if len(shown) == len(results):
        return ""
    return "Of each objective and parametrization one seed is shown, the lowest."


def make_matrix(results: Sequence[Result]) -> Matrix | None:
    """The matrix of the results; None unless they have several parametrizations, or several seeds of one cell.

    A combination of an objective and a parametrization that are there, but not together, is a row without runs, and so
    are those of which a sweep says that they failed.
    """
    from grun.report.missing import failures

    cells = cells_of(results)
    unlearned = [row for row in cells if row.objective is not None]
    kinds = {row.parametrization for row in unlearned}
    if len(kinds) < 2 and all(len(row.results) < 2 for row in unlearned):
        return None
    compared = [
        Row(name_of(result), result.stage, None, "none", (result,)) for result in results if result.stage != "after"
    ]
    failed = failures(results)
    kinds |= {kind for _, kind, _ in failed}
    objectives = {str(row.objective) for row in unlearned} | {objective for objective, _, _ in failed}
    rows: list[Row] = []
    for objective in sorted(objectives):
        for kind in sorted(kinds, key=place_of):
            found = [row for row in unlearned if (row.objective, row.parametrization) == (objective, kind)]
            rows += found or [Row(run_label(objective, kind), "after", objective, kind, ())]
    others = [row for row in cells if row.objective is None]
    return Matrix((*compared, *rows, *others), tuple(results))


def has_many_runs(results: Sequence[Result]) -> bool:
    """Whether a matrix has more runs than can be told apart one by one."""
    return sum(result.stage == "after" for result in results) > MANY_RUNS and make_matrix(results) is not None
