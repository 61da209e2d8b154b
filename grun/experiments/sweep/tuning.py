"""Which of the settings that were tried is taken: a rule, and the files that show what it saw.

The rule is written down before anything is run, and looks at the forget set and the validation set alone. Held-out,
paraphrased and unknown rows, by which methods are compared, have no say. The forget set has to have one: it is what is
to be forgotten, in training as in the choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    f"Among the settings whose forget score is at most the target's + {TOLERANCE}, the one with the highest "
    "validation score; where there is none, the one with the lowest forget score. Ties go to the other criterion, then "
    "to the first in the grid. The target is the retain-only model or, where a model was taught nothing, what it "
    "guesses of what does not exist."
)
"""Why so: forgetting is the condition, and the retain-only model is the measure of it, since a model that never saw the
rows scores as it does; a margin absorbs what a few rows of chance answers make. Among those that forget, usefulness is
what is left to compare, on rows that training did not see. A weighted sum of the two would let a method buy a worse
forget score with utility. A method that cannot forget at any setting is shown at its best, rather than left out."""
ROUNDING = 1e-9
SETS = ("forget", "validation")
GUESSED = "unknown"
"""Set whose score before is the target where there is no retain-only model."""
BASES = ("before", "retain_only")


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
        target: forget score of the retain-only model, or what guessing gives.
    """
    there = [(index, one) for index, one in enumerate(tried) if one is not None]
    forgotten = [(index, one) for index, one in there if one.forget <= target + TOLERANCE + ROUNDING]
    if forgotten:
        return min(forgotten, key=lambda entry: (-entry[1].validation, entry[1].forget, entry[0]))[0]
    if there:
        return min(there, key=lambda entry: (entry[1].forget, -entry[1].validation, entry[0]))[0]
    return None


def write_choice(results: Path, cells: Sequence[Planned], failed: Mapping[str, str]) -> list[str]:
    """Write tune.json, tune.md and tuned.yaml into `results` from the evaluations there.

    Args:
        results: folder with evaluation/NAME for every cell that did not fail, before and, if there is one, retain_only.
        cells: what was tried.
        failed: name -> error of the cells that failed, which count as not tried.

    Returns:
        Lines for the user: choices that had failed settings, and what was written.
    """
    evaluations = results / "evaluation"
    there = [name for name in BASES if (evaluations / name).is_dir()]
    metric = _metric_of(evaluations / there[-1])
    bases = {name: _scores(evaluations / name, metric) for name in there}
    guessed = None if "retain_only" in bases else _score(evaluations / "before", GUESSED, metric)
    target = bases["retain_only"].forget if guessed is None else guessed
    choices, lines = [], []
    tuned: dict[str, Any] = {}
    for group in dict.fromkeys(cell.tuned_for for cell in cells):
        members = [cell for cell in cells if cell.tuned_for == group]
        tried = [None if cell.name in failed else _scores(evaluations / cell.name, metric) for cell in members]
        number = choose(tried, target)
        chosen = None if number is None else members[number]
        first = members[0].unlearn
        settings = [
            {
                "name": cell.name,
                "setting": cell.setting,
                **(dict.fromkeys(SETS) if one is None else asdict(one)),
                "chosen": cell is chosen,
                "error": failed.get(cell.name),
            }
            for cell, one in zip(members, tried, strict=True)
        ]
        named = {"objective": first.objective, "parametrization": first.method.parametrization, "seed": first.seed}
        setting = None if chosen is None else chosen.setting
        choices.append({"cell": group, **named, "chosen": setting, "settings": settings})
        if missing := tried.count(None):
            lines.append(f"{group}: {missing} of {len(members)} settings failed and count as not tried")
        if chosen is not None:
            entry = tuned.setdefault(first.objective, {}).setdefault(first.method.parametrization, {})
            entry.update({chosen.part: setting} if chosen.part else setting)
    scores: dict[str, Any] = {name: asdict(one) for name, one in bases.items()}
    if guessed is not None:
        scores["guessed"] = guessed
    record = {"rule": RULE, "metric": metric, "tolerance": TOLERANCE, **scores, "cells": choices}
    write_json(results / "tune.json", record)
    write_text(results / "tune.md", _to_markdown(record))
    write_text(results / "tuned.yaml", OmegaConf.to_yaml(OmegaConf.create({"tuned": tuned})))
    lines += [f"written: {results / name}" for name in ("tune.md", "tune.json", "tuned.yaml")]
    return [*lines, "paste tuned.yaml into the sweep's file"]


def _sets(folder: Path, names: Sequence[str] = SETS) -> dict[str, dict[str, Any]]:
    """Metrics of the sets that decide, of the evaluation in `folder`; DamagedFile where they are none."""
    path = folder / EVALUATION_FILE
    sets = typed(dict[str, Any], read_json(path, expect=dict).get("sets"), f"{path}: sets")
    return {name: typed(dict[str, Any], sets.get(name), f"{path}: {name}") for name in names}


def _metric_of(folder: Path) -> str:
    """fact_recall where the corpus names facts, else rouge_l."""
    recalls = [metrics.get("fact_recall") for metrics in _sets(folder).values()]
    named = all(isinstance(value, int | float) and math.isfinite(value) for value in recalls)
    return "fact_recall" if named else "rouge_l"


def _scores(folder: Path, metric: str) -> Tried:
    """Scores of the evaluation in `folder`; RunError where the metric cannot read any row of a set."""
    return Tried(*(_score(folder, name, metric) for name in SETS))


def _score(folder: Path, name: str, metric: str) -> float:
    """Score of one set."""
    metrics = _sets(folder, [name])[name]
    if metric not in metrics:
        raise RunError(
            f"settings are chosen by {metric}, which reads no row of the {name} set of {folder}: no answer has a "
            "letter or digit; add the field fact to the rows, or take others"
        )
    return float(typed(float, metrics[metric], f"{folder / EVALUATION_FILE}: {metric}"))


def _to_markdown(record: Mapping[str, Any]) -> str:
    """tune.json as a page: the rule, and every setting with its scores, the chosen one marked."""
    metric = record["metric"].replace("_", " ").replace("rouge l", "ROUGE-L")
    lines = [
        *("# Settings that were tried", "", f"{record['rule']} Scores are {metric}.", ""),
        *("| model | forget | validation |", "|---|---|---|"),
        *(f"| {name.replace('_', ' ')} | {_shown(record[name])} |" for name in BASES if name in record),
        *([f"| guessed | {record['guessed']:.3f} | - |"] if "guessed" in record else []),
        *("", "| cell | seed | setting | forget | validation | |", "|---|---|---|---|---|---|"),
    ]
    for choice in record["cells"]:
        for one in choice["settings"]:
            setting = ", ".join(f"{key}={value}" for key, value in one["setting"].items())
            mark = "failed" if one["error"] else "**chosen**" if one["chosen"] else ""
            lines.append(f"| {choice['cell']} | {choice['seed']} | {setting} | {_shown(one)} | {mark} |")
    return "\n".join(lines) + "\n"


def _shown(scores: Mapping[str, Any]) -> str:
    return " | ".join("-" if scores[name] is None else f"{scores[name]:.3f}" for name in SETS)
