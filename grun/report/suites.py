"""A suite's report is data: its columns, its rule for verdicts, its examples; everything else is done here for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.errors import RunError
from grun.report.columns import seconds
from grun.report.figures import Drawn, Picture, draw
from grun.report.page import Block, Section, page, picture_block, settings_section, statement_section, verdict_section
from grun.report.result import Judgement, Result, after, single_runs
from grun.report.results import EVALUATION_FILE
from grun.report.tables import (
    Column,
    Folded,
    Line,
    Table,
    markdown_points,
    markdown_text,
    shown_columns,
    to_csv,
    to_markdown,
    to_terminal,
)
from grun.report.terminal import print_line, print_said, print_terms, print_verdicts
from grun.runtime.files import remove
from grun.runtime.records import Evaluation, read_record

if TYPE_CHECKING:
    from rich.console import Console

AT_ONCE = 8
"""Methods next to before and retain only in one printed table; of more there are several tables."""
RUNS_FILE = "table_runs.csv"
"""The table with a row a run, where the others have means over seeds."""
Results = Sequence[Result]


@dataclass(frozen=True)
class Suite:
    """What distinguishes the report of one suite from another's."""

    name: str
    find: Callable[[Path], list[Result]]
    """The evaluated models of a results folder, in the order of the rows."""
    columns: Callable[[Results], list[Column]]
    """What at least one model has a number for; those that are not main are for the files alone."""
    judge: Callable[[Result, Results], Judgement]
    statement: str
    """What no verdict means."""
    legend: Callable[[Results], list[tuple[str, str]]]
    notes: Callable[[Results], str]
    """What was asked, in sentences."""
    intervals: Callable[[Results], str]
    """What the numbers in parentheses are, a sentence."""
    pictures: Sequence[Picture]
    examples: Callable[[Results], list[Section]]
    """Sections of the page with what models answered."""
    quoted: Callable[[Results], tuple[str, list[tuple[str, list[tuple[str, str]]]]]]
    """A heading, and questions with who said what, to be printed."""
    groups: Callable[[Results], list[Folded]] = lambda results: []
    """Tables that stand before the others, and open line by line on the page."""
    grouped: str = ""
    """How to read them."""
    tables: Callable[[Results], list[list[Column]]] = lambda results: []
    """Columns of further tables in table.md."""
    facts: Callable[[Results], dict[str, Any]] = lambda results: {}
    """Entries of summary.json."""
    entry: Callable[[Result, Results], dict[str, Any]] = lambda result, results: {}
    """Entries of a model's row in summary.json."""

    def judgements(self, results: Results) -> list[Judgement]:
        """The verdict on each method."""
        return [self.judge(result, results) for result in after(results)]

    def draw(self, results: Results, folder: Path) -> Drawn:
        """Draw the pictures into `folder`, and return them with their files."""
        return draw([(picture, results) for picture in self.pictures], folder)

    def texts(self, results: Results, title: str, drawn: Drawn, folder: Path) -> dict[str, str]:
        """The files of the report by name, without summary.json and pictures."""
        columns = self.columns(results)
        texts = {"report.html": self._page(results, title, drawn)}
        texts["table.csv"] = to_csv(columns, results, "name", "label", "stage")
        texts["table.md"] = self._markdown(columns, results)
        runs = single_runs(results)
        if len(runs) > len(results):
            texts[RUNS_FILE] = to_csv(self.columns(runs), runs, "name", "label", "stage")
        else:
            remove(folder / RUNS_FILE)  # an older report's would contradict this one
        return texts

    def summary(self, results: Results, profile: str) -> dict[str, Any]:
        """Contents of summary.json: numbers and intervals by column, and the verdict, of each model."""
        columns, rows = self.columns(results), []
        for result in results:
            found = {column.key: number for column in columns if (number := column.found(result)) is not None}
            row = {
                **{key: getattr(result, key) for key in ("name", "label", "stage", "objective", "parametrization")},
                "numbers": {
                    key: number.value if math.isfinite(number.value) else None for key, number in found.items()
                },
                "intervals": {key: list(number.interval) for key, number in found.items() if number.interval},
            }
            row |= self.entry(result, results)
            if result.stage == "after":
                row["verdict"] = self.judge(result, results).as_json()
            rows.append(row)
        head = {"profile": profile, "suite": self.name, **self.facts(results)}
        return {**head, "rows": rows, "seconds": seconds(single_runs(results))}

    def show(self, console: Console, results: Results, title: str) -> None:
        """Print the numbers, a column a model, what they mean, the verdicts, and what some models answered."""
        columns, methods = shown_columns(self.columns(results)), after(results)
        groups = self.groups(results)
        if groups:
            print_line(console, self.grouped)
        for folded in groups:
            console.print(to_terminal(folded.table.narrow(), folded.title, ""))
        lines = [one for one in results if one.stage != "after"]
        for start in range(0, max(len(methods), 1), AT_ONCE):
            some = [*lines, *methods[start : start + AT_ONCE]]
            console.print(to_terminal(table_of(columns, some).flipped(good=False).narrow(), title, ""))
        print_terms(console, self.legend(results))
        if notes := self.notes(results):
            print_line(console, notes)
        print_line(console)
        print_verdicts(console, self.judgements(results), self.statement)
        heading, quoted = self.quoted(results)
        if quoted:
            print_line(console)
            print_line(console, heading, "bold")
        for question, said in quoted:
            print_said(console, question, said)

    def _markdown(self, columns: Sequence[Column], results: Results) -> str:
        """Groups; every number with its interval, models as columns; what was asked; the verdicts; further tables."""
        groups = self.groups(results)
        parts = [f"{self.grouped}\n"] if groups else []
        for folded in groups:
            parts += [f"**{markdown_text(folded.title)}**\n", to_markdown(folded.table)]
        parts.append(to_markdown(table_of(columns, results, intervals=True).flipped()))
        said = [self.intervals(results), markdown_text(self.notes(results))]
        parts.append(f"{' '.join(filter(None, said))}\n" if any(said) else "")
        parts.append(markdown_points(judgement.sentence for judgement in self.judgements(results)))
        parts += [to_markdown(table_of(columns, results, intervals=True).flipped()) for columns in self.tables(results)]
        return "\n".join(filter(None, parts))

    def _page(self, results: Results, title: str, drawn: Drawn) -> str:
        notes = self.notes(results)
        groups = [Block("folded", folded, folded.title) for folded in self.groups(results)]
        groups = [Block("text", self.grouped), *groups] if groups else []
        table = [
            Block(
                "table", table_of(shown_columns(self.columns(results)), results).flipped(), "Table of all models", ""
            ),
            *([Block("text", notes)] if notes else []),
            Block("terms", self.legend(results), "What the words mean"),
        ]
        return page(
            title,
            [
                verdict_section(self.judgements(results), none="No unlearned model has been evaluated yet."),
                Section("groups", "Groups", "The worst of each group", groups),
                Section("table", "Table", "All models", table),
                Section("pictures", "Pictures", "Pictures", [picture_block(picture, path) for picture, path in drawn]),
                *self.examples(results),
                settings_section(single_runs(results)),
                statement_section(self.statement),
            ],
        )


def suite_of(folders: Sequence[Path], known: Sequence[str]) -> str:
    """The suite of all evaluations in `folders`; RunError if they are of several, or of one that has no report."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        suite = read_record(folder / EVALUATION_FILE, Evaluation).get("suite", "answers")
        found.setdefault(suite, []).append(folder.name)
    listed = "; ".join(f"{suite}: {', '.join(names)}" for suite, names in found.items())
    place = folders[0].parent if folders else ""
    if len(found) > 1:
        raise RunError(f"{place} holds evaluations of several suites ({listed}); keep one in a results folder")
    suite = next(iter(found), "answers")
    if suite not in known:
        raise RunError(
            f"{place} holds evaluations of suite={suite}, of which there is no report; see {EVALUATION_FILE}"
        )
    return suite


def table_of(columns: Sequence[Column], results: Results, *, intervals: bool = False) -> Table:
    """A line a model."""
    lines = [Line(one.title, [column.text(one, intervals) for column in columns], one.stage) for one in results]
    return Table([column.header for column in columns], [column.good for column in columns], lines)
