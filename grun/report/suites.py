"""A suite's report is data: its columns, parts, examples and its rule for verdicts; all else is done here for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.errors import RunError
from grun.report.figures import Drawn, Picture, draw
from grun.report.page import Block, Examples, Section, page, picture_block, settings_block
from grun.report.result import Judgement, Result, after, single_runs
from grun.report.results import EVALUATION_FILE
from grun.report.tables import (
    Column,
    Line,
    Table,
    markdown_points,
    markdown_text,
    shown_columns,
    to_csv,
    to_markdown,
    to_terminal,
)
from grun.report.terminal import print_line, print_said, print_terms
from grun.runtime.files import remove
from grun.runtime.records import Evaluation, read_record

if TYPE_CHECKING:
    from rich.console import Console

ATTRIBUTES = ("name", "label", "stage", "objective", "parametrization")
"""Of a model, in front of its numbers in files."""
MOST_SAID = 8
"""Answers printed of one question."""
Results = Sequence[Result]


class Part(NamedTuple):
    """Further tables of a report."""

    link: str
    heading: str
    text: str
    """How to read them."""
    tables: Sequence[tuple[str, Table]]
    """By title."""
    points: Sequence[str] = ()
    """Sentences below them."""
    places: Sequence[str] = ("page", "terminal", "table.md")
    """Where it stands."""
    first: str = "model"
    """Head of the tables' first column on the page."""

    def section(self) -> Section:
        """It on the page."""
        blocks = [Block("text", self.text)] if self.text else []
        for title, table in self.tables:
            blocks += [Block("heading", title), Block("table", table, title, self.first)]
        blocks += [Block("points", self.points)] if self.points else []
        return Section(self.link.lower(), self.link, self.heading, blocks)

    def markdown(self) -> str:
        """It as Markdown."""
        texts = [f"# {self.heading}\n", f"{markdown_text(self.text)}\n" if self.text else ""]
        for title, table in self.tables:
            texts += [f"## {markdown_text(title)}\n", to_markdown(table)]
        return "\n".join(filter(None, [*texts, markdown_points(self.points)]))

    def show(self, console: Console) -> None:
        """Print it."""
        print_line(console, self.text)
        for title, table in self.tables:
            for printed in table.printed():
                console.print(to_terminal(printed, title, ""))
        for point in self.points:
            print_line(console, point)
        print_line(console)


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
    pictures: Sequence[Picture]
    examples_title: str
    examples: Callable[[Results], list[Examples]]
    """What models answered."""
    notes: Callable[[Results], list[str]] = lambda results: []
    """Sentences below the table."""
    intervals: Callable[[Results], str] = lambda results: ""
    """What the numbers in parentheses in table.md are, a sentence."""
    parts: Callable[[Results], list[Part]] = lambda results: []
    shown: Callable[[Results], Results] = lambda results: results
    """The models that have verdicts, examples and pictures, and are in the printed table."""
    files: Callable[[Results], dict[str, str | None]] = lambda results: {}
    """Further files by name; None: an older one would contradict this report."""
    facts: Callable[[Results], dict[str, Any]] = lambda results: {}
    """Entries of summary.json."""
    entry: Callable[[Result, Results], dict[str, Any]] = lambda result, results: {}
    """Entries of a model's row in summary.json."""

    def draw(self, results: Results, folder: Path) -> Drawn:
        """Draw the pictures into `folder`, and return them with their files."""
        shown = self.shown(results)
        return draw([(picture, results if picture.every_seed else shown) for picture in self.pictures], folder)

    def texts(self, results: Results, title: str, drawn: Drawn, folder: Path) -> dict[str, str]:
        """The files of the report by name, without summary.json and pictures."""
        texts = {"report.html": self._page(results, title, drawn)}
        texts["table.csv"] = to_csv(self.columns(results), results, *ATTRIBUTES)
        texts["table.md"] = self._markdown(results)
        for name, text in self.files(results).items():
            if text is None:
                remove(folder / name)
            else:
                texts[name] = text
        return texts

    def summary(self, results: Results, profile: str) -> dict[str, Any]:
        """Contents of summary.json: numbers and intervals by column, and the verdict, of each model."""
        columns, rows = self.columns(results), []
        for result in results:
            found = {column.key: number for column in columns if (number := column.found(result)) is not None}
            row = {
                **{key: getattr(result, key) for key in ATTRIBUTES},
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
        """Print an example of each kind, the parts and the numbers, what these mean, and the verdicts."""
        shown = self.shown(results)
        for examples in (one for one in self.examples(shown) if one.cards):
            print_line(console, ": ".join(filter(None, (examples.label, examples.meaning))), "bold")
            heading, said = examples.cards[0]
            said = said[said[0][1] == said[1][1] :]  # what the model knew is its own reference
            print_said(console, heading, said[:MOST_SAID])
        print_line(console)
        for part in self._parts(results, "terminal"):
            part.show(console)
        for table in table_of(shown_columns(self.columns(results)), shown).printed():
            console.print(to_terminal(table, title, ""))
        print_terms(console, self.legend(results))
        for text in (*self.notes(results), "", *self._verdicts(results), ""):
            print_line(console, text)
        print_line(console, self.statement, "bold")

    def _parts(self, results: Results, place: str) -> list[Part]:
        return [part for part in self.parts(results) if place in part.places]

    def _judgements(self, results: Results) -> list[Judgement]:
        return [self.judge(result, results) for result in after(self.shown(results))]

    def _verdicts(self, results: Results) -> list[str]:
        """Sentences: a verdict on each method, and that some seeds have none."""
        note = one_seed_note(results, self.shown(results))
        return [judgement.sentence for judgement in self._judgements(results)] + ([note] if note else [])

    def _markdown(self, results: Results) -> str:
        """Every number with its interval, models as columns; what was asked; the verdicts; the parts."""
        parts = [to_markdown(table_of(self.columns(results), results, intervals=True).flipped())]
        said = [self.intervals(results), *map(markdown_text, self.notes(results))]
        parts.append(f"{' '.join(filter(None, said))}\n" if any(said) else "")
        parts.append(markdown_points(self._verdicts(results)))
        parts += [part.markdown() for part in self._parts(results, "table.md")]
        return "\n".join(filter(None, parts))

    def _page(self, results: Results, title: str, drawn: Drawn) -> str:
        shown, notes = self.shown(results), self.notes(results)
        note = one_seed_note(results, shown)
        above = [Block("text", note)] if note else []
        examples = [Block("cards", found, opened=number == 0) for number, found in enumerate(self.examples(shown))]
        verdicts = [Block("verdict", judgement) for judgement in self._judgements(results)]
        none = Block("text", "No unlearned model has been evaluated yet; these are the models to compare with.")
        table = table_of(shown_columns(self.columns(results)), results).flipped()
        numbers = [
            Block("table", table, "Table of all models", ""),
            *([Block("points", notes)] if notes else []),
            Block("terms", self.legend(results), "What the words mean"),
        ]
        pictures = [picture_block(one, path, "" if one.every_seed else note) for one, path in drawn]
        settings = [settings_block(result) for result in single_runs(results)]
        return page(
            title,
            [
                Section("examples", "Examples", self.examples_title, [*above, *examples] if examples else []),
                Section("verdicts", "Verdicts", "Verdicts", [*above, *(verdicts or [none])]),
                *(part.section() for part in self._parts(results, "page")),
                Section("table", "Table", "All models", numbers),
                Section("pictures", "Pictures", "Pictures", pictures),
                Section("settings", "Settings", "Settings and provenance", settings),
                Section("statement", "What this is not", "What this is not", [Block("text", self.statement)]),
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


def one_seed_note(results: Results, shown: Results) -> str:
    """What a reader must know where `shown` stands for `results`; empty where nothing is left out."""
    if len(shown) == len(results):
        return ""
    return "Of each objective and parametrization one seed is shown, the lowest."


def seconds(results: Results) -> dict[str, float]:
    """Seconds by stage: finetune/NAME where the model's own folder has them, unlearn/NAME, evaluate/NAME."""
    found = {f"{'unlearn' if one.run else 'finetune'}/{one.name}": one.record.get("seconds") for one in results}
    found |= {f"evaluate/{one.name}": one.evaluation.get("seconds", {}).get("total") for one in results}
    return {stage: float(spent) for stage, spent in found.items() if isinstance(spent, int | float)}
