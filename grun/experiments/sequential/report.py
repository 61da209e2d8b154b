"""The files of an experiment's report, made from what lies on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from grun.experiments.sequential import pictures
from grun.experiments.sequential.results import read_experiment, summarize
from grun.experiments.sequential.tables import experiment_csv, experiment_markdown, printed
from grun.report.figures import save
from grun.runtime.files import holding, take, write_json, write_text


@holding()
def make_report(results: Path) -> dict[str, Any]:
    """Write table.md, table.csv, summary.json and the pictures into `results`, and print the table.

    Returns:
        What summary.json holds: metric, requests (ids), before, retain_only (recall by request and set), methods (by
        name: summary, and steps as they were recorded).

    Raises:
        RunError: no method has a step yet.
    """
    experiment = read_experiment(results)
    summaries = [summarize(method, experiment) for method in experiment.methods]
    title = f"{len(experiment.ids)} requests to forget, one after another"
    summary = {
        "metric": experiment.metric,
        "requests": experiment.ids,
        "before": experiment.before,
        "retain_only": experiment.floor,
        "methods": {
            method.name: {"summary": asdict(of_method), "steps": method.steps}
            for method, of_method in zip(experiment.methods, summaries, strict=True)
        },
    }
    take(results)
    write_text(results / "table.md", experiment_markdown(experiment, summaries, title))
    write_text(results / "table.csv", experiment_csv(experiment, summaries))
    write_json(results / "summary.json", summary)
    figures = {"heatmap.png": pictures.heatmap(experiment), "confusion.png": pictures.confusion(experiment)}
    figures["utility.png"] = pictures.utility(experiment) if experiment.kept_sets else None
    drawn = [name for name, figure in figures.items() if save(figure, results / name)]
    print(printed(experiment, summaries))
    written = ["table.md", "table.csv", "summary.json", *drawn]
    print(*(f"written: {results / name}" for name in written), sep="\n")
    return summary
