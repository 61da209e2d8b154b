"""The tables of an experiment: measures of each method, and recall by request and time."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from grun.data.sets import set_label
from grun.experiments.sequential.files import BEFORE, RETAIN_ONLY
from grun.experiments.sequential.results import Experiment, Method, Summary
from grun.experiments.sweep.tuning import TOLERANCE
from grun.report.labels import PARAMETRIZATIONS
from grun.report.tables import csv_text, number
from grun.report.terminal import WIDTH

LEGEND = (
    "before: the model that knows everything; retain only: a model never taught any request. Recall is the share of "
    "answers with the key fact (fact recall), or of the reference's words (ROUGE-L) where a corpus names no facts."
)
METRICS = {"fact_recall": "fact recall", "rouge_l": "ROUGE-L"}


@dataclass(frozen=True)
class Line:
    """One measure of all methods."""

    key: str
    """Name in table.csv."""
    header: str
    good: str
    """Which way is good."""
    value: Callable[[Summary], float | None]
    show: Callable[[float | None], str] = number
    before: float | None = None
    """The same of the model before."""
    floor: float | None = None
    """The same of the retain-only model."""


def label(method: str) -> str:
    """What readers call a method."""
    return PARAMETRIZATIONS.get(method, method)


def lines(experiment: Experiment, summaries: list[Summary]) -> list[Line]:
    """Measures that at least one method has, in the order of the table."""
    before, floor = experiment.before, experiment.floor
    known = list(before["recall"].values())
    never = None if floor is None else list(floor["recall"].values())
    per_request = "a request, mean"

    def of_floor(name: str) -> float | None:
        return None if floor is None else floor["sets"].get(name)

    def kept(name: str) -> Callable[[Summary], float | None]:
        return lambda summary: summary.kept.get(name)

    found = [
        Line("requests", "requests served", "all", lambda s: float(s.requests), _whole),
        Line(
            *("forgotten", "recall on forgotten sets, mean", "low, as retain only", lambda s: s.forgotten),
            before=_mean(known),
            floor=None if never is None else _mean(never),
        ),
        Line(
            *("forgotten_worst", "the same, worst set", "low, as retain only", lambda s: s.forgotten_worst),
            before=max(known),
            floor=None if never is None else max(never),
        ),
        Line(
            "at_floor", f"sets at retain only + {TOLERANCE} or below", "all",
            lambda s: None if s.at_floor is None else float(s.at_floor), _whole,
        ),
        Line("came_back", "highest recall of a set at any time after its request", "low", lambda s: s.came_back),
        Line(
            *("forgotten_paraphrased", "recall on forgotten sets, asked in other words", "low, as retain only"),
            lambda s: s.forgotten_paraphrased,
            before=before["sets"].get("forget_paraphrase"),
            floor=of_floor("forget_paraphrase"),
        ),
        Line("not_yet_asked", "kept of sets not yet asked for", "high", lambda s: s.not_yet_asked, _percent, 1.0),
        *(
            Line(
                f"kept_{name}", f"kept of {set_label(name)}", "high", kept(name), _percent, 1.0,
                None if floor is None or not before["sets"][name] else floor["sets"][name] / before["sets"][name],
            )
            for name in experiment.kept_sets
        ),
        Line("own_gates", "own gate open on a request's prompts", "high", lambda s: s.own_gates, _percent),
        Line("others_gates", "gate of another request open there", "low", lambda s: s.others_gates, _percent),
        Line("false_positives", "any gate open on retain and held-out", "low", lambda s: s.false_positives, _percent),
        Line("seconds", f"seconds of training {per_request}", "low", lambda s: s.seconds, _decimal),
        Line("saved_bytes", f"megabytes written {per_request}", "low", lambda s: s.saved_bytes, _megabytes),
        Line(
            "peak_memory_bytes", "peak memory, megabytes", "low",
            lambda s: None if s.peak_memory_bytes is None else float(s.peak_memory_bytes), _megabytes,
        ),
    ]  # fmt: skip
    return [line for line in found if any(line.value(summary) is not None for summary in summaries)]


def to_markdown(experiment: Experiment, summaries: list[Summary], title: str) -> str:
    """Measures as a Markdown table with methods as columns, then recall by request and time of each method."""
    text = [f"# {title}\n", f"{LEGEND}\n", _table(_rows(experiment, summaries))]
    text += [f"- {verdict(summary, experiment)}" for summary in summaries]
    for method in experiment.methods:
        text += [f"\n## {label(method.name)}: {METRICS[experiment.metric]} by request (down) and time (across)\n"]
        text += [_table(_over_time(experiment, method))]
    return "\n".join(text) + "\n"


def to_csv(experiment: Experiment, summaries: list[Summary]) -> str:
    """Measures with full precision, a row a model; the headers are the names in summary.json."""
    found = lines(experiment, summaries)
    rows: list[list[str | float | None]] = [["method", *(line.key for line in found)]]
    rows.append([BEFORE, *(line.before for line in found)])
    if experiment.floor is not None:
        rows.append([RETAIN_ONLY, *(line.floor for line in found)])
    return csv_text([*rows, *([summary.method, *(line.value(summary) for line in found)] for summary in summaries)])


def printed(experiment: Experiment, summaries: list[Summary]) -> str:
    """The table for a terminal, and a verdict on each method."""
    header, _, *rest = (row[:-1] for row in _rows(experiment, summaries))  # the second is Markdown's line
    rows = [header, *rest]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    told = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for first, *cells in rows
    ]
    words = [LEGEND, *(verdict(summary, experiment) for summary in summaries)]
    return "\n".join([*told, *("\n" + textwrap.fill(text, WIDTH) for text in words)])


def verdict(summary: Summary, experiment: Experiment) -> str:
    """What a method comes to, as a sentence."""
    kept = ", ".join(f"{share:.0%} on {set_label(name)}" for name, share in summary.kept.items())
    forgotten = f"{METRICS[experiment.metric]} on the {summary.requests} forgotten sets {summary.forgotten:.2f}"
    forgotten += f" (worst {summary.forgotten_worst:.2f}"
    if summary.at_floor is not None:
        forgotten += f"; {summary.at_floor} of {summary.requests} at retain only + {TOLERANCE} or below"
    return f"{label(summary.method)}: {forgotten}); kept of before: {kept}."


def _rows(experiment: Experiment, summaries: list[Summary]) -> list[list[str]]:
    floor = experiment.floor is not None
    bases = ["before", "retain only"] if floor else ["before"]
    header = ["", *bases, *(label(summary.method) for summary in summaries), "good is"]
    rows = [header, ["---", *("---:" for _ in header[1:-1]), "---"]]
    for line in lines(experiment, summaries):
        values = [line.before, *([line.floor] if floor else []), *(line.value(summary) for summary in summaries)]
        rows.append([line.header, *map(line.show, values), line.good])
    return rows


def _over_time(experiment: Experiment, method: Method) -> list[list[str]]:
    """A row a request or set, a column a step; recall from a request's own step on is bold."""
    header = ["", "before", *(step["request"] for step in method.steps)]
    rows = [header, ["---", *("---:" for _ in header[1:])]]
    for place, name in enumerate(experiment.ids, start=1):
        cells = [f"{step['recall'][name]:.2f}" for step in method.steps]
        marked = [
            f"**{cell}**" if step["number"] >= place else cell for cell, step in zip(cells, method.steps, strict=True)
        ]
        rows.append([name, f"{experiment.before['recall'][name]:.2f}", *marked])
    for name in experiment.kept_sets:
        values = [experiment.before["sets"][name], *(step["sets"][name] for step in method.steps)]
        rows.append([set_label(name), *(f"{value:.2f}" for value in values)])
    return rows


def _table(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.2f}"
