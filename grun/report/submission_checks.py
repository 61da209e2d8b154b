"""What a submission to the leaderboard is refused for: numbers that are not those of its rows, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from grun.errors import DataError, RunError
from grun.evaluation.attacks.base import ATTACKS
from grun.report.submission import FORMAT, Submission, Submitted, hash_of, methods_in, models_at, numbers_of
from grun.runtime.files import content_hash
from grun.runtime.reading import in_one_line

REQUIRED = ("plain", "few_shot", "second_turn", "prefill_1")
"""Attacks that every method must have met; more are welcome."""


def check(submission: Submission, where: str) -> None:
    """Refuse a submission whose numbers are not those of its rows, or that lacks what comparing needs.

    Raises:
        DataError: the first thing that is wrong, by the names of the model and of the number.
    """
    problem = next(_problems(submission), None)
    if problem is not None:
        raise DataError(f"{where}: {problem}")


def _problems(submission: Submission) -> Iterator[str]:
    if submission["format"] != FORMAT:
        yield f"format {submission['format']} is not {FORMAT}; make the file again with this version's submit"
    if not submission["tuning"].strip():
        yield "the tuning rule is missing; say how the settings were chosen: tuning='...'"
    befores, targets = models_at(submission, "before"), models_at(submission, "retain_only")
    if len(befores) != 1 or len(targets) > 1:
        yield f"{len(befores)} models are called before and {len(targets)} retain_only; expected one, and at most one"
        return
    methods = methods_in(submission)
    if not methods or not submission["seeds"]:
        yield "there is no unlearned model with a seed; name the folders of its evaluations, next to their runs"
    for method, runs in methods.items():
        yield from _seed_problems(method, runs, submission["seeds"])
        for run in runs:
            yield from _run_problems(f"{method}, seed {run['seed']}", run, runs[0])
    for model in submission["models"]:
        yield from _row_problems(model, befores[0])
    for model in submission["models"]:
        try:
            computed = numbers_of(model, next(iter(targets), None))
        except (ArithmeticError, LookupError, RunError, ValueError) as error:
            yield f"{model['name']}: its rows give no numbers ({in_one_line(error)}); make the file again"
            continue
        place = _difference(model["numbers"], computed, "")
        if place is not None:
            yield f"{model['name']}: {place}; the file was edited, or another version of GRUN made it"
    if submission["hash"] != hash_of(submission):
        yield "its content is not what its hash says; the file was edited after submit wrote it"


def _seed_problems(method: str, runs: Sequence[Submitted], seeds: Sequence[int]) -> Iterator[str]:
    found = [run["seed"] for run in runs]
    for seed in seeds:
        if found.count(seed) != 1:
            what = "is missing" if seed not in found else "is there twice; settings apart need a file of their own"
            yield f"{method}: seed {seed} {what} (seeds of this file: {', '.join(map(str, seeds))})"
    if others := [seed for seed in found if seed not in seeds]:
        yield f"{method}: a run of seed {others[0]}, which is none of the file's seeds"
    trained = [run for run in runs if run["cost"].get("parameters")]
    if len({content_hash([asdict(score) for score in run["scores"]]) for run in trained}) < len(trained):
        yield f"{method}: two seeds hold the same scores to the last digit, so they are one run"


def _run_problems(name: str, run: Submitted, first: Submitted) -> Iterator[str]:
    met = {one["attack"] for one in run["attempts"]}
    if not met:
        yield f"{name}: the attack table is missing; evaluate suite=attacks and name its folder too"
    elif lacking := [attack for attack in REQUIRED if attack not in met]:
        yield f"{name}: the attack table lacks {', '.join(lacking)}; evaluate suite=attacks with them"
    if unknown := sorted(met - {*ATTACKS.names()}):
        yield f"{name}: unknown attack {unknown[0]}; `python -m grun list attacks` names those there are"
    if met != {one["attack"] for one in first["attempts"]} or run["asked"] != first["asked"]:
        yield f"{name}: attacked otherwise than seed {first['seed']}; attack all seeds alike"
    if run["config"] != first["config"]:
        yield f"{name}: settings are not those of seed {first['seed']}; runs of a method differ in seed alone"
    if lacking := [key for key in ("seconds", "parameters") if run["cost"].get(key) is None]:
        yield f"{name}: its cost lacks {', '.join(lacking)}; keep run.json next to the evaluation"


def _row_problems(model: Submitted, before: Submitted) -> Iterator[str]:
    """Other rows, settings, data or weights than those of before."""
    name = model["name"]
    kept = [str(key) for key in ("sets", "limit", "max_new_tokens", "quirks") if key in before["settings"]]
    if other := [key for key in kept if model["settings"].get(key) != before["settings"][key]]:
        yield f"{name}: evaluated otherwise than before (settings: {', '.join(other)})"
    if model["stage"] != "retain_only" and model["data"] != before["data"]:
        keys = sorted({*model["data"], *before["data"]})
        other = [key for key in keys if model["data"].get(key) != before["data"].get(key)]
        yield f"{name}: evaluated on other data than before (hashes: {', '.join(other)})"
    if model["adapter"] is not None and model["base"] != before["base"]:
        yield f"{name}: evaluated on another base ({model['base']}) than before ({before['base']})"
    rows, expected = _rows(model), _rows(before)
    if rows != expected:
        lost = next((row for row in expected if row not in rows), None) or next(
            (row for row in rows if row not in expected), rows[0]
        )
        yield f"{name}: its rows are not those of before (first that differs: {lost[1]}, row {lost[2]})"


def _rows(model: Submitted) -> list[tuple[Any, ...]]:
    said = [("said", row.set, row.index, row.question, row.reference, row.fact) for row in model["generations"]]
    return said + [("scored", row.set, row.index, row.kind, row.variant, row.answer_tokens) for row in model["scores"]]


def _difference(stated: Any, computed: Any, place: str) -> str | None:
    """Where two values differ beyond rounding, and how; None: nowhere."""
    if isinstance(stated, Mapping) and isinstance(computed, Mapping):
        pairs = [(key, stated.get(key), computed.get(key)) for key in dict.fromkeys((*stated, *computed))]
        found = (_difference(one, other, f"{place}.{key}".lstrip(".")) for key, one, other in pairs)
        return next((each for each in found if each is not None), None)
    if isinstance(stated, list) and isinstance(computed, list) and len(stated) == len(computed):
        found = (_difference(one, other, place) for one, other in zip(stated, computed, strict=True))
        return next((each for each in found if each is not None), None)
    numbers = all(isinstance(each, int | float) for each in (stated, computed))
    if stated == computed or (numbers and math.isclose(stated, computed, rel_tol=1e-6, abs_tol=1e-9)):
        return None
    return f"{place} is {stated} in the file, and {computed} by its rows"
