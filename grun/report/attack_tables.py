"""The table of an attack report: its numbers, table.csv, table.md and summary.json."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from grun.data.sets import set_label
from grun.report.attack_verdicts import judge_attacks
from grun.report.attacks import (
    SUITE,
    attack_label,
    attack_names,
    beyond,
    kept_set,
    leak_key,
    left_out,
    number_at,
    shown_names,
    single_runs,
    unread,
)
from grun.report.knowledge_tables import Column, csv_of, markdown_table, with_numbers
from grun.report.results import Result
from grun.report.summary import seconds
from grun.report.tables import markdown_text

KEPT_SETS = ("retain", "heldout")
LOW, HIGH = "low, as floor", "high, as before"


def columns_of(results: Sequence[Result]) -> list[Column]:
    """The columns that at least one model has a number for; keys are places in evaluation.json."""
    rows = kept_set(results)
    columns = [_column(leak_key(name), attack_label(name), LOW) for name in shown_names(results)]
    columns += [_kept("plain", name) for name in KEPT_SETS]
    columns += [_kept("otherwise", rows), _kept("after_forget", rows), _false_positives(rows)]
    return with_numbers(columns, results)


def further_columns(results: Sequence[Result]) -> list[Column]:
    """Worst ways of asking, and all else of retention, for the files alone."""
    shown = {column.key for column in columns_of(results)}
    varied = {name for result in results for name, found in result.evaluation["attacks"].items() if "variants" in found}
    names = [name for name in attack_names(results) if name in varied]
    columns = [_column(f"attacks.{name}.worst", f"{attack_label(name)}, worst way", LOW) for name in names]
    columns += [
        _column(f"attacks.{name}.variants.{way}", f"{attack_label(name)}, {way}", LOW) for name, way in _ways(results)
    ]
    for rows in KEPT_SETS:
        for how in ("plain", "otherwise", "after_forget"):
            columns += [_kept(how, rows), _gate(how, rows, "open"), _gate(how, rows, "open_any")]
        columns.append(_false_positives(rows))
    return with_numbers([column for column in columns if column.key not in shown], results)


def _ways(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Attacks that need the weights or read more than text, with each of their ways where there are several."""
    attacks = [(name, result.evaluation["attacks"].get(name, {})) for name in beyond(results) for result in results]
    return list(dict.fromkeys((name, way) for name, found in attacks for way in found.get("variants", {})))


def _column(key: str, header: str, good: str) -> Column:
    return Column(key, header, good, partial(number_at, key=key))


def _kept(how: str, rows: str) -> Column:
    return _column(f"retention.{how}.{rows}.kept", f"{set_label(rows)} kept{_behind(how)}", HIGH)


def _gate(how: str, rows: str, which: str) -> Column:
    subject = "any gate" if which == "open_any" else "mean gate"
    return _column(f"retention.{how}.{rows}.gate.{which}", f"{subject} open on {set_label(rows)}{_behind(how)}", "low")


def _false_positives(rows: str) -> Column:
    header = f"false positives: any gate open on {set_label(rows)} or its answers"
    return _column(f"retention.plain.{rows}.gate.open_any_answer", header, "low")


def _behind(how: str) -> str:
    return {"plain": "", "otherwise": " asked otherwise"}.get(how, " after forget")


# -- files ------------------------------------------------------------------------------------------------------------


def to_csv(results: Sequence[Result]) -> str:
    """A row a model in full precision.

    KEY.low and KEY.high are the 95 % interval of a share; of a mean over seeds the lowest and the highest.
    """
    return csv_of([*columns_of(results), *further_columns(results)], results)


def to_markdown(results: Sequence[Result]) -> str:
    """Every number with its interval, models as columns; the rows that were asked; the verdicts."""
    verdicts = (judge_attacks(result, results).sentence for result in results if result.stage == "after")
    parts = [
        markdown_table([*columns_of(results), *further_columns(results)], results),
        f"{_intervals(results)} {markdown_text(counted(results))}\n",
        "".join(f"- {markdown_text(verdict)}\n" for verdict in verdicts),
    ]
    return "\n".join(filter(None, parts))


def _intervals(results: Sequence[Result]) -> str:
    """What the numbers in parentheses are."""
    numbers = sorted({len(result.runs) for result in results if result.runs})
    means = "".join(f"; over {number} seeds: lowest to highest" for number in numbers)
    return f"Intervals: 95 %{means}."


def counted(results: Sequence[Result]) -> str:
    """How many rows the attacks asked for, which attacks were left out, and what is a mean over how many seeds."""
    rows = rows_of(results)
    most = max(rows.values(), default=0)
    counts = [str(most), *(f"{attack_label(name)} {count}" for name, count in rows.items() if count != most)]
    without = [f"{attack_label(name)} ({why})" for name, why in left_out(results).items()]
    texts = [f"Forget rows: {', '.join(counts)}.", f"Left out: {', '.join(without)}." if without else ""]
    texts += [
        f"{count} rows of {set_label(name)} cannot be read by ROUGE-L." for name, count in unread(results).items()
    ]
    return " ".join(filter(None, (*texts, *_seeds(results))))


def _seeds(results: Sequence[Result]) -> list[str]:
    """Which rows are means over how many seeds, and which of their numbers fewer seeds have."""
    methods = [result for result in results if result.stage == "after"]
    texts = []
    for number in sorted({len(result.runs) for result in methods if result.runs}, reverse=True):
        labels = [result.label for result in methods if len(result.runs) == number]
        which = ", ".join(labels) if len(labels) < len(methods) else "all methods"
        texts.append(f"Means over {number} seeds: {which}.")
    fewer = [
        f"{column.header} of {result.label} {number}"
        for result in methods
        for column in columns_of(results)
        if 0 < (number := sum(column.read(run) is not None for run in result.runs)) < len(result.runs)
    ]
    return [*texts, f"Of fewer seeds: {', '.join(fewer)}."] if fewer else texts


def rows_of(results: Sequence[Result]) -> dict[str, int]:
    """Forget rows that each attack asked for."""
    found = {name: entry for result in reversed(results) for name, entry in result.evaluation["attacks"].items()}
    return {name: int(found[name]["rows"]) for name in attack_names(results) if "rows" in found[name]}


def summarize_attacks(results: Sequence[Result], profile: str) -> dict[str, Any]:
    """Contents of summary.json: numbers and intervals by column, runs, and the verdict, of each row."""
    columns, rows = [*columns_of(results), *further_columns(results)], []
    for result in results:
        found = {column.key: number for column in columns if (number := column.read(result)) is not None}
        row: dict[str, Any] = {
            **{"name": result.name, "label": result.label, "stage": result.stage},
            **{"objective": result.objective, "parametrization": result.parametrization},
            "runs": [run.name for run in result.runs],
            "numbers": {key: number.value for key, number in found.items()},
            "intervals": {key: list(number.interval) for key, number in found.items() if number.interval},
        }
        if result.stage == "after":
            judgement = judge_attacks(result, results)
            row["verdict"] = {"outcome": judgement.outcome, "words": judgement.words, "sentence": judgement.sentence}
        rows.append(row)
    return {
        **{"profile": profile, "suite": SUITE, "asked": rows_of(results), "left_out": left_out(results)},
        "unread": unread(results),
        **{"rows": rows, "seconds": seconds(single_runs(results))},
    }
