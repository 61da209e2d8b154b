"""matrix.md, matrix.csv and matrix.tex: the matrix for reading, for programs and for a paper."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from grun.report.matrix import Matrix, Row
from grun.report.matrix_words import RULE, words
from grun.report.measures import Measure
from grun.report.missing import notes
from grun.report.tables import csv_text, markdown_text, tex_number, tex_text

QUALITY, COST = "What is forgotten and kept", "What it costs"


def halves(matrix: Matrix) -> list[tuple[str, list[Measure], list[Row]]]:
    """The two tables, each with its title, its columns and the rows that have numbers in them or should have."""
    found = []
    for title, is_cost in ((QUALITY, False), (COST, True)):
        measures = [measure for measure in matrix.measures if measure.is_cost == is_cost]
        rows = [row for row in matrix.rows if not is_cost or (row.stage == "after" and row.objective is not None)]
        if measures:
            found.append((title, measures, rows))
    return found


def seeds_text(row: Row) -> str:
    """Number of seeds of a cell; - for a model to compare with and for a cell without runs."""
    return str(len(row.results)) if row.stage == "after" and row.results else "-"


def to_markdown(matrix: Matrix) -> str:
    """Both tables, how to read them, what is missing, and the comparison in words."""
    lines = ["# Matrix: objective by parametrization", "", markdown_text(matrix.caption), ""]
    for title, measures, rows in halves(matrix):
        cells = [
            ["", "seeds", *(measure.header for measure in measures)],
            ["---", "---:", *("---:" for _ in measures)],
            ["good is", "", *(measure.good for measure in measures)],
            *(
                [markdown_text(row.label), seeds_text(row), *(row.spread(m).text(m.kind) for m in measures)]
                for row in rows
            ),
        ]
        lines += [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in cells), ""]
    missing = notes(matrix)
    if missing:
        lines += ["## Notes", "", *(f"- {markdown_text(note)}" for note in missing), ""]
    compared = words(matrix)
    if compared:
        lines += ["## GRUN beside the others", "", RULE, ""]
        for objective, sentences in compared:
            lines += [f"**{markdown_text(objective)}**", "", *(f"- {markdown_text(text)}" for text in sentences), ""]
    return "\n".join(lines)


def to_csv(matrix: Matrix) -> str:
    """Full precision: for each row of the matrix a line a statistic, then a line a run with its seed and raw numbers.

    `statistic` is n, mean, sd, median, lowest, highest or run; a p-value has no mean and no sd. Bytes are bytes.
    """
    head = ["row", "stage", "objective", "parametrization", "statistic", "seed", "name"]
    rows: list[list[str | float | None]] = [[*head, *(measure.key for measure in matrix.measures)]]
    for row in matrix.rows:
        of_row = [row.label, row.stage, row.objective, row.parametrization]
        rows += [[*of_row, statistic, None, None, *values] for statistic, values in _statistics(row, matrix.measures)]
        for result in row.results:
            rows.append([*of_row, "run", result.seed, result.name, *(m.value(result) for m in matrix.measures)])
    return csv_text(rows)


def _statistics(row: Row, measures: Sequence[Measure]) -> Iterator[tuple[str, list[float | None]]]:
    spreads = [(measure, row.spread(measure)) for measure in measures]
    yield "n", [spread.n for _, spread in spreads]
    yield "mean", [None if measure.kind == "p" else spread.mean for measure, spread in spreads]
    yield "sd", [None if measure.kind == "p" else spread.deviation for measure, spread in spreads]
    yield "median", [spread.median for _, spread in spreads]
    yield "lowest", [min(spread.values, default=None) for _, spread in spreads]
    yield "highest", [max(spread.values, default=None) for _, spread in spreads]


def to_tex(matrix: Matrix) -> str:
    r"""Both tables as LaTeX tabulars (package booktabs), a rule between objectives; how to read them as comments."""
    lines = ["% \\usepackage{booktabs}", *(f"% {text}" for text in (matrix.caption, *notes(matrix)))]
    for title, measures, rows in halves(matrix):
        heads = [" & ".join(["", "seeds", *(tex_text(measure.header) for measure in measures)]) + " \\\\"]
        lines += [f"% {title}", f"\\begin{{tabular}}{{lr{'r' * len(measures)}}}", "\\toprule", *heads]
        objective: str | None = ""
        for row in rows:
            if row.objective != objective:
                lines.append("\\midrule")
                objective = row.objective
            numbers = (_tex_spread(row.spread(measure).text(measure.kind)) for measure in measures)
            lines.append(" & ".join([tex_text(row.label), tex_number(seeds_text(row)), *numbers]) + " \\\\")
        lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(re.sub(r"[\r\n]+", " ", line) for line in lines) + "\n"


def _tex_spread(text: str) -> str:
    """Mean and deviation with a plus-minus sign; a range of p-values number by number."""
    mean, plus_minus, deviation = text.partition(" ± ")
    if plus_minus:
        return f"${_tex_digits(mean)} \\pm {_tex_digits(deviation)}$"
    median, between, highest = text.rstrip(")").partition(" to ")
    if between:
        median, lowest = median.split(" (")
        return f"{tex_number(median)} ({tex_number(lowest)} to {tex_number(highest)})"
    return tex_number(text)


def _tex_digits(text: str) -> str:
    return text.replace(",", "{,}")  # in mathematics a bare comma is followed by a space
