"""The tables of an experiment: measures of each method, and recall by request and time."""

from __future__ import annotations

import io
from typing import NamedTuple

from rich.console import Console

from grun.data.sets import set_label
from grun.experiments.sequential.definition import METHODS
from grun.experiments.sequential.files import BEFORE, RETAIN_ONLY
from grun.experiments.sequential.results import Experiment, Method, Summary
from grun.experiments.sweep.tuning import TOLERANCE
from grun.report.labels import PARAMETRIZATIONS
from grun.report.result import metric_label
from grun.report.tables import Column, Line, Style, Table, to_csv, to_markdown, to_terminal, with_numbers
from grun.report.terminal import WIDTH, print_line

LEGEND = (
    "before: the model that knows everything; retain only: a model never taught any request. Recall is the share of "
    "answers with the key fact (fact recall), or of the reference's words (ROUGE-L) where a corpus names no facts."
)


class Row(NamedTuple):
    """A method, or a model to compare with."""

    method: str
    label: str
    numbers: dict[str, float | None]
    """By column."""


def label(method: str) -> str:
    """What readers call a method."""
    return PARAMETRIZATIONS.get(method, method)


def rows_of(experiment: Experiment, summaries: list[Summary]) -> list[Row]:
    """The models to compare with, then the methods."""
    before, rows = experiment.before, []
    for name, measured in ((BEFORE, before), (RETAIN_ONLY, experiment.floor)):
        if measured is not None:
            recall, sets = list(measured["recall"].values()), measured["sets"]
            known = {"forgotten": sum(recall) / len(recall), "forgotten_worst": max(recall)}
            known |= {"forgotten_paraphrased": sets.get("forget_paraphrase")}
            known |= {"not_yet_asked": 1.0} if name == BEFORE else {}
            for kept in experiment.kept_sets:
                share = sets[kept] / before["sets"][kept] if before["sets"][kept] else None
                known[f"kept_{kept}"] = 1.0 if name == BEFORE else share
            rows.append(Row(name, name.replace("_", " "), known))
    for summary in summaries:
        kept_shares = {f"kept_{name}": share for name, share in summary.kept.items()}
        rows.append(Row(summary.method, label(summary.method), vars(summary) | kept_shares))
    return rows


def columns_of(experiment: Experiment, rows: list[Row]) -> list[Column]:
    """Measures that at least one method has, in the order of the table."""
    low, a_request = "low, as retain only", "a request, mean"

    def column(key: str, header: str, good: str, style: Style = "share") -> Column:
        def read(row: Row) -> float | None:
            value = row.numbers.get(key)
            return None if value is None else float(value)

        return Column(key, header, good, read, style)

    columns = [
        column("requests", "requests served", "all", "count"),
        column("forgotten", "recall on forgotten sets, mean", low),
        column("forgotten_worst", "the same, worst set", low),
        column("at_floor", f"sets at retain only + {TOLERANCE} or below", "all", "count"),
        column("came_back", "highest recall of a set at any time after its request", "low"),
        column("forgotten_paraphrased", "recall on forgotten sets, asked in other words", low),
        column("not_yet_asked", "kept of sets not yet asked for", "high", "percent"),
        *(column(f"kept_{name}", f"kept of {set_label(name)}", "high", "percent") for name in experiment.kept_sets),
        column("own_gates", "own gate open on a request's prompts", "high", "percent"),
        column("others_gates", "gate of another request open there", "low", "percent"),
        column("false_positives", "any gate open on retain and held-out", "low", "percent"),
        column("seconds", f"seconds of training {a_request}", "low", "decimal"),
        column("saved_bytes", f"megabytes written {a_request}", "low", "megabytes"),
        column("peak_memory_bytes", "peak memory, megabytes", "low", "megabytes"),
    ]
    return with_numbers(columns, [row for row in rows if row.method in METHODS])


def table_of(experiment: Experiment, summaries: list[Summary]) -> Table:
    """Measures by model."""
    rows = rows_of(experiment, summaries)
    columns = columns_of(experiment, rows)
    lines = [Line(row.label, [column.text(row) for column in columns]) for row in rows]
    return Table([column.header for column in columns], [column.good for column in columns], lines)


def experiment_markdown(experiment: Experiment, summaries: list[Summary], title: str) -> str:
    """Measures as a Markdown table with methods as columns, then recall by request and time of each method."""
    parts = [f"# {title}\n", f"{LEGEND}\n", to_markdown(table_of(experiment, summaries).flipped())]
    parts.append("".join(f"- {verdict(summary, experiment)}\n" for summary in summaries))
    for method in experiment.methods:
        about = f"{metric_label(experiment.metric)} by request (down) and time (across)"
        parts.append(f"## {label(method.name)}: {about}\n")
        parts.append(to_markdown(_over_time(experiment, method)))
    return "\n".join(parts)


def experiment_csv(experiment: Experiment, summaries: list[Summary]) -> str:
    """Measures with full precision, a row a model; the headers are the names in summary.json."""
    rows = rows_of(experiment, summaries)
    return to_csv(columns_of(experiment, rows), rows, "method")


def printed(experiment: Experiment, summaries: list[Summary]) -> str:
    """The table for a terminal, and a verdict on each method."""
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(to_terminal(table_of(experiment, summaries).flipped(good=False).narrow(), "", ""))
    for text in (LEGEND, *(verdict(summary, experiment) for summary in summaries)):
        print_line(console, f"{text}\n")
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def verdict(summary: Summary, experiment: Experiment) -> str:
    """What a method comes to, as a sentence."""
    kept = ", ".join(f"{share:.0%} on {set_label(name)}" for name, share in summary.kept.items())
    forgotten = f"{metric_label(experiment.metric)} on the {summary.requests} forgotten sets {summary.forgotten:.2f}"
    forgotten += f" (worst {summary.forgotten_worst:.2f}"
    if summary.at_floor is not None:
        forgotten += f"; {summary.at_floor} of {summary.requests} at retain only + {TOLERANCE} or below"
    return f"{label(summary.method)}: {forgotten}); kept of before: {kept}."


def _over_time(experiment: Experiment, method: Method) -> Table:
    """A row a request or set, a column a step; recall from a request's own step on is bold."""
    lines = []
    for place, name in enumerate(experiment.ids, start=1):
        cells = [(f"{step['recall'][name]:.2f}", step["number"] >= place) for step in method.steps]
        marked = [f"**{cell}**" if made else cell for cell, made in cells]
        lines.append(Line(name, [f"{experiment.before['recall'][name]:.2f}", *marked]))
    for name in experiment.kept_sets:
        values = [experiment.before["sets"][name], *(step["sets"][name] for step in method.steps)]
        lines.append(Line(set_label(name), [f"{value:.2f}" for value in values]))
    return Table(["before", *(step["request"] for step in method.steps)], [], lines)
