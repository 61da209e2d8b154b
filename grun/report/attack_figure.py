"""The picture of an attack report: what comes back under each attack, between the floor and the model before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grun.report.attack_results import attack_label, leak, shown_names
from grun.report.figures import PALETTE, Picture, clean, colors_of, new_figure, plain
from grun.report.result import Result, after

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPREAD = 0.7
"""Height of the markers of a row together; a row is 1."""
MANY = len(PALETTE)
"""Of more methods there is the table alone; markers would share colors and make the picture meters high."""
HEIGHT, HEIGHT_OF_MARKER = 0.34, 0.13
"""Least height of a row, and what a method adds to it beyond that, inches."""


def draw_attacks(results: Sequence[Result]) -> Figure | None:
    """Leak by attack, a marker a method, the model before and the floor as lines.

    None where nothing was attacked, and of more than `MANY` methods.
    """
    names = [name for name in shown_names(results) if any(leak(result, name) is not None for result in results)]
    methods = after(results)
    if not names or len(methods) > MANY:
        return None
    figure = new_figure(8.6, 1.6 + len(names) * max(HEIGHT, HEIGHT_OF_MARKER * len(methods)))
    axes = figure.add_subplot()
    xlabel = "leak  (left is better: nothing comes back)"
    clean(axes, grid="x", xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel=xlabel)
    axes.set_yticks(range(len(names)), [plain(attack_label(name)) for name in names], fontsize=11)
    axes.set_title("Good is left, at the floor", fontsize=12, loc="left")
    colors = colors_of(results)
    for result in results:
        found = {row: value for row, name in enumerate(names) if (value := leak(result, name)) is not None}
        rows, values, color, label = list(found), list(found.values()), colors[result.name], plain(result.title)
        if result not in methods:
            ends = [row - 0.5 for row in rows], [row + 0.5 for row in rows]
            axes.vlines(values, *ends, color=color, linewidth=2, label=label, zorder=2)
            continue
        heights = [row + SPREAD * ((methods.index(result) + 0.5) / len(methods) - 0.5) for row in rows]
        mark: dict[str, Any] = {"s": 40, "color": color, "edgecolor": "white", "linewidth": 0.8, "clip_on": False}
        axes.scatter(values, heights, label=label, zorder=3, **mark)
        if result.runs:
            seeds = [[value for run in result.runs if (value := leak(run, names[row])) is not None] for row in rows]
            axes.hlines(heights, list(map(min, seeds)), list(map(max, seeds)), color=color, linewidth=1.5, zorder=2)
    figure.legend(loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    return figure


ATTACK_PICTURE = Picture(
    "attacks.png",
    "What comes back",
    "A row for each attack, a marker for each method: how much of the forget answers comes back. Good is a marker "
    "at the black line, the floor: what a model leaks that was never taught them. The gray line is the model "
    "before unlearning, what the attack can reach; where both lines meet, the attack shows nothing. Over several "
    "seeds the marker is the mean, and a thin line goes from the lowest to the highest.",
    draw_attacks,
)
