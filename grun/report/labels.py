"""What readers call runs, and the order in which these stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from grun.report.result import STAGES, Result, after

PARAMETRIZATIONS = {"full": "full", "lora": "LoRA", "reft": "ReFT", "grun": "GRUN"} | {
    name: name.replace("_", " ") for name in ("task_vector", "system_prompt", "in_context", "output_filter")
}
"""What may change in unlearning, in the order of the tables, with the names that readers see."""


def order_of(result: Result) -> tuple[str, int, str, str, int]:
    """Where a run stands among the runs: by objective, parametrization, design (the published one first) and seed.

    Parametrizations stand as in `PARAMETRIZATIONS`, then others.
    """
    seed = -1 if result.seed is None else result.seed
    return (result.objective or "", *place_in(PARAMETRIZATIONS, result.parametrization), result.design, seed)


def row_order(result: Result) -> tuple[Any, ...]:
    """Where a model stands among all: before, retain only, then the runs."""
    return (STAGES.index(result.stage), *order_of(result), result.name)


def place_in(known: Iterable[str], name: str) -> tuple[int, str]:
    """Where a name stands among others: those that are known first, in their order, then by name."""
    order = list(known)
    return (order.index(name) if name in order else len(order), name)


def run_label(objective: str, parametrization: str, quantization: str | None = None, design: str = "") -> str:
    """What readers call the runs of one objective and parametrization, such as GD LoRA or IDK GRUN every token."""
    words = (objective.upper(), PARAMETRIZATIONS.get(parametrization, parametrization), design, quantization)
    return " ".join(word for word in words if word)


def label_runs(results: Sequence[Result]) -> None:
    """Labels that differ: the objective, with parametrization and design where not all are GRUN of one; the seed.

    A mean over seeds has the name of its first run instead of the seed; what still is the same gets its name as label.
    Changes the labels of runs; models without a run keep theirs unless two share it.
    """
    runs = [result for result in after(results) if result.objective is not None]
    kinds = {(result.parametrization, result.design) for result in runs}
    alike = len(kinds) == 1 and runs[0].parametrization == "grun"
    for result in runs:
        kind, design = ("", "") if alike else (result.parametrization, result.design)
        result.label = run_label(str(result.objective), kind, result.quantization, design)
    labels = [result.label for result in results]
    for result in runs:
        if labels.count(result.label) > 1 and result.runs:
            result.label += f" ({result.runs[0].name})"
        elif labels.count(result.label) > 1 and result.seed is not None:
            result.label += f" s{result.seed}"
    labels = [result.label for result in results]
    for result in results:
        if labels.count(result.label) > 1:
            result.label = result.name
