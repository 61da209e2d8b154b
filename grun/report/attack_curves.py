"""The picture of attackers who ask again and again: what they have by number of queries, or of drawn answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from grun.report.attack_results import attack_label, attack_names, number_at
from grun.report.figures import Picture, clean, colors_of, plain, titled_panels
from grun.report.result import Result, single_runs
from grun.report.tables import Number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADE = 0.12
"""Opacity of an interval."""
XLABELS = {"curve": "queries a row", "at_k": "answers drawn"}


class Curve(NamedTuple):
    """Where the curve of one attack stands in evaluation.json."""

    attack: str
    place: tuple[str, ...]
    """curve: by number of queries; at_k and a way of drawing: the best of k answers."""

    @property
    def title(self) -> str:
        """The attack, and the way of drawing where there are several."""
        return ", ".join([attack_label(self.attack), *(way for way in self.place[1:] if way != "all")])

    def points(self, result: Result, *, floor: bool = False) -> dict[int, Number]:
        """The leak by number of queries or answers that all seeds have; as the floor that of rows never taught."""
        place = ["attacks", self.attack, *(["floor"] if floor else []), *self.place]
        runs = single_runs([result])
        parts = [reduce(lambda found, name: found.get(name, {}), place, run.evaluation) for run in runs]
        common = sorted(int(number) for number in parts[0] if all(number in part for part in parts))
        found = {number: number_at(result, [*place, str(number), "leak"]) for number in common}
        return {number: leak for number, leak in found.items() if leak is not None}


def curves_of(results: Sequence[Result]) -> list[Curve]:
    """Every curve that at least one model has."""
    found = []
    for name in attack_names(results):
        entries = [run.evaluation["attacks"].get(name, {}) for run in single_runs(results)]
        found += [Curve(name, ("curve",))] if any("curve" in entry for entry in entries) else []
        ways = dict.fromkeys(way for entry in entries for way in entry.get("at_k", {}))
        found += [Curve(name, ("at_k", way)) for way in ways]
    return found


def draw_curves(results: Sequence[Result]) -> Figure | None:
    """A panel a curve, a line a model, floors dashed; None where no attack has a curve."""
    curves, colors = curves_of(results), colors_of(results)
    if not curves:
        return None
    figure, panels = titled_panels(len(curves), "Good is low and flat, at the dashed floor", 3.0)
    for axes, curve in zip(panels, curves, strict=True):
        drawn = [(result, curve.points(result), curve.points(result, floor=True)) for result in results]
        clean(axes, ylim=(-0.02, 1.02), xlabel=XLABELS[curve.place[0]])
        axes.set_title(plain(curve.title), fontsize=11)
        axes.set_xscale("symlog", base=2, linthresh=1)
        for result, points, floor in drawn:
            color, style = colors[result.name], "--" if result.stage == "retain_only" else "-"
            for numbers, dash, label in ((points, style, plain(result.title)), (floor, "--", "_")):
                if numbers:
                    heights = [number.value for number in numbers.values()]
                    axes.plot(list(numbers), heights, dash, color=color, linewidth=1.6, label=label)
            ends = [(number, *one.interval) for number, one in points.items() if one.interval]
            if ends and result.stage == "after":
                steps, lows, highs = zip(*ends, strict=True)
                axes.fill_between(steps, lows, highs, color=color, alpha=SHADE, linewidth=0)
        if any(floor for _, _, floor in drawn):
            axes.plot([], [], "--", color="#BBBBBB", linewidth=1.6, label="rows never taught, in each model's color")
        ticks = sorted({number for _, points, _ in drawn for number in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    panels[0].set_ylabel("leak")
    named = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    return figure


CURVE_PICTURE = Picture(
    "attack_curves.png",
    "What comes back by number of tries",
    "A panel for each attacker who asks again and again, a line for each model: the leak after so many queries a row "
    "(0 is the plain question), or of the best of so many drawn answers. The band is a method's 95 % interval, over "
    "several seeds from the lowest to the highest. Dashed in a model's color is its floor, the same attack on rows "
    "that were never taught; dashed in black a model never taught the forget set.",
    draw_curves,
)
