"""A results folder: what was evaluated, and summary.json, which says it all in plain numbers.

It holds `evaluation/before` (the taught model), `evaluation/retain_only` (the target: a model never taught the forget
rows) and, for each run NAME, `NAME/run.json`, `NAME/log.jsonl` and `evaluation/NAME`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.errors import RunError
from grun.files import read_json

NAMES = {
    "forget": "forget",
    "forget_paraphrase": "paraphrase",
    "retain": "retain",
    "heldout": "held-out",
    "unknown": "unknown",
}
"""Evaluation sets, with the names that readers see."""


@dataclass
class Result:
    """One evaluated model."""

    name: str
    """Folder under `evaluation/`."""
    stage: str
    """before, retain_only or after."""
    objective: str | None
    parametrization: str
    folder: Path
    """Folder of the evaluation."""
    run: Path | None
    """Folder of the unlearning run; None for before and retain_only."""
    evaluation: dict[str, Any]
    label: str
    """Name in tables and pictures."""

    def metric(self, set_name: str, metric: str) -> float | None:
        """One number, None if the corpus or the model does not give it."""
        value = self.evaluation["sets"].get(set_name, {}).get(metric)
        return None if value is None else float(value)


def collect(results_dir: Path, profile: str) -> dict[str, Any]:
    """Contents of summary.json: every evaluated model's metrics, the gates by objective, the seconds by stage."""
    return summarize(find_results(results_dir), profile)


def find_results(results_dir: Path) -> list[Result]:
    """The evaluated models in the order of the table: before, retain_only, then the runs by objective.

    An evaluation that is neither before nor retain_only, nor has a run, is passed over with a line on stderr.
    """
    folder = results_dir / "evaluation"
    if not (folder / "before" / "evaluation.json").is_file():
        raise RunError(
            f"{folder / 'before' / 'evaluation.json'} is missing, so there is nothing to compare with; "
            "evaluate the taught model with output_dir set to that folder first"
        )
    results = []
    for path in sorted(folder.glob("*/evaluation.json")):
        name, run = path.parent.name, results_dir / path.parent.name
        if name.startswith("."):
            continue  # what an interrupted evaluation left
        evaluation = _read(path, ("sets",))
        if name in ("before", "retain_only"):
            label = {"before": "before", "retain_only": "retain only"}[name]
            results.append(Result(name, name, None, "none", path.parent, None, evaluation, label))
        elif (run / "run.json").is_file():
            record = _read(run / "run.json", ("objective", "parametrization"))
            objective = str(record["objective"])
            found = Result(
                name=name,
                stage="after",
                objective=objective,
                parametrization=str(record["parametrization"]),
                folder=path.parent,
                run=run,
                evaluation=evaluation,
                label=objective.upper(),
            )
            results.append(found)
        else:
            print(f"passed over: {path.parent} has no {run / 'run.json'}", file=sys.stderr)
    objectives = [result.objective for result in results]
    for result in results:
        if result.objective is not None and objectives.count(result.objective) > 1:
            result.label = result.name
    order = ("before", "retain_only", "after")
    return sorted(results, key=lambda result: (order.index(result.stage), result.objective or "", result.name))


def summarize(results: list[Result], profile: str) -> dict[str, Any]:
    """Contents of summary.json. "gate" is keyed by objective, or by run where two runs share an objective."""
    objectives = [result.objective for result in results]
    gate = {
        (result.objective if objectives.count(result.objective) == 1 else result.name): result.evaluation["gate"]
        for result in results
        if result.stage == "after" and "gate" in result.evaluation
    }
    return {
        "profile": profile,
        "rows": [
            {
                "name": result.name,
                "objective": result.objective,
                "parametrization": result.parametrization,
                "stage": result.stage,
                "metrics": result.evaluation["sets"],
            }
            for result in results
        ],
        "gate": gate,
        "seconds": _seconds(results),
    }


def _seconds(results: list[Result]) -> dict[str, float]:
    """Seconds by stage: finetune/NAME where the model's own folder says so, unlearn/NAME, evaluate/NAME."""
    seconds: dict[str, float] = {}
    for result in results:
        model = result.evaluation.get("model")
        source, stage = (result.run, "unlearn") if result.run else (Path(model) if model else None, "finetune")
        if source is not None and (source / "run.json").is_file():
            spent = _read(source / "run.json", ()).get("seconds")
            if isinstance(spent, int | float):
                seconds[f"{stage}/{result.name}"] = float(spent)
    for result in results:
        spent = result.evaluation.get("seconds", {}).get("total")
        if spent is not None:
            seconds[f"evaluate/{result.name}"] = float(spent)
    return seconds


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); make it again with overwrite=true") from error
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing or not isinstance(value, dict):
        raise RunError(f"{path} lacks {', '.join(missing) or 'an object'}; make it again with overwrite=true")
    return value


def has_facts(results: list[Result]) -> bool:
    """Whether the corpus names a key fact for each forget row."""
    return results[0].metric("forget", "fact_recall") is not None


def main_metric(results: list[Result]) -> tuple[str, str]:
    """The metric that verdicts and pictures go by, and its name: fact recall, or ROUGE-L where there are no facts."""
    return ("fact_recall", "fact recall") if has_facts(results) else ("rouge_l", "ROUGE-L")
