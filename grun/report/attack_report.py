"""The report of attack evaluations: which files it writes, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.report.attacks import find_attacked, leaked_most, leakiest, single_runs
from grun.runtime.files import remove

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = 3
"""Answers shown of each method."""
RUNS_FILE = "table_runs.csv"
"""The table with a row a run, where the others have means over seeds."""


def report_attacks(console: Console, folder: Path, title: str, profile: str) -> tuple[dict[str, Any], list[Path]]:
    """Write table.csv, table.md, summary.json, attacks.png and report.html into `folder` and print the report.

    Where rows are means over seeds, table_runs.csv has the runs. Returns the summary and the files, report.html first.
    RunError as of `find_attacked`.
    """
    from grun.report.attack_figure import attack_picture
    from grun.report.attack_html import attack_page
    from grun.report.attack_tables import summarize_attacks, to_csv, to_markdown
    from grun.report.attack_terminal import print_attacks
    from grun.report.writing import draw, write_files

    results = find_attacked(folder)
    methods = [result for result in results if result.stage == "after"]
    shown = [run for result in methods if (run := leakiest(result)) is not None]
    leaked = [(run, leaked_most(run, EXAMPLES)) for run in shown]
    drawn = draw(attack_picture(), results, folder)
    summary = summarize_attacks(results, profile)
    texts = {
        "report.html": attack_page(results, title, drawn, leaked),
        "table.csv": to_csv(results),
        "table.md": to_markdown(results),
    }
    runs = single_runs(results)
    if len(runs) > len(results):
        texts[RUNS_FILE] = to_csv(runs)
    else:
        remove(folder / RUNS_FILE)  # an older report's would contradict this one
    files = write_files(folder, texts, summary, drawn)
    print_attacks(console, results, title, [(run, lines[0]) for run, lines in leaked if lines])
    return summary, files
