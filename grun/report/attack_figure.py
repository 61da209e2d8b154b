"""The picture of an attack report: what comes back under each attack, between the floor and the model before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grun.report.attacks import attack_label, leak, shown_names
from grun.report.figures import PALETTE, Picture, clean, colors_of, new_figure, plain
from grun.report.results import Result
from grun.report.tables import name_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "oDs^vPX"
"""One for all methods of a round of colors."""
SPREAD = 0.7
"""Height of the markers of a row together; a row is 1."""
HEIGHT, HEIGHT_OF_MARKER = 0.34, 0.13
"""Least height of a row, and what a method adds to it beyond that, inches."""


def attack_picture() -> Picture:
    """The picture, and what it says to those who do not see it."""
    return Picture(
        "attacks.png",
        "What comes back",
        "A row for each attack, a marker for each method: how much of the forget answers comes back. Good is a marker "
        "at the black line, the floor: what a model leaks that was never taught them. The gray line is the model "
        "before unlearning, what the attack can reach; where both lines meet, the attack says nothing. Over several "
        "seeds the marker is the mean, and a thin line goes from the lowest to the highest.",
        draw_attacks,
    )


def draw_attacks(results: Sequence[Result]) -> Figure | None:
    """Leak by attack, a marker a method, the model before and the floor as lines; None where nothing was attacked."""
    names = [
        name
        for name in shown_names(results)
        if any(leak(result, name) is not None for result in results)
    ]  # fmt: skip
    if not names:
        return None
    methods = [result for result in results if result.stage == "after"]
    figure = new_figure(8.6, 1.6 + len(names) * max(HEIGHT, HEIGHT_OF_MARKER * len(methods)))
    axes = figure.add_subplot()
    clean(axes)
    axes.grid(False, axis="y")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [plain(attack_label(name)) for name in names], fontsize=11)
    axes.set_xlabel("leak  (left is better: nothing comes back)")
    axes.set_title("Good is left, at the floor", fontsize=12, loc="left")
    colors = colors_of(results)
    for result in results:
        found = {row: value for row, name in enumerate(names) if (value := leak(result, name)) is not None}
        rows, values, label = list(found), list(found.values()), plain(name_of(result))
        if result.stage != "after":
            ends = [row - 0.5 for row in rows], [row + 0.5 for row in rows]
            axes.vlines(values, *ends, color=colors[result.name], linewidth=2, label=label, zorder=2)
            continue
        number = methods.index(result)
        offset = SPREAD * ((number + 0.5) / len(methods) - 0.5)
        axes.scatter(
            values, [row + offset for row in rows], s=40, marker=MARKERS[number // len(PALETTE) % len(MARKERS)],
            color=colors[result.name], edgecolor="white", linewidth=0.8, label=label, zorder=3, clip_on=False,
        )  # fmt: skip
        if result.runs:
            seeds = [[value for run in result.runs if (value := leak(run, names[row])) is not None] for row in rows]
            ends = list(map(min, seeds)), list(map(max, seeds))
            axes.hlines([row + offset for row in rows], *ends, color=colors[result.name], linewidth=1.5, zorder=2)
    figure.legend(loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    return figure
