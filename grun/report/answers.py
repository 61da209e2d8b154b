"""The report of suite=answers: its files, its page and what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from grun.data.sets import EvaluationSet, in_order
from grun.report.before_after import PICTURE, asked_sets, before_after_section, compared
from grun.report.columns import columns_of, legend, narrow_columns, summarize
from grun.report.compared import HEADING, RULE, matrix_markdown, words
from grun.report.figures import Drawn
from grun.report.matrix import Matrix, first_seeds, has_many_runs, make_matrix, matrix_csv, matrix_tex, one_seed_note
from grun.report.page import (
    EXAMPLES,
    Block,
    Card,
    Section,
    page,
    picture_block,
    settings_section,
    statement_section,
    verdict_section,
)
from grun.report.pictures import KEPT_PICTURE, draw_all
from grun.report.result import Result, after, behind_filters, unread_words
from grun.report.results import find_results
from grun.report.suites import table_of
from grun.report.tables import Line, Table, to_csv, to_markdown, to_terminal, to_tex
from grun.report.terminal import print_line, print_said, print_terms, print_verdicts
from grun.report.verdict import STATEMENT, judge
from grun.runtime.files import remove

if TYPE_CHECKING:
    from rich.console import Console

MATRIX_FILES = ("matrix.csv", "matrix.md", "matrix.tex")
Results = Sequence[Result]


class AnswerReport:
    """The report of answers, with the methods of a `grun.report.suites.Suite`."""

    find = staticmethod(find_results)
    draw = staticmethod(draw_all)
    summary = staticmethod(summarize)

    def texts(self, results: Results, title: str, drawn: Drawn, folder: Path) -> dict[str, str]:
        """The files of the report by name, without summary.json and pictures."""
        table = table_of(columns_of(results, everything=True), results).flipped()
        texts = {"report.html": answer_page(results, title, drawn)}
        texts["table.csv"] = table_csv(results)
        texts["table.md"] = to_markdown(table)
        texts["table.tex"] = f"% \\usepackage{{booktabs}}\n{to_tex(table)}"
        matrix = make_matrix(results)
        if matrix is None:
            for name in MATRIX_FILES:
                remove(folder / name)  # an older report's would contradict this one
            return texts
        written = (matrix_csv(matrix), matrix_markdown(matrix), matrix_tex(matrix))
        return texts | dict(zip(MATRIX_FILES, written, strict=True))

    def show(self, console: Console, results: Results, title: str) -> None:
        """Print questions with the answers before and after, the table, what it means, and a verdict for each run.

        Where there are many runs of a matrix, it is printed instead, and its comparison in words.
        """
        matrix, first, many = make_matrix(results), first_seeds(results), has_many_runs(results)
        columns = narrow_columns(results)
        _print_examples(console, compared(first))
        if matrix is not None and many:
            console.print(to_terminal(matrix.narrow(), title, ""))
            print_line(console, matrix.caption)
        else:
            lines = [Line(one.title, [column.text(one) for column, _ in columns]) for one in results]
            console.print(to_terminal(Table([header for _, header in columns], [], lines), title))
        print_terms(console, legend(results, [column for column, _ in columns]))
        alone = [*behind_filters(results), *unread_words(results)]
        for note in alone if matrix is None else matrix.notes():
            print_line(console, note)
        for objective, sentences in words(matrix) if matrix is not None else ():
            _print_compared(console, objective, sentences)
        print_line(console)
        print_verdicts(console, [] if many else [judge(result, results) for result in after(first)], STATEMENT)
        if note := one_seed_note(results, first):
            print_line(console, note)


def table_csv(results: Results) -> str:
    """The full table with full precision; its headers are the places of the numbers in summary.json."""
    attributes = ("name", "label", "stage", "objective", "parametrization")
    return to_csv(columns_of(results, everything=True), results, *attributes)


# -- page -------------------------------------------------------------------------------------------------------------


def answer_page(results: Results, title: str, drawn: Drawn) -> str:
    """The page of a report, with the pictures that were drawn."""
    first, matrix, columns = first_seeds(results), make_matrix(results), columns_of(results)
    note = one_seed_note(results, first)
    above = [Block("text", note)] if note else []
    pictures = [
        picture_block(picture, path, "" if picture.every_seed else note)
        for picture, path in drawn
        if picture.name != PICTURE and (matrix is None or picture.name != KEPT_PICTURE)
    ]
    unread = [*behind_filters(results), *unread_words(results)]
    table = [
        Block("table", table_of(columns, results), "Table of all models"),
        *([Block("points", unread)] if unread else []),
        Block("terms", legend(results, columns), "What the rows, sets and numbers mean"),
    ]
    none = "No unlearned model has been evaluated yet; these are the models to compare with."
    asked = in_order(name for result in results for name in result.table.sets())
    answers = [block for one in asked for block in _answers(first, one)]
    return page(
        title,
        [
            before_after_section(first, drawn),
            Section("matrix", "Matrix", "Matrix", [] if matrix is None else _matrix(matrix, drawn)),
            verdict_section([judge(result, results) for result in after(first)], *above, none=none),
            Section("table", "Table", "All models", table),
            Section("pictures", "Pictures", "Pictures", pictures),
            Section("answers", "Answers", "First answers of each set", [*above, *answers]),
            settings_section(results),
            statement_section(STATEMENT),
        ],
    )


def _matrix(matrix: Matrix, drawn: Drawn) -> list[Block]:
    blocks = [Block("table", table, f"Matrix: {title}", title.lower()) for title, table in matrix.tables()]
    blocks.append(Block("text", matrix.caption))
    notes, compared = matrix.notes(), words(matrix)
    blocks += [Block("points", notes)] if notes else []
    blocks += [picture_block(picture, path) for picture, path in drawn if picture.name == KEPT_PICTURE]
    blocks += [Block("text", f"{HEADING}. {RULE}")] if compared else []
    for name, sentences in compared:
        blocks += [Block("heading", name), Block("points", sentences)]
    return blocks


def _answers(results: Results, asked: EvaluationSet) -> list[Block]:
    """What each model answered to the first questions of a set."""
    rows = _rows_of(results, asked)
    if not rows:
        return []
    cards = [Card(question, said) for question, said in islice(rows, EXAMPLES)]
    meaning = f": {asked.meaning}" if asked.meaning else ""
    return [Block("cards", cards, asked.label, meaning=meaning, opened=asked.name == "forget")]


def _rows_of(results: Results, asked: EvaluationSet) -> list[tuple[str, list[tuple[str, str]]]]:
    """Questions of a set by index, with the reference and the answers."""
    answers = [(one.label, {row.index: row for row in one.table.generations_of(asked.name)}) for one in results]
    rows = {index: row for _, found in reversed(answers) for index, row in found.items()}
    return [
        (
            row.question,
            [("reference", row.reference), *((label, found[index].text) for label, found in answers if index in found)],
        )
        for index, row in sorted(rows.items())
    ]


# -- terminal ---------------------------------------------------------------------------------------------------------


def _print_compared(console: Console, objective: str, sentences: Sequence[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    print_line(console)
    print_line(console, f"{objective}: {HEADING}", "bold")
    for sentence in sentences:
        console.print(Padding(Text(sentence), (0, 0, 0, 2)))


def _print_examples(console: Console, models: Results) -> None:
    """The first question of each set, of the forget set two, and what each model answered."""
    for one in asked_sets(models):
        print_line(console, f"{one.label}: {one.meaning}", "bold")
        for question, said in _rows_of(models, one)[: 2 if one.name == "forget" else 1]:
            answers = said[1:] if said[0][1] == said[1][1] else said  # what the model knew is its own reference
            print_said(console, question, answers)
    print_line(console)
