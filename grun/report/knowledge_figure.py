"""The picture of a knowledge report: what is left of the forget questions and what is kept of general ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from grun.report.figures import Picture
from grun.report.knowledge_results import Number, chance, choice, cloze, main_way, worst_suffix
from grun.report.result import Result
from grun.report.rows_figure import Marked, Panel, rows_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_knowledge(results: Sequence[Result]) -> Figure | None:
    """Multiple choice and cloze of forget and of general questions; None where neither was asked."""
    way = main_way(results)
    level = chance(results, way)
    reads: dict[tuple[str, str], Callable[[Result], Number | None]] = {
        ("forget multiple choice", "low"): partial(choice, way=way, role="forget"),
        ("forget after a suffix", "low"): partial(worst_suffix, way=way, level=level),
        ("forget cloze", "low"): partial(cloze, role="forget"),
        ("general multiple choice", "high"): partial(choice, way=way, role="general"),
        ("general cloze", "high"): partial(cloze, role="general"),
    }
    panels = []
    for (header, good), read in reads.items():
        numbers = [read(result) for result in results]
        if any(numbers):
            guessed = level if good == "low" and read is not reads["forget cloze", "low"] else None
            panels.append(Panel(header, good, numbers, level=guessed))
    if not panels:
        return None
    return rows_figure([Marked(one.title, one.stage, one.parametrization) for one in results], panels)


KNOWLEDGE_PICTURE = Picture(
    "knowledge.png",
    "Forgotten and kept",
    "A row for each model, a panel for each number, with its 95 % interval: of what is to be forgotten multiple choice "
    "answered rightly, the same after the worst suffix, and sentences completed (cloze); of everything else multiple "
    "choice and cloze. Good is what is to be forgotten at the dotted line, chance, or at the dashed one, the target, "
    "and everything else at the gray one, as before.",
    draw_knowledge,
)
