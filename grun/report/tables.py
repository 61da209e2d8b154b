"""The one table model of all reports, and its renderers: CSV, Markdown, LaTeX, terminal; HTML is in `templates/`."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Style = Literal[
    "share", "auc", "p", "log10", "decimal", "count", "percent", "perplexity", "whole", "seconds", "memory", "size",
    "megabytes",
]  # fmt: skip
"""How numbers look; memory is shown in MiB, size and megabytes in MB (10^6 bytes)."""
DIGITS = {
    **{"share": 2, "auc": 3, "log10": 1, "decimal": 1, "count": 0, "perplexity": 1, "whole": 0, "memory": 0},
    "megabytes": 2,
}
UNITS = {"memory": 2**20, "size": 10**6, "megabytes": 10**6}
GROUPED = ("whole", "seconds", "memory", "size")
"""Styles whose thousands are set apart by commas."""
NOT_SHOWN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters and halves of surrogate pairs."""
GOOD_IS = "good is"
"""Head of the column, or row, that is which way is good."""
AT_ONCE = 5
"""Methods next to before and retain only in one printed table."""
CLOSE = 9
"""A printed table of more columns than this has no space between them."""


class Number(NamedTuple):
    """A measured number."""

    value: float
    interval: tuple[float, float] | None = None
    """95 %; of a mean over seeds the lowest and the highest."""


@dataclass(frozen=True)
class Column:
    """One number of every row."""

    key: str
    """Name in table.csv and summary.json."""
    header: str
    good: str
    """Which way is good."""
    read: Callable[[Any], Number | float | None]
    """The number of a row, such as a `Result`; None where it is missing."""
    style: Style = "share"
    main: bool = True
    """Shown in the report; otherwise in the files alone."""

    def found(self, row: Any) -> Number | None:
        """The number of a row with its interval."""
        number = self.read(row)
        return number if number is None or isinstance(number, Number) else Number(number)

    def value(self, row: Any) -> float | None:
        """The number of a row."""
        number = self.found(row)
        return None if number is None else number.value

    def text(self, row: Any, interval: bool = False) -> str:
        """The number as it is shown, - where it is missing; with its interval if that is asked for and known."""
        number = self.found(row)
        if number is None or number.interval is None or not interval:
            return shown(number, self.style)
        value, low, high = (shown(each, self.style) for each in (number.value, *number.interval))
        return f"{value} ({low} to {high})"


def with_numbers(columns: Iterable[Column], rows: Sequence[Any]) -> list[Column]:
    """The columns that at least one row has a number for."""
    return [column for column in columns if any(column.read(row) is not None for row in rows)]


def shown_columns(columns: Iterable[Column]) -> list[Column]:
    """The main ones."""
    return [column for column in columns if column.main]


class Line(NamedTuple):
    """One row of a table."""

    label: str
    cells: list[str]
    kind: str = ""
    """before, retain_only or after."""
    group: str | None = None
    """Lines of another group than the one above are set apart."""
    bold: tuple[int, ...] = ()
    """Numbers of the cells that are bold on a page."""


@dataclass(frozen=True)
class Table:
    """A table as it is shown: a line a model, a column a number."""

    headers: Sequence[str]
    good: Sequence[str]
    """Which way is good, by column."""
    lines: Sequence[Line]
    inside: Sequence[Table] = ()
    """Of a table whose lines open on the page, what is in each; labels of lines are the heads of these."""

    def flipped(self, *, good: bool = True) -> Table:
        """With models as columns, the last one of which is which way is good, unless that is left out."""
        columns = [*(line.cells for line in self.lines), *([self.good] if good else [])]
        heads = [*(line.label for line in self.lines), *([GOOD_IS] if good else [])]
        return Table(
            heads, [], [Line(first, list(cells)) for first, *cells in zip(self.headers, *columns, strict=True)]
        )

    def narrow(self) -> Table:
        """Headers a word a line."""
        return replace(self, headers=[header.replace(" ", "\n") for header in self.headers])

    def printed(self) -> list[Table]:
        """As a terminal has room for it: narrow, without what is in parentheses.

        Where it has which way is good, its lines are models: these become columns, `AT_ONCE` of them in a table.
        """
        lines = [line._replace(cells=[cell.partition(" (")[0] for cell in line.cells]) for line in self.lines]
        if not self.good:
            return [replace(self, lines=lines).narrow()]
        same, own = ([line for line in lines if (line.kind == "after") == is_own] for is_own in (False, True))
        parts = [own[start : start + AT_ONCE] for start in range(0, max(len(own), 1), AT_ONCE)]
        return [replace(self, lines=[*same, *part]).flipped(good=False).narrow() for part in parts]


def shown(value: Number | float | None, style: Style = "share", like: float | None = None) -> str:
    """A number as readers see it, - for None; with as many decimals as `like`, its mean, has."""
    if value is None:
        return "-"
    value = value.value if isinstance(value, Number) else value
    if style == "p":
        return p_value(value)
    if style == "percent":
        return f"{value:.0%}"
    unit = UNITS.get(style, 1)
    size = (value if like is None else like) / unit
    if style == "seconds":
        digits = 1 if size < 100 else 0
    elif style == "size":
        digits = 3 if size < 1 else 2 if size < 100 else 0
    else:
        digits = DIGITS[style]
    if style == "perplexity" and value >= 1000:
        return f"{value:.3g}"
    text = f"{value / unit:{',' if style in GROUPED else ''}.{digits}f}"
    return text if text.strip("-0.") else text.removeprefix("-")


