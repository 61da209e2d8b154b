"""The table of a knowledge report: its numbers, table.csv, table.md and summary.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from grun.data.corpus import ROLES
from grun.report.knowledge import (
    SUITE,
    Number,
    Way,
    chance,
    choice,
    cloze,
    gate_auc,
    main_way,
    perplexity,
    subjects,
    ways,
    worst_suffix,
)
from grun.report.knowledge_verdicts import judge_knowledge
from grun.report.results import Result
from grun.report.summary import seconds
from grun.report.tables import csv_text, markdown_text, name_of

Style = Literal["share", "auc", "perplexity"]


@dataclass(frozen=True)
class Column:
    """One number of every model."""

    key: str
    """Name in table.csv and summary.json."""
    header: str
    good: str
    """Which way is good."""
    read: Callable[[Result], Number | None]
    style: Style = "share"

    def text(self, result: Result) -> str:
        """The number as it is shown, - where it is missing."""
        found = self.read(result)
        return "-" if found is None else _shown(found.value, self.style)

    def text_with_interval(self, result: Result) -> str:
        """The number with its 95 % interval, where it has one."""
        found = self.read(result)
        if found is None or found.interval is None:
            return self.text(result)
        low, high = (_shown(bound, self.style) for bound in found.interval)
        return f"{self.text(result)} ({low} to {high})"


def columns_of(results: Sequence[Result]) -> list[Column]:
    """The columns that at least one model has a number for."""
    way = main_way(results)
    level = chance(results, way)
    columns = []
    for role in ROLES:
        low, good = role == "forget", {"forget": "low", "neighbor": "high", "general": "high, as before"}[role]
        at = f"{level:.2f}, chance" if low else good
        columns.append(Column(f"{role}.choice", f"{role} multiple choice", at, partial(choice, way=way, role=role)))
        if low:
            read = partial(worst_suffix, way=way, level=level)
            columns.append(Column("forget.choice_suffix", "forget multiple choice behind a suffix (worst)", at, read))
        good = "low, as retain only" if low else good
        columns.append(Column(f"{role}.cloze", f"{role} cloze", good, partial(cloze, role=role)))
    for name in dict.fromkeys(name for result in results for name in result.evaluation.get("perplexity", {})):
        read = partial(perplexity, name=name)
        columns.append(Column(f"perplexity.{name}", f"perplexity {Path(name).name}", "low", read, "perplexity"))
    columns.append(Column("gate.auc_general", "gate AUC", "high, near 1", partial(gate_auc, way=way), "auc"))
    return with_numbers(columns, results)


def further_columns(results: Sequence[Result]) -> list[Column]:
    """Multiple choice in the other ways, for the files alone."""
    columns = []
    for way in ways(results)[1:]:
        for role in ROLES:
            key = f"{role}.choice[{'/'.join(way if way.suffix else way[:2])}]"
            header = f"{role} multiple choice, {_described(way)}"
            good = "low" if role == "forget" else "high"
            columns.append(Column(key, header, good, partial(choice, way=way, role=role)))
    return with_numbers(columns, results)


def with_numbers(columns: Sequence[Column], results: Sequence[Result]) -> list[Column]:
    """The columns that at least one model has a number for."""
    return [column for column in columns if any(column.read(result) is not None for result in results)]


def _described(way: Way) -> str:
    return f"{way.format} {way.order}" + (f' behind "{way.suffix.strip()}"' if way.suffix else "")


def _shown(value: float, style: Style) -> str:
    digits = {"share": 2, "auc": 3, "perplexity": 1}[style]
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.3g}"


# -- files ------------------------------------------------------------------------------------------------------------


def to_csv(results: Sequence[Result]) -> str:
    """A row a model in full precision; KEY.low and KEY.high are the 95 % interval of a share."""
    return csv_of([*columns_of(results), *further_columns(results)], results)


def csv_of(columns: Sequence[Column], results: Sequence[Result]) -> str:
    """A row a model, with the bounds of the columns that have intervals."""
    bounded = {column.key for column in columns if any(found and found.interval for found in map(column.read, results))}
    headers = [
        f"{column.key}{ending}"
        for column in columns
        for ending in (("", ".low", ".high") if column.key in bounded else ("",))
    ]
    rows: list[list[str | float | None]] = [["name", "label", "stage", *headers]]
    for result in results:
        values: dict[str, float] = {}
        for column in columns:
            found = column.read(result)
            if found is not None:
                values[column.key] = found.value
            if found is not None and found.interval is not None:
                values[f"{column.key}.low"], values[f"{column.key}.high"] = found.interval
        rows.append([result.name, result.label, result.stage, *map(values.get, headers)])
    return csv_text(rows)


def to_markdown(results: Sequence[Result]) -> str:
    """Every number with its 95 % interval, models as columns; the verdicts; a table of the subjects of each role."""
    way = main_way(results)
    parts = [markdown_table([*columns_of(results), *further_columns(results)], results)]
    if way is not None:
        parts.append(
            f"Intervals: 95 %. Multiple choice: {markdown_text(_described(way))} where nothing else is said.\n"
        )
    verdicts = [judge_knowledge(result, results).sentence for result in results if result.stage == "after"]
    parts.append("".join(f"- {markdown_text(verdict)}\n" for verdict in verdicts))
    for role in ROLES:
        names = subjects(results, way, role)
        if len(names) > 1:
            read = partial(choice, way=way, role=role)
            of_role = [Column(name, f"{role}: {name}", "", partial(read, subject=name)) for name in names]
            parts.append(markdown_table(of_role, results))
    return "\n".join(filter(None, parts))


def markdown_table(columns: Sequence[Column], results: Sequence[Result]) -> str:
    """A line a column, models side by side."""
    rows = [
        ["", *(markdown_text(name_of(result)) for result in results), "good is"],
        ["---", *("---:" for _ in results), "---"],
        *(
            [markdown_text(column.header), *(column.text_with_interval(result) for result in results), column.good]
            for column in columns
        ),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summarize_knowledge(results: Sequence[Result], profile: str) -> dict[str, Any]:
    """Contents of summary.json: numbers and intervals by column, subjects, and the verdict, of each model."""
    columns, way = [*columns_of(results), *further_columns(results)], main_way(results)
    rows = []
    for result in results:
        found = {column.key: number for column in columns if (number := column.read(result)) is not None}
        row: dict[str, Any] = {
            **{"name": result.name, "label": result.label, "stage": result.stage},
            **{"objective": result.objective, "parametrization": result.parametrization},
            "numbers": {key: number.value if math.isfinite(number.value) else None for key, number in found.items()},
            "intervals": {key: list(number.interval) for key, number in found.items() if number.interval},
            "subjects": {
                role: {
                    name: number.value
                    for name in subjects(results, way, role)
                    if (number := choice(result, way, role, name)) is not None
                }
                for role in ROLES
            },
        }
        if result.stage == "after":
            judgement = judge_knowledge(result, results)
            row["verdict"] = {"outcome": judgement.outcome, "words": judgement.words, "sentence": judgement.sentence}
        rows.append(row)
    return {
        **{"profile": profile, "suite": SUITE, "way": way._asdict() if way else None, "chance": chance(results, way)},
        **{"rows": rows, "seconds": seconds(results)},
    }
