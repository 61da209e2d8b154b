"""The matrix: runs of one objective and parametrization with different seeds as one row, with mean and spread.

Objectives say what is minimized, parametrizations what may change; each cell of that matrix is trained with some seeds.
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from grun.data.sets import evaluation_sets
from grun.report.columns import columns_by_key
from grun.report.labels import order_of, run_label
from grun.report.result import Result, after, main_metric
from grun.report.tables import Column, Line, Style, Table, csv_text, shown, to_tex, with_numbers
from grun.runtime.files import read_json
from grun.runtime.runs import identity

QUALITY, COST = "What is forgotten and kept", "What it costs"
OUTCOME = ".outcome.json"
"""How a sweep ends the name of the file in RESULTS/cells, in which is how far a cell came."""
CAPTION = (
    "Mean ± sample standard deviation over the seeds of a row; one seed has no spread. Of p-values the median (lowest "
    "to highest). Peak memory is the GPU's, on a CPU the whole process's."
)
"""How to read the numbers."""
COSTS = "cost."
"""How the keys of what unlearning costs begin."""


@dataclass(frozen=True)
class Spread:
    """One number over the seeds of a cell."""

    values: tuple[float, ...]
    """By seed, in the order of the cell's runs; without those that lack the number."""

    @property
    def n(self) -> int:
        """Runs that have the number."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None without a run."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1 below the fraction); None with fewer than two runs."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def median(self) -> float | None:
        """Median over seeds; None without a run."""
        return statistics.median(self.values) if self.values else None

    def center(self, style: Style) -> float | None:
        """What stands for all: of p-values the median, else the mean."""
        return self.median if style == "p" else self.mean

    def text(self, style: Style) -> str:
        """As readers see it: 0.12 ± 0.03, one seed without a spread, p as median with its range, - for nothing."""
        if style == "p":
            ends = f" ({shown(min(self.values), 'p')} to {shown(max(self.values), 'p')})" if self.n > 1 else ""
            return shown(self.median, "p") + ends
        counted = style in ("whole", "size") and not self.deviation  # not measured
        if self.deviation is None or counted:
            return shown(self.mean, style)
        return f"{shown(self.mean, style)} ± {shown(self.deviation, style, like=self.mean)}"


STATISTICS: dict[str, Callable[[Spread], float | None]] = {
    "n": lambda spread: spread.n,
    "mean": lambda spread: spread.mean,
    "sd": lambda spread: spread.deviation,
    "median": lambda spread: spread.median,
    "lowest": lambda spread: min(spread.values, default=None),
    "highest": lambda spread: max(spread.values, default=None),
}
"""Lines of matrix.csv for each row of the matrix."""


@dataclass(frozen=True)
class Row:
    """A cell of the matrix: one objective and parametrization, a run for each seed; or a model to compare with."""

    label: str
    stage: str
    objective: str | None
    parametrization: str
    results: tuple[Result, ...]
    """By seed."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of its runs as far as they are known, ascending."""
        return tuple(result.seed for result in self.results if result.seed is not None)

    def spread(self, column: Column) -> Spread:
        """One number over the cell's runs."""
        return Spread(tuple(value for value in map(column.value, self.results) if value is not None))

    def line(self, *cells: str) -> Line:
        """Its line in a table."""
        return Line(self.label, list(cells), self.stage, self.objective)

    def counted(self, none: str) -> str:
        """Number of runs of a cell; `none` for a model to compare with."""
        return str(len(self.results)) if self.stage == "after" else none


@dataclass(frozen=True)
class Matrix:
    """The rows in their order: before, retain only, then the cells by objective and parametrization."""

    rows: tuple[Row, ...]
    results: tuple[Result, ...]

    @cached_property
    def columns(self) -> list[Column]:
        """What at least one row has a number for: first what is forgotten and kept, then what it costs."""
        return with_numbers(_columns(self.results), self.results)

    def column(self, key: str) -> Column | None:
        """The column of a key, if it has numbers."""
        return next((column for column in self.columns if column.key == key), None)

    @property
    def cells(self) -> list[Row]:
        """The rows that are cells."""
        return [row for row in self.rows if row.stage == "after"]

    def tables(self) -> list[tuple[str, Table]]:
        """The two tables by title, with the rows that have numbers in them or should have."""
        found = []
        for title, is_cost in ((QUALITY, False), (COST, True)):
            columns = [column for column in self.columns if column.key.startswith(COSTS) == is_cost]
            rows = [row for row in self.rows if not is_cost or (row.stage == "after" and row.objective is not None)]
            lines = [row.line(row.counted("-"), *(row.spread(c).text(c.style) for c in columns)) for row in rows]
            if columns:
                heads = ["seeds", *(c.header for c in columns)], ["", *(c.good for c in columns)]
                found.append((title, Table(*heads, lines)))
        return found

    def notes(self) -> list[str]:
        """Seeds and cells that are missing or failed, and times that are not whole."""
        unlearned = [row for row in self.cells if row.objective is not None]
        seeds = sorted({seed for row in unlearned for seed in row.seeds})
        lines = []
        for row in unlearned:
            missing = [str(seed) for seed in seeds if seed not in row.seeds] if row.seeds else []
            lines += [f"{row.label}: seed {', '.join(missing)} has no evaluation."] if missing else []
        there = {(str(row.objective), row.parametrization) for row in unlearned}
        for objective in sorted({objective for objective, _ in there}):
            kinds = sorted({kind for _, kind in there if (objective, kind) not in there})
            lines += [f"{run_label(objective, kind)}: no evaluated run." for kind in kinds]
        lines += failures(self.results)
        found = []
        for row in unlearned:
            lent = sum(bool((result.record.get("cache") or {}).get("found")) for result in row.results)
            found += [f"{row.label} {lent} of {len(row.results)}"] if lent else []
        if found:
            lines.append(
                "Runs that found frozen states in the cache, computed by an earlier run, which their seconds leave "
                f"out: {', '.join(found)}."
            )
        return lines


