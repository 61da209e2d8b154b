"""Pictures of distributions and of training: gates, truth ratios, loss terms."""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.data.sets import EvaluationSet, evaluation_sets
from grun.report.figures import GREY, clean, colors_of, new_figure, plain
from grun.report.results import Result, before_of, main_metric, target_of
from grun.report.tables import p_value
from grun.runtime.reading import read_json_lines
from grun.runtime.records import Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TERMS = {"forget": "#D55E00", "retain": "#0072B2", "gate": "#009E73"}
PER_ROW = 3
"""Most panels beside each other."""
BINS = 20
"""Of a gate's histogram, from 0 to 1."""
DISTANCE = "#C00000"


def _panels(count: int, title: str, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in as few rows as hold them, with a title."""
    down = math.ceil(count / PER_ROW)
    across = math.ceil(count / down)
    width = max(5.5, 3.6 * across)
    lines = textwrap.wrap(title, int(8 * width))  # about nine letters to the inch
    figure = new_figure(width, 0.3 + 0.2 * len(lines) + height * down)
    figure.suptitle("\n".join(lines), fontsize=12)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes[:count]


# -- gates ------------------------------------------------------------------------------------------------------------


def _gated(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.stage == "after" and "gate" in result.evaluation]


def _groups(results: Sequence[Result]) -> list[EvaluationSet]:
    return [one for one in evaluation_sets().values() if any(result.table.gates_of(one.name) for result in results)]


def _histogram(axes: Axes, gates: Sequence[float], color: str) -> None:
    """Share of the prompts by gate."""
    clean(axes)
    shares = [0.0] * BINS
    for gate in gates:
        shares[min(int(gate * BINS), BINS - 1)] += 1 / len(gates)
    axes.stairs(shares, [number / BINS for number in range(BINS + 1)], fill=True, color=color)
    axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.05)


def gate_histograms(results: Sequence[Result]) -> Figure | None:
    """Histograms of the gate (mean over blocks) by group, one column for each run; None if no run has gates."""
    runs = _gated(results)
    groups = _groups(runs)
    if not groups:
        return None
    figure = new_figure(max(5.5, 1.2 + 3.1 * len(runs)), 1.0 + 1.25 * len(groups))
    title = "The gate should open (right) on forget questions\nand stay shut (left) on all others"
    figure.suptitle(title.replace("\n", " ") if len(runs) > 1 else title, fontsize=12)
    grid = figure.subplots(len(groups), len(runs), sharex=True, sharey=True, squeeze=False)
    for column, result in enumerate(runs):
        for row, one in enumerate(groups):
            axes = grid[row, column]
            _histogram(axes, [record.mean for record in result.table.gates_of(one.name)], one.color)
            if row == 0:
                axes.set_title(plain(result.label), fontsize=11)
            if column == 0:
                axes.set_ylabel(one.label, color=one.color, fontweight="bold")
            if row == len(groups) - 1:
                axes.set_xlabel("gate, mean over blocks")
    figure.supylabel("share of the group's questions", fontsize=10)
    return figure


def gate_histograms_blocks(results: Sequence[Result]) -> Figure | None:
    """Histograms of the gate of each block, one column for each group; None where no run has more than one block."""
    runs = _gated(results)
    rows = [(result, block) for result in runs for block in result.table.blocks()]
    groups = _groups(runs)
    if not groups or len(rows) == len(runs):
        return None  # the mean over one block is that block
    figure = new_figure(max(5.5, 1.0 + 1.8 * len(groups)), 1.0 + 1.05 * len(rows))
    figure.suptitle("The gate of each block: open on forget, shut elsewhere", fontsize=12)
    grid = figure.subplots(len(rows), len(groups), sharex=True, sharey=True, squeeze=False)
    for row, (result, block) in enumerate(rows):
        for column, one in enumerate(groups):
            axes = grid[row, column]
            _histogram(axes, [record.gates[block] for record in result.table.gates_of(one.name)], one.color)
            axes.set_yticks([0, 0.5, 1])
            if row == 0:
                axes.set_title(one.label, color=one.color, fontsize=11, fontweight="bold")
            if column == 0:
                axes.set_ylabel(f"{plain(result.label)}\nblock {block}", fontsize=9)
            if row == len(rows) - 1:
                axes.set_xlabel("gate")
    return figure


# -- truth ratios -----------------------------------------------------------------------------------------------------


def truth_ratio_curves(results: Sequence[Result]) -> Figure | None:
    """Cumulative shares of log10 of the truth ratio on forget, each model against its retain-only target.

    Where there is no target the taught model is drawn beside; None where no row has wrong answers.
    """
    from grun.evaluation.metrics import truth_ratios

    ratios = {
        result.name: sorted(truth_ratios(result.table, "forget", quirks=result.quirks).values()) for result in results
    }
    shown = [result for result in results if ratios[result.name] and result.stage != "retain_only"]
    if not shown:
        return None
    aimed = any(target_of(result, results) for result in shown)
    beside = "good is on the black line, retain only" if aimed else "gray: before"
    title = f"Truth ratios of forget rows (wrong answers / right one); {beside}"
    figure, panels = _panels(len(shown), title, 3.0)
    colors = colors_of(results)
    finite = [_log10(ratio) for values in ratios.values() for ratio in values]
    low, high = min(finite) - 0.3, max(finite) + 0.3
    for axes, result in zip(panels, shown, strict=True):
        clean(axes)
        other = target_of(result, results) or before_of(result, results)
        values = ratios[result.name]
        if other is not None and other is not result and ratios[other.name]:
            _cumulative(axes, ratios[other.name], (low, high), colors[other.name])
            if other.stage == "retain_only":
                _mark_distance(axes, result, values, ratios[other.name])
        _cumulative(axes, values, (low, high), colors[result.name])
        axes.set_xlim(low, high)
        axes.set_ylim(0, 1.02)
        axes.set_title(plain(result.label), fontsize=11, color=colors[result.name], fontweight="bold")
        axes.set_xlabel("log10 of the truth ratio")
    panels[0].set_ylabel("share of forget rows below")
    return figure


def _log10(ratio: float) -> float:
    """log10, within what can be drawn: a ratio under- or overflows where a probability does."""
    return max(-12.0, min(12.0, math.log10(ratio))) if ratio > 0 else -12.0


def _cumulative(axes: Axes, ratios: Sequence[float], limits: tuple[float, float], color: str) -> None:
    """Steps of the cumulative share; `ratios` ascending."""
    x = [limits[0], *(_log10(ratio) for ratio in ratios), limits[1]]
    y = [*(number / len(ratios) for number in range(len(ratios) + 1)), 1.0]
    axes.step(x, y, where="post", color=color, linewidth=1.6)


def largest_distance(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Where two samples' cumulative shares differ most: the value, and the share of each up to it (both ascending)."""

    def shares(value: float) -> tuple[float, float]:
        return bisect_right(first, value) / len(first), bisect_right(second, value) / len(second)

    place = max(sorted({*first, *second}), key=lambda value: abs(shares(value)[0] - shares(value)[1]))
    return (place, *shares(place))


def _mark_distance(axes: Axes, result: Result, values: Sequence[float], target: Sequence[float]) -> None:
    place, share, goal = largest_distance(values, target)
    x = _log10(place)
    axes.plot([x, x], [share, goal], color=DISTANCE, linewidth=2.5, zorder=5)
    text = f"D = {abs(share - goal):.2f}"
    quality = result.reference.get("forget_quality")
    if quality is not None:
        text += f"\np = {p_value(quality)}"
    axes.text(0.97, 0.05, text, color=DISTANCE, fontsize=10, ha="right", va="bottom", transform=axes.transAxes)


# -- training ---------------------------------------------------------------------------------------------------------


def training_curves(results: Sequence[Result]) -> Figure | None:
    """Loss terms by step, one panel for each run; runs without a log (imported adapters) have none."""
    panels = _logged(results, "log.jsonl")
    if not panels:
        return None
    figure, grid = _panels(len(panels), "Training: every loss term should fall, the gate's towards 0", 3.1)
    for axes, (result, lines) in zip(grid, panels, strict=True):
        clean(axes)
        for term, color in TERMS.items():
            curve = [(line["step"], line[term]) for line in lines if isinstance(line.get(term), int | float)]
            if curve:
                axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.4, label=f"{term} term")
        axes.set_title(plain(result.label), fontsize=11)
        axes.set_xlabel("step")
    grid[0].set_ylabel("loss term")
    grid[0].legend(fontsize=9, frameon=False)
    return figure


