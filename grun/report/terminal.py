"""What all reports print: lines, legends, who said what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from grun.report.tables import readable

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100
"""Columns of the printed report where stdout is no terminal."""


def print_line(console: Console, text: str = "", style: str = "") -> None:
    """Print text in which nothing is markup."""
    from rich.text import Text

    console.print(Text(text, style=style))


def print_terms(console: Console, rows: Iterable[Sequence[str]]) -> None:
    """Print a legend: terms, each with its text."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for texts in rows:
        grid.add_row(*map(Text, texts))
    console.print(grid)


def print_said(console: Console, question: str, said: Sequence[tuple[str, str]]) -> None:
    """Print a question and, indented below it, who said what, a line each."""
    from rich.table import Table
    from rich.text import Text

    print_line(console, _one_line(question))
    grid = Table.grid(padding=(0, 2, 0, 0))
    width = 2 + max(len(who) for who, _ in said)  # indented by two
    grid.add_column(justify="right", no_wrap=True, min_width=width, style="dim")
    for who, text in said:
        grid.add_row(Text(who), Text(_one_line(text)))
    console.print(grid)


def _one_line(text: str) -> str:
    return " ".join(readable(text).split()) or "(empty)"
