"""Pictures of distributions and of training: gates, truth ratios, loss terms."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING

from grun.data.sets import evaluation_sets
from grun.evaluation.metrics import truth_ratios
from grun.report.figures import GREY, clean, colors_of, new_figure, plain, titled_panels
from grun.report.result import Result, after, before_of, main_metric, target_of
from grun.report.tables import p_value
from grun.runtime.reading import read_json_lines
from grun.runtime.records import Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TERMS = {"forget": "#D55E00", "retain": "#0072B2", "gate": "#009E73"}
BINS = 20
"""Of a gate's histogram, from 0 to 1."""
DISTANCE = "#C00000"


# -- gates ------------------------------------------------------------------------------------------------------------


def _histogram(axes: Axes, gates: Sequence[float], color: str) -> None:
    """Share of the prompts by gate."""
    clean(axes, xlim=(0, 1), ylim=(0, 1.05))
    shares = [0.0] * BINS
    for gate in gates:
        shares[min(int(gate * BINS), BINS - 1)] += 1 / len(gates)
    axes.stairs(shares, [number / BINS for number in range(BINS + 1)], fill=True, color=color)
    axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")


def gate_histograms(results: Sequence[Result]) -> Figure | None:
    """Histograms of the gate: for each run a row of its mean over blocks, and of several blocks a row each.

    A set is a column. None where no run has gates.
    """
    runs = [result for result in after(results) if "gate" in result.evaluation]
    sets = [one for one in evaluation_sets().values() if any(run.table.gates_of(one.name) for run in runs)]
    if not sets:
        return None
    rows: list[tuple[Result, int | None]] = []
    for run in runs:
        blocks = run.table.blocks()
        rows += [(run, None), *((run, block) for block in blocks if len(blocks) > 1)]
    figure = new_figure(max(5.5, 1.0 + 1.8 * len(sets)), 1.0 + 1.05 * len(rows))
    figure.suptitle("The gate should open (right) on forget, and stay shut (left) elsewhere", fontsize=12)
    grid = figure.subplots(len(rows), len(sets), sharex=True, sharey=True, squeeze=False)
    for row, (run, block) in enumerate(rows):
        what = "mean" if block is None else f"block {block}"
        grid[row, 0].set_ylabel(f"{plain(run.label)}\n{what}", fontsize=9)
        for axes, one in zip(grid[row], sets, strict=True):
            gates = [record.mean if block is None else record.gates[block] for record in run.table.gates_of(one.name)]
            _histogram(axes, gates, one.color)
            axes.set_yticks([0, 0.5, 1])
    for top, bottom, one in zip(grid[0], grid[-1], sets, strict=True):
        top.set_title(one.label, color=one.color, fontsize=11, fontweight="bold")
        bottom.set_xlabel("gate")
    figure.supylabel("share of the set's questions", fontsize=10)
    return figure


# -- truth ratios -----------------------------------------------------------------------------------------------------


def truth_ratio_curves(results: Sequence[Result]) -> Figure | None:
    """Cumulative shares of log10 of the truth ratio on forget, each model against its retain-only target.

    Where there is no target the taught model is drawn instead; None where no row has wrong answers.
    """
    ratios = {one.name: sorted(truth_ratios(one.table, "forget", quirks=one.quirks).values()) for one in results}
    shown = [result for result in results if ratios[result.name] and result.stage != "retain_only"]
    if not shown:
        return None
    aimed = any(target_of(result, results) for result in shown)
    other_line = "good is on the black line, retain only" if aimed else "gray: before"
    title = f"Truth ratios of forget rows (wrong answers / right one); {other_line}"
    figure, panels = titled_panels(len(shown), title, 3.0)
    colors = colors_of(results)
    finite = [_log10(ratio) for values in ratios.values() for ratio in values]
    low, high = min(finite) - 0.3, max(finite) + 0.3
    for axes, result in zip(panels, shown, strict=True):
        clean(axes, xlim=(low, high), ylim=(0, 1.02), xlabel="log10 of the truth ratio")
        other = target_of(result, results) or before_of(result, results)
        values = ratios[result.name]
        if other is not None and other is not result and ratios[other.name]:
            _cumulative(axes, ratios[other.name], (low, high), colors[other.name])
            if other.stage == "retain_only":
                _mark_distance(axes, result, values, ratios[other.name])
        _cumulative(axes, values, (low, high), colors[result.name])
        axes.set_title(plain(result.label), fontsize=11, color=colors[result.name], fontweight="bold")
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
    quality = result.reference.get("forget_quality")
    text = f"D = {abs(share - goal):.2f}" + ("" if quality is None else f"\np = {p_value(quality)}")
    axes.text(0.97, 0.05, text, color=DISTANCE, fontsize=10, ha="right", va="bottom", transform=axes.transAxes)


# -- training ---------------------------------------------------------------------------------------------------------


def training_curves(results: Sequence[Result]) -> Figure | None:
    """Loss terms by step, one panel for each run; runs without a log (imported adapters) have none."""
    curves = {f"{term} term": (color, (term,)) for term, color in TERMS.items()}
    title = "Training: every loss term should fall, the gate's towards 0"
    return _logged(results, "log.jsonl", title, "loss term", curves)


def monitor_curves(results: Sequence[Result]) -> Figure | None:
    """What a run's looks at a few rows of each set saw, by step; None where no run was looked at."""
    metric, label = main_metric(results)
    curves = {one.label: (one.color, ("sets", name, metric)) for name, one in evaluation_sets().items()}
    title = "While training: forget should fall, all others stay"
    return _logged(results, "monitor.jsonl", title, label, curves, marker="o", limits=(-0.03, 1.03))


def _logged(
    results: Sequence[Result],
    file: str,
    title: str,
    y_label: str,
    curves: Mapping[str, tuple[str, Sequence[str]]],
    *,
    marker: str = "",
    limits: tuple[float, float] | None = None,
) -> Figure | None:
    """A panel for each run that has lines in this log, a curve for each label that has numbers there.

    `curves` have a color, and the keys that lead to the height in a line of the log.
    """
    paths = [(result, result.run / file) for result in results if result.run is not None]
    found = [(one, [line for _, line in read_json_lines(path, Step)]) for one, path in paths if path.is_file()]
    logs = [(result, lines) for result, lines in found if lines]
    if not logs:
        return None
    figure, panels = titled_panels(len(logs), title, 3.1)
    for axes, (result, lines) in zip(panels, logs, strict=True):
        clean(axes, xlabel="step")
        if limits is not None:
            axes.set_ylim(*limits)
        for label, (color, keys) in curves.items():
            heights = [(line["step"], reduce(lambda found, key: (found or {}).get(key), keys, line)) for line in lines]
            curve = [(step, height) for step, height in heights if isinstance(height, int | float)]
            if curve:
                axes.plot(
                    *zip(*curve, strict=True), linewidth=1.4, marker=marker, markersize=3, color=color, label=label
                )
        axes.set_title(plain(result.label), fontsize=11)
    panels[0].set_ylabel(y_label)
    panels[0].legend(fontsize=9, frameon=False)
    return figure
