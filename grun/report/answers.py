"""The report of suite=answers: its pictures, the matrix, and what was answered."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from grun.report import distributions
from grun.report.columns import columns_of, legend
from grun.report.compared import RULE, standings
from grun.report.figures import Picture
from grun.report.left_and_kept import asked_sets, left_and_kept, sets_figure
from grun.report.matrix import CAPTION, Matrix, first_seeds, make_matrix, matrix_csv, matrix_tex
from grun.report.page import Card, Examples
from grun.report.result import Result, behind_filters, unread_words
from grun.report.results import find_results
from grun.report.suites import Part, Suite, table_of
from grun.report.tables import to_tex
from grun.report.verdict import STATEMENT, judge

EXAMPLES = 5
"""Questions shown of each set."""
Results = Sequence[Result]

PICTURES = (
    Picture(
        "sets.png",
        "What is left, set by set",
        "Share of right answers before and after. What is to be forgotten should go; everything else should stay as "
        "it was before.",
        sets_figure,
    ),
    Picture(
        "left_and_kept.png",
        "What is left and what is kept",
        "A row for each model, or for each objective and parametrization (means over seeds; bars are one standard "
        "deviation), a panel for each number: what is left of the forget set, what is kept of the rest, of TOFU its "
        "model utility and log10 of forget quality's p too (right of the dotted line, p = 0.05, a model cannot be "
        "told from the target). The gray line is the model before, the dashed one the target.",
        left_and_kept,
        every_seed=True,
    ),
    Picture(
        "gate_histograms.png",
        "Gates by set",
        "Histograms of how far the gate opens, a column for each set: for each run a row of the mean over blocks, then "
        "one for each edited block. Good is open (right) on forget questions and shut (left) on all others.",
        distributions.gate_histograms,
    ),
    Picture(
        "truth_ratios.png",
        "Truth ratios of the forget set",
        "Share of forget rows whose truth ratio is below each value, every model against the retain-only one. The "
        "red bar is their largest distance D, which the KS test of forget quality judges; small is good.",
        distributions.truth_ratio_curves,
    ),
    Picture(
        "training_curves.png",
        "Training",
        "Loss terms by training step, a panel for each run. Each should fall, the gate's towards 0.",
        distributions.training_curves,
    ),
    Picture(
        "monitor_curves.png",
        "While training",
        "What each run answered to a few questions of each set, looked at again and again while it was trained "
        "(train.monitor_epochs). Forget should fall, all others stay.",
        distributions.monitor_curves,
    ),
)


def _matrix_part(matrix: Matrix) -> Part:
    compared = standings(matrix)
    text = f"{CAPTION} {RULE}" if compared else CAPTION
    tables = [*matrix.tables(), *compared]
    title = "Matrix: objective by parametrization"
    return Part("Matrix", title, text, tables, matrix.notes(), places=("page", "terminal"))


def _files(results: Results) -> dict[str, str | None]:
    matrix = make_matrix(results)
    table = to_tex(table_of(columns_of(results), results).flipped())
    return {
        "table.tex": f"% \\usepackage{{booktabs}}\n{table}",
        "matrix.csv": matrix_csv(matrix) if matrix else None,
        "matrix.md": _matrix_part(matrix).markdown() if matrix else None,
        "matrix.tex": matrix_tex(matrix) if matrix else None,
    }


def _examples(results: Results) -> list[Examples]:
    """The first questions of each set by index, with the reference and the answers."""
    found = []
    for one in asked_sets(results):
        answers = [(model.label, {row.index: row for row in model.table.generations_of(one.name)}) for model in results]
        rows = {index: row for _, of_model in reversed(answers) for index, row in of_model.items()}
        cards = [
            Card(
                row.question,
                [
                    ("reference", row.reference),
                    *((label, of_model[index].text) for label, of_model in answers if index in of_model),
                ],
            )
            for index, row in islice(sorted(rows.items()), EXAMPLES)
        ]
        found.append(Examples(one.label, cards, one.meaning))
    return found


def _gates(results: Results) -> dict[str, Any]:
    """Keyed by objective, or by run where two runs share an objective."""
    objectives, gate = [result.objective for result in results], {}
    for result in results:
        if result.stage == "after" and "gate" in result.evaluation:
            alone = result.objective is not None and objectives.count(result.objective) == 1
            gate[result.objective if alone else result.name] = result.evaluation["gate"]
    return {"gate": gate}


def _entry(result: Result, results: Results) -> dict[str, Any]:
    """Numbers by set and metric."""
    sets = result.evaluation["sets"]
    unread = {name: rows for name in sets if (rows := result.unread(name))}
    return {"metrics": sets, "overall": result.overall, "reference": result.reference, "unread": unread}


ANSWER_SUITE = Suite(
    name="answers",
    find=find_results,
    columns=columns_of,
    judge=judge,
    statement=STATEMENT,
    legend=legend,
    pictures=PICTURES,
    examples_title="Before and after",
    examples=_examples,
    notes=lambda results: [*behind_filters(results), *unread_words(results)],
    parts=lambda results: [_matrix_part(matrix)] if (matrix := make_matrix(results)) else [],
    shown=first_seeds,
    files=_files,
    facts=_gates,
    entry=_entry,
)