def p_value(value: float) -> str:
    """Two significant digits: 0.34, 0.046, 3.2e-5, 1.8e-21; 0 where it underflows."""
    if value == 0 or value >= 0.01:
        return "0" if not value else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def readable(text: str) -> str:
    """Text without what a terminal would obey or a file cannot hold: each such character becomes a replacement."""
    return NOT_SHOWN.sub("\N{REPLACEMENT CHARACTER}", text)


# -- CSV --------------------------------------------------------------------------------------------------------------


def csv_text(rows: Iterable[Iterable[str | float | None]]) -> str:
    """Rows as CSV, None as nothing, numbers in full.

    A text that a spreadsheet would run as a formula gets an apostrophe in front, as spreadsheets mark texts.
    """
    file = io.StringIO()
    for row in rows:
        cells = [cell.replace("\r", " ") if isinstance(cell, str) else cell for cell in row]
        cells = [f"'{cell}" if _is_formula(cell) else cell for cell in cells]
        csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()


def _is_formula(cell: str | float | None) -> bool:
    number = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
    return isinstance(cell, str) and bool(re.match(r" *[=+\-@\t\n]", cell)) and not re.fullmatch(number, cell)


def to_csv(columns: Sequence[Column], rows: Sequence[Any], *attributes: str) -> str:
    """A line a row in full precision: attributes of the row, then its numbers under the keys of their columns.

    KEY.low and KEY.high are the bounds of a number's interval, for columns that have intervals.
    """
    bounded = {column.key for column in columns if any(found and found.interval for found in map(column.found, rows))}
    lines: list[list[Any]] = [list(attributes)]
    for column in columns:
        lines[0] += [f"{column.key}{end}" for end in (("", ".low", ".high") if column.key in bounded else ("",))]
    for row in rows:
        lines.append([getattr(row, name) for name in attributes])
        for column in columns:
            found = column.found(row)
            lines[-1].append(None if found is None else found.value)
            if column.key in bounded:
                lines[-1] += found.interval if found and found.interval else (None, None)
    return csv_text(lines)


# -- Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """A Markdown table."""
    rule = ["---", *("---" if header == GOOD_IS else "---:" for header in table.headers)]
    rows = [[GOOD_IS, *table.good]] if table.good else []
    rows += [[markdown_text(line.label), *line.cells] for line in table.lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in (["", *map(markdown_text, table.headers)], rule, *rows))


def markdown_text(text: str) -> str:
    """Text on one line in which nothing is Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def markdown_points(texts: Iterable[str]) -> str:
    """A list."""
    return "".join(f"- {markdown_text(text)}\n" for text in texts)


# -- LaTeX ------------------------------------------------------------------------------------------------------------


def to_tex(table: Table) -> str:
    """A LaTeX tabular (package booktabs), a rule between groups."""
    words = [header == GOOD_IS for header in table.headers]
    lines = [
        f"\\begin{{tabular}}{{l{''.join('l' if word else 'r' for word in words)}}}",
        "\\toprule",
        _tex_row(map(tex_text, ["", *table.headers])),
    ]
    for number, line in enumerate(table.lines):
        if not number or line.group != table.lines[number - 1].group:
            lines.append("\\midrule")
        cells = [tex_text(cell) if word else tex_number(cell) for cell, word in zip(line.cells, words, strict=True)]
        lines.append(_tex_row([tex_text(line.label), *cells]))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _tex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + " \\\\"


def tex_text(text: str) -> str:
    """Text on one line in which nothing is a command of LaTeX."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
    return "".join(special.get(character, character) for character in " ".join(text.split()))


def tex_number(text: str) -> str:
    """A minus sign for a hyphen, 1.8e-21 as a power of ten, mean ± deviation as mathematics, a range by its numbers."""
    mean, plus_minus, deviation = (part.replace(",", "{,}") for part in text.partition(" ± "))
    if plus_minus:  # in mathematics a bare comma is followed by a space
        return f"${mean} \\pm {deviation}$"
    if ranged := re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", text):
        value, low, high = map(tex_number, ranged.groups())
        return f"{value} ({low} to {high})"
    if text == "-":
        return "--"
    digits, _, exponent = text.partition("e")
    if exponent:
        return f"${digits} \\cdot 10^{{{exponent}}}$"
    return f"${text}$" if text.startswith("-") else text


# -- terminal ---------------------------------------------------------------------------------------------------------


def to_terminal(table: Table, title: str, first: str = "model") -> RichTable:
    """A line a model, a blank line between groups; headers stand as they are broken into lines."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    close = len(table.headers) > CLOSE
    rich = RichTable(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="italic",
        box=box.SIMPLE_HEAD,
        padding=0 if close else (0, 1, 0, 0),
        pad_edge=False,
    )
    rich.add_column(first, overflow="fold")  # the only one that gives way to a narrow screen
    for header in table.headers:
        rich.add_column(Text(header), justify="right", no_wrap=True)
    for number, line in enumerate(table.lines):
        if number and line.group != table.lines[number - 1].group:
            rich.add_section()
        rich.add_row(Text(line.label), *line.cells)
    return rich
