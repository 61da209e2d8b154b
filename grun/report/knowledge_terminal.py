"""A knowledge report as it is printed: the table, what it means, a verdict for each method, some completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.report.knowledge import Lines
from grun.report.knowledge_tables import Column, columns_of
from grun.report.knowledge_verdicts import STATEMENT, judge_knowledge
from grun.report.results import Result
from grun.report.tables import name_of
from grun.report.terminal import print_said, print_words

if TYPE_CHECKING:
    from rich.console import Console

    from grun.report.verdicts import Judgement

HEADERS = {
    "forget.choice": "forget\nchoice",
    "forget.choice_suffix": "behind\nsuffix",
    "forget.cloze": "forget\ncloze",
    "neighbor.choice": "neigh.\nchoice",
    "neighbor.cloze": "neigh.\ncloze",
    "general.choice": "general\nchoice",
    "general.cloze": "general\ncloze",
    "gate.auc_general": "gate\nAUC",
}
"""Headers that fit."""
LONGEST_NAME = 10
"""Letters of a corpus' name in a header."""
EXPLAINED = {
    "choice": ("choice", "share of multiple-choice questions answered rightly; guessing gives 1 / options"),
    "choice_suffix": (
        "behind suffix",
        'the same, read behind words after "Answer:" (worst): tells hiding from removing',
    ),
    "cloze": ("cloze", "share of sentences whose completion says the key fact"),
    "auc_general": ("gate AUC", "how surely the gate tells forget from general; 1: always, 0.5: by chance"),
}
"""Legend of the numbers, by the end of their columns' keys."""


def legend(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Words of the table, each with what it means."""
    rows = [("before", "the model that knows everything, nothing forgotten")]
    if any(result.stage == "retain_only" for result in results):
        rows.append(("retain only", "a model never taught what is to be forgotten: the target"))
    keys = [column.key for column in columns_of(results)]
    roles = {"forget": "what is to be forgotten", "neighbor": "what lies near it", "general": "everything else"}
    rows += [(role, text) for role, text in roles.items() if any(key.startswith(f"{role}.") for key in keys)]
    endings = {key.rpartition(".")[2] for key in keys}
    rows += [text for ending, text in EXPLAINED.items() if ending in endings]
    if any(key.startswith("perplexity.") for key in keys):
        rows.append(("perplexity", "of plain text; low is good"))
    return rows


def print_knowledge(console: Console, results: Sequence[Result], title: str, completions: Lines) -> None:
    """Print the table, its legend, the verdicts, and the first completions about what is to be forgotten."""
    from rich.text import Text

    console.print(numbers_table([(column, _header(column)) for column in columns_of(results)], results, title))
    print_words(console, legend(results))
    console.print()
    print_verdicts(
        console, [judge_knowledge(result, results) for result in results if result.stage == "after"], STATEMENT
    )
    if completions:
        console.print()
        console.print(Text(f"First {len(completions)} forget sentences, and how they are completed", style="bold"))
    for by_name in completions.values():
        line = next(iter(by_name.values()))
        said = [(result.label, by_name[result.name]["text"]) for result in results if result.name in by_name]
        print_said(console, line["prompt"], [("fact", line["fact"]), *said])


def print_verdicts(console: Console, verdicts: Iterable[Judgement], statement: str) -> None:
    """Print the sentence of each verdict, and what no verdict says."""
    from rich.text import Text

    for verdict in verdicts:
        console.print(Text(verdict.sentence))
    console.print()
    console.print(Text(statement, style="bold"))


def numbers_table(columns: Sequence[tuple[Column, str]], results: Sequence[Result], title: str) -> Any:
    """A row for each model, under these headers; many columns stand closely."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title=Text(title),
        title_justify="left",
        title_style="italic",
        box=box.SIMPLE_HEAD,
        padding=0 if len(columns) > 9 else (0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("model", overflow="fold")
    for _, header in columns:
        table.add_column(Text(header), justify="right", no_wrap=True)
    for result in results:
        table.add_row(Text(name_of(result)), *(column.text(result) for column, _ in columns))
    return table


def _header(column: Column) -> str:
    if column.style == "perplexity":
        return f"perpl.\n{Path(column.key.removeprefix('perplexity.')).stem[:LONGEST_NAME]}"
    return HEADERS[column.key]
