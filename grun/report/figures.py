"""The pictures of a report: what is drawn, and the scatter plots of forgetting against what is kept.

Colors are Okabe and Ito's, which people with any form of color vision tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.data.sets import set_label
from grun.report.matrix import first_seeds, has_many_runs
from grun.report.placing import place_label
from grun.report.results import DISTINGUISHABLE, Result, main_metric
from grun.runtime.files import remove, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
MATRIX_PICTURE = "matrix.png"
MANY_TEXT = "With many runs shapes are objectives, colors parametrizations."
GREY = "#555555"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#9A8F00")


@dataclass(frozen=True)
class Picture:
    """One file of pictures, and what it says to those who do not see it."""

    name: str
    title: str
    text: str
    """What is drawn and how to read it."""
    draw: Callable[[Sequence[Result]], Figure | None]
    """Returns None where the results lack what it shows."""
    every_seed: bool = False
    """Shows all seeds of a cell; others show the first."""


def pictures() -> tuple[Picture, ...]:
    """Every picture, in the order of the report."""
    from grun.report import distributions as drawn
    from grun.report.matrix_figure import forget_against_utility

    return (
        Picture(
            MATRIX_PICTURE,
            "Matrix: forgotten against kept",
            "Each objective and parametrization is a point: what is left of the forget set to the right, what is kept "
            "upwards (means over seeds; bars are one standard deviation). Shapes are objectives, colors "
            "parametrizations; the dashed line and the star are the target. Where many points lie close, that part is "
            "drawn again larger; markers that would cover each other are moved apart, a line leading to their place.",
            forget_against_utility,
            every_seed=True,
        ),
        Picture(
            "forget_quality_vs_utility.png",
            "Forget quality against model utility",
            "Each model is a point: TOFU's model utility to the right, log10 of forget quality's p upwards. Good is "
            "top right, near the retain-only target; above the dotted line (p = 0.05) a model cannot be told from it. "
            f"{MANY_TEXT}",
            forget_quality_vs_utility,
        ),
        Picture(
            "forget_vs_retain.png",
            "Forget set against the rest",
            "Each model is a point for the retain and one for the held-out set: what is left of the forget set to the "
            "right, what is left of the rest upwards. Good is top left. "
            f"{MANY_TEXT} Then the retain set alone is drawn; the matrix has held-out or model utility.",
            forget_vs_retain,
        ),
        Picture(
            "gate_histograms.png",
            "Gates by set",
            "Histograms of how far the gate opens, mean over blocks: a row for each set, a column for each run. Good "
            "is open (right) on forget questions and shut (left) on all others.",
            drawn.gate_histograms,
        ),
        Picture(
            "gate_histograms_blocks.png",
            "Gates by block",
            "The same for each edited block: a row for each run and block, a column for each set.",
            drawn.gate_histograms_blocks,
        ),
        Picture(
            "truth_ratios.png",
            "Truth ratios of the forget set",
            "Share of forget rows whose truth ratio is below each value, every model against the retain-only one. The "
            "red bar is their largest distance D, which the KS test behind forget quality judges; small is good.",
            drawn.truth_ratio_curves,
        ),
        Picture(
            "training_curves.png",
            "Training",
            "Loss terms by training step, a panel for each run. Each should fall, the gate's towards 0.",
            drawn.training_curves,
        ),
        Picture(
            "monitor_curves.png",
            "While training",
            "What each run said to a few questions of each set, looked at again and again while it was trained "
            "(train.monitor_epochs). Forget should fall, all others stay.",
            drawn.monitor_curves,
        ),
    )


def draw(results: Sequence[Result], folder: Path) -> list[tuple[Picture, Path]]:
    """Draw what the results allow into `folder` and return it with its files; a picture without data is left out."""
    written, first = [], first_seeds(results)
    for picture in pictures():
        figure = picture.draw(results if picture.every_seed else first)
        if figure is None:
            remove(folder / picture.name)  # an older report's picture would contradict this one
        else:
            save(figure, folder / picture.name)
            written.append((picture, folder / picture.name))
    return written


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    write_bytes(path, buffer.getvalue())


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own (inches), without pyplot's global list and without a display (Agg)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def clean(axes: Axes) -> None:
    """No frame, a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def plain(text: str) -> str:
    """Text in which a dollar sign is no mathematics."""
    return text.replace("$", r"\$")


def colors_of(results: Sequence[Result]) -> dict[str, str]:
    """A color for each model by name, the same in every picture."""
    fixed = {"before": GREY, "retain_only": "#000000"}
    runs = [result.name for result in results if result.stage == "after"]
    cycled = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(runs)}
    return {result.name: fixed.get(result.stage) or cycled[result.name] for result in results}


def _long_label(result: Result) -> str:
    long = {"before": f"{result.label} (taught all)", "retain_only": f"target: {result.label} (never taught)"}
    return long.get(result.stage, result.label)


# -- forget quality against model utility -----------------------------------------------------------------------------


