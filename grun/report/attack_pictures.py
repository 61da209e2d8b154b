"""The pictures of an attack report: what comes back under each attack, and by number of tries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from grun.report.attack_results import attack_label, attack_names, leak, shown_names
from grun.report.figures import PALETTE, Picture, clean, colors_of, new_figure, plain, titled_panels
from grun.report.result import Result, after, single_runs
from grun.report.results import number_at
from grun.report.tables import Number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPREAD = 0.7
"""Height of the markers of a row together; a row is 1."""
MANY = len(PALETTE)
"""Of more methods there is the table alone; markers would share colors and make the picture meters high."""
HEIGHT, HEIGHT_OF_MARKER = 0.34, 0.13
"""Least height of a row, and what a method adds to it beyond that, inches."""
XLABELS = {"curve": "queries a row", "at_k": "answers drawn"}


# -- leak by attack ---------------------------------------------------------------------------------------------------


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


# -- leak by number of tries ------------------------------------------------------------------------------------------


def curves_of(results: Sequence[Result]) -> dict[str, list[str]]:
    """Where every curve that at least one model has stands among the attacks of evaluation.json, by its title."""
    found: dict[str, list[str]] = {}
    for name in attack_names(results):
        for run in single_runs(results):
            entry, label = run.evaluation["attacks"].get(name, {}), attack_label(name)
            found |= {label: [name, "curve"]} if "curve" in entry else {}
            found |= {
                label if way == "all" else f"{label}, {way}": [name, "at_k", way] for way in entry.get("at_k", {})
            }
    return found


def points_of(result: Result, place: Sequence[str]) -> dict[int, Number]:
    """The leak by number of queries or answers, as far as all seeds have it."""
    place, runs = ["attacks", *place], single_runs([result])
    parts = [reduce(lambda found, name: found.get(name, {}), place, run.evaluation) for run in runs]
    common = sorted(int(number) for number in parts[0] if all(number in part for part in parts))
    found = {number: number_at(result, [*place, str(number), "leak"]) for number in common}
    return {number: leak for number, leak in found.items() if leak is not None}


def draw_curves(results: Sequence[Result]) -> Figure | None:
    """A panel a curve, a line a model, floors dashed; None where no attack has a curve."""
    curves, colors = curves_of(results), colors_of(results)
    if not curves:
        return None
    figure, panels = titled_panels(len(curves), "Good is low and flat, at the dashed floor", 3.0)
    for axes, (title, place) in zip(panels, curves.items(), strict=True):
        clean(axes, ylim=(-0.02, 1.02), xlabel=XLABELS[place[1]])
        axes.set_title(plain(title), fontsize=11)
        axes.set_xscale("symlog", base=2, linthresh=1)
        ticks: set[int] = set()
        for result in results:
            points, floor = points_of(result, place), points_of(result, [place[0], "floor", *place[1:]])
            color, dash = colors[result.name], "--" if result.stage == "retain_only" else "-"
            if points:
                axes.plot(list(points), _values(points), dash, color=color, linewidth=1.6, label=plain(result.title))
            if floor:
                axes.plot(list(floor), _values(floor), "--", color=color, linewidth=1.6)
                axes.plot([], [], "--", color="#BBBBBB", label="rows never taught, in each model's color")
            if result.stage == "after" and points:
                lows, highs = zip(*(one.interval or (one.value, one.value) for one in points.values()), strict=True)
                axes.fill_between(list(points), lows, highs, color=color, alpha=0.12, linewidth=0)
            ticks |= points.keys()
        axes.set_xticks(sorted(ticks), map(str, sorted(ticks)))
        axes.minorticks_off()
    panels[0].set_ylabel("leak")
    labeled = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labeled.values(), labeled, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    return figure


def _values(points: dict[int, Number]) -> list[float]:
    return [number.value for number in points.values()]


CURVE_PICTURE = Picture(
    "attack_curves.png",
    "What comes back by number of tries",
    "A panel for each attacker who asks again and again, a line for each model: the leak after so many queries a row "
    "(0 is the plain question), or of the best of so many drawn answers. The band is a method's 95 % interval, over "
    "several seeds from the lowest to the highest. Dashed in a model's color is its floor, the same attack on rows "
    "that were never taught; dashed in black a model never taught the forget set.",
    draw_curves,
)
