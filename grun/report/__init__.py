"""The end of a pipeline, from results on disk alone: what was evaluated, in words, tables and pictures.

`results.py` and `comparison.py` find what was evaluated; `tables.py`, `verdicts.py`, `figures.py`, `distributions.py`
and `provenance.py` say it, `matrix*.py` where objectives were run with several parametrizations or seeds;
`terminal.py` prints it; `html.py` puts it on one page.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from grun.config import ReportConfig
from grun.files import write_json, write_text
from grun.report.results import find_results
from grun.report.summary import collect, summarize
from grun.report.verdicts import verdict

__all__ = ["collect", "make_report", "verdict"]

SUMMARY_FILE = "summary.json"
PAGE_FILE = "report.html"
MATRIX_FILES = ("matrix.csv", "matrix.md", "matrix.tex")


def make_report(config: ReportConfig) -> dict[str, Any]:
    """Write the page, the tables, summary.json and the pictures, print the report, and return the summary.

    They go to config.results_dir, which is the folder that is read unless config.runs names others. The matrix is among
    them where there are several parametrizations, or several seeds of one.
    """
    from rich.console import Console

    from grun.report import matrix_tables, tables
    from grun.report.comparison import find_comparison, folder_names
    from grun.report.figures import draw
    from grun.report.html import page
    from grun.report.matrix import make_matrix
    from grun.report.terminal import WIDTH, print_report

    profile = Path(config.profile).stem
    folder = Path(config.results_dir or f"results/{'comparison' if config.runs else profile}").expanduser()
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
    if matrix is None:
        for name in MATRIX_FILES:
            (folder / name).unlink(missing_ok=True)  # an older report's would contradict this one
    else:
        writers = (matrix_tables.to_csv, matrix_tables.to_markdown, matrix_tables.to_tex)
        texts |= {name: write(matrix) for name, write in zip(MATRIX_FILES, writers, strict=True)}
    drawn = draw(results, folder)
    texts[PAGE_FILE] = page(results, title, drawn)
    write_json(folder / SUMMARY_FILE, summary)
    for name, text in texts.items():
        write_text(folder / name, text)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    print_report(console, results, title)
    written = (folder / PAGE_FILE, folder / SUMMARY_FILE, *(folder / name for name in texts if name != PAGE_FILE))
    for path in (*written, *(path for _, path in drawn)):
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    return summary
