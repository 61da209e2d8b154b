"""The picture of the matrix: what is left of the forget set against what is kept, a point for each cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.report.figures import GREY, clean, legend_mark, new_panels
from grun.report.labels import PARAMETRIZATIONS, place_of
from grun.report.matrix import Matrix, Spread, make_matrix
from grun.report.result import Result, main_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"full": "#0072B2", "lora": "#009E73", "reft": "#E69F00", "grun": "#D55E00"}
"""Okabe and Ito's; a parametrization from elsewhere is purple."""
OTHER = "#CC79A7"
SHAPES = {"o": 1.0, "s": 0.95, "^": 1.15, "D": 0.88, "v": 1.15, "P": 1.15, "X": 1.1, "p": 1.1, "h": 1.1, "<": 1.15}
"""Markers of the objectives, with the factor that makes them look equally large."""
MARKER = 9.0
"""Diameter of a marker in points."""
CROWD = 0.15
"""Side of the window, as a share of the axes, in which the most cells lie that are drawn again larger."""
ZOOMED_FROM = 4
"""Cells in that window from which on it is."""

Limits = tuple[float, float]
Window = tuple[Limits, Limits]


class Axis(NamedTuple):
    """An axis of a scatter plot."""

    label: str
    limits: Limits


@dataclass(frozen=True)
class Point:
    """A cell or a model to compare with."""

    objective: str | None
    parametrization: str
    stage: str
    x: Spread
    y: Spread

    @property
    def spot(self) -> tuple[float, float]:
        """The means."""
        return self.x.mean or 0.0, self.y.mean or 0.0

    def is_in(self, window: Window) -> bool:
        """Whether the means lie in a window."""
        return all(low <= value <= high for value, (low, high) in zip(self.spot, window, strict=True))


def forget_against_utility(results: Sequence[Result]) -> Figure | None:
    """Forget (x) against held-out, or model utility where it is known and there are no facts (y); None if no matrix."""
    matrix, metric = make_matrix(results), main_metric(results)[0]
    utility = ("overall.model_utility",) if metric == "rouge_l" else ()
    return None if matrix is None else _forget_against(matrix, (*utility, f"heldout.{metric}", f"retain.{metric}"))


def forget_against_retain(results: Sequence[Result]) -> Figure | None:
    """The same with the retain set; None where `forget_against_utility` shows it."""
    matrix, metric = make_matrix(results), main_metric(results)[0]
    if matrix is None or not any(map(matrix.column, ("overall.model_utility", f"heldout.{metric}"))):
        return None
    return _forget_against(matrix, (f"retain.{metric}",))


def _forget_against(matrix: Matrix, heights: Sequence[str]) -> Figure | None:
    """The first of `heights` that there is stands at y."""
    x = matrix.column(f"forget.{main_metric(matrix.results)[0]}")
    y = next(filter(None, map(matrix.column, heights)), None)
    if x is None or y is None:
        return None
    points = [
        Point(row.objective, row.parametrization, row.stage, row.spread(x), row.spread(y))
        for row in matrix.rows
        if row.spread(x).n and row.spread(y).n and (row.stage != "after" or row.objective is not None)
    ]
    return scatter(
        points,
        Axis(f"{x.header}  (left is better: forgotten)", (-0.05, 1.05)),
        Axis(f"{y.header}  (up is better: kept)", (-0.05, 1.08)),
        "Good is top left: forgotten as far as the target, the rest kept",
    )


def scatter(points: Sequence[Point], x: Axis, y: Axis, title: str, level: float | None = None) -> Figure | None:
    """Points by shape and color; where many lie close, that part is drawn again larger. None without a cell.

    At `level` on y is a dotted line; without one a dashed line stands where the target is on x.
    """
    from matplotlib.patches import Rectangle

    cells = [point for point in points if point.stage == "after"]
    if not cells:
        return None
    window = _crowded(cells, x.limits, y.limits)
    figure, panels = new_panels(12.4 if window else 8.6, 5.4, 1, 2 if window else 1)
    for panel, heading in zip(panels, (title, "The dotted part, larger"), strict=False):
        panel.set_xlabel(x.label)
        panel.set_title(heading, fontsize=11, loc="left")
    panels[0].set_ylabel(y.label)
    _legends(panels[-1], points)
    _panel(panels[0], points, (x.limits, y.limits), level, window)
    if window:
        (left, right), (low, high) = window
        frame = Rectangle((left, low), right - left, high - low, fill=False, edgecolor=GREY, linestyle=":", zorder=1)
        panels[0].add_patch(frame)
        _panel(panels[1], points, window, level)
    return figure


def _crowded(cells: Sequence[Point], x_limits: Limits, y_limits: Limits) -> Window | None:
    """Limits around the window that holds the most cells; None where it holds few."""
    across, along = (CROWD * (high - low) for low, high in (x_limits, y_limits))
    best: list[Point] = []
    for left in sorted({cell.spot[0] for cell in cells}):
        for low in sorted({cell.spot[1] for cell in cells}):
            best = max(best, [c for c in cells if c.is_in(((left, left + across), (low, low + along)))], key=len)
    if len(best) < ZOOMED_FROM:
        return None
    return _around([cell.x for cell in best], across), _around([cell.y for cell in best], along)


