"""`python -m grun report`: which report a folder has, and its files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from grun.config.options import ReportConfig
from grun.errors import RunError
from grun.report.answers import ANSWER_SUITE
from grun.report.attacks import ATTACK_SUITE
from grun.report.knowledge import KNOWLEDGE_SUITE
from grun.report.results import EVALUATION_FILE, evaluation_folders, find_comparison, folder_names
from grun.report.suites import Suite, suite_of
from grun.report.terminal import WIDTH
from grun.runtime.files import taken, target, write_json, write_text

SUMMARY_FILE = "summary.json"
ANSWERS = ANSWER_SUITE.name
REPORTS: dict[str, Suite] = {suite.name: suite for suite in (ANSWER_SUITE, ATTACK_SUITE, KNOWLEDGE_SUITE)}
"""Report by suite."""


def make_report(config: ReportConfig) -> dict[str, Any]:
    """Write the page, the tables, summary.json and the pictures, print the report, and return the summary.

    They go to config.results_dir, which is the folder that is read unless config.runs names others. The matrix is among
    them where there are several parametrizations, or several seeds of one. Evaluations of suite=knowledge and of
    suite=attacks have a report of their own.
    """
    from rich.console import Console

    profile = Path(config.profile).stem
    folder = target(config.results_dir or f"results/{'comparison' if config.runs else profile}", "results_dir")
    report = REPORTS[_suite(config, folder)]
    title = f"Unlearning, profile {config.profile}"
    if config.runs:
        results = find_comparison(config.runs)
        title = f"Unlearning: comparison of {', '.join(folder_names(config.runs))}"
    else:
        results = report.find(folder)
    summary = report.summary(results, config.profile)
    with taken(folder):
        drawn = report.draw(results, folder)
        texts = report.texts(results, title, drawn, folder)
        for name, text in texts.items():
            write_text(folder / name, text)
        write_json(folder / SUMMARY_FILE, summary)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    report.show(console, results, title)
    for path in [*(folder / name for name in (*texts, SUMMARY_FILE)), *(path for _, path in drawn)]:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    return summary


def _suite(config: ReportConfig, folder: Path) -> str:
    """The suite of the evaluations that are to be reported; RunError where there is no such report."""
    if not config.runs:
        return suite_of(evaluation_folders(folder), list(REPORTS))
    for run in config.runs:
        path = Path(run).expanduser()
        single = [path] if (path / EVALUATION_FILE).is_file() else []
        suite = suite_of(single or (evaluation_folders(path) if (path / "evaluation").is_dir() else []), list(REPORTS))
        if suite != ANSWERS:
            raise RunError(
                f"runs=... compares evaluations of suite=answers, and those in {path} are of suite={suite}; report "
                f"them alone, with results_dir={path}"
            )
    return ANSWERS
