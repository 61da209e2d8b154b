"""The report of suite=knowledge: its columns, and what was answered."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.data.corpus import ROLES
from grun.report.figures import Picture
from grun.report.knowledge_results import (
    Way,
    chance,
    choice,
    cloze,
    find_knowledge,
    first_lines,
    gate_auc,
    main_way,
    perplexity,
    subjects,
    ways,
    worst_suffix,
)
from grun.report.knowledge_verdict import STATEMENT, judge_knowledge
from grun.report.matrix import Row
from grun.report.page import Card, Examples
from grun.report.result import Result, compared_terms
from grun.report.rows_figure import Panel, rows_figure
from grun.report.suites import Part, Suite, table_of
from grun.report.tables import Column, Line, Table, markdown_text, shown_columns, with_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = 5
"""Questions and sentences that are shown."""
Results = Sequence[Result]
GOOD = {"forget": "low", "neighbor": "high", "general": "high, as before"}
MEANINGS = {
    "forget": "what is to be forgotten",
    "neighbor": "what lies near it",
    "general": "everything else",
}
EXPLAINED = {
    "choice": ("multiple choice", "share of multiple-choice questions answered rightly; guessing gives 1 / options"),
    "choice_suffix": ("after a suffix", 'the same with words after "Answer:" (worst): is it hidden or removed?'),
    "cloze": ("cloze", "share of sentences that are completed by the key fact"),
    "auc_general": ("gate AUC", "how often the gate is wider on forget than on general; 0.5 is chance"),
}
"""Legend of the numbers, by the end of their columns' keys."""
DRAWN = {
    **{"forget.choice": "forget multiple choice", "forget.choice_suffix": "forget after a suffix"},
    **{"forget.cloze": "forget cloze", "general.choice": "general multiple choice", "general.cloze": "general cloze"},
}
"""Panels of the picture, by their columns' keys."""


def columns_of(results: Results) -> list[Column]:
    """The columns that at least one model has a number for; multiple choice in the other ways for the files alone."""
    way = main_way(results)
    level = chance(results, way)
    columns = []
    for role in ROLES:
        low = role == "forget"
        at = f"{level:.2f}, chance" if low else GOOD[role]
        columns.append(Column(f"{role}.choice", f"{role} multiple choice", at, partial(choice, way=way, role=role)))
        if low:
            read = partial(worst_suffix, way=way, level=level)
            columns.append(Column("forget.choice_suffix", "forget multiple choice after a suffix (worst)", at, read))
        good = "low, as retain only" if low else GOOD[role]
        columns.append(Column(f"{role}.cloze", f"{role} cloze", good, partial(cloze, role=role)))
    for name in dict.fromkeys(name for result in results for name in result.evaluation.get("perplexity", {})):
        read = partial(perplexity, name=name)
        columns.append(Column(f"perplexity.{name}", f"perplexity {Path(name).name}", "low", read, "perplexity"))
    columns.append(Column("gate.auc_general", "gate AUC", "high, near 1", partial(gate_auc, way=way), "auc"))
    for other in ways(results)[1:]:
        for role in ROLES:
            key = f"{role}.choice[{'/'.join(other if other.suffix else other[:2])}]"
            header, read = f"{role} multiple choice, {_described(other)}", partial(choice, way=other, role=role)
            columns.append(Column(key, header, "low" if role == "forget" else "high", read, main=False))
    return with_numbers(columns, results)


def _described(way: Way) -> str:
    return f"{way.format} {way.order}" + (f' after "{way.suffix.strip()}"' if way.suffix else "")


def legend(results: Results) -> list[tuple[str, str]]:
    """Words of the table, each with what it means."""
    target = "a model never taught what is to be forgotten: the target"
    rows = compared_terms(results, "the model that knows everything, nothing forgotten", target)
    keys = [column.key for column in shown_columns(columns_of(results))]
    rows += [(role, text) for role, text in MEANINGS.items() if any(key.startswith(f"{role}.") for key in keys)]
    endings = {key.rpartition(".")[2] for key in keys}
    rows += [text for ending, text in EXPLAINED.items() if ending in endings]
    return rows + [("perplexity", "of plain text; low is good")] * any(key.startswith("perplexity.") for key in keys)


def _intervals(results: Results) -> str:
    way = main_way(results)
    if way is None:
        return ""
    return f"Intervals: 95 %. Multiple choice: {markdown_text(_described(way))} where nothing else is given."


