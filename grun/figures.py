"""The three pictures of a report, drawn from results on disk.

Colors are Okabe and Ito's, which people with any form of color vision tell apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.errors import RunError
from grun.evaluation.table import Table
from grun.results import NAMES, Result, main_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
GREY = "#555555"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
GROUPS = {"forget": "#D55E00", "retain": "#0072B2", "heldout": "#009E73", "unknown": "#CC79A7"}
TERMS = {"forget": "#D55E00", "retain": "#0072B2", "gate": "#009E73"}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw what the results allow into `folder` and return the files; a picture without data is left out."""
    pictures = {
        "forget_vs_retain.png": forget_vs_retain(results),
        "gate_histograms.png": gate_histograms(results),
        "training_curves.png": training_curves(results),
    }
    written = []
    for name, figure in pictures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # an older report's picture would contradict this one
        else:
            _save(figure, folder / name)
            written.append(folder / name)
    return written


def _save(figure: Figure, path: Path) -> None:
    import io

    from grun.files import write_bytes

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    write_bytes(path, buffer.getvalue())


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot's global list and without a display (Agg)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


# -- forget against retain --------------------------------------------------------------------------------------------


def forget_vs_retain(results: Sequence[Result]) -> Figure | None:
    """What is left of the forget set (x) against what is left of the rest (y), one color for each model."""
    from matplotlib.lines import Line2D

    metric, metric_name = main_metric(list(results))
    shapes = {"retain": "o", "heldout": "D"}
    points = []  # (result, color, {set: (x, y)})
    colors = iter(PALETTE * (len(results) // len(PALETTE) + 1))
    for result in results:
        x = result.metric("forget", metric)
        heights = {name: result.metric(name, metric) for name in shapes}
        known = {name: (x, y) for name, y in heights.items() if x is not None and y is not None}
        color = {"before": GREY, "retain_only": "#000000"}.get(result.stage) or next(colors)
        if known:
            points.append((result, color, known))
    if not points:
        return None
    figure = _figure(7.6, 5.6)
    axes = figure.add_subplot()
    _clean(axes)
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
        Line2D([], [], color=GREY, marker=shapes[name], linestyle="", label=f"{NAMES[name]} set") for name in sets
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
    target = {"before": "before (taught all)", "retain_only": "target: retain only (never taught)"}
    for result, color, known in points:
        spot = next(iter(known.values()))
        _place_label(axes, target.get(result.stage, result.label), spot, color, spots, taken)
    return figure


def _place_label(
    axes: Axes, text: str, spot: tuple[float, float], color: str, spots: Sequence[tuple[float, float]], taken: list[Any]
) -> None:
    """Write `text` near `spot` with a line to it, where it covers no point and no box in `taken`; adds its own box.

    Places are tried outwards from the spot, in turn all around it.
    """
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    inside = axes.get_window_extent(renderer)
    pixels = axes.transData.transform(list(spots))
    label = axes.annotate(
        text,
        spot,
        xytext=(0, 0),
        textcoords="offset points",
        color=color,
        fontsize=10,
        fontweight="bold",
        ha="center",
        va="center",
        zorder=50,
        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 2},
    )
    box = label.get_window_extent(renderer)
    per_point = axes.figure.dpi / 72
    x, y = axes.transData.transform(spot)
    width, height = label.get_window_extent(renderer).width, 12 * per_point * 1.3
    for distance in range(26, 400, 8):
        for angle in range(0, 360, 15):
            across = distance * per_point * math.cos(math.radians(angle))
            along = distance * per_point * math.sin(math.radians(angle))
            across += math.copysign(width / 2, across) if abs(across) > 1 else 0.0
            box = Bbox.from_bounds(x + across - width / 2, y + along - height / 2, width, height)
            clear = 12 * per_point
            grown = Bbox.from_extents(box.x0 - clear, box.y0 - clear, box.x1 + clear, box.y1 + clear)
            within = box.x0 > inside.x0 and box.x1 < inside.x1 and box.y0 > inside.y0 and box.y1 < inside.y1
            covered = any(box.overlaps(other) for other in taken) or any(grown.contains(*pixel) for pixel in pixels)
            if within and not covered:
                label.set_position((across / per_point, along / per_point))
                taken.append(box)
                return
    taken.append(box)


# -- gates ------------------------------------------------------------------------------------------------------------


def gate_histograms(results: Sequence[Result]) -> Figure | None:
    """Histograms of the gate (mean over blocks) by group, one column for each run; None if no run has gates."""
    columns = []
    for result in results:
        if result.stage == "after" and "gate" in result.evaluation:
            table = Table.read(result.folder)
            found = {name: [record.mean for record in table.gates_of(name)] for name in GROUPS}
            columns.append((result, {name: gates for name, gates in found.items() if gates}))
    groups = [name for name in GROUPS if any(name in found for _, found in columns)]
    if not groups:
        return None
    figure = _figure(max(5.5, 1.2 + 3.1 * len(columns)), 1.0 + 1.25 * len(groups))
    figure.suptitle("The gate should open (right) on forget questions and stay shut (left) on all others", fontsize=12)
    grid = figure.subplots(len(groups), len(columns), sharex=True, sharey=True, squeeze=False)
    edges = [number / 20 for number in range(21)]
    for column, (result, found) in enumerate(columns):
        for row, name in enumerate(groups):
            axes = grid[row, column]
            _clean(axes)
            gates = found.get(name, [])
            axes.hist(gates, edges, weights=[1 / len(gates)] * len(gates), color=GROUPS[name])
            axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.05)
            if row == 0:
                axes.set_title(result.label, fontsize=11)
            if column == 0:
                axes.set_ylabel(NAMES[name], color=GROUPS[name], fontweight="bold")
            if row == len(groups) - 1:
                axes.set_xlabel("gate, mean over blocks")
    figure.supylabel("share of the group's questions", fontsize=10)
    return figure


# -- training ---------------------------------------------------------------------------------------------------------


def training_curves(results: Sequence[Result]) -> Figure | None:
    """Loss terms by step, one panel for each run; runs without a log (imported adapters) have none."""
    panels = []
    for result in results:
        if result.run is not None and (result.run / "log.jsonl").is_file():
            lines = read_log(result.run / "log.jsonl")
            if lines:
                panels.append((result, lines))
    if not panels:
        return None
    figure = _figure(max(5.5, 3.6 * len(panels)), 3.6)
    figure.suptitle("Training: every loss term should fall, the gate's towards 0", fontsize=12)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (result, lines) in zip(grid, panels, strict=True):
        _clean(axes)
        for term, color in TERMS.items():
            curve = [(line["step"], line[term]) for line in lines if isinstance(line.get(term), int | float)]
            if curve:
                axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.4, label=f"{term} term")
        axes.set_title(result.label, fontsize=11)
        axes.set_xlabel("step")
    grid[0].set_ylabel("loss term")
    grid[0].legend(fontsize=9, frameon=False)
    return figure


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log.jsonl; RunError names a damaged line."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise RunError(f"{path}, line {number}: not JSON ({error.msg}); remove the line") from error
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines
