"""The pictures of an experiment: what is forgotten when, what is kept meanwhile, whose gates open for whom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grun.data.sets import set_label
from grun.experiments.sequential.definition import METHODS
from grun.experiments.sequential.results import Experiment
from grun.experiments.sequential.tables import label
from grun.report.figures import GREY, PALETTE, clean, new_figure, new_panels, plain
from grun.report.result import metric_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "#BBBBBB"
"""Color of what was not measured."""
MARKERS = "osD^"
MANY = 25
"""More requests than these are not all named on an axis."""


def heatmap(experiment: Experiment) -> Figure:
    """A panel a method: recall by request (down) and time (across), a white line at the time of each request."""
    from matplotlib import colormaps

    methods, count = experiment.methods, len(experiment.ids)
    columns = min(2, len(methods))
    rows = math.ceil(len(methods) / columns)
    side = min(1.0 + 0.25 * (count + 1), 5.0)
    size = columns * (side + 0.9) + 1.3, rows * (side + 0.8) + 0.9
    figure, panels = new_panels(*size, rows, columns, len(methods))
    colors = colormaps["viridis"].with_extremes(bad=MISSING)
    image: Any = None
    for place, (axes, method) in enumerate(zip(panels, methods, strict=True)):
        values = [[math.nan] * (count + 1) for _ in experiment.ids]
        for row, name in enumerate(experiment.ids):
            values[row][0] = experiment.before["recall"][name]
            for step in method.steps:
                values[row][step["number"]] = step["recall"][name]
        image = axes.imshow(values, cmap=colors, vmin=0.0, vmax=1.0, interpolation="nearest")
        # From the left edge of a request's own step down to the next row: right of the line it has been made.
        across = [edge for row in range(count) for edge in (row + 0.5, row + 0.5)]
        down = [edge for row in range(count) for edge in (row - 0.5, row + 0.5)]
        axes.plot(across, down, color="white", linewidth=2)
        axes.set_title(plain(label(method.name)), fontsize=12, loc="left")
        named = range(count) if count <= MANY else range(0, count, 5)
        axes.set_yticks(list(named), [plain(experiment.ids[row]) for row in named], fontsize=9)
        axes.set_xticks([0, *(row + 1 for row in named)], ["before", *(plain(experiment.ids[row]) for row in named)])
        axes.tick_params(axis="x", labelsize=9, rotation=90)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("recall of request" if place % columns == 0 else "", fontsize=10)
        axes.set_xlabel("after serving" if place + columns >= len(methods) else "", fontsize=10)
    bar = figure.colorbar(image, ax=figure.axes, shrink=min(1.0, 3.0 / side), pad=0.02)
    bar.set_label(f"{metric_label(experiment.metric)}  (dark is forgotten)")
    missing = any(len(method.steps) < count for method in methods)
    gray = "; gray was not measured" if missing else ""
    figure.suptitle(f"Good is dark right of the white line, bright left of it{gray}", fontsize=12, x=0.02, ha="left")
    return figure


def utility(experiment: Experiment) -> Figure:
    """A panel a set that is to stay: recall over time, a line a method; before and the retain-only model as lines."""
    sets, count = experiment.kept_sets, len(experiment.ids)
    columns = min(2, len(sets))
    rows = math.ceil(len(sets) / columns)
    figure, panels = new_panels(4.6 * columns + 0.4, 3.6 * rows + 0.6, rows, columns, len(sets), sharey=True)
    lowest = 1.0
    for axes, name in zip(panels, sets, strict=True):
        clean(axes, xlabel="requests served", xlim=(-0.3, count + 0.3))
        before = experiment.before["sets"][name]
        axes.axhline(before, color=GREY, linewidth=1.5, linestyle="--", label="before")
        if experiment.floor is not None:
            floor = experiment.floor["sets"][name]
            axes.axhline(floor, color="black", linewidth=1.5, linestyle=":", label="retain only")
            lowest = min(lowest, floor)
        for method in experiment.methods:
            number = list(METHODS).index(method.name)
            times = [0, *(step["number"] for step in method.steps)]
            values = [before, *(step["sets"][name] for step in method.steps)]
            if method.name == "retrain":  # each step is a model of its own
                times, values = times[1:], values[1:]
            axes.plot(
                times, values, color=PALETTE[number], marker=MARKERS[number], markersize=5, linewidth=1.5,
                linestyle="none" if method.name == "retrain" else "-", label=plain(label(method.name)), clip_on=False,
                zorder=3,
            )  # fmt: skip
            lowest = min([lowest, before, *values])
        axes.set_title(plain(set_label(name)), fontsize=12, loc="left")
        axes.set_xticks(sorted({0, *range(0, count + 1, max(1, count // 5)), count}))
    panels[0].set_ylim(max(0.0, math.floor(lowest * 10 - 0.5) / 10), 1.02)
    for axes in panels[::columns]:
        axes.set_ylabel(f"{metric_label(experiment.metric)}  (up is better: kept)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=10, frameon=False)
    return figure


def confusion(experiment: Experiment) -> Figure | None:
    """How far the gates of each request (down) open at the prompts of each request or set (across), at the end.

    None where no method has gates.
    """
    gates = next((method.last["gates"] for method in experiment.methods if method.last["gates"]), None)
    if gates is None:
        return None
    whose, prompts = list(gates["mean"]), list(gates["rows"])
    values = [[gates["mean"][name][group] for group in prompts] for name in whose]
    side = 0.8 + 0.22 * len(whose)
    figure = new_figure(2.6 + 0.22 * len(prompts) + 1.0, max(2.8, side + 1.6))
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto")
    _name(axes.set_yticks, whose)
    _name(axes.set_xticks, [set_label(name) if name not in experiment.ids else name for name in prompts])
    axes.tick_params(axis="x", labelsize=9, rotation=90, length=0)
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.axvline(len(experiment.ids) - 0.5, color="black", linewidth=1)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("prompts of")
    axes.set_ylabel("gates of")
    axes.set_title("Good is dark on the diagonal alone", fontsize=12, loc="left")
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02).set_label("widest gate, mean over prompts")
    return figure


def _name(set_ticks: Any, names: Sequence[str]) -> None:
    """Names at an axis, every fifth of many."""
    places = range(len(names)) if len(names) <= 2 * MANY else range(0, len(names), 5)
    set_ticks(list(places), [plain(names[place]) for place in places])
