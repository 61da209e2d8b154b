"""The table of a report: which numbers it has, how they are shown, and table.csv, table.md and table.tex."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from grun.data.sets import evaluation_sets
from grun.report.results import METRIC_NAMES, Result, has_facts

Style = Literal["share", "auc", "p", "log10", "signed", "count"]
UNREAD = "_unread"
"""How the name of a metric ends where the rows are counted that it cannot read."""


@dataclass(frozen=True)
class Column:
    """One number of every model."""

    place: str
    """An evaluation set, or overall, reference, gate."""
    metric: str
    header: str
    good: str
    """Which way is good."""
    style: Style = "share"
    main: bool = True
    """Shown in the report; otherwise in the files alone."""

    @property
    def key(self) -> str:
        """Name in table.csv: where the number stands in summary.json."""
        return f"{self.place}.{self.metric}"

    def value(self, result: Result) -> float | None:
        """The number of one model; None where it is missing."""
        if self.place == "overall":
            return result.overall.get(self.metric)
        if self.place == "reference":
            return result.reference.get(self.metric)
        if self.place == "gate":
            return gate_auc(result)
        if self.metric.endswith(UNREAD):
            return result.unread(self.place).get(self.metric.removesuffix(UNREAD))
        return result.metric(self.place, self.metric)

    def text(self, result: Result) -> str:
        """The number as it is shown, - where it is missing."""
        return number(self.value(result), self.style)


LOW, HIGH, TARGET = "low, as retain only", "high, as before", "as retain only"
NOT_SHOWN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters and halves of surrogate pairs."""
METRICS = {
    "fact_recall": "fact recall",
    "rouge_l": "ROUGE-L",
    "probability": "probability",
    "probability_normalized": "probability",
    "truth_ratio": "truth ratio",
    "truth_ratio_arithmetic": "truth ratio, arithmetic",
    "truth_ratio_grun_paper": "truth ratio, GRUN's paper",
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization",
}
"""Metrics of a set, in their order."""
RATIOS = dict.fromkeys(("truth_ratio", "truth_ratio_arithmetic"), "high, as retain only")
GOOD = {
    "low": {"truth_ratio_grun_paper": "low"} | RATIOS | {"": LOW},
    "high": {"": HIGH},
    "same": {"": "as before"},
}
"""Which way is good, by what should become of a set and by metric; "": every other metric."""
FIRST = (
    Column("reference", "forget_quality", "forget quality (p)", "high; above 0.05 as retain only", "p"),
    Column("reference", "forget_quality_log10", "forget quality (log10 p)", "high, near 0", "log10"),
    Column(
        "reference",
        "forget_quality_arithmetic",
        "forget quality, arithmetic (p)",
        "high; above 0.05 as retain only",
        "p",
        main=False,
    ),
    Column("overall", "model_utility", "model utility", HIGH),
    Column("overall", "model_utility_arithmetic", "model utility, arithmetic", HIGH, "share", main=False),
)
LAST = (
    Column("forget", "degenerate", "forget degenerate", "low"),
    Column("gate", "auc", "gate AUC", "high, near 1", "auc"),
    Column("overall", "mia_loss", "MIA loss AUC", TARGET),
    Column("overall", "mia_zlib", "MIA zlib AUC", TARGET),
    Column("overall", "mia_min_k", "MIA Min-K% AUC", TARGET),
    Column("overall", "mia_min_k_plus_plus", "MIA Min-K%++ AUC", TARGET),
    Column("reference", "privleak", "PrivLeak (%)", "near 0", "signed"),
)
WITH_FACTS = (
    *("forget.fact_recall", "forget.rouge_l", "forget_paraphrase.fact_recall", "retain.fact_recall"),
    *("heldout.fact_recall", "unknown.rouge_l", "forget.degenerate", "gate.auc"),
)
"""What comes first where the corpus has facts."""


def columns_by_key() -> dict[str, Column]:
    """Every column, in TOFU's order."""
    of_sets = [
        Column(
            one.name,
            metric,
            f"{one.label} {words}",
            GOOD[one.good].get(metric, GOOD[one.good][""]),
            main=metric in one.metrics,
        )
        for one in evaluation_sets().values()
        for metric, words in METRICS.items()
        if metric in (*one.metrics, *one.in_files)
    ]
    return {column.key: column for column in (*FIRST, *of_sets, *LAST)}


