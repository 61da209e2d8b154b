"""summary.json: the numbers of every evaluated model, for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grun.report.results import Result, find_results


def collect(results_dir: Path, profile: str) -> dict[str, Any]:
    """Contents of summary.json: every evaluated model's metrics, the gates by objective, the seconds by stage."""
    return summarize(find_results(results_dir), profile)


def summarize(results: Sequence[Result], profile: str) -> dict[str, Any]:
    """Contents of summary.json. "gate" is keyed by objective, or by run where two runs share an objective."""
    objectives = [result.objective for result in results]
    gate = {}
    for result in results:
        if result.stage == "after" and "gate" in result.evaluation:
            alone = result.objective is not None and objectives.count(result.objective) == 1
            gate[result.objective if alone else result.name] = result.evaluation["gate"]
    return {
        "profile": profile,
        "rows": [
            {
                "name": result.name,
                "objective": result.objective,
                "parametrization": result.parametrization,
                "stage": result.stage,
                "metrics": result.evaluation["sets"],
                "overall": result.overall,
                "reference": result.reference,
                "unread": {name: rows for name in result.evaluation["sets"] if (rows := result.unread(name))},
            }
            for result in results
        ],
        "gate": gate,
        "seconds": seconds(results),
    }


def seconds(results: Sequence[Result]) -> dict[str, float]:
    """Seconds by stage: finetune/NAME where the model's own folder says so, unlearn/NAME, evaluate/NAME."""
    seconds: dict[str, float] = {}
    for result in results:
        spent = result.record.get("seconds")
        if isinstance(spent, int | float):
            seconds[f"{'unlearn' if result.run else 'finetune'}/{result.name}"] = float(spent)
    for result in results:
        spent = result.evaluation.get("seconds", {}).get("total")
        if spent is not None:
            seconds[f"evaluate/{result.name}"] = float(spent)
    return seconds
