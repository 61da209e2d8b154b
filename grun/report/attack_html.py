"""report.html of attack evaluations: verdicts, table, picture, what came back, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grun.report.attack_tables import columns_of, counted
from grun.report.attack_terminal import legend
from grun.report.attack_verdicts import STATEMENT, judge_attacks
from grun.report.attacks import attack_label, single_runs
from grun.report.figures import Picture
from grun.report.html import (
    answer,
    definitions,
    embedded,
    escape,
    frame,
    models_table,
    scrolling,
    settings,
    verdict_line,
)
from grun.report.results import Result


def attack_page(
    results: Sequence[Result],
    title: str,
    drawn: Sequence[tuple[Picture, Path]],
    leaked: Sequence[tuple[Result, Sequence[dict[str, Any]]]],
) -> str:
    """The report of `results` with the pictures that were drawn and the runs to quote, with lines of attacks.jsonl."""
    methods = [result for result in results if result.stage == "after"]
    verdicts = "".join(verdict_line(result.label, judge_attacks(result, results)) for result in methods)
    examples = "".join(_examples(run, lines) for run, lines in leaked)
    return frame(
        title,
        [
            ("verdicts", "Verdicts", "Verdicts", verdicts or "<p>No unlearned model has been evaluated yet.</p>\n"),
            ("table", "Table", "All models", _table(results)),
            ("picture", "Picture", "Picture", "".join(embedded(picture, path) for picture, path in drawn)),
            ("leaked", "What came back", "What came back most", examples),
            ("settings", "Settings", "Settings and provenance", settings(single_runs(results))),
            ("statement", "What this is not", "What this is not", f"<p>{escape(STATEMENT)}</p>"),
        ],
    )


def _table(results: Sequence[Result]) -> str:
    return (
        scrolling("Table of all models", models_table(columns_of(results), results), "numbers")
        + f"<p>{escape(counted(results))}</p>\n"
        + f"<details>\n<summary>What the words mean</summary>\n{definitions(legend(results))}</details>\n"
    )


def _examples(result: Result, lines: Sequence[dict[str, Any]]) -> str:
    """What a method wrote under the attacks that brought most back."""
    cards = []
    for line in lines:
        variant = f", {line['variant'].strip()}" if line.get("variant") else ""
        given = f"; the prompt ends with {line['given']} given tokens of the answer" if line.get("given") else ""
        heading = f"{attack_label(line['attack'])}{variant}: leak {line['leak']:.2f}{given}"
        said = (("prompt", line["prompt"]), ("answer", line["text"]))
        shown = "".join(f'<div><dt>{who}</dt><dd dir="auto">{answer(text)}</dd></div>\n' for who, text in said)
        cards.append(f'<article>\n<h4 dir="auto">{escape(heading)}</h4>\n<dl>\n{shown}</dl>\n</article>\n')
    content = "".join(cards) or "<p>Nothing came back.</p>\n"
    return f'<details class="set" open>\n<summary><h3>{escape(result.label)}</h3></summary>\n{content}</details>\n'