def monitor_curves(results: Sequence[Result]) -> Figure | None:
    """What a run's looks at a few rows of each set saw, by step; None where no run was looked at."""
    panels = _logged(results, "monitor.jsonl")
    if not panels:
        return None
    metric, metric_name = main_metric(results)
    figure, grid = _panels(len(panels), "While training: forget should fall, all others stay", 3.1)
    for axes, (result, looks) in zip(grid, panels, strict=True):
        clean(axes)
        for one in evaluation_sets().values():
            seen = [(look["step"], look["sets"].get(one.name, {}).get(metric)) for look in looks]
            curve = [(step, value) for step, value in seen if value is not None]
            if curve:
                axes.plot(*zip(*curve, strict=True), color=one.color, marker="o", markersize=3, label=one.label)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(plain(result.label), fontsize=11)
        axes.set_xlabel("step")
    grid[0].set_ylabel(metric_name)
    grid[0].legend(fontsize=9, frameon=False)
    return figure


def _logged(results: Sequence[Result], file: str) -> list[tuple[Result, list[dict[str, Any]]]]:
    """Runs that have lines in one of their logs, with the lines."""
    runs = [(result, result.run / file) for result in results if result.run is not None]
    found = [(result, read_log(path)) for result, path in runs if path.is_file()]
    return [(result, lines) for result, lines in found if lines]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log.jsonl; RunError names a damaged line."""
    return [line for _, line in read_json_lines(path, Step)]
