"""report.html of knowledge evaluations: verdicts, table, picture, first questions and completions, settings."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grun.data.corpus import ROLES
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
    unbroken,
    verdict_line,
)
from grun.report.knowledge import Lines
from grun.report.knowledge_tables import columns_of
from grun.report.knowledge_terminal import legend
from grun.report.knowledge_verdicts import STATEMENT, judge_knowledge
from grun.report.results import Result


def knowledge_page(
    results: Sequence[Result],
    title: str,
    drawn: Sequence[tuple[Picture, Path]],
    lines: Mapping[tuple[str, str], Lines],
) -> str:
    """The report of `results` with the pictures that were drawn and what was said, by kind and role."""
    verdicts = "".join(
        verdict_line(result.label, judge_knowledge(result, results)) for result in results if result.stage == "after"
    )
    asked = "".join(_question(line, results) for line in lines.get(("choice", "forget"), {}).values())
    completed = "".join(_completions(role, lines.get(("cloze", role), {}), results) for role in ROLES)
    above = "<p>Options with the probability that each model gives to their letter; what it takes is bold.</p>\n"
    return frame(
        title,
        [
            ("verdicts", "Verdicts", "Verdicts", verdicts or "<p>No unlearned model has been evaluated yet.</p>\n"),
            ("table", "Table", "All models", _table(results)),
            ("picture", "Picture", "Picture", "".join(embedded(picture, path) for picture, path in drawn)),
            ("questions", "Questions", "First forget questions", above + asked if asked else ""),
            ("cloze", "Cloze", "First sentences, and how they are completed", completed),
            ("settings", "Settings", "Settings and provenance", settings(results)),
            ("statement", "What this is not", "What this is not", f"<p>{escape(STATEMENT)}</p>"),
        ],
    )


def _table(results: Sequence[Result]) -> str:
    table = models_table(columns_of(results), results)
    explained = definitions(legend(results))
    return (
        scrolling("Table of all models", table, "numbers")
        + f"<details>\n<summary>What the words mean</summary>\n{explained}</details>\n"
    )


def _question(by_name: Mapping[str, dict[str, Any]], results: Sequence[Result]) -> str:
    """One question: a row for each option, a column for each model."""
    line = next(iter(by_name.values()))
    models = [result for result in results if result.name in by_name]
    headers = "".join(f'<th scope="col">{unbroken(result.label)}</th>' for result in models)
    rows = []
    for number, option in enumerate(line["choices"]):
        right = " (right)" if number == line["answer"] else ""
        name = escape(f"{string.ascii_uppercase[number]}. {option}{right}")
        cells = (_cell(by_name[result.name], number) for result in models)
        rows.append(f'<tr><th scope="row" dir="auto">{name}</th>{"".join(cells)}</tr>\n')
    table = (
        f'<table>\n<thead><tr><th scope="col">option</th>{headers}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody>\n'
        "</table>\n"
    )
    heading = f'<h4 dir="auto">{escape(line["question"])}</h4>'
    return f"<article>\n{heading}\n{scrolling('Options of the question', table, 'numbers')}</article>\n"


def _cell(line: dict[str, Any], number: int) -> str:
    logp = line["logp"][number] if number < len(line["logp"]) else -math.inf
    text = f"{math.exp(min(logp, 0.0)):.2f}"
    return f"<td>{f'<strong>{text}</strong>' if line['chosen'] == number else text}</td>"


def _completions(role: str, lines: Lines, results: Sequence[Result]) -> str:
    """The first sentences of a role with every model's completion."""
    cards = []
    for by_name in lines.values():
        line = next(iter(by_name.values()))
        said = [("fact", line["fact"])]
        said += [(result.label, by_name[result.name]["text"]) for result in results if result.name in by_name]
        shown = "".join(f'<div><dt>{escape(who)}</dt><dd dir="auto">{answer(text)}</dd></div>\n' for who, text in said)
        cards.append(f'<article>\n<h4 dir="auto">{escape(line["prompt"])} …</h4>\n<dl>\n{shown}</dl>\n</article>\n')
    if not cards:
        return ""
    opened = " open" if role == "forget" else ""
    return f'<details class="set"{opened}>\n<summary><h3>{role}</h3></summary>\n{"".join(cards)}</details>\n'
