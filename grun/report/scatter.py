"""Scatter plots of forgetting against what is kept: models with labels; of many runs of a matrix, its cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grun.data.sets import set_label
from grun.report.figures import GREY, clean, colors_of, legend_mark, new_figure, plain, write_at
from grun.report.matrix import Spread, has_many_runs
from grun.report.matrix_figure import Axis, Point, forget_against_retain, scatter
from grun.report.result import DISTINGUISHABLE, Result, main_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Spot = tuple[float, float]
SHAPES = {"retain": "o", "heldout": "D"}


def forget_quality_vs_utility(results: Sequence[Result]) -> Figure | None:
    """log10 of forget quality's p (y) against model utility (x); the retain-only model stands at p = 1."""
    from matplotlib.transforms import Bbox

    points: list[tuple[Result, Spot]] = []
    for result in results:
        utility = result.overall.get("model_utility")
        quality = 0.0 if result.stage == "retain_only" else result.reference.get("forget_quality_log10")
        if utility is not None and quality is not None:
            points.append((result, (utility, quality)))
    if all(result.stage == "retain_only" for result, _ in points):
        return None
    lowest, level = min(-3.0, *(y for _, (_, y) in points)), math.log10(DISTINGUISHABLE)
    x = Axis("model utility  (right is better: kept)", (-0.05, 1.05))
    y = Axis("log10 of forget quality's p  (up is better: forgotten)", (lowest * 1.12, -lowest * 0.12))
    if has_many_runs(results):
        cells = [
            Point(one.objective, one.parametrization, one.stage, Spread(spot[:1]), Spread(spot[1:]))
            for one, spot in points
            if one.stage != "after" or one.objective is not None
        ]
        return scatter(cells, x, y, "Good is top right: as if never taught, the rest still known", level)
    axes = _axes(x, y, "Good is top right: as forgotten as if never taught, the rest still known")
    axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
    write_at(axes, f"p = {DISTINGUISHABLE}", (0, level), (2, -3), va="top", fontsize=9, color=GREY)
    colors = colors_of(results)
    for number, (result, spot) in enumerate(points):
        is_target = result.stage == "retain_only"
        size = 260 if is_target else 60 + 160 * (1 - number / len(points)) ** 2
        _mark(axes, spot, size, "*" if is_target else "o", colors[result.name], number)
    axes.figure.canvas.draw()
    (left, height), (right, _) = axes.transData.transform([(x.limits[0], level), (x.limits[1], level)])
    taken = [Bbox.from_extents(left, height - 1, right, height + 1)]
    return _labeled(axes, [(result, spot) for result, spot in points], [spot for _, spot in points], colors, taken)


def forget_vs_retain(results: Sequence[Result]) -> Figure | None:
    """What is left of the forget set (x) against what is left of the rest (y), one color for each model."""
    if has_many_runs(results):
        return forget_against_retain(results)
    metric, metric_name = main_metric(results)
    points: list[tuple[Result, dict[str, Spot]]] = []
    for result in results:
        forget, heights = result.metric("forget", metric), {name: result.metric(name, metric) for name in SHAPES}
        known = {name: (forget, y) for name, y in heights.items() if forget is not None and y is not None}
        points += [(result, known)] if known else []
    if not points:
        return None
    axes = _axes(
        Axis(f"{metric_name} on the forget set  (left is better: forgotten)", (-0.05, 1.05)),
        Axis(f"{metric_name} on retain and held-out  (up is better: kept)", (-0.05, 1.08)),
        "Good is top left: the forget set is gone, the rest is still known",
    )
    colors = colors_of(results)
    for number, (result, known) in enumerate(points):
        # The first are the largest: models at one spot show as rings around each other.
        size = 80 + 330 * (1 - number / len(points)) ** 2
        axes.plot(*zip(*known.values(), strict=True), color=colors[result.name], linewidth=1, zorder=2)
        for name, spot in known.items():
            # The diamond is the smaller, so that both show where retain and held-out agree.
            area = size * (0.45 if name == "heldout" else 1)
            _mark(axes, spot, area, SHAPES[name], colors[result.name], number)
    sets = [name for name in SHAPES if any(name in known for _, known in points)]
    handles = [legend_mark(f"{set_label(name)} set", marker=SHAPES[name], color=GREY) for name in sets]
    legend = axes.legend(handles=handles, loc="lower right", fontsize=9, frameon=False)
    arrow = {"arrowstyle": "-|>", "color": "#888888", "linewidth": 2}
    words: dict[str, Any] = {"xytext": (0.54, 0.42), "color": "#888888", "fontsize": 11, "ha": "center"}
    better = axes.annotate("better", (0.42, 0.56), arrowprops=arrow, **words)
    axes.figure.canvas.draw()
    taken = [legend.get_window_extent(), better.get_window_extent()]
    first = [(result, next(iter(known.values()))) for result, known in points]
    return _labeled(axes, first, [spot for _, known in points for spot in known.values()], colors, taken)