def columns_of(results: Sequence[Result], *, everything: bool = False) -> list[Column]:
    """The columns that at least one model has a number for: the main ones, or `everything`."""
    first, known = WITH_FACTS if has_facts(results) else (), columns_by_key()
    columns = [known[key] for key in dict.fromkeys((*first, *known))]
    columns += [
        Column(one.name, metric + UNREAD, f"{one.label} rows not read by {of}", "0", "count", main=False)
        for one in evaluation_sets().values()
        for metric, of in METRIC_NAMES.items()
    ]
    shown = [column for column in columns if column.main or everything]
    return [column for column in shown if any(column.value(result) is not None for result in results)]


def gate_auc(result: Result) -> float | None:
    """Forget against held-out; against retain where nothing is held out."""
    gate = result.evaluation.get("gate", {})
    value = gate.get("auc_heldout", gate.get("auc_retain"))
    return None if value is None else float(value)


def name_of(result: Result) -> str:
    """First cell of a row."""
    if result.stage == "retain_only":  # what methods should reach; under attack, what no method can go below
        return f"{result.label} ({'floor' if result.evaluation.get('suite') == 'attacks' else 'target'})"
    return result.label + (" (adapter)" if result.parametrization == "adapter" else "")


def number(value: float | None, style: Style = "share") -> str:
    """A number as readers see it: p as 1.8e-21, log10 with one decimal, shares with two, - for None."""
    if value is None:
        return "-"
    if style == "p":
        return p_value(value)
    digits = {"share": 2, "auc": 3, "log10": 1, "signed": 1, "count": 0}[style]
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if not float(text) else text


def p_value(value: float) -> str:
    """Two significant digits: 0.34, 0.046, 3.2e-5, 1.8e-21; 0 where it underflows."""
    if value == 0 or value >= 0.01:
        return "0" if not value else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def readable(text: str) -> str:
    """Text without what a terminal would obey or a file cannot hold: each such character becomes a replacement."""
    return NOT_SHOWN.sub("\N{REPLACEMENT CHARACTER}", text)


# -- files ------------------------------------------------------------------------------------------------------------


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


def to_csv(results: Sequence[Result]) -> str:
    """The full table with full precision; its headers are the places of the numbers in summary.json."""
    columns = columns_of(results, everything=True)
    head = ["name", "label", "stage", "objective", "parametrization", *(column.key for column in columns)]
    rows = [
        [
            *(result.name, result.label, result.stage, result.objective, result.parametrization),
            *(column.value(result) for column in columns),
        ]
        for result in results
    ]
    return csv_text([head, *rows])


def to_markdown(results: Sequence[Result]) -> str:
    """The full table as a Markdown table, turned so that models are columns; the last says which way is good."""
    rows = [
        ["", *(markdown_text(name_of(result)) for result in results), "good is"],
        ["---", *("---:" for _ in results), "---"],
        *(
            [column.header, *(column.text(result) for result in results), column.good]
            for column in columns_of(results, everything=True)
        ),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def markdown_text(text: str) -> str:
    """Text on one line in which nothing is Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def to_tex(results: Sequence[Result]) -> str:
    """The full table as a LaTeX tabular (package booktabs), turned so that models are columns: it fits a page."""
    columns = columns_of(results, everything=True)
    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * len(results)}l}}",
        "\\toprule",
        " & ".join(["", *(tex_text(name_of(result)) for result in results), "good is"]) + " \\\\",
        "\\midrule",
        *(
            " & ".join([tex_text(column.header), *(tex_number(column.text(r)) for r in results), tex_text(column.good)])
            + " \\\\"
            for column in columns
        ),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def tex_text(text: str) -> str:
    """Text on one line in which nothing is a command of LaTeX."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
    return "".join(special.get(character, character) for character in " ".join(text.split()))


def tex_number(text: str) -> str:
    """A minus sign instead of a hyphen; 1.8e-21 as a power of ten."""
    if text == "-":
        return "--"
    digits, _, exponent = text.partition("e")
    if exponent:
        return f"${digits} \\cdot 10^{{{exponent}}}$"
    return f"${text}$" if text.startswith("-") else text