def _around(spreads: Sequence[Spread], least: float) -> Limits:
    """Limits that hold the means with their error bars, and some room."""
    low = min((spread.mean or 0.0) - (spread.deviation or 0.0) for spread in spreads)
    high = max((spread.mean or 0.0) + (spread.deviation or 0.0) for spread in spreads)
    room = max(0.15 * (high - low), 0.2 * least)
    return low - room, high + room


def _panel(
    axes: Axes, points: Sequence[Point], limits: Window, level: float | None, window: Window | None = None
) -> None:
    """One panel. Markers that would cover each other are moved apart, those in `window`, which is drawn again, not."""
    clean(axes, xlim=limits[0], ylim=limits[1])
    if level is not None:
        axes.axhline(level, color=GREY, linewidth=0.9, linestyle=":", zorder=1)
    for point in points:
        if point.stage == "retain_only":
            if level is None:
                axes.axvline(point.spot[0], color="#000000", linewidth=0.9, linestyle="--", zorder=1)
            axes.scatter(*point.spot, s=190, marker="*", color="#000000", edgecolor="white", linewidth=0.8, zorder=2)
        elif point.stage == "before":
            axes.scatter(*point.spot, s=70, marker="o", facecolor="none", edgecolor=GREY, linewidth=1.8, zorder=2)
    cells = [point for point in points if point.stage == "after" and point.is_in(limits)]
    if cells:
        _draw_cells(axes, points, cells, window)


def _draw_cells(axes: Axes, points: Sequence[Point], cells: Sequence[Point], window: Window | None) -> None:
    objectives = list(dict.fromkeys(point.objective for point in points if point.stage == "after"))
    size = MARKER * (0.85 if window else 1)
    axes.figure.canvas.draw()  # the layout decides how many pixels a step of the axes is
    places = [tuple(place) for place in axes.transData.transform([cell.spot for cell in cells])]
    free = [number for number, cell in enumerate(cells) if window is None or not cell.is_in(window)]
    taken = [tuple(axes.transData.transform(point.spot)) for point in points if point.stage == "retain_only"]
    moved = spread_apart([places[number] for number in free], size * axes.figure.dpi / 72 * 1.25, taken)
    drawn = dict(zip(free, moved, strict=True))
    for number, cell in enumerate(cells):
        place = drawn.get(number, places[number])
        x, y = axes.transData.inverted().transform(place)
        color, shape = COLORS.get(cell.parametrization, OTHER), _shape(objectives.index(cell.objective))
        if math.dist(places[number], place) > 1:
            axes.plot([cell.spot[0], x], [cell.spot[1], y], color=color, linewidth=0.8, zorder=3)
        marker: dict[str, Any] = {"fmt": shape, "markersize": size * SHAPES[shape], "markeredgecolor": "white"}
        marker |= {"color": color, "markeredgewidth": 0.5, "elinewidth": 1, "zorder": 4 + number}
        axes.errorbar(x, y, xerr=cell.x.deviation, yerr=cell.y.deviation, **marker)


def spread_apart(
    spots: Sequence[tuple[float, ...]], diameter: float, taken: Sequence[tuple[float, ...]] = ()
) -> list[tuple[float, float]]:
    """Places (pixels) for markers at least `diameter` from each other and from `taken`, each as near to its spot as
    is free, in the order given.
    """
    places: list[tuple[float, float]] = []
    for x, y in spots:
        for step in range(400):
            # A spiral outwards: the angle of sunflower seeds tries every direction.
            radius, angle = diameter * 0.28 * math.sqrt(step), step * math.pi * (3 - math.sqrt(5))
            place = (x + radius * math.cos(angle), y + radius * math.sin(angle))
            if all(math.dist(place, other) >= diameter for other in (*taken, *places)):
                break
        places.append(place)
    return places


def _shape(number: int) -> str:
    return list(SHAPES)[number % len(SHAPES)]


def _legends(axes: Axes, points: Sequence[Point]) -> None:
    """Shapes for objectives and colors for parametrizations, to the right of `axes`."""
    cells = [point for point in points if point.stage == "after"]
    stages = {point.stage for point in points}
    objectives = dict.fromkeys(str(cell.objective) for cell in cells)
    shapes = [
        legend_mark(name.upper(), marker=_shape(number), markersize=8, color=GREY)
        for number, name in enumerate(objectives)
    ]
    colors = [
        legend_mark(PARAMETRIZATIONS.get(kind, kind), color=COLORS.get(kind, OTHER), linewidth=7, linestyle="-")
        for kind in sorted({cell.parametrization for cell in cells}, key=place_of)
    ]
    if "retain_only" in stages:
        colors.append(legend_mark("target", color="#000000", marker="*", markersize=11, linestyle="--"))
    if "before" in stages:
        ring: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.8}
        colors.append(legend_mark("before", color=GREY, **ring))
    style: dict[str, Any] = {"loc": "upper left", "frameon": False, "fontsize": 9, "alignment": "left"}
    first = axes.legend(handles=shapes, title="objective: shape", bbox_to_anchor=(1.02, 1.0), **style)
    axes.add_artist(first)
    below = 0.9 - 0.044 * len(shapes)
    axes.legend(handles=colors, title="parametrization: color", bbox_to_anchor=(1.02, below), **style)
