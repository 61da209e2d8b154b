"""Which of the settings that were tried is taken: a rule, and the files that show what it saw.

The rule is written down before anything is run, and looks at the forget set and the validation set alone. Held-out,
paraphrased and unknown rows, by which methods are compared, have no say. The forget set has to have one: it is what is
to be forgotten, in training as in the choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from grun.errors import RunError
from grun.evaluation.plan import EVALUATION_FILE
from grun.experiments.sweep.plan import Planned
from grun.runtime.files import read_json, write_json, write_text
from grun.runtime.reading import typed

TOLERANCE = 0.05
"""Forget score above the retain-only model's that still counts as forgotten."""
RULE = (
    f"Among the settings whose forget score is at most the retain-only model's + {TOLERANCE}, the one with the highest "
    "validation score; where there is none, the one with the lowest forget score. Ties go to the other criterion, then "
    "to the first in the grid."
)
"""Why so: forgetting is the condition, and the retain-only model is the measure of it, since a model that never saw the
rows scores as it does; a margin absorbs what a few rows of chance answers make. Among those that forget, usefulness is
what is left to compare, on rows that training did not see. A weighted sum of the two would let a method buy a worse
forget score with utility. A method that cannot forget at any setting is shown at its best, rather than left out."""
ROUNDING = 1e-9
SETS = ("forget", "validation")


@dataclass(frozen=True)
class Tried:
    """Scores of one setting; both between 0 and 1."""

    forget: float
    """On the forget set: lower is better."""
    validation: float
    """On the validation set: higher is better."""


def choose(tried: Sequence[Tried | None], target: float) -> int | None:
    """Index of the setting that `RULE` takes; None entries were not tried, and None means that there is nothing.

    Args:
        tried: scores in the grid's order.
        target: forget score of the retain-only model.
    """
    there = [(index, one) for index, one in enumerate(tried) if one is not None]
    forgotten = [(index, one) for index, one in there if one.forget <= target + TOLERANCE + ROUNDING]
    if forgotten:
        return min(forgotten, key=lambda entry: (-entry[1].validation, entry[1].forget, entry[0]))[0]
    if there:
        return min(there, key=lambda entry: (entry[1].forget, -entry[1].validation, entry[0]))[0]
    return None


def scores(folder: Path, metric: str) -> Tried:
    """Scores of the evaluation in `folder`; RunError where the metric cannot read any row of a set."""
    sets = _sets(folder)
    for name in SETS:
        if metric not in sets[name]:
            raise RunError(
                f"settings are chosen by {metric}, which reads no row of the {name} set of {folder}: no answer has a "
                "letter or digit; add the field fact to the rows, or take others"
            )
    where = f"{folder / EVALUATION_FILE}: {metric}"
    return Tried(*(float(typed(float, sets[name][metric], where)) for name in SETS))


def metric_of(folder: Path) -> str:
    """fact_recall where the corpus names facts, else rouge_l; `folder` is that of an evaluation."""
    sets = _sets(folder)
    recalls = [sets[name].get("fact_recall") for name in SETS]
    return (
        "fact_recall"
        if all(isinstance(value, int | float) and math.isfinite(value) for value in recalls)
        else "rouge_l"
    )


def _sets(folder: Path) -> dict[str, dict[str, Any]]:
    """Metrics of the sets that decide; DamagedFile where they are none."""
    path = folder / EVALUATION_FILE
    sets = typed(dict[str, Any], read_json(path, expect=dict).get("sets"), f"{path}: sets")
    return {name: typed(dict[str, Any], sets.get(name), f"{path}: {name}") for name in SETS}


def write_choice(results: Path, cells: Sequence[Planned], failed: Mapping[str, str]) -> list[str]:
    """Write tune.json, tune.md and tuned.yaml into `results` from the evaluations there.

    Args:
        results: folder with evaluation/NAME for every cell that did not fail, before and retain_only.
        cells: what was tried.
        failed: name -> error of the cells that failed, which count as not tried.

    Returns:
        What is to be said: a line for each choice that had failed settings or none left.
    """
    evaluations = results / "evaluation"
    metric = metric_of(evaluations / "retain_only")
    bases = {name: scores(evaluations / name, metric) for name in ("before", "retain_only")}
    choices: list[dict[str, Any]] = []
    tuned: dict[str, Any] = {}
    told = []
    for group in dict.fromkeys(cell.tuned_for for cell in cells):
        members = [cell for cell in cells if cell.tuned_for == group]
        tried = [None if cell.name in failed else scores(evaluations / cell.name, metric) for cell in members]
        chosen = choose(tried, bases["retain_only"].forget)
        first = members[0].unlearn
        choices.append(
            {
                "cell": group,
                "objective": first.objective,
                "parametrization": first.method.parametrization,
                "seed": first.seed,
                "chosen": None if chosen is None else members[chosen].setting,
                "settings": [
                    _setting(cell, one, failed.get(cell.name), number == chosen)
                    for number, (cell, one) in enumerate(zip(members, tried, strict=True))
                ],
            }
        )
        missing = sum(one is None for one in tried)
        if missing:
            told.append(f"{group}: {missing} of {len(members)} settings failed and count as not tried")
        if chosen is not None:
            entry = tuned.setdefault(first.objective, {}).setdefault(first.method.parametrization, {})
            part = members[chosen].part
            entry.update({part: members[chosen].setting} if part else members[chosen].setting)
    record = {
        "rule": RULE,
        "metric": metric,
        "tolerance": TOLERANCE,
        **{name: {"forget": one.forget, "validation": one.validation} for name, one in bases.items()},
        "cells": choices,
    }
    write_json(results / "tune.json", record)
    write_text(results / "tune.md", to_markdown(record))
    write_text(results / "tuned.yaml", OmegaConf.to_yaml(OmegaConf.create({"tuned": tuned})))
    return told


def to_markdown(record: Mapping[str, Any]) -> str:
    """tune.json as a page: the rule, and every setting with its scores, the chosen one marked."""
    metric = record["metric"].replace("_", " ").replace("rouge l", "ROUGE-L")
    lines = [
        "# Settings that were tried",
        "",
        f"{record['rule']} Scores are {metric}.",
        "",
        "| model | forget | validation |",
        "|---|---|---|",
    ]
    for name in ("before", "retain_only"):
        one = record[name]
        lines.append(f"| {name.replace('_', ' ')} | {one['forget']:.3f} | {one['validation']:.3f} |")
    lines += ["", "| cell | seed | setting | forget | validation | |", "|---|---|---|---|---|---|"]
    for choice in record["cells"]:
        for one in choice["settings"]:
            setting = ", ".join(f"{key}={value}" for key, value in one["setting"].items())
            shown = ["-", "-"] if one["error"] else [f"{one[name]:.3f}" for name in SETS]
            mark = "failed" if one["error"] else "**chosen**" if one["chosen"] else ""
            lines.append(f"| {choice['cell']} | {choice['seed']} | {setting} | {' | '.join(shown)} | {mark} |")
    return "\n".join(lines) + "\n"


def _setting(cell: Planned, one: Tried | None, error: str | None, chosen: bool) -> dict[str, Any]:
    values = (
        {"forget": None, "validation": None} if one is None else {"forget": one.forget, "validation": one.validation}
    )
    return {"name": cell.name, "setting": cell.setting, **values, "chosen": chosen, "error": error}