def _axes(x: Axis, y: Axis, title: str) -> Axes:
    axes = new_figure(7.6, 5.6).add_subplot()
    clean(axes, xlim=x.limits, ylim=y.limits, xlabel=x.label, ylabel=y.label)
    axes.set_title(title, fontsize=12, loc="left")
    return axes


def _mark(axes: Axes, spot: Spot, size: float, marker: str, color: str, number: int) -> None:
    axes.scatter(*spot, s=size, marker=marker, color=color, edgecolor="white", linewidth=1, zorder=3 + number)


# -- labels -----------------------------------------------------------------------------------------------------------


def _labeled(
    axes: Axes,
    points: Sequence[tuple[Result, Spot]],
    spots: Sequence[Spot],
    colors: dict[str, str],
    taken: list[Any],
) -> Figure:
    """The figure with a label for each model, where it covers none of the spots and no box (pixels) in `taken`."""
    for result, spot in points:
        long = {"before": f"{result.label} (taught all)", "retain_only": f"target: {result.label} (never taught)"}
        _label(axes, plain(long.get(result.stage, result.label)), spot, colors[result.name], spots, taken)
    return axes.figure  # type: ignore[return-value]


def _label(axes: Axes, text: str, spot: Spot, color: str, spots: Sequence[Spot], taken: list[Any]) -> None:
    """Text near a spot with a line to it, tried outwards from the spot, all around it; its box is then taken too."""
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    inside = axes.get_window_extent(renderer)
    pixels = axes.transData.transform(list(spots))
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 2}
    style: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "ha": "center", "va": "center", "zorder": 50}
    label = axes.annotate(text, spot, xytext=(0, 0), textcoords="offset points", color=color, arrowprops=line, **style)
    box = label.get_window_extent(renderer)
    per_point = axes.figure.dpi / 72
    x, y = axes.transData.transform(spot)
    width, clear = box.width, 12 * per_point
    height = 1.3 * clear
    for step in range((400 - 26) // 8 + 1):
        for angle in range(0, 360, 15):
            distance = (26 + 8 * step) * per_point
            across, along = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            across += math.copysign(width / 2, across) if abs(across) > 1 else 0.0
            box = Bbox.from_bounds(x + across - width / 2, y + along - height / 2, width, height)
            grown = Bbox.from_extents(box.x0 - clear, box.y0 - clear, box.x1 + clear, box.y1 + clear)
            within = box.x0 > inside.x0 and box.x1 < inside.x1 and box.y0 > inside.y0 and box.y1 < inside.y1
            covered = any(box.overlaps(other) for other in taken) or any(grown.contains(*pixel) for pixel in pixels)
            if within and not covered:
                label.set_position((across / per_point, along / per_point))
                taken.append(box)
                return
    taken.append(box)
