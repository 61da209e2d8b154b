"""The report of attack evaluations: which files it writes, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.evaluation.attack_suite import ATTACKS_FILE
from grun.report.attacks import find_attacked, leaked_most

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = 3
"""Answers shown of each method."""


def report_attacks(console: Console, folder: Path, title: str, profile: str) -> tuple[dict[str, Any], list[Path]]:
    """Write table.csv, table.md, summary.json, attacks.png and report.html into `folder` and print the report.

    Returns the summary and the files, report.html first. RunError as of `find_attacked`.
    """
    from grun.report.attack_figure import attack_picture
    from grun.report.attack_html import attack_page
    from grun.report.attack_tables import summarize_attacks, to_csv, to_markdown
    from grun.report.attack_terminal import print_attacks
    from grun.report.writing import draw, write_files

    results = find_attacked(folder)
    methods = [result for result in results if result.stage == "after"]
    leaked = {
        result.name: leaked_most(result, EXAMPLES) for result in methods if (result.folder / ATTACKS_FILE).is_file()
    }
    drawn = draw(attack_picture(), results, folder)
    summary = summarize_attacks(results, profile)
    texts = {
        "report.html": attack_page(results, title, drawn, leaked),
        "table.csv": to_csv(results),
        "table.md": to_markdown(results),
    }
    files = write_files(folder, texts, summary, drawn)
    print_attacks(console, results, title, [(one, leaked[one.name][0]) for one in methods if leaked.get(one.name)])
    return summary, files