def _parts(results: Results) -> list[Part]:
    """Accuracy by subject where a role has several, and the first forget questions with their options."""
    way, tables, found = main_way(results), [], []
    for role in ROLES:
        read, names = partial(choice, way=way, role=role), subjects(results, way, role)
        if len(names) > 1:
            columns = [Column(name, name, "", partial(read, subject=name)) for name in names]
            tables.append((role, table_of(columns, results, intervals=True).flipped(good=False)))
    if tables:
        found.append(Part("Subjects", "Multiple choice by subject", "", tables, places=("table.md",)))
    asked = first_lines(results, way, EXAMPLES).get(("choice", "forget"), {}).values()
    if asked:
        above = "Options with the probability that each model gives to their letter; what it takes is bold."
        questions = [_question(by_name, results) for by_name in asked]
        found.append(Part("Questions", "First forget questions", above, questions, places=("page",), first="option"))
    return found


def _entry(result: Result, results: Results) -> dict[str, Any]:
    """Accuracy by role and subject."""
    way, found = main_way(results), {}
    for role in ROLES:
        numbers = {name: choice(result, way, role, name) for name in subjects(results, way, role)}
        found[role] = {name: number.value for name, number in numbers.items() if number is not None}
    return {"subjects": found}


def _facts(results: Results) -> dict[str, Any]:
    way = main_way(results)
    return {"way": way._asdict() if way else None, "chance": chance(results, way)}


def draw_knowledge(results: Results) -> Figure | None:
    """Multiple choice and cloze of forget and of general questions; None where neither was asked."""
    panels = []
    for column in (column for column in columns_of(results) if column.key in DRAWN):
        good = "low" if column.key.startswith("forget") else "high"
        level = chance(results, main_way(results)) if column.key.startswith("forget.choice") else None
        panels.append(Panel(DRAWN[column.key], good, [column.found(one) for one in results], level=level))
    rows = [Row(one.title, one.stage, None, one.parametrization, (one,)) for one in results]
    return rows_figure(rows, panels) if panels else None


PICTURE = Picture(
    "knowledge.png",
    "Forgotten and kept",
    "A row for each model, a panel for each number, with its 95 % interval: of what is to be forgotten multiple choice "
    "answered rightly, the same after the worst suffix, and sentences completed (cloze); of everything else multiple "
    "choice and cloze. Good is what is to be forgotten at the dotted line, chance, or at the dashed one, the target, "
    "and everything else at the gray one, as before.",
    draw_knowledge,
)


# -- what was answered ------------------------------------------------------------------------------------------------


def _examples(results: Results) -> list[Examples]:
    """The first sentences of each role, the fact, and every model's completion."""
    lines, found = first_lines(results, main_way(results), EXAMPLES), []
    for role in ROLES:
        cards = []
        for by_name in lines.get(("cloze", role), {}).values():
            line = next(iter(by_name.values()))
            said = [(result.label, by_name[result.name]["text"]) for result in results if result.name in by_name]
            cards.append(Card(f"{line['prompt']} …", [("fact", line["fact"]), *said]))
        found += [Examples(role, cards, MEANINGS[role])] if cards else []
    return found


def _question(by_name: dict[str, dict[str, Any]], results: Results) -> tuple[str, Table]:
    """One question: a line for each option, a column for each model; what a model takes is bold."""
    asked = next(iter(by_name.values()))
    models = [result for result in results if result.name in by_name]
    lines = []
    for number, option in enumerate(asked["choices"]):
        given = [by_name[result.name] for result in models]
        logps = [line["logp"][number] if number < len(line["logp"]) else -math.inf for line in given]
        taken = tuple(place for place, line in enumerate(given) if line["chosen"] == number)
        label = f"{string.ascii_uppercase[number]}. {option}{' (right)' if number == asked['answer'] else ''}"
        lines.append(Line(label, [f"{math.exp(min(logp, 0.0)):.2f}" for logp in logps], bold=taken))
    return asked["question"], Table([result.label for result in models], [], lines)


KNOWLEDGE_SUITE = Suite(
    name="knowledge",
    find=find_knowledge,
    columns=columns_of,
    judge=judge_knowledge,
    statement=STATEMENT,
    legend=legend,
    intervals=_intervals,
    pictures=[PICTURE],
    examples_title="First sentences, and how they are completed",
    examples=_examples,
    parts=_parts,
    facts=_facts,
    entry=_entry,
)