def failures(results: Sequence[Result]) -> list[str]:
    """A sentence for each cell that failed in a sweep, with its error."""
    lines = []
    folders = {result.folder.resolve().parent.parent for result in results}
    for path in sorted(path for folder in folders for path in folder.glob(f"cells/*{OUTCOME}")):
        try:
            outcome = read_json(path)
            if outcome["state"] == "failed":
                lines.append(f"{path.name.removesuffix(OUTCOME)} failed: {outcome.get('error') or 'no reason given'}.")
        except (OSError, ValueError, LookupError, TypeError):
            continue  # a damaged file has nothing on its run
    return lines


# -- columns ----------------------------------------------------------------------------------------------------------


def _columns(results: Sequence[Result]) -> list[Column]:
    """What is forgotten and kept, by the corpus's main metric, then what it costs."""
    main, known = main_metric(results)[0], columns_by_key()
    # The model utility stands for general knowledge.
    kept = [name for name, one in evaluation_sets().items() if one.is_result and not one.general and name != "forget"]
    wanted = [f"forget.{main}", "forget.rouge_l", *(f"{name}.{main}" for name in kept)]
    wanted += ["overall.model_utility", "reference.forget_quality", "forget.degenerate", "gate.auc"]
    return [
        *(known[key] for key in dict.fromkeys(wanted) if key in known),
        Column("cost.parameters", "trained parameters", "low", partial(_recorded, key="parameters.trained"), "whole"),
        Column("cost.seconds", "seconds", "low", partial(_recorded, key="seconds"), "seconds"),
        Column("cost.memory_bytes", "peak memory (MiB)", "low", partial(_recorded, key="peak_memory_bytes"), "memory"),
        Column("cost.saved_bytes", "size on disk (MB)", "low", partial(_recorded, key="saved_bytes"), "size"),
    ]


def _recorded(result: Result, key: str) -> float | None:
    value: Any = result.record if result.run else None
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# -- cells ------------------------------------------------------------------------------------------------------------


def cells_of(results: Sequence[Result]) -> list[Row]:
    """The runs by objective, parametrization, base model and settings; a cell's runs differ in seed alone.

    Runs of unknown seed, or of a seed that their cell has already, are cells of their own, under their names.
    """
    cells: list[tuple[Any, list[Result]]] = []
    for result in sorted(after(results), key=order_of):
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
    cells = cells_of(results)
    labels = {row.results[0].name: row.label for row in cells if len(row.results) > 1}
    left_out = {result.name for row in cells for result in row.results[1:]}
    kept = []
    for result in results:
        if result.name in labels:
            result = copy.copy(result)  # with the table, if it was read already
            result.label = labels[result.name]
        if result.name not in left_out:
            kept.append(result)
    return kept


def make_matrix(results: Sequence[Result]) -> Matrix | None:
    """The matrix of the results; None unless they have several parametrizations, or several seeds of one cell."""
    cells = cells_of(results)
    unlearned = [row for row in cells if row.objective is not None]
    if len({row.parametrization for row in unlearned}) < 2 and all(len(row.results) < 2 for row in unlearned):
        return None
    compared = [Row(one.title, one.stage, None, "none", (one,)) for one in results if one.stage != "after"]
    return Matrix((*compared, *cells), tuple(results))


# -- files ------------------------------------------------------------------------------------------------------------


def matrix_csv(matrix: Matrix) -> str:
    """Full precision: for each row of the matrix a line a statistic, then a line a run with its seed and raw numbers.

    `statistic` is n, mean, sd, median, lowest, highest or run; a p-value has no mean and no sd. Bytes are bytes.
    """
    head = ["row", "stage", "objective", "parametrization", "statistic", "seed", "name"]
    rows: list[list[Any]] = [[*head, *(column.key for column in matrix.columns)]]
    for row in matrix.rows:
        of_row = [row.label, row.stage, row.objective, row.parametrization]
        for statistic, read in STATISTICS.items():
            without = statistic in ("mean", "sd")
            values = [None if without and c.style == "p" else read(row.spread(c)) for c in matrix.columns]
            rows.append([*of_row, statistic, None, None, *values])
        rows += [[*of_row, "run", one.seed, one.name, *(c.value(one) for c in matrix.columns)] for one in row.results]
    return csv_text(rows)


def matrix_tex(matrix: Matrix) -> str:
    """Both tables as LaTeX tabulars (package booktabs), a rule between objectives; how to read them as comments."""
    comments = [re.sub(r"[\r\n]+", " ", text) for text in (CAPTION, *matrix.notes())]
    text = "".join(f"% {line}\n" for line in ("\\usepackage{booktabs}", *comments))
    return text + "".join(f"% {title}\n{to_tex(table)}" for title, table in matrix.tables())