def forget_quality_vs_utility(results: Sequence[Result]) -> Figure | None:
    """log10 of forget quality's p (y) against model utility (x); the retain-only model stands at p = 1."""
    from matplotlib.transforms import Bbox

    from grun.report.matrix_figure import Point, scatter
    from grun.report.measures import Spread

    colors, points = colors_of(results), []
    for result in results:
        x = result.overall.get("model_utility")
        y = 0.0 if result.stage == "retain_only" else result.reference.get("forget_quality_log10")
        if x is not None and y is not None:
            points.append((result, (x, y)))
    if not any(result.stage != "retain_only" for result, _ in points):
        return None
    lowest = min(-3.0, *(y for _, (_, y) in points))
    across, along = (-0.05, 1.05), (lowest * 1.12, -lowest * 0.12)
    x_label = "model utility  (right is better: kept)"
    y_label = "log10 of forget quality's p  (up is better: forgotten)"
    if has_many_runs(results):
        return scatter(
            [
                Point(r.objective, r.parametrization, r.stage, Spread((x,)), Spread((y,)))
                for r, (x, y) in points
                if r.stage != "after" or r.objective is not None
            ],
            *((x_label, across), (y_label, along), "Good is top right: as if never taught, the rest still known"),
            level=math.log10(DISTINGUISHABLE),
        )
    figure = new_figure(7.6, 5.6)
    axes = figure.add_subplot()
    clean(axes)
    axes.set_xlim(*across)
    axes.set_ylim(*along)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title("Good is top right: as forgotten as if never taught, the rest still known", fontsize=12, loc="left")
    line = math.log10(DISTINGUISHABLE)
    axes.axhline(line, color=GREY, linewidth=1, linestyle=":")
    dotted = f"p = {DISTINGUISHABLE}"
    axes.annotate(dotted, (0, line), xytext=(2, -3), textcoords="offset points", va="top", fontsize=9, color=GREY)
    for number, (result, (x, y)) in enumerate(points):
        marker = "*" if result.stage == "retain_only" else "o"
        size = 260 if marker == "*" else 60 + 160 * (1 - number / len(points)) ** 2
        axes.scatter(
            x, y, s=size, marker=marker, color=colors[result.name], edgecolor="white", linewidth=1, zorder=3 + number
        )
    figure.canvas.draw()
    (left, height), (right, _) = axes.transData.transform([(-0.05, line), (1.05, line)])
    taken: list[Any] = [Bbox.from_extents(left, height - 1, right, height + 1)]
    for result, spot in points:
        place_label(axes, plain(_long_label(result)), spot, colors[result.name], [spot for _, spot in points], taken)
    return figure


# -- forget against retain --------------------------------------------------------------------------------------------


def forget_vs_retain(results: Sequence[Result]) -> Figure | None:
    """What is left of the forget set (x) against what is left of the rest (y), one color for each model."""
    from matplotlib.lines import Line2D

    if has_many_runs(results):
        from grun.report.matrix_figure import forget_against_retain

        return forget_against_retain(results)
    metric, metric_name = main_metric(results)
    shapes = {"retain": "o", "heldout": "D"}
    points = []  # (result, color, {set: (x, y)})
    colors = colors_of(results)
    for result in results:
        x = result.metric("forget", metric)
        heights = {name: result.metric(name, metric) for name in shapes}
        known = {name: (x, y) for name, y in heights.items() if x is not None and y is not None}
        if known:
            points.append((result, colors[result.name], known))
    if not points:
        return None
    figure = new_figure(7.6, 5.6)
    axes = figure.add_subplot()
    clean(axes)
    axes.set_xlim(-0.05, 1.05)
    axes.set_ylim(-0.05, 1.08)
    axes.set_xlabel(f"{metric_name} on the forget set  (left is better: forgotten)")
    axes.set_ylabel(f"{metric_name} on retain and held-out  (up is better: kept)")
    axes.set_title("Good is top left: the forget set is gone, the rest is still known", fontsize=12, loc="left")
    sets = [name for name in shapes if any(name in known for *_, known in points)]
    for number, (_, color, known) in enumerate(points):
        # The first are the largest: models at one spot show as rings around each other.
        size = 80 + 330 * (1 - number / len(points)) ** 2
        axes.plot(*zip(*known.values(), strict=True), color=color, linewidth=1, zorder=2)
        for name, (x, y) in known.items():
            # The diamond is the smaller, so that both show where retain and held-out agree.
            area = size * (0.45 if name == "heldout" else 1)
            axes.scatter(
                x, y, s=area, marker=shapes[name], color=color, edgecolor="white", linewidth=1, zorder=3 + number
            )
    handles = [
        Line2D([], [], color=GREY, marker=shapes[name], linestyle="", label=f"{set_label(name)} set") for name in sets
    ]
    legend = axes.legend(handles=handles, loc="lower right", fontsize=9, frameon=False)
    better = axes.annotate(
        "better",
        (0.42, 0.56),
        xytext=(0.54, 0.42),
        color="#888888",
        fontsize=11,
        ha="center",
        arrowprops={"arrowstyle": "-|>", "color": "#888888", "linewidth": 2},
    )
    figure.canvas.draw()
    taken = [legend.get_window_extent(), better.get_window_extent()]
    spots = [spot for *_, known in points for spot in known.values()]
    for result, color, known in points:
        spot = next(iter(known.values()))
        place_label(axes, plain(_long_label(result)), spot, color, spots, taken)
    return figure
