"""The picture of a knowledge report: what is left of the forget questions and what is kept of general ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grun.data.sets import find_set
from grun.report.figures import GREY, Picture, clean, legend_mark, new_panels, plain, write_at
from grun.report.knowledge_results import Number, chance, choice, cloze, main_way, worst_suffix
from grun.report.knowledge_verdict import KEEPS, judge_knowledge
from grun.report.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"forget": (find_set("forget").color, "#F0B48C"), "general": (find_set("retain").color, "#8CBCDC")}
"""Of multiple choice and of cloze."""
THICK = 0.36
"""Of a bar; a row is 1."""
TITLE: dict[str, Any] = {"fontsize": 12, "fontweight": "bold", "loc": "left", "pad": 18}
"""Above the names of the lines."""
OUTCOMES = {"reached": "#116329", "missed": "#A40E26", "open": GREY}


def draw_knowledge(results: Sequence[Result]) -> Figure | None:
    """Two bars for each model, of forget and of general questions; None where neither was asked."""
    from matplotlib.patches import Patch

    way = main_way(results)
    level = chance(results, way)
    values = {
        role: [(choice(result, way, role), cloze(result, role)) for result in results] for role in ("forget", "general")
    }
    shown = [role for role, pairs in values.items() if any(pair != (None, None) for pair in pairs)]
    if not shown:
        return None
    size = 3.6 + 2.2 * len(shown), 1.5 + 0.62 * len(results)
    figure, panels = new_panels(*size, 1, len(shown), sharey=True)
    for axes, role in zip(panels, shown, strict=True):
        _panel(axes, role, values[role])
    if "forget" in shown:
        axes = panels[0]
        for row, result in enumerate(results):
            worst = worst_suffix(result, way, level)
            if worst is not None:
                axes.plot(worst.value, row - THICK / 2, "v", color="black", markersize=6, clip_on=False)
        if way is not None:
            _line(axes, level, "--", "chance")
        goal = cloze(next((result for result in results if result.stage == "retain_only"), None), "forget")
        if goal is not None:
            _line(axes, goal.value, ":", "")
        axes.set_title("forget: good is short", color=COLORS["forget"][0], **TITLE)
    if "general" in shown:
        before = choice(results[0], way, "general")
        if before is not None:
            _line(panels[-1], KEEPS * before.value, "--", "95 %")
        panels[-1].set_title("general: good is as before", color=COLORS["general"][0], **TITLE)
    _label_rows(panels[0], results)
    handles = [
        Patch(color=GREY, label="multiple choice"),
        Patch(color="#BBBBBB", label="cloze"),
        legend_mark("after a suffix", color="black", marker="v"),
        legend_mark("retain only", color="black", linestyle=":"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    return figure


def _panel(axes: Axes, role: str, pairs: Sequence[tuple[Number | None, Number | None]]) -> None:
    clean(axes, grid="x", xlim=(0, 1))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=11)
    for row, pair in enumerate(pairs):
        for number, found in enumerate(pair):
            place = row + (number - 0.5) * THICK
            if found is not None:
                axes.barh(place, found.value, THICK, color=COLORS[role][number])
            text = "-" if found is None else f"{found.value:.2f}"
            write_at(axes, text, (1, place), (6, 0), xycoords=("axes fraction", "data"), va="center", fontsize=10)


def _line(axes: Axes, value: float, style: str, text: str) -> None:
    axes.axvline(value, color="black", linewidth=1.2, linestyle=style, zorder=3)
    if text:
        centered: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 9}
        write_at(axes, text, (value, 1), (0, 2), xycoords=("data", "axes fraction"), **centered)


def _label_rows(axes: Axes, results: Sequence[Result]) -> None:
    """Names of the models, and under each method's the first words of its verdict in the color of its outcome."""
    axes.set(ylim=(len(results) - 0.4, -0.6), yticks=[])
    style: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
    for row, result in enumerate(results):
        judgement = judge_knowledge(result, results) if result.stage == "after" else None
        name = "retain only (target)" if result.stage == "retain_only" else result.label
        write_at(axes, plain(name), (0, row), (-8, 7 if judgement else 0), fontsize=12, fontweight="bold", **style)
        if judgement is not None:
            color = OUTCOMES[judgement.outcome]
            write_at(axes, _short(judgement.words), (0, row), (-8, -8), fontsize=10, color=color, **style)


def _short(words: str) -> str:
    """The verdict without what follows a colon or a comma, such as hides; damages the rest."""
    return "; ".join(part.partition(":")[0].partition(",")[0] for part in words.split("; "))


KNOWLEDGE_PICTURE = Picture(
    "knowledge.png",
    "Forgotten and kept",
    "A row for each model. Left, what is to be forgotten: the share of multiple choice answered rightly (dark bar; "
    "the triangle after the worst suffix) and of sentences completed, cloze (light bar). Good is a dark bar that "
    "ends at the dashed line, chance, and a light one that ends at the dotted line, retain only. Right, everything "
    "else: good is both bars as long as before; the dashed line is 95 % of before's multiple choice.",
    draw_knowledge,
)
