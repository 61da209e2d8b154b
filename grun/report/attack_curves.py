"""The picture of attackers who ask again and again: what they have by number of queries, or of drawn answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

from grun.report.attack_results import attack_label, attack_names, number_at
from grun.report.figures import Picture, clean, colors_of, plain, titled_panels
from grun.report.result import Result, single_runs
from grun.report.tables import Number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

XLABELS = {"curve": "queries a row", "at_k": "answers drawn"}


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
