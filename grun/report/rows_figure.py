"""A picture of numbers: a row for each model, a panel for each number; answers and knowledge are drawn so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grun.report.figures import GREY, clean, new_panels, plain
from grun.report.tables import Number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from grun.report.matrix import Row

COLORS = {"full": "#0072B2", "lora": "#009E73", "reft": "#E69F00", "grun": "#D55E00"}
"""Of parametrizations, Okabe and Ito's; one from elsewhere is purple."""
OTHER = "#CC79A7"
COMPARED = {"before": (GREY, "-"), "retain_only": ("#000000", "--")}
"""Color and line of the models to compare with, which go through all rows."""
SHARES = (-0.04, 1.04)


@dataclass(frozen=True)
class Panel:
    """A number of every row."""

    header: str
    good: str
    """Which way is good, as a column of a table says it."""
    numbers: Sequence[Number | None]
    """By row; an interval is drawn as a bar."""
    limits: tuple[float, float] = SHARES
    level: float | None = None
    """Where a dotted line stands."""


def rows_figure(rows: Sequence[Row], panels: Sequence[Panel]) -> Figure:
    """A marker for each number, objectives set apart; models to compare with are lines through all rows too."""
    size = 2.0 + 1.9 * len(panels), 1.1 + 0.3 * len(rows)
    figure, every = new_panels(*size, 1, len(panels), sharey=True)
    for axes, panel in zip(every, panels, strict=True):
        clean(axes, grid="x", xlim=panel.limits, ylim=(len(rows) - 0.5, -0.5))
        side = "left" if panel.good.startswith("low") else "right"
        axes.set_title(f"{panel.header.replace(' ', chr(10), 1)}\n(good is {side})", fontsize=10)
        if panel.level is not None:
            axes.axvline(panel.level, color=GREY, linewidth=1.2, linestyle=":", zorder=1)
        for place, (row, number) in enumerate(zip(rows, panel.numbers, strict=True)):
            if place and row.objective != rows[place - 1].objective:
                axes.axhline(place - 0.5, color="black", linewidth=0.6, zorder=1)
            if number is None:
                continue
            color, line = COMPARED.get(row.stage, (COLORS.get(row.parametrization, OTHER), ""))
            if line:
                axes.axvline(number.value, color=color, linewidth=1, linestyle=line, zorder=1)
            low, high = number.interval or (number.value, number.value)
            mark: dict[str, Any] = {"color": color, "fmt": "o", "markersize": 7, "clip_on": False}
            ends = [[max(0.0, number.value - low)], [max(0.0, high - number.value)]]
            axes.errorbar(number.value, place, xerr=ends if number.interval else None, **mark)
    every[0].set_yticks(range(len(rows)), [plain(row.label) for row in rows], fontsize=10)
    return figure
