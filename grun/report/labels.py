"""What readers call runs, and the order in which these stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grun.report.results import Result

PARAMETRIZATIONS = {"full": "full", "lora": "LoRA", "reft": "ReFT", "grun": "GRUN"}
"""What may change in unlearning, in the order of the tables, with the names that readers see."""


def order_of(result: Result) -> tuple[str, int, str, int]:
    """Where a run stands among the runs: by objective, parametrization (full, lora, reft, grun, others) and seed."""
    return (result.objective or "", *place_of(result.parametrization), -1 if result.seed is None else result.seed)


def place_of(parametrization: str) -> tuple[int, str]:
    """Where a parametrization stands among the others: those from elsewhere come last, by name."""
    known = list(PARAMETRIZATIONS)
    return (known.index(parametrization) if parametrization in known else len(known), parametrization)


def run_label(objective: str, parametrization: str, quantization: str | None = None) -> str:
    """What readers call the runs of one objective and parametrization, such as GD LoRA."""
    words = (objective.upper(), PARAMETRIZATIONS.get(parametrization, parametrization), quantization)
    return " ".join(word for word in words if word)


def label_runs(results: Sequence[Result]) -> None:
    """Labels that differ: the objective; with the parametrization where not all are GRUN; then the seed; then the name.

    Changes the labels of runs; models without a run keep theirs unless two share it.
    """
    runs = [result for result in results if result.stage == "after" and result.objective is not None]
    if any(result.parametrization != "grun" for result in runs):
        for result in runs:
            result.label = run_label(str(result.objective), result.parametrization, result.quantization)
    labels = [result.label for result in results]
    for result in runs:
        if labels.count(result.label) > 1 and result.seed is not None:
            result.label += f" s{result.seed}"
    labels = [result.label for result in results]
    for result in results:
        if labels.count(result.label) > 1:
            result.label = result.name
