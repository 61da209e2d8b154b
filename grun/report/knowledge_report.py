"""The report of knowledge evaluations: which files it writes, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.report.knowledge import find_knowledge, first_lines, main_way
from grun.report.terminal import EXAMPLES

if TYPE_CHECKING:
    from rich.console import Console


def report_knowledge(console: Console, folder: Path, title: str, profile: str) -> tuple[dict[str, Any], list[Path]]:
    """Write table.csv, table.md, summary.json, knowledge.png and report.html into `folder` and print the report.

    Returns the summary and the files, report.html first. RunError as of `find_knowledge`.
    """
    from grun.report.knowledge_figure import knowledge_picture
    from grun.report.knowledge_html import knowledge_page
    from grun.report.knowledge_tables import summarize_knowledge, to_csv, to_markdown
    from grun.report.knowledge_terminal import print_knowledge
    from grun.report.writing import draw, write_files

    results = find_knowledge(folder)
    lines = first_lines(results, main_way(results), EXAMPLES)
    drawn = draw(knowledge_picture(), results, folder)
    summary = summarize_knowledge(results, profile)
    texts = {
        "report.html": knowledge_page(results, title, drawn, lines),
        "table.csv": to_csv(results),
        "table.md": to_markdown(results),
    }
    files = write_files(folder, texts, summary, drawn)
    print_knowledge(console, results, title, lines.get(("cloze", "forget"), {}))
    return summary, files
