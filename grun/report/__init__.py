"""The end of a pipeline, from results on disk alone: what was evaluated, in words, tables and pictures.

`results.py` and `comparison.py` find what was evaluated; `tables.py`, `verdicts.py`, `figures.py`, `distributions.py`
and `provenance.py` say it, `matrix*.py` where objectives were run with several parametrizations or seeds;
`terminal.py` prints it; `html.py` puts it on one page. `knowledge*.py` do the same for evaluations of suite=knowledge,
`attack*.py` for those of suite=attacks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config.options import ReportConfig
from grun.errors import RunError
from grun.report.results import find_results
from grun.report.summary import collect, summarize
from grun.report.verdicts import verdict
from grun.runtime.files import remove, taken, target, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["collect", "make_report", "verdict"]

SUMMARY_FILE = "summary.json"
PAGE_FILE = "report.html"
MATRIX_FILES = ("matrix.csv", "matrix.md", "matrix.tex")


def make_report(config: ReportConfig) -> dict[str, Any]:
    """Write the page, the tables, summary.json and the pictures, print the report, and return the summary.

    They go to config.results_dir, which is the folder that is read unless config.runs names others. The matrix is among
    them where there are several parametrizations, or several seeds of one. Evaluations of suite=knowledge and of
    suite=attacks have a report of their own.
    """
    from rich.console import Console

    from grun.report import matrix_tables, tables
    from grun.report.comparison import find_comparison, folder_names
    from grun.report.figures import draw
    from grun.report.html import page
    from grun.report.matrix import make_matrix
    from grun.report.terminal import WIDTH, print_report

    profile = Path(config.profile).stem
    folder = target(config.results_dir or f"results/{'comparison' if config.runs else profile}", "results_dir")
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    suite = _suite(config, folder)
    if suite != "answers":
        from grun.report.attack_report import report_attacks
        from grun.report.knowledge_report import report_knowledge

        report = report_attacks if suite == "attacks" else report_knowledge
        with taken(folder):
            summary, paths = report(console, folder, f"Unlearning, profile {config.profile}", config.profile)
        _tell(console, paths)
        return summary
    if config.runs:
        results = find_comparison(config.runs)
        title = f"Unlearning: comparison of {', '.join(folder_names(config.runs))}"
    else:
        results = find_results(folder)
        title = f"Unlearning, profile {config.profile}"
    summary = summarize(results, config.profile)
    texts = {
        "table.csv": tables.to_csv(results),
        "table.md": tables.to_markdown(results),
        "table.tex": tables.to_tex(results),
    }
    matrix = make_matrix(results)
    if matrix is not None:
        writers = (matrix_tables.to_csv, matrix_tables.to_markdown, matrix_tables.to_tex)
        texts |= {name: write(matrix) for name, write in zip(MATRIX_FILES, writers, strict=True)}
    with taken(folder):
        drawn = draw(results, folder)
        texts[PAGE_FILE] = page(results, title, drawn)
        write_json(folder / SUMMARY_FILE, summary)
        for name, text in texts.items():
            write_text(folder / name, text)
        for name in () if matrix else MATRIX_FILES:
            remove(folder / name)  # an older report's would contradict this one
    print_report(console, results, title)
    written = (folder / PAGE_FILE, folder / SUMMARY_FILE, *(folder / name for name in texts if name != PAGE_FILE))
    _tell(console, [*written, *(path for _, path in drawn)])
    return summary


def _tell(console: Console, paths: Sequence[Path]) -> None:
    for path in paths:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def _suite(config: ReportConfig, folder: Path) -> str:
    """The suite of the evaluations that are to be reported; RunError where there is no such report."""
    from grun.report.knowledge import suite_of
    from grun.report.results import EVALUATION_FILE, evaluation_folders

    if not config.runs:
        return suite_of(evaluation_folders(folder))
    for run in config.runs:
        path = Path(run).expanduser()
        single = [path] if (path / EVALUATION_FILE).is_file() else []
        suite = suite_of(single or (evaluation_folders(path) if (path / "evaluation").is_dir() else []))
        if suite != "answers":
            raise RunError(
                f"runs=... compares evaluations of suite=answers, and those in {path} are of suite={suite}; report "
                f"them alone, with results_dir={path}"
            )
    return "answers"
