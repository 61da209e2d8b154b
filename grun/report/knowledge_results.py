"""Evaluations of `suite=knowledge` as rows of one report, and the numbers that are read from them.

A results folder holds `evaluation/before` (the model that knows), `evaluation/retain_only` (the target: never taught
what is to be forgotten; may be absent) and `evaluation/METHOD` for each method.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grun.report.result import Result
from grun.report.results import evaluations, lines_in, number_at
from grun.report.tables import Number
from grun.runtime.reading import typed
from grun.runtime.records import Choice, Cloze, FirstChoice

QUESTIONS_FILE = "questions.jsonl"
LOSSES = {
    "rmu": "RMU",
    "max_entropy": "max-entropy",
    "min_posterior": "min-posterior",
    "random_mapping": "random-mapping",
}
METHODS = {
    name: text
    for loss, words in LOSSES.items()
    for name, text in (
        (loss, words),
        (f"grun_{loss}", f"GRUN-{words}"),
        (f"grun_{loss}_pooled", f"GRUN-{words}, pooled"),
    )
}
"""Methods in the order of the rows, with the names that readers see; others follow by name."""
ASKED = ("choices", "cloze", "texts", "seed", "max_new_tokens", "window", "stride")
"""Settings of an evaluation that must be those of before."""
CHANCE = 0.25
"""Of four options, where an evaluation does not say how many there are."""


class Way(NamedTuple):
    """How multiple-choice questions are put."""

    format: str
    order: str
    suffix: str


MAIN_WAY = Way("harness", "rotations", "")


def find_knowledge(results_dir: Path) -> list[Result]:
    """The evaluated models in the order of the rows: before, retain_only, then the methods.

    Multiple choice in their evaluations is by `Way`.

    Raises:
        RunError: there is no before, a file is damaged, or an evaluation is of another base model or other questions.
    """
    results = evaluations(results_dir, ("settings",), METHODS, ASKED, "asked other questions")
    for result in results:
        result.evaluation["choices"] = {_way(entry): entry for entry in result.evaluation.get("choices", ())}
    return results


# -- numbers ----------------------------------------------------------------------------------------------------------


def ways(results: Sequence[Result]) -> list[Way]:
    """The ways in which questions were put, the main one first: harness, rotations, no suffix, else the first."""
    found = dict.fromkeys(way for result in results for way in result.evaluation["choices"])
    return sorted(found, key=lambda way: way != MAIN_WAY)


def main_way(results: Sequence[Result]) -> Way | None:
    """The way that verdicts go by; None where there are no multiple-choice questions."""
    return next(iter(ways(results)), None)


def _way(entry: dict[str, Any]) -> Way:
    return Way(entry["format"], entry["order"], entry["suffix"])


def choice(result: Result | None, way: Way | None, role: str, subject: str | None = None) -> Number | None:
    """Accuracy on a role's multiple-choice questions, or on those of one subject; None without a model."""
    part = [] if subject is None else ["subjects", subject]
    return number_at(result, ["choices", way, "roles", role, *part, "accuracy"])


def subjects(results: Sequence[Result], way: Way | None, role: str) -> list[str]:
    """Subjects of a role's questions."""
    entries = [result.evaluation["choices"].get(way, {}) for result in results]
    found = [entry.get("roles", {}).get(role, {}).get("subjects", {}) for entry in entries]
    return list(dict.fromkeys(name for table in found for name in table))


def cloze(result: Result | None, role: str) -> Number | None:
    """Share of a role's sentences that are completed by the key fact; None without a model."""
    return number_at(result, f"cloze.roles.{role}.fact_recall")


def after_suffixes(result: Result | None, way: Way | None) -> dict[str, Number]:
    """Accuracy on forget by the suffix after "Answer:", asked as `way` otherwise."""
    if way is None or result is None:
        return {}
    same = [other for other in ways([result]) if other.suffix and other[:2] == way[:2]]
    found = {other.suffix: choice(result, other, "forget") for other in same}
    return {suffix: number for suffix, number in found.items() if number is not None}


def worst_suffix(result: Result, way: Way | None, level: float) -> Number | None:
    """Of these the one furthest from chance, `level`."""
    found = after_suffixes(result, way).values()
    return max(found, key=lambda number: abs(number.value - level), default=None)


def perplexity(result: Result, name: str) -> Number | None:
    """Perplexity of a corpus."""
    return number_at(result, ["perplexity", name, "perplexity"])


def gate_auc(result: Result, way: Way | None) -> Number | None:
    """How surely the gate tells forget from general: at multiple choice, else at sentences to complete."""
    places = (["choices", way, "gate", "auc_general"], "cloze.gate.auc_general")
    return next(filter(None, (number_at(result, place) for place in places)), None)


def chance(results: Sequence[Result], way: Way | None) -> float:
    """Accuracy of guessing on forget: the mean over questions of 1 / options."""
    found = (number_at(result, ["choices", way, "roles", "forget", "chance"]) for result in results)
    return next((number.value for number in found if number is not None), CHANCE)


# -- single questions -------------------------------------------------------------------------------------------------

Lines = dict[int, dict[str, dict[str, Any]]]
"""Lines of questions.jsonl, by the question's index, then by model."""


def first_lines(results: Sequence[Result], way: Way | None, count: int) -> dict[tuple[str, str], Lines]:
    """What each model said to the first `count` questions of each kind (choice, cloze) and role.

    Multiple choice as `way` puts it, the options in the first order. A model without questions.jsonl has no lines.
    """
    found: dict[tuple[str, str], Lines] = {}
    for result in results:
        for line in lines_in(result.folder / QUESTIONS_FILE, Choice, Cloze):
            other = line["kind"] == "choice" and (_way(line) != way or line["rotation"] > 0)
            if line["index"] < count and not other:
                if line["kind"] == "choice":
                    line = typed(FirstChoice, line, f"{result.folder / QUESTIONS_FILE}, question {line['index']}")
                lines = found.setdefault((line["kind"], line["role"]), {})
                lines.setdefault(line["index"], {})[result.name] = line
    return found
